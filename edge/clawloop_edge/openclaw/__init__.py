"""OpenClaw's side of the edge: its configuration, changed only as shown, and the plugin that it loads."""
