"""The Flower node inside the edge: a fixed set of messages over one transport interface."""
