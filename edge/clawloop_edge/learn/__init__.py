"""Learning at home: what leaves at `deltas` and `private-deltas` is made here, from what stays here."""
