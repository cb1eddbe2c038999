"""The copy of a model that the engine works on: modules of its own; the user's tensors, hooks, and locks."""

import copy
import functools
import threading

import pytest
import torch
from torch import nn

import stars_kernels
from stars_kernels.hf.view.copying import eval_copy, view_of
from tests.tiny import tiny_language_model

SET = dict(seed=0, reward_threshold=1.0, beta=1.0, max_new_tokens=8, segment_size=4)


class Owner:
    """What a hook may be bound to."""

    def __init__(self):
        self.seen = []

    def look(self, module, *_):
        self.seen.append(module)


@pytest.mark.parametrize("bind", [lambda owner: owner.look, lambda owner: functools.partial(Owner.look, owner)])
def test_a_hook_runs_on_the_users_object(rm, bind):
    model, owner = tiny_language_model(), Owner()
    layer = model.model.layers[0]
    layer.register_forward_hook(bind(owner))
    model.model.norm.register_forward_pre_hook(bind(owner))
    stars_kernels.decode(model, rm, [1, 2], **SET)
    assert {type(module) for module in owner.seen} == {type(layer), type(model.model.norm)}
    assert layer not in owner.seen, "it is called with the view's module"


def test_a_hook_that_a_module_of_the_model_owns_runs_on_that_module(rm):
    """As any other bound method: on what it was bound to when it was registered, the user's module."""
    model = tiny_language_model()
    layer = model.model.layers[0]
    layer.calls = 0

    def count(self, *_):
        self.calls += 1

    layer.register_forward_hook(count.__get__(layer))
    stars_kernels.decode(model, rm, [1, 2], **SET)
    assert layer.calls > 0


def test_what_cannot_be_copied_is_shared(tmp_path, rm):
    model = tiny_language_model()
    expected = stars_kernels.decode(model, rm, [1, 2], **SET).token_ids
    with open(tmp_path / "log", "w") as log:
        model.lock, model.model.log, model.model.layers[0].numbers = threading.Lock(), log, (i for i in range(3))
        model.state = {"lock": model.lock, "calls": [0], "body": model.model, "steps": [log, []]}
        model.guarded = Owner()
        model.guarded.lock, model.guarded.part = model.lock, Owner()
        model.part = model.guarded.part
        view = eval_copy(model)
        assert stars_kernels.decode(model, rm, [1, 2], **SET).token_ids == expected
    assert view.lock is model.lock and view.model.log is log
    assert view.model.layers[0].numbers is model.model.layers[0].numbers
    assert view.state["lock"] is model.lock and view.state["body"] is view.model and view.state["steps"][0] is log
    for mine, users in [(view.state, model.state), (view.state["steps"][1], model.state["steps"][1])]:
        assert mine is not users
    assert view.state["calls"] == [0] and view.state["calls"] is not model.state["calls"]
    assert view.guarded is model.guarded, "an object that holds such a thing is shared as a whole"
    assert view.part is not model.part and view.part.seen == [], "and leaves no half-made copies behind"


def test_lists_and_dicts_that_a_forward_writes_are_the_copys_own():
    head = nn.Sequential(nn.Linear(4, 1))
    head.lock, head.seen, head.others = threading.Lock(), [], [head[0]]
    copy = eval_copy(head)
    copy.seen.append(1)
    assert head.seen == [] and copy.others[0] is copy[0] and copy[0].weight is head[0].weight
    assert head.training and not copy.training


def test_a_method_set_on_a_module_follows_it_to_the_copy():
    """As accelerate's wrapped forwards do."""
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].lock, model[0].forward = threading.Lock(), functools.partial(nn.Linear.forward, model[0])
    copy = eval_copy(model)
    assert copy[0].forward.args == (copy[0],)


def test_a_tensor_with_a_graph_is_no_obstacle():
    """torch.nn.utils.weight_norm leaves one on the module, which torch refuses to deep-copy."""
    layer = nn.utils.weight_norm(nn.Linear(4, 4))
    x = torch.randn(2, 4)
    torch.testing.assert_close(eval_copy(nn.Sequential(layer))(x), layer(x))


class Stubborn(nn.Linear):
    def __deepcopy__(self, memo):
        raise TypeError("not this one")


def test_a_module_that_refuses_to_be_copied_is_named():
    with pytest.raises(ValueError, match="a module Stubborn cannot be copied for its view: not this one"):
        eval_copy(nn.Sequential(Stubborn(2, 2)))


def test_a_config_is_the_views_own_also_where_a_part_of_it_cannot_be_copied(rm):
    model, reward = tiny_language_model(), copy.deepcopy(rm)
    ids = torch.tensor([[1, 2, 3]])
    expected = stars_kernels.decode(model, reward, [1, 2], **SET).token_ids
    logits = model(ids).logits
    for config in (model.config, reward.config):
        config.lock, config.deep = threading.Lock(), {"lock": threading.Lock()}
    assert stars_kernels.decode(model, reward, [1, 2], **SET).token_ids == expected
    assert model.config._attn_implementation == "sdpa" and torch.equal(model(ids).logits, logits)
    assert view_of(model).config.lock is model.config.lock


class Stated(nn.Linear):
    def __getstate__(self):
        return (self.__dict__, None)

    def __setstate__(self, state):
        self.__dict__.update(state[0])


class Made(nn.Linear):
    def __new__(cls, inputs, outputs):
        return super().__new__(cls)

    def __getnewargs__(self):
        return self.in_features, self.out_features


@pytest.mark.parametrize("kind", [Stated, Made])
def test_a_module_that_is_more_than_its_dict(kind):
    body = nn.Sequential(kind(4, 4), nn.Linear(4, 2))
    twin = eval_copy(body)
    assert type(twin[0]) is kind and twin[0] is not body[0] and twin[0].weight is body[0].weight
    x = torch.randn(3, 4)
    assert torch.equal(twin(x), body(x))
