"""Weights edited in place between two calls: the second gives what a fresh copy of the models gives, to the bit."""

import copy
import ctypes
import itertools

import pytest
import torch

import stars_kernels
from tests.tiny import tiny_language_model, tiny_reward_model

SET = dict(
    seed=0, reward_threshold=1.0, beta=1.0, max_new_tokens=8, segment_size=4, max_attempts=4, width=2, request_ids=[1]
)
WIDE = dict(hidden_size=96, intermediate_size=160, num_attention_heads=12, num_key_value_heads=12)
NAMES = ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
"""Of a layer's packed weights; the edits take them in turn."""


def data(weight):
    return weight.data


def under_no_grad(edit):
    def run(weight, g):
        with torch.no_grad():
            edit(weight, g)

    return run


def assign(change):
    """Write what `change` makes of the weight over it, through `.data`."""
    return lambda weight, g: data(weight).copy_(change(data(weight).clone(), g))


def through_numpy(change):
    def run(weight, g):
        array = weight.detach().numpy()
        array[...] = change(array.copy())

    return run


def negate_column(w, g):
    w[:, 1] *= -1
    return w


def swap(w, first, second):
    w[[first, second]] = w[[second, first]]
    return w


def swap_within_a_word(w, g):
    """Two neighbours that share 8 bytes."""
    w[0, [0, 1]] = w[0, [1, 0]]
    return w


def cancel(w, g):
    """Two changes whose sum, as integers, is nothing."""
    bits = w.view(torch.int32)
    bits[0, 0] += 1 << 21
    bits[0, 2] -= 1 << 21
    return w


def in_inference_mode(weight, g):
    with torch.inference_mode():
        weight.mul_(1.5)


def by_an_optimizer(weight, g):
    weight.grad = torch.randn(weight.shape, generator=g)
    torch.optim.SGD([weight], lr=0.5).step()
    weight.grad = None


def by_ctypes(weight, g):
    rows = weight.detach().roll(3, 0).contiguous()
    ctypes.memmove(weight.data_ptr(), rows.data_ptr(), rows.nbytes)


def by_its_storage(weight, g):
    weight.untyped_storage().copy_(weight.detach().flip(1).contiguous().untyped_storage())


def with_other_data(weight, g):
    weight.data = torch.randn(weight.shape, generator=g) * 0.3


def with_the_same_bytes_elsewhere_then_edited(weight, g):
    weight.data = weight.data.clone()
    weight.data[0].neg_()


def into_a_flat_vector(weight, g):
    flat = torch.nn.utils.parameters_to_vector([weight]).detach()
    torch.nn.utils.vector_to_parameters(torch.cat([flat[:1], flat.flip(0)])[1:], [weight])


def by_a_second_view(weight, g):
    view = weight.detach().t()
    view.copy_(view.roll(5, 1))


EDITS = {
    "rows flipped": assign(lambda w, g: w.flip(0)),
    "columns flipped": assign(lambda w, g: w.flip(1)),
    "rows rolled": assign(lambda w, g: w.roll(1, 0)),
    "columns rolled": assign(lambda w, g: w.roll(2, 1)),
    "rows shuffled": assign(lambda w, g: w[torch.randperm(len(w), generator=g)]),
    "columns shuffled": assign(lambda w, g: w[:, torch.randperm(w.shape[1], generator=g)]),
    "all shuffled": assign(lambda w, g: w.flatten()[torch.randperm(w.numel(), generator=g)].view_as(w)),
    "rows sorted": assign(lambda w, g: w.sort(0).values),
    "columns sorted": assign(lambda w, g: w.sort(1).values),
    "two rows swapped": assign(lambda w, g: swap(w, 0, 7)),
    "neighbours swapped": assign(lambda w, g: swap(w, 4, 5)),
    "two words swapped": assign(swap_within_a_word),
    "a column negated": assign(negate_column),
    "two changes that cancel": assign(cancel),
    "negated": assign(lambda w, g: -w),
    "scaled": assign(lambda w, g: w * 1.25),
    "one element": lambda weight, g: data(weight).view(-1).__setitem__(17, 3.0),
    "the last element": lambda weight, g: data(weight).view(-1).__setitem__(-1, -3.0),
    "zeroed": lambda weight, g: data(weight).zero_(),
    "noise added": under_no_grad(lambda weight, g: weight.add_(torch.randn(weight.shape, generator=g) * 0.3)),
    "written in slices": under_no_grad(lambda weight, g: weight[2:5].mul_(-2)),
    "index_copy_": under_no_grad(lambda weight, g: weight.index_copy_(0, torch.tensor([3]), weight[4:5].clone())),
    "numpy, reversed": through_numpy(lambda a: a[::-1]),
    "numpy, scaled": through_numpy(lambda a: a * 0.5),
    "inference mode": in_inference_mode,
    "an optimizer": by_an_optimizer,
    "ctypes": by_ctypes,
    "its storage": by_its_storage,
    "other data": with_other_data,
    "moved and edited": with_the_same_bytes_elsewhere_then_edited,
    "a flat vector, odd offset": into_a_flat_vector,
    "a second view": by_a_second_view,
}


@pytest.mark.parametrize("whose", ["language model", "reward model"])
def test_edits_in_30_ways_between_two_calls(whose):
    """The language model's likelihood is its own reward: a change shows in it where it tips no token."""
    assert len(EDITS) >= 30
    if stars_kernels.backends()["packed_linear"]["cpu"] != "cpp":
        pytest.skip("needs the compiled extension: nothing is packed without it")
    likelihood = whose == "language model"
    make = tiny_language_model if likelihood else tiny_reward_model
    lm, original = tiny_language_model(torch.float32, **WIDE), make(torch.float32, **WIDE)

    def outcome(model):
        models = (model, stars_kernels.Likelihood(model)) if likelihood else (lm, model)
        (output,) = stars_kernels.decode(*models, [[1, 2, 3]], **SET)
        return output.token_ids, output.reward, [segment.rewards for segment in output.segments]

    generator, places, stale = torch.Generator().manual_seed(0), itertools.cycle(NAMES), []
    for name, edit in EDITS.items():
        model = copy.deepcopy(original)
        before = outcome(model)
        edited = model.base_model.layers[1].get_submodule(next(places)).weight
        was = edited.detach().clone()
        edit(edited, generator)
        assert not torch.equal(edited.detach(), was), f"{name} is no edit"
        fresh = outcome(copy.deepcopy(model))
        assert fresh != before, f"{name} changes nothing that could be seen"
        if outcome(model) != fresh:
            stale.append(name)
    assert not stale
