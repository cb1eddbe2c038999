"""What goes wrong, and what survives it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stars_kernels.decoder.output import StarsOutput


class StarsError(RuntimeError):
    """Some prompts of a list failed; the others are done.

    results: one entry a prompt, its StarsOutput or the exception that ended it. errors: {prompt index: exception}.
    """

    def __init__(self, results: list[StarsOutput | Exception]) -> None:
        self.results = results
        self.errors = {i: r for i, r in enumerate(results) if isinstance(r, Exception)}
        listed = "\n".join(f"  {error}" for error in self.errors.values())  # each names its prompt
        super().__init__(
            f"{len(self.errors)} of {len(results)} prompts failed; .results has one entry a prompt:\n{listed}"
        )

    def __reduce__(self) -> tuple[type[StarsError], tuple[list[StarsOutput | Exception]]]:
        return type(self), (self.results,)  # not the message, as an exception is pickled by default
