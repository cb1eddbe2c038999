"""Triton's interpreter, mended for tests: Triton 3.6 with NumPy 2.4.

A scalar of a kernel is an array of one element there. As a bound of `range` it becomes an int by `int(array)`, which
NumPy refuses since 2.4 for arrays of a dimension; later Tritons squeeze it first.
"""

from __future__ import annotations

from typing import Any


def mend() -> None:
    """Let a scalar tensor be an index in the interpreter. Kernels on a GPU are not touched."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
