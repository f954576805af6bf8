"""The encrypted database of everything kept on this device."""
