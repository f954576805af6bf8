"""Which conversation, which turn and which line a model call belongs to. Pure, but for the memory of recent steps."""
