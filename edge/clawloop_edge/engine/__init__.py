"""The model behind one interface: a prompt's ids in, sampled ids with their logprobs out."""
