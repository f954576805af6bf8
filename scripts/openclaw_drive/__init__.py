"""Drives the real OpenClaw through a real edge and checks what the edge kept. For developers; not packaged."""
