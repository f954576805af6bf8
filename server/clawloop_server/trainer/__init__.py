"""The RL update: rows, packing, advantages, losses, one engine."""
