"""The launches that `python -m bench roofline` goes by are those of the engine: equal, for each family."""

import pytest
import torch

from bench import counted, launches
from bench.launches import Launches, parts, seen


@pytest.mark.parametrize("family", launches.FAMILIES)
def test_the_constants_are_what_the_engine_launches(family):
    assert launches.counted(family) == {name: value for name, value in vars(counted).items() if name.isupper()}


def test_they_depend_on_no_number_of_prompts_or_attempts():
    assert seen("llama", 1, prompts=3, width=3) == seen("llama", 1)


def test_a_round_calls_each_op_as_often_as_the_roofline_says():
    found = parts(seen("llama", 2, segment=5))
    assert found["segment+forward"]["fork_attention"] == 4 * 2 and found["segment"]["segment_sample"] == 5
    assert found["last token"]["kv_commit"] == 1 and found["round"]["kv_commit"] == 2
    assert found["RM"]["reward_head"] == found["prefill RM"]["reward_head"] == 1


def test_an_op_that_is_not_in_the_table_is_an_error():
    with pytest.raises(ValueError, match="aten::sort is launched, expected an op of"), Launches():
        torch.zeros(3).sort()
    with pytest.raises(ValueError, match="index by a mask, expected numbers"), Launches():
        torch.zeros(3)[torch.zeros(3, dtype=torch.bool)]


def test_casts_count_and_views_do_not():
    with Launches() as count:
        torch.zeros(4).bfloat16().view(2, 2).t().contiguous()
    assert {op: n for (_, op), n in count.seen.items()} == {"zeros": 1, "_to_copy": 1, "clone": 1}
