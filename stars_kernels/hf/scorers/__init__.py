"""Reward models as Scorers, a file for each kind."""

from stars_kernels.hf.scorers.classifier import ClassifierScorer
from stars_kernels.hf.scorers.function import CallableScorer, RewardFunction

__all__ = ["CallableScorer", "ClassifierScorer", "RewardFunction"]
