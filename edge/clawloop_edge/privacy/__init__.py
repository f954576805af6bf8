"""What may leave: consent, the outbox that shows it byte for byte, the audit log."""
