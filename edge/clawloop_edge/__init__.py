"""The edge: what runs on the owner's Mac, between the agent and the model.

A step walks forward: gateway → sessions → engine → recorder → pool → outbox → node; an adapter walks back:
node → adapters → engine.
"""
