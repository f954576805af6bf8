"""What may leave this device, what will, and what did. Knows no network: the node asks it, and it never pushes."""
