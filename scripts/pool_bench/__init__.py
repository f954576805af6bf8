"""`scripts/bench-pool`: the pool beside plain SQLite, on a session as OpenClaw has it, and at a million steps."""
