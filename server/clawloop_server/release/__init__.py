"""From a candidate to a signed adapter: gate, keys, registry."""
