"""The reward model's side of a round: it gives every candidate a reward.

`reward_model.py` has what a user may pass, `rewarder.py` tells its kinds apart, and each kind has a scorer in a file of
its own.
"""
