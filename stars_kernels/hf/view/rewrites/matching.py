"""How a module is known: by the code of its forward, and by having no hooks; never by its name."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeGuard, TypeVar

from torch import nn

Kind = TypeVar("Kind", bound=nn.Module)


def is_plain(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Say whether `module` is a `kind` that does what its class says and nothing else."""
    return type(module) is kind and "forward" not in vars(module) and not has_hooks(module)


def works_as(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Say whether `module`, of any class, does what a `kind` does: transformers writes one class per family."""
    own: type[nn.Module] = type(module)
    return _code(own) == _code(kind) and is_plain(module, own)  # type: ignore[arg-type]


@cache
def _code(kind: type[nn.Module]) -> tuple[Any, ...]:
    """Return what a class's forward does: the same for two classes with the same lines of code."""
    code = getattr(kind.forward, "__code__", None)
    if code is None or code.co_freevars:  # wrapped: what is inside does not show
        return (kind,)
    known = [kind.forward.__globals__.get(name) for name in code.co_names]  # the same name may mean another function
    return code.co_code, code.co_names, code.co_consts, code.co_varnames, known


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
