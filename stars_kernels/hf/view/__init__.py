"""A copy of a model's modules on the user's own weights, so that the model itself is never changed.

Attention is set and layers are swapped on this copy, the view; `layout.py` finds out what a model keeps of its past.
"""
