"""The view: a copy of a model's modules on the user's weights, on which attention is set and layers are swapped."""

from __future__ import annotations

import copy
import itertools
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from stars_kernels.hf.view.attention import ATTENTION
from stars_kernels.hf.view.layout import has_hook
from stars_kernels.hf.view.rewrites import rewrite
from stars_kernels.hf.view.rewrites.rope import keep_phases_exact
from stars_kernels.versions import rope_by_matmul

PLAIN = ("__new__", "__reduce__", "__reduce_ex__", "__getstate__")
"""What a class overrides whose modules are not copied by their __dict__."""
HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith("_hooks"))
"""Where torch keeps a module's hooks."""

Model = TypeVar("Model", bound=nn.Module)


def view_of(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model's view: an `eval_copy` with our attention, or with its own where its class has no attention hook."""
    view = eval_copy(model)
    if has_hook(view):
        for part in view.modules():  # transformers 5.17 leaves out inner models whose config is of the outer's class
            if isinstance(part, PreTrainedModel) and type(part.config) is type(view.config):
                part.set_attn_implementation(ATTENTION)
    rewrite(view)
    return view


def eval_copy(model: Model) -> Model:
    """Copy `model` in eval mode: every parameter and buffer is shared, the config and the modules are the copy's own.

    The user's model is left alone, so other threads may go on using it: what a forward may write on a module, such as
    a list or a dict, is the copy's own. What cannot be copied (a lock, an open file, a generator) is shared, and so is
    an object that holds such a thing. Hooks are the user's: they are called with the copy's module, and one that is a
    bound method runs on the object it was bound to, be it `model` itself.
    """
    memo: dict[int, Any] = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    # Empty modules first: the copying of what one holds then ends at the next, and fails for no fault of another.
    modules = [module for module in model.modules() if not _copies_itself(type(module))]
    for module in modules:
        memo[id(module)] = type(module).__new__(type(module))
    for module in modules:
        state = {
            name: copy.copy(value) if name in HOOKS else _copied(value, memo)
            for name, value in module.__getstate__().items()
        }
        memo[id(module)].__setstate__(state)
    twin: Model = _copied(model, memo)
    if isinstance(twin, PreTrainedModel) and rope_by_matmul():
        keep_phases_exact(twin)
    return twin.eval()


def _copies_itself(kind: type[nn.Module]) -> bool:
    """Say whether modules of a class are more than a dict of their state, as TorchScript's are."""
    own = any(getattr(kind, name) is not getattr(nn.Module, name) for name in PLAIN)
    return own or hasattr(kind, "__deepcopy__")


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Copy deeply, but share what cannot be copied; of a list or a dict, share only those parts that cannot."""
    known = len(memo)
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:  # whatever the things that a model holds raise
        if isinstance(value, nn.Module):  # shared, it would be the user's that the view's layers are swapped on
            raise ValueError(f"a module {type(value).__name__} cannot be copied for its view: {error}") from error
    while len(memo) > known:  # half-made copies
        memo.popitem()
    if not isinstance(value, dict | list | PreTrainedConfig):
        return value
    parts = memo[id(value)] = copy.copy(value)
    if isinstance(value, PreTrainedConfig):  # never shared: the view's has our attention written on it
        vars(parts).update({name: _copied(part, memo) for name, part in vars(value).items()})
        return parts
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        parts[key] = _copied(part, memo)
    return parts
