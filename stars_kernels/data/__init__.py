"""Files of prompts in, folders of answers out: runs that survive what ends them."""

from stars_kernels.data.prompts import BadRow, PromptRow, read_prompts
from stars_kernels.data.run import Summary, run_file

__all__ = ["BadRow", "PromptRow", "Summary", "read_prompts", "run_file"]
