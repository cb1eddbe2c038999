"""A run of any proposer and scorer, with the settings of a config."""

from stars_kernels.decoder.round import Round
from stars_kernels.decoder.scheduler import Run


def run_of(proposer, scorer, config, answers, eos=()):
    """A `Run` by the rule, the sampling and the width of a config, with r* and beta."""
    return Run(Round(proposer, scorer, config.resolved_rule, config.sampling, answers, eos), config.width, config.wave)
