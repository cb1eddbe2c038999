"""Builds the optional C++ extension stars_kernels._C; everything else about the package is in pyproject.toml.

STARS_BUILD_EXT=auto  (default) build it, and install without it where that fails
STARS_BUILD_EXT=1     a failed build fails the install
STARS_BUILD_EXT=0     leave it out
"""

import json
import os
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
except ImportError as error:
    sys.exit(f"setup.py cannot import torch ({error}): install torch first and use --no-build-isolation")

MODE = os.environ.get("STARS_BUILD_EXT", "auto")
if MODE not in ("auto", "0", "1"):
    sys.exit(f"STARS_BUILD_EXT: expected auto, 0 or 1, found {MODE!r}")

# Without it at::parallel_for is a plain loop. For the compiler alone: the linker would bring a second OpenMP runtime,
# with threads of its own, beside the one that torch has loaded.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []


class BuildExt(BuildExtension):
    def run(self):
        target = Path(self.get_ext_fullpath("stars_kernels._C"))  # beside the package if editable
        target.unlink(missing_ok=True)  # what is there after a failed build must not be an older one
        reason = "STARS_BUILD_EXT=0 at install time" if MODE == "0" else None
        try:
            if MODE != "0":
                super().run()
        except Exception as error:
            if MODE == "1":
                raise
            reason = f"C++ build failed: {error} (compiler {get_cxx_compiler()}; STARS_BUILD_EXT=1 shows why)"
            print(f"*** stars-kernels installs without its C++ extension. {reason} ***", file=sys.stderr)
        # pip hides what is printed above, so the reason travels with the package.
        info = {"extension": reason is None, "reason": reason, "torch": str(torch.__version__)}
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_name("_build_info.json").write_text(json.dumps(info) + "\n")


extension = CppExtension(
    "stars_kernels._C",
    sources=[*sorted(glob("csrc/*.cpp")), "python/bindings.cpp"],
    depends=sorted(glob("csrc/*.h")),
    include_dirs=[os.path.abspath("csrc")],  # ninja runs elsewhere
    define_macros=[("STARS_TORCH_VERSION", f'"{torch.__version__}"')],
    # torch adds the -std its headers need. No contraction: it would change the race and the decisions. gcc's own
    # headers of AVX-512 leave a register uninitialized on purpose.
    extra_compile_args=["-O3", "-g0", "-ffp-contract=off", "-Wall", "-Wno-maybe-uninitialized", *OPENMP],
)
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt})
