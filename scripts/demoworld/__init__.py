"""The demo world: a small task that only a reward can teach, and the small model that starts out not knowing it."""
