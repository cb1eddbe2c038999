"""torch's modes (inference mode, gradients, autocast): the engine has its own, the user's functions the caller's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch

from stars_kernels import ops

Result = TypeVar("Result")
Anything = TypeVar("Anything")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Leave the caller's `torch.autocast` in this block: a model is decoded in its own dtype."""
    with ExitStack() as stack:
        for device in ops.DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def resumed_in(
    events: Generator[Result, None, None], enter: Callable[[], AbstractContextManager[object]]
) -> Generator[Result, None, None]:
    """Run `events` inside of a context that is entered anew for each; at every yield the consumer is outside of it.

    Where it cannot be entered, `events` ends with the error.
    """
    thrown: BaseException | None = None
    while True:
        try:
            with ExitStack() as stack:
                try:
                    stack.enter_context(enter())
                except BaseException as error:  # Ctrl-C too, while another thread is waited for
                    thrown = thrown or error
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

    @property
    def key(self) -> object:
        """Equal for equal modes."""
        return self._inference, self._gradients, tuple(self._autocast.items())

    def bound(self, function: Anything) -> Anything:
        """Return what runs in these modes; what is no function comes back as it is."""
        if not callable(function):
            return function

        @functools.wraps(function, updated=())
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.active():
                return function(*args, **kwargs)

        return cast(Anything, call)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Be in these modes again inside this block. Tensors that inference mode made before never get gradients."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._gradients))
            for device, dtype in self._autocast.items():
                stack.enter_context(torch.autocast(device, dtype))
            yield
