"""Files of prompts in, folders of answers out: runs that survive what ends them."""

from stars_kernels.data.datasets import load_prompts
from stars_kernels.data.prompts import BadLine, PromptLine, read_prompts
from stars_kernels.data.ray import StarsPredictor, run_file_ray
from stars_kernels.data.run import Summary, read_results, run_file

__all__ = [
    "BadLine",
    "PromptLine",
    "StarsPredictor",
    "Summary",
    "load_prompts",
    "read_prompts",
    "read_results",
    "run_file",
    "run_file_ray",
]
