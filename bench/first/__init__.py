"""first: what a first session on a GPU must tell, in minutes: rates, kernels, launches and rounds beside the roofline.

`python -m bench first --device cuda` writes `first.json` and `first.md`. Nothing is timed before its result has been
checked against the definition, and what fails or is left out is told by name.
"""

from bench.first.command import add_arguments, run

__all__ = ["add_arguments", "run"]
