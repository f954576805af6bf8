"""What devices sent, encrypted a device at a time, with its lineage."""
