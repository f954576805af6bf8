"""Flower: the SuperLink and its children, and the bridge that carries messages."""
