"""Which conversation, run and branch a call belongs to; sampled ids spliced back into its history."""
