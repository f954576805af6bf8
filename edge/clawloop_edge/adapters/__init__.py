"""An adapter's way in: verify, convert, probe, swap, keep, roll back."""
