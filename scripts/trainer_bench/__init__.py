"""The trainer's bench: its step beside TRL's, with and without sharing, its memory, and its use of a GPU."""
