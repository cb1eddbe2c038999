"""Decoding rules compared: the same prompts under each rule, judged against plain sampling, with intervals."""

from stars_kernels.evaluation.comparison import Comparison, compare
from stars_kernels.evaluation.endpoint import EndpointJudge
from stars_kernels.evaluation.figures import Figures
from stars_kernels.evaluation.judges import FunctionJudge, JudgeError, RewardJudge
from stars_kernels.evaluation.statistics import Estimate

__all__ = [
    "Comparison",
    "EndpointJudge",
    "Estimate",
    "Figures",
    "FunctionJudge",
    "JudgeError",
    "RewardJudge",
    "compare",
]
