"""What the gateway adds to a fixed upstream server, beside an honest relay and LiteLLM, in one run."""
