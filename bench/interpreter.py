"""Triton's interpreter, mended for tests: it takes NumPy 2.4, rounds as a GPU does, and patches Triton once a launch.

- With Triton 3.6, a scalar of a kernel is an array of one element. As a bound of `range` it becomes an int by
  `int(array)`, which NumPy refuses since 2.4 for arrays of a dimension; later Tritons squeeze it first.
- fp32 becomes bfloat16 by cutting bits off, where a GPU rounds to the nearest: errors twice as large.
- A launch replaces the functions of `triton.language` by interpreted ones, and so does every call of a function in it:
  about 3 ms each, most of the time of a kernel with small tiles. Here once a launch, for each module of functions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def mend() -> None:
    """Mend the interpreter of this process. Kernels on a GPU are not touched."""
    from triton.runtime import interpreter

    if hasattr(interpreter, "stars_mended"):
        return
    interpreter.stars_mended = True
    patch_tensor, patch, launch = (
        interpreter._patch_lang_tensor,
        interpreter._patch_lang,
        interpreter.GridExecutor.__call__,
    )
    patched: set[int] = set()  # by the globals of the functions that see the replaced ones

    def tensor_patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def patched_once(function: Any) -> Any:
        if id(function.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(function.__globals__))
        return patch(function)

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    convert = interpreter._convert_float

    def converted(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (str(source), str(target), rounding_mode) != ("fp32", "bf16", None):
            return convert(values, source, target, rounding_mode)
        rounded = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = converted
    interpreter._patch_lang_tensor, interpreter._patch_lang = tensor_patched, patched_once
    interpreter.GridExecutor.__call__ = launched
