"""A doorway for Flower; the code is in clawloop_server.fleet.bridge."""
