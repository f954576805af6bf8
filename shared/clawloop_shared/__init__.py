"""What the edge and the server must agree on: records, wire format, manifests, signatures.

Knows no torch, no mlx, no flwr and no socket; imports neither side.
"""
