"""The engine on models of transformers: it loads them, and makes a proposer of one and a scorer of the other.

`decoder/` and `ops/` know nothing of transformers.
"""
