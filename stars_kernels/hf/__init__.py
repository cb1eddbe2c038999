"""The one door to transformers: models, cache and attention hook, proposer, scorers."""
