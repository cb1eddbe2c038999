"""STARS_BUILD_EXT: what an install leaves behind when the extension is not wanted or cannot be built."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def install(tmp_path):
    """install(**env) pip-installs a copy of the tree; returns (completed process, the installed package)."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("stars_kernels", "csrc", "python"):
        built_here = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
        shutil.copytree(ROOT / name, source / name, ignore=built_here)
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]

    def run(**env):
        command = [*pip, "--target", str(target), str(source)]
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
        return done, target / "stars_kernels"

    return run


def assert_without_extension(done, package, reason):
    assert done.returncode == 0, done.stderr
    assert not list(package.glob("_C*.so"))
    assert (package / "__init__.py").exists()
    info = json.loads((package / "_build_info.json").read_text())
    assert info["extension"] is False
    assert reason in info["reason"]
    assert info["torch"] == torch.__version__


def test_0_leaves_the_extension_out(install):
    assert_without_extension(*install(STARS_BUILD_EXT="0"), "STARS_BUILD_EXT=0 at install time")


def test_auto_installs_without_a_working_compiler(install):
    broken = {"CC": "/bin/false", "CXX": "/bin/false"}
    assert_without_extension(*install(STARS_BUILD_EXT="auto", **broken), "compiler /bin/false")


def test_auto_installs_where_the_source_does_not_compile(install, tmp_path):
    for source in (tmp_path / "source").glob("*/*.cpp"):
        source.write_text('#include "no_such_header.h"\n')
    assert_without_extension(*install(STARS_BUILD_EXT="auto"), "C++ build failed")


@pytest.fixture
def broken_nvcc(tmp_path):
    """A CUDA_HOME whose nvcc fails."""
    if torch.version.cuda is None:
        pytest.skip(f"torch {torch.__version__} has no CUDA")
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    (tmp_path / "cuda" / "bin" / "nvcc").symlink_to("/bin/false")
    return str(tmp_path / "cuda")


def test_auto_builds_without_cuda_where_that_fails(install, broken_nvcc):
    done, package = install(STARS_BUILD_EXT="auto", CUDA_HOME=broken_nvcc)
    assert done.returncode == 0, done.stderr
    assert list(package.glob("_C*.so"))
    info = json.loads((package / "_build_info.json").read_text())
    assert info["extension"] is True and info["reason"] is None
    assert info["cuda"] is False
    assert info["cuda_reason"].startswith("CUDA build failed: ") and broken_nvcc in info["cuda_reason"]


def test_1_fails_where_cuda_does(install, broken_nvcc):
    done, package = install(STARS_BUILD_EXT="1", CUDA_HOME=broken_nvcc)
    assert done.returncode != 0
    assert not package.exists()


OLD_NVCC = """#!/bin/sh
echo "$@" >> "$0.calls"
case "$*" in
  --list-gpu-arch) printf 'compute_80\ncompute_86\ncompute_90\n' ;;
  --version) echo "Cuda compilation tools, release {version}, V{version}.0" ;;
  *) exit 1 ;;
esac
"""


def test_an_nvcc_that_knows_no_b100_builds_for_the_others(install, broken_nvcc):
    nvcc = Path(broken_nvcc) / "bin" / "nvcc"
    nvcc.unlink()
    nvcc.write_text(OLD_NVCC.format(version=torch.version.cuda))
    nvcc.chmod(0o755)
    done, _ = install(STARS_BUILD_EXT="1", CUDA_HOME=broken_nvcc)
    assert done.returncode != 0
    (compiled,) = {line for line in Path(f"{nvcc}.calls").read_text().splitlines() if "-gencode" in line}
    assert "code=sm_80" in compiled and "code=sm_90" in compiled and "compute_90" in compiled
    assert "100" not in "".join(word for word in compiled.split() if "gencode" in word)


def test_1_fails_without_a_working_compiler(install):
    done, package = install(STARS_BUILD_EXT="1", CC="/bin/false", CXX="/bin/false")
    assert done.returncode != 0
    assert "CalledProcessError: Command '['/bin/false'" in done.stdout + done.stderr
    assert not package.exists()


@pytest.fixture
def no_torch(tmp_path):
    """A PYTHONPATH on which torch cannot be imported."""
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "torch.py").write_text("raise ImportError('no torch here')\n")
    return str(tmp_path / "none")


@pytest.mark.parametrize("mode", ["auto", "1"])
def test_without_torch_it_says_what_to_run(install, no_torch, mode):
    done, package = install(STARS_BUILD_EXT=mode, PYTHONPATH=no_torch)
    assert done.returncode != 0
    assert not package.exists()
    said = done.stdout + done.stderr
    assert "found none (no torch here). Run: pip install torch, and then: pip install stars-kernels, or ." in said


def test_0_needs_no_torch(install, no_torch):
    done, package = install(STARS_BUILD_EXT="0", PYTHONPATH=no_torch)
    assert done.returncode == 0, done.stderr
    info = json.loads((package / "_build_info.json").read_text())
    assert info["extension"] is False and info["torch"] is None


HIDE = """
import sys
sys.path = [path for path in sys.path if not path.endswith("site-packages")] + [{overlay!r}]
"""


def test_an_isolated_build_takes_the_installed_torch(install, tmp_path):
    """Where pip hides all packages from a build but those that the build asks for."""
    overlay, hide = tmp_path / "overlay", tmp_path / "hide"
    overlay.mkdir()
    hide.mkdir()
    (hide / "sitecustomize.py").write_text(HIDE.format(overlay=str(overlay)))
    packages = Path(torch.__file__).parents[1]
    for name in ("setuptools", "_distutils_hack", "ninja"):
        (overlay / name).symlink_to(packages / name)
    for info in packages.glob("setuptools-*.dist-info"):
        (overlay / info.name).symlink_to(info)
    hidden = {"PYTHONPATH": str(hide)}
    nothing = subprocess.run(
        [sys.executable, "-c", "import torch"], env=os.environ | hidden, capture_output=True, text=True
    )
    assert "No module named 'torch'" in nothing.stderr
    run = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build", "--build-lib", "lib"], cwd=tmp_path / "source",
        env=os.environ | hidden | {"CC": "/bin/false", "CXX": "/bin/false", "STARS_BUILD_EXT": "auto"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    info = json.loads((tmp_path / "source/lib/stars_kernels/_build_info.json").read_text())
    assert info["torch"] == torch.__version__
    assert "compiler /bin/false" in info["reason"]


def test_bad_value_is_named(install):
    done, _ = install(STARS_BUILD_EXT="yes")
    assert done.returncode != 0
    assert "STARS_BUILD_EXT: expected auto, 0 or 1, found 'yes'" in done.stdout + done.stderr


def test_1_installs_the_extension(install):
    """What a wheel carries: the compiled module, its record, and a package that finds both."""
    done, package = install(STARS_BUILD_EXT="1")
    assert done.returncode == 0, done.stderr
    info = json.loads((package / "_build_info.json").read_text())
    assert info["extension"] is True
    assert info["cuda"] == (info["cuda_reason"] is None)
    assert info["cuda"] or not os.environ.get("STARS_EXPECT_CUDA"), info["cuda_reason"]
    if torch.version.cuda is None:
        assert info["cuda_reason"] == f"torch {torch.__version__} has no CUDA"
    code = (
        "import torch, stars_kernels as s; from stars_kernels import _C; "
        "print(s.__file__, s.backends()['accept']['cpu'], ';'.join(_C.build_info()['cuda_archs']))"
    )
    env = os.environ | {"PYTHONPATH": str(package.parent)}
    run = subprocess.run([sys.executable, "-c", code], env=env, cwd=package.parent, capture_output=True, text=True)
    file, served, *archs = run.stdout.split()
    assert (file, served) == (str(package / "__init__.py"), "cpp"), run.stderr
    assert "STARS_EXPECT_CUDA" not in os.environ or archs == [os.environ["STARS_EXPECT_CUDA"]]
