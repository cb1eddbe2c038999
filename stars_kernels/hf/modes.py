"""torch's modes (inference mode, gradients, autocast): the engine has its own, the user's functions the caller's."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch

from stars_kernels import ops

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Leave the caller's `torch.autocast` in this block: a model is decoded in its own dtype."""
    with ExitStack() as stack:
        for device in ops.DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def run_without_autocast(events: Generator[Result, None, None]) -> Generator[Result, None, None]:
    """Run `events` without autocast; at every yield the consumer is in its own mode."""
    thrown: BaseException | None = None
    while True:
        try:
            with without_autocast():
                event = next(events) if thrown is None else events.throw(thrown)
        except StopIteration:
            return
        finally:
            thrown = None  # its frames hold this one
        try:
            yield event
        except BaseException as error:  # the consumer's, for `events` to deal with, as where it closes them
            thrown = error


class CallersMode:
    """The modes of the thread that makes this: inference mode, gradients and autocast."""

    def __init__(self) -> None:
        self._inference, self._gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self._autocast = {d: torch.get_autocast_dtype(d) for d in ops.DEVICES if torch.is_autocast_enabled(d)}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Be in these modes again inside this block. Tensors that inference mode made before never get gradients."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._gradients))
            for device, dtype in self._autocast.items():
                stack.enter_context(torch.autocast(device, dtype))
            yield


def in_callers_mode(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Wrap `function` so that every call of it runs in the modes of here and now."""
    mode = CallersMode()

    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with mode.active():
            return function(*args, **kwargs)

    return call
