"""Packages outside the range are refused or warned of in one sentence."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import stars_kernels
from stars_kernels import versions
from stars_kernels.ops import dispatch

ROOT = Path(__file__).parents[1]


def found(monkeypatch, **others):
    real = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: others[name] if name in others else real(name))


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("torch", "2.10.0+cu130", "needs torch 2.11 to 2.14, found 2.10.0+cu130: pip install 'torch>=2.11'"),
        ("transformers", "4.57.6", "needs transformers 5.17 to 5.24, found 4.57.6: pip install 'transformers>=5.17'"),
        ("transformers", None, "needs transformers 5.17 to 5.24, which is missing: pip install transformers"),
        ("python", "3.10.13", "needs python 3.11 to 3.13, found 3.10.13: a newer Python"),
    ],
)
def test_what_is_too_old_is_refused(monkeypatch, name, version, message):
    found(monkeypatch, **{name: version})
    with pytest.raises(ImportError) as error:
        versions.check()
    assert str(error.value) == f"stars_kernels {message}"


@pytest.mark.parametrize(("name", "version"), [("torch", "2.15.0"), ("transformers", "6.0.0rc1"), ("python", "3.14.0")])
def test_what_is_too_new_is_warned_of(monkeypatch, name, version):
    found(monkeypatch, **{name: version})
    first, last = versions.RANGES[name]
    with pytest.warns(RuntimeWarning, match=f"made for {name} {first} to {last}, found {version}, which is not tested"):
        versions.check()


@pytest.mark.parametrize("torch", ["2.11.0a0+git1234567.nv26.1", "2.11.0", "2.14.1+cpu", "2.14.99"])
def test_what_is_inside_the_range_says_nothing(monkeypatch, torch):
    found(monkeypatch, torch=torch, transformers="5.17.0", python="3.13.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check()


def test_an_import_ends_with_the_sentence_and_nothing_of_theirs(tmp_path):
    """In a process where an old transformers is installed."""
    metadata = tmp_path / "transformers-5.16.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.16.1\n")
    (tmp_path / "transformers.py").write_text("raise SystemError('used before it was checked')\n")
    path = os.pathsep.join([str(tmp_path), str(Path(stars_kernels.__file__).parents[1])])
    run = subprocess.run(
        [sys.executable, "-c", "import stars_kernels"],
        env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: stars_kernels needs transformers 5.17 to 5.24, found 5.16.1: pip install"), (
        last
    )


def test_a_decode_uses_nothing_deprecated(lm, rm):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        stars_kernels.decode(lm, rm, [1, 2, 3], seed=0, reward_threshold=1.0, beta=1.0, max_new_tokens=8)


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "triton is missing: pip install 'triton>=3.6'"),
        ("3.5.1", "triton 3.5.1 is installed, expected 3.6 to 3.9"),
    ],
)
def test_without_a_triton_that_works_the_ops_say_so(monkeypatch, version, reason):
    found(monkeypatch, triton=version)
    assert dispatch.load_triton.__wrapped__() == reason


def test_the_lower_bounds_are_those_of_the_package():
    text = (ROOT / "pyproject.toml").read_text()
    for name in ("torch", "transformers"):
        assert f'"{name}>={versions.RANGES[name][0]}"' in text
    assert f'requires-python = ">={versions.RANGES["python"][0]}"' in text
    assert f'"triton>={versions.TRITON[0]};' in text


def test_the_sets_span_the_range():
    ranges = versions.RANGES | {"triton": versions.TRITON}
    pinned = {name: [] for name in ranges}
    for file in (ROOT / ".ci/pins").glob("torch-*.txt"):
        pins = dict(re.findall(r"^(?:# )?(\w+)(?:==| )([\d.]+)$", file.read_text(), re.MULTILINE))
        for package, found in pinned.items():
            found.append(versions.release(pins[package]))
    for package, (first, last) in ranges.items():
        assert (str(min(pinned[package])), str(max(pinned[package]))) == (first, last), package


def test_the_document_has_what_each_set_passed():
    """docs/versions.md holds the table that `make matrix` made with these pins, and nothing failed."""
    document = (ROOT / "docs/versions.md").read_text()
    for file in (ROOT / ".ci/pins").glob("torch-*.txt"):
        pins = dict(re.findall(r"^(?:# )?(\w+)(?:==| )([\d.]+)$", file.read_text(), re.MULTILINE))
        versions_of = rf"{pins['python']}[.\d]* \| {pins['torch']}\S* \| {pins['triton']} \| {pins['transformers']}"
        row = re.search(rf"^\| `{file.stem}` \| {versions_of} \| (\d+) \| 0 \| \d+ \|$", document, re.MULTILINE)
        assert row and int(row[1]) > 3000, file.stem
