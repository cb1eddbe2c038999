"""Builds the optional C++ extension stars_kernels._C; everything else about the package is in pyproject.toml.

STARS_BUILD_EXT=auto  (default) build it, without CUDA where that fails, and install without it where that fails too
STARS_BUILD_EXT=1     a failed build fails the install
STARS_BUILD_EXT=0     leave it out

It runs with the torch that it was compiled against and with no other, so it is compiled against the one that lies where
it is installed to; without one, the install fails. It is built with CUDA where that torch has CUDA and nvcc is found:
$CUDA_HOME/bin/nvcc, or nvcc on PATH. TORCH_CUDA_ARCH_LIST chooses the architectures: by default A100, H100 and B100, as
far as nvcc knows them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("STARS_BUILD_EXT", "auto")
if MODE not in ("auto", "0", "1"):
    sys.exit(f"STARS_BUILD_EXT: expected auto, 0 or 1, found {MODE!r}")

# pip hides the packages of the environment that it installs to from a build, unless asked for --no-build-isolation.
sys.path += [path for path in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")) if path not in sys.path]
try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, get_cxx_compiler
except ImportError as error:
    torch, BuildExtension = None, build_ext
    NO_TORCH = (
        f"stars-kernels compiles against the torch of the environment that it is installed to, and found none "
        f"({error}). Run: pip install torch, and then: pip install stars-kernels, or . in its folder. "
        "Without the compiled kernels: STARS_BUILD_EXT=0 pip install ..."
    )

ARCHITECTURES = ("8.0", "9.0", "10.0")  # A100, H100, B100 and their kin
# Without it at::parallel_for is a plain loop. For the compiler alone: the linker would bring a second OpenMP runtime,
# with threads of its own, beside the one that torch has loaded.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []


def why_no_cuda():
    """The reason to build for the CPU alone, or None."""
    if torch is None:
        return "no torch"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    nvcc = shutil.which(os.path.join(cpp_extension.CUDA_HOME or "", "bin", "nvcc"))
    if nvcc is None:
        return f"no nvcc found (CUDA_HOME={cpp_extension.CUDA_HOME})"
    # nvcc may be a script that lies elsewhere than its toolkit. It knows where that is, torch has guessed.
    dry_run = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    if top := re.search("TOP=(.+)", dry_run):
        cpp_extension.CUDA_HOME = os.path.realpath(top[1])
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures(nvcc))
    return None


def architectures(nvcc):
    """Those that this nvcc knows, 12.8 being the first with 10.0, and what comes after by PTX.

    Not torch's default, the GPUs of this machine.
    """
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    known = [name for name in ARCHITECTURES if f"compute_{name.replace('.', '')}" in listed]
    return ";".join(known or ARCHITECTURES) + "+PTX"


def extension(cuda):
    if torch is None:
        return Extension("stars_kernels._C", sources=[])  # never built
    sources = [*sorted(glob("csrc/*.cpp")), "python/bindings.cpp"]
    macros = [("STARS_TORCH_VERSION", f'"{torch.__version__}"')]
    if cuda:
        sources += sorted(glob("csrc/cuda/*.cu"))
        macros += [("STARS_WITH_CUDA", None)]
    return (CUDAExtension if cuda else CppExtension)(
        "stars_kernels._C",
        sources=sources,
        depends=sorted(glob("csrc/*.h") + glob("csrc/cuda/*")),
        include_dirs=[os.path.abspath("csrc")],  # ninja runs elsewhere
        define_macros=macros,
        # torch adds the -std its headers need. No contraction: it would change the race and the decisions. gcc's own
        # headers of AVX-512 leave a register uninitialized on purpose.
        extra_compile_args={
            "cxx": ["-O3", "-g0", "-ffp-contract=off", "-Wall", "-Wno-maybe-uninitialized", *OPENMP],
            "nvcc": ["-O3", "-fmad=false", "-Xcompiler=-Wall"],
        },
    )


class BuildExt(BuildExtension):
    def run(self):
        target = Path(self.get_ext_fullpath("stars_kernels._C"))  # beside the package if editable
        target.unlink(missing_ok=True)  # what is there after a failed build must not be an older one
        reason = "STARS_BUILD_EXT=0 at install time" if MODE == "0" else None
        if MODE != "0" and torch is None:
            sys.exit(NO_TORCH)
        no_cuda = NO_CUDA or reason
        try:
            if MODE != "0":
                no_cuda = self.build(no_cuda)
        except Exception as error:
            if MODE == "1":
                raise
            reason = f"C++ build failed: {error} (compiler {get_cxx_compiler()}; STARS_BUILD_EXT=1 shows why)"
            no_cuda = no_cuda or reason
            print(f"*** stars-kernels installs without its C++ extension. {reason} ***", file=sys.stderr)
        # pip hides what is printed above, so the reasons travel with the package.
        info = {"extension": reason is None, "reason": reason, "cuda": no_cuda is None, "cuda_reason": no_cuda}
        target.parent.mkdir(parents=True, exist_ok=True)
        info["torch"] = None if torch is None else str(torch.__version__)
        target.with_name("_build_info.json").write_text(json.dumps(info) + "\n")

    def build(self, no_cuda):
        """Build; where that fails with CUDA, once more without. Returns why it has no CUDA, or None."""
        before = {name: getattr(self, name) for name in ("compiler", "inplace")}  # a build leaves others here
        try:
            super().run()
        except Exception as error:
            if MODE == "1" or no_cuda:
                raise
            no_cuda = f"CUDA build failed: {error} (CUDA_HOME={cpp_extension.CUDA_HOME}; STARS_BUILD_EXT=1 shows why)"
            print(f"*** stars-kernels builds its C++ extension without CUDA. {no_cuda} ***", file=sys.stderr)
            vars(self).update(before)
            vars(self.extensions[0]).update(vars(extension(cuda=False)))
            super().run()
        return no_cuda


NO_CUDA = why_no_cuda()
setup(ext_modules=[extension(cuda=NO_CUDA is None)], cmdclass={"build_ext": BuildExt})
