"""A run of any proposer and scorer, with the settings of a config, and either of them with prompts alone."""

from stars_kernels.decoder.protocols import Room, admissions
from stars_kernels.decoder.round import Round
from stars_kernels.decoder.scheduler import Run


def run_of(proposer, scorer, config, answers, eos=()):
    """A `Run` by the settings of a config with r* and beta; all answers have a slot at once where these do not say."""
    slots = len(answers) if config.batch_size == "auto" else config.batch_size
    played = Round(proposer, scorer, config.resolved_rule, config.sampling, eos)
    return Run(played, answers, slots, config.width, config.wave)


def admit(side, prompts, answer, segment):
    """Let a proposer or a scorer read prompts that may grow by `answer` tokens; returns what it says to that."""
    side.reserve(Room(len(prompts), sum(map(len, prompts)) + answer * len(prompts), answer, segment))
    return side.admit(admissions(prompts, answer))
