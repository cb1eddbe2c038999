"""Reward models as Scorers, a file for each kind."""

from stars_kernels.hf.scoring.scorers.chunks import Chunks
from stars_kernels.hf.scoring.scorers.classifier import ClassifierScorer
from stars_kernels.hf.scoring.scorers.encoder import EncoderScorer
from stars_kernels.hf.scoring.scorers.function import CallableScorer, RewardFunction
from stars_kernels.hf.scoring.scorers.likelihood import LikelihoodScorer, likelihood_chunks
from stars_kernels.hf.scoring.scorers.own_head import OwnHeadScorer, head_rewards
from stars_kernels.hf.scoring.scorers.process import REDUCE, ProcessScorer, Reduce
from stars_kernels.hf.scoring.scorers.text import TextClassifierScorer
from stars_kernels.hf.scoring.scorers.total import SumScorer

__all__ = [
    "REDUCE",
    "CallableScorer",
    "Chunks",
    "ClassifierScorer",
    "EncoderScorer",
    "LikelihoodScorer",
    "OwnHeadScorer",
    "ProcessScorer",
    "Reduce",
    "RewardFunction",
    "SumScorer",
    "TextClassifierScorer",
    "head_rewards",
    "likelihood_chunks",
]
