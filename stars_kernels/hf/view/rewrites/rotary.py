"""Attention modules that leave it to the cache to turn queries and keys by their positions (RoPE) as it stores them.

A module is known by its forward, which calls a function `apply_rotary_pos_emb` with the code of Llama's. On a view it
gets a copy of that forward in which the name means `_asking_the_cache`; nothing else of it changes, be it a norm of
queries or a bias. Whether the cache may then turn them itself is found by a forward (`hf.view.layout`): where what the
function returns are the very tensors that the module attends with.
"""

from __future__ import annotations

import functools
import inspect
from types import CellType, FunctionType
from typing import Any, TypeGuard, cast

from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from stars_kernels.hf.view.attention import Rotation, current_cache
from stars_kernels.hf.view.rewrites.matching import is_plain

TESTED = "transformers.models."
"""Where the modules come from whose families the tests compare with the plain model: what a forward may do with queries
and keys besides attending, none of this sees."""
ROTATE, HALF = "apply_rotary_pos_emb", "rotate_half"


def turn_where_stored(view: nn.Module) -> int:
    """Let the cache turn the queries and keys of a private copy's attention modules; return how many there are."""
    found = [module for module in view.modules() if _is_rotary(module)]
    for module in found:
        module.__class__ = _turning_later(type(module))  # type: ignore[arg-type]  # a class is hashable
    return len(found)


def _is_rotary(module: nn.Module) -> TypeGuard[nn.Module]:
    forward: Any = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    if (
        not type(module).__module__.startswith(TESTED)
        or code is None
        or code.co_freevars
        or ROTATE not in code.co_names
        or not is_plain(module, type(module))
    ):
        return False
    return _is_llamas(forward.__globals__.get(ROTATE))


def _is_llamas(function: Any) -> bool:
    """Say whether a function does what Llama's apply_rotary_pos_emb does."""
    own, known = function, cast(FunctionType, modeling_llama.apply_rotary_pos_emb)
    if not isinstance(own, FunctionType) or _code(own) != _code(known) or own.__defaults__ != known.__defaults__:
        return False
    half = own.__globals__.get(HALF)
    return isinstance(half, FunctionType) and _code(half) == _code(cast(FunctionType, modeling_llama.rotate_half))


def _code(function: FunctionType) -> tuple[Any, ...]:
    """Return what a function does, its documentation apart."""
    code = function.__code__
    constants = code.co_consts[1:] if function.__doc__ and code.co_consts[:1] == (function.__doc__,) else code.co_consts
    return code.co_code, code.co_names, constants, code.co_varnames, code.co_freevars


@functools.cache
def _turning_later(kind: type[nn.Module]) -> type[nn.Module]:
    own: Any = kind.forward
    return type(kind.__name__, (kind,), {"forward": _turning(own), "__module__": kind.__module__})


def _turning(own: Any) -> FunctionType:
    """Copy a forward, in which ROTATE asks the cache; of a decorated one, as transformers 5.24 has them, all of it."""
    names, closure, inner = own.__globals__, own.__closure__, getattr(own, "__wrapped__", None)
    attributes = dict(vars(own))
    if inner is None:
        names = {**names, ROTATE: _asking_the_cache(names[ROTATE])}
    else:
        attributes["__wrapped__"] = _turning(inner)
        inside = CellType(attributes["__wrapped__"])
        closure = tuple(inside if cell.cell_contents is inner else cell for cell in closure)
    copy = FunctionType(own.__code__, names, own.__name__, own.__defaults__, closure)
    copy.__kwdefaults__ = own.__kwdefaults__
    vars(copy).update(attributes)
    return copy


def _asking_the_cache(function: Any) -> Any:
    @functools.wraps(function)
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        cache = current_cache()
        if cache is None or args or kwargs:
            turned: tuple[Tensor, Tensor] = function(q, k, cos, sin, *args, **kwargs)
            return turned
        return cache.turn(Rotation(q, k, cos, sin), function)

    return rotate
