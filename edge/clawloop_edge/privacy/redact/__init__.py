"""Finding what must not leave: secrets and personal data, by shape, by context, and by what this machine knows."""
