"""The language model's side of a round: it samples a candidate for every row from the stored prefixes.

The user's logits processors and stopping criteria are asked here, and on a GPU each step becomes a CUDA graph.
"""
