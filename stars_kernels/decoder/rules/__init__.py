"""Decoding rules: how the attempts at a segment come to be, and which of them is taken.

A rule sees host numbers alone, no tensor and no model. `decoder/sequential.py` is the definition of decoding by a rule;
the engine decodes many attempts and prompts at once and gives the same answers.
"""

from stars_kernels.decoder.rules.args import Args
from stars_kernels.decoder.rules.best_of import BestOf, BlockBestOf, Plain
from stars_kernels.decoder.rules.cards import Cards
from stars_kernels.decoder.rules.rule import AnswerSoFar, Candidate, Draw, Plan, Rule, Verdict, best
from stars_kernels.decoder.rules.speculative_rejection import SpeculativeRejection
from stars_kernels.decoder.rules.stars import Stars

RULES = (Args, BestOf, BlockBestOf, Cards, Plain, SpeculativeRejection, Stars)
"""All of this package."""

__all__ = [
    "RULES",
    "AnswerSoFar",
    "Args",
    "BestOf",
    "BlockBestOf",
    "Candidate",
    "Cards",
    "Draw",
    "Plain",
    "Plan",
    "Rule",
    "SpeculativeRejection",
    "Stars",
    "Verdict",
    "best",
]
