import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import stars_kernels
from stars_kernels.ops.dispatch import build_info, load_extension

OPS = {
    "accept", "add_rms_norm", "content_hash", "fork_attention", "gated", "kv_commit", "lm_head_sample",
    "packed_linear", "packed_swiglu", "reward_head", "rms_norm", "rotary_store", "segment_sample",
}  # fmt: skip
COMPILED = {(op, "cpu"): "cpp" for op in OPS - {"gated", "lm_head_sample"}}
TRITON = OPS - {"content_hash", "packed_linear", "packed_swiglu"}


def test_every_op_and_device_is_named():
    served = stars_kernels.backends()
    assert set(served) == OPS
    for devices in served.values():
        assert set(devices) == {"cpu", "cuda"}


def test_what_serves_each_op():
    reason = load_extension()
    for op, devices in stars_kernels.backends().items():
        for device, found in devices.items():
            if reason is None and (op, device) in COMPILED:
                assert found == COMPILED[op, device]
            elif device == "cuda" and op in TRITON:
                compiled = op == "accept" and reason is None and build_info()["cuda"]
                assert found == ("cuda" if compiled else "triton")
            elif reason is not None and device == "cpu":
                assert found == f"definition: no compiled extension ({reason})"
            else:
                assert found == f"definition: this release has no {op} kernel for {device}"


WITH_CUDA = """
import torch
from stars_kernels.ops import dispatch

dispatch.load_extension()
if not dispatch.has_kernel("accept", "cuda"):
    library = torch.library.Library("stars", "IMPL")  # stands for the extension
    library.impl("accept", lambda *args: None, "CUDA")
print(dispatch.backend("accept", "cuda"), dispatch.backend("kv_commit", "cuda"))
"""


def test_the_extensions_cuda_kernels_come_before_tritons():
    run = subprocess.run([sys.executable, "-c", WITH_CUDA], capture_output=True, text=True, timeout=300)
    assert run.stdout.split() == ["cuda", "triton"], run.stderr


def test_a_gpu_without_triton_and_cuda_says_both(monkeypatch):
    from stars_kernels.ops import dispatch

    for name, result in (("load_extension", None), ("load_triton", "no triton"), ("has_kernel", False)):
        monkeypatch.setattr(dispatch, name, lambda *args, result=result: result)
    monkeypatch.setattr(dispatch, "build_info", lambda: {"cuda_reason": "no nvcc"})
    reasons = "no Triton kernels (no triton); the extension was built without CUDA (no nvcc)"
    assert stars_kernels.backends()["accept"]["cuda"] == f"definition: {reasons}"
    assert stars_kernels.backends()["kv_commit"]["cuda"] == "definition: no Triton kernels (no triton)"


@pytest.mark.skipif(sys.platform != "linux", reason="only built with OpenMP on Linux")
def test_the_kernels_use_torchs_threads():
    """at::parallel_for is a plain loop where its caller is compiled without OpenMP, and a second runtime competes."""
    if load_extension() is not None:
        pytest.skip(f"no compiled extension: {load_extension()}")
    from stars_kernels import _C

    assert _C.build_info()["openmp"]
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert len(loaded) <= 1, loaded


def test_make_asan_tests_a_sanitized_extension():
    expected = "STARS_EXPECT_SANITIZED" in os.environ
    if load_extension() is not None:
        assert not expected
        return
    from stars_kernels import _C

    assert _C.build_info()["sanitized"] == expected


def test_reference_forces_the_definitions():
    outside = stars_kernels.backends()
    with stars_kernels.reference():
        inside = {found for devices in stars_kernels.backends().values() for found in devices.values()}
    assert inside == {"definition: forced by stars_kernels.reference()"}
    assert stars_kernels.backends() == outside


def test_reference_ends_after_an_error():
    with pytest.raises(ZeroDivisionError), stars_kernels.reference():
        raise ZeroDivisionError
    assert "forced" not in str(stars_kernels.backends())


def test_reference_calls_no_operator(monkeypatch):
    """Inside reference() an op is its Python definition, outside it goes through the dispatcher."""
    import torch

    from stars_kernels.ops import dispatch

    monkeypatch.setitem(dispatch.definitions, "accept", lambda *args: "definition")
    arguments = [torch.zeros(1, 1), torch.zeros(1, 1).bool(), torch.zeros(1, 1).double()]
    arguments += [torch.zeros(1).long()] * 3 + [torch.zeros(1).double(), torch.zeros(1).long()]
    call = lambda: stars_kernels.ops.accept(*arguments, max_attempts=1, beta=1.0)  # noqa: E731
    with stars_kernels.reference():
        assert call() == "definition"
    assert call() != "definition"


def test_an_extension_that_does_not_load(monkeypatch, tmp_path):
    def fail(name):
        raise ImportError(f"{name}: undefined symbol: _ZN2at")

    # A place without _build_info.json.
    monkeypatch.setattr("stars_kernels.ops.dispatch.__file__", str(tmp_path / "ops" / "dispatch.py"))
    monkeypatch.setattr("stars_kernels.ops.dispatch.importlib.import_module", fail)
    assert load_extension.__wrapped__() == "stars_kernels._C: undefined symbol: _ZN2at"


PROGRAM = """
import json, sys, warnings, torch
from stars_kernels.ops import accept, backends, kv_commit, reference, reward_head

def run():
    reward = reward_head(torch.ones(2, 3, 4), torch.tensor([0, 2]), torch.ones(4))
    one, zero = torch.ones(2, 1), torch.zeros(2, dtype=torch.int64)
    accept(one, one.bool(), one.double(), zero, zero, zero, zero.double(), zero - 1, max_attempts=2, beta=1.0)
    return reward.tolist()

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with reference():
        run()
    quiet = len(caught)
    rewards = [run(), run()]
found = [(w.category.__name__, str(w.message), w.filename) for w in caught]
unwanted = sorted({"transformers", "stars_kernels.hf", "stars_kernels.decoder"} & set(sys.modules))
print(json.dumps([quiet, found, rewards, backends()["accept"]["cpu"], unwanted]))
"""


def run_without_extension(folder, build_info, extension=None):
    """Run PROGRAM with a copy of the ops and what they import; the extension is absent, or the source `extension`."""
    package = folder / "stars_kernels"
    shutil.copytree(
        Path(stars_kernels.ops.__file__).parent, package / "ops", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(Path(stars_kernels.__file__).with_name("versions.py"), package)
    (package / "__init__.py").touch()
    if build_info is not None:
        (package / "_build_info.json").write_text(json.dumps(build_info))
    if extension is not None:
        (package / "_C.py").write_text(extension)
    program = folder / "program.py"
    program.write_text(PROGRAM)
    result = subprocess.run(
        [sys.executable, program.name], cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


WITHOUT = [
    pytest.param({"extension": False, "reason": "no compiler"}, None, "it was not built: no compiler", id="not built"),
    pytest.param(
        {"extension": True, "reason": None, "torch": "1.2.3+other"},
        "raise AssertionError('imported')",
        "built for torch 1.2.3+other but torch {torch} is installed",
        id="another torch",
    ),
]


@pytest.mark.parametrize(("build_info", "extension", "reason"), WITHOUT)
def test_a_missing_extension_warns_once_with_the_reason(tmp_path, build_info, extension, reason):
    import torch

    quiet, warned, rewards, backend, unwanted = run_without_extension(tmp_path, build_info, extension)
    assert quiet == 0, "reference() asks for the definitions: nothing to warn of"
    assert [category for category, _, _ in warned] == ["RuntimeWarning"]
    _, message, filename = warned[0]
    assert Path(filename).name == "program.py", "the warning points at the caller"
    reason = reason.format(torch=torch.__version__)
    assert reason in message and reason in backend
    assert rewards == [[4.0, 4.0]] * 2
    assert unwanted == [], "ops knows torch alone"
