"""Signals: what was good, told by what happened. One file a scorer; the worker runs them in the background."""
