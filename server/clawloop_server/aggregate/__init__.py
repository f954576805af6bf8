"""Joining what devices learned at home, and what the server learned itself, into one adapter."""
