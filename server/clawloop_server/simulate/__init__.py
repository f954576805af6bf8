"""Many devices that are not there, on real connections, to measure a server with. Nothing else imports this room."""
