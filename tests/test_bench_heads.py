"""The benchmark's real rewards: an engine that gave others would be found, and what cannot be timed is refused."""

import pytest
from torch import nn

from bench import __main__ as bench
from bench import decode, heads
from bench.report import CheckError
from demo.naive import naive_decode
from stars_kernels import RewardModel, StarsConfig
from stars_kernels.decoder.rules import Args, Cards, SpeculativeRejection


def test_the_check_passes_and_finds_a_wrong_reward(monkeypatch):
    heads.check_exact("tiny")
    monkeypatch.setattr(heads, "RewardModel", lambda head: RewardModel(shifted(head)))
    with pytest.raises(CheckError, match="own head"):
        heads.check_exact("tiny")


def shifted(head):
    """The head that says 0.01 more."""
    other = nn.Linear(head.in_features, 1, dtype=head.weight.dtype)
    other.load_state_dict({"weight": head.weight, "bias": head.bias + 0.01})
    return other


def test_real_rewards_are_for_the_cpu():
    _, _, args = bench.parse(["decode", "--rewards", "real", "--device", "cuda"])
    with pytest.raises(SystemExit, match="only scripted rewards are timed"):
        decode.run(args)


def test_the_naive_loop_refuses_what_it_would_decode_otherwise():
    setup = heads.load("tiny", 1)
    for given, named in (
        ({"stop_strings": "."}, "stop strings"),
        ({"rule": Args()}, "Args"),
        ({"rule": Cards()}, "Cards"),
        ({"rule": SpeculativeRejection(4)}, "SpeculativeRejection"),
    ):
        with pytest.raises(ValueError, match=f"knows no {named}"):
            naive_decode(setup.model, lambda ids: 0.0, setup.prompts[0], StarsConfig(**given), key=1)
