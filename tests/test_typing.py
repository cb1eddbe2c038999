"""What mypy and pyright say of code that uses the package, as a user's editor would."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from stars_kernels import StarsConfig
from stars_kernels.decoder.config import Settings

ROOT = Path(__file__).parents[1]
CHECKERS = ("mypy", "pyright")
USES = """
from collections.abc import Iterator

from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

import stars_kernels
from stars_kernels import BestOf, Calibration, Engine, RewardModel, StarsConfig, StarsEvent, StarsOutput


def reward(prompts: list[str], answers: list[str]) -> list[float]:
    return [0.0 for _ in answers]


def right(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": "user", "content": "Hello"}]
    one: StarsOutput = stars_kernels.decode(model, reward, "a", tokenizer=tokenizer, seed=0, top_k=None)
    of_chat: StarsOutput = stars_kernels.decode(model, RewardModel(reward), chat, config={"seed": 1})
    of_ids: StarsOutput = stars_kernels.decode("folder", [reward, "other"], [1, 2], config=StarsConfig(seed=1))
    many: list[StarsOutput] = stars_kernels.decode(model, reward, ["a", "b"], rule=BestOf(3), request_ids=[1, "x"])
    chats: list[StarsOutput] = stars_kernels.decode(model, reward, [chat, chat], stop_strings=["x"], eos_token_id=3)
    ids: list[StarsOutput] = stars_kernels.decode(model, reward, [[1], [2, 3]], width="auto", pack="bfloat16")
    ends: list[StarsOutput | Exception] = stars_kernels.decode(model, reward, ["a"], errors="return")
    events: Iterator[StarsEvent] = stars_kernels.stream(model, reward, "a", trace="full")
    calibration: Calibration = stars_kernels.calibrate(model, reward, ["a", "b"], calibration_samples=8)
    with Engine(model, reward, tokenizer=tokenizer, max_new_tokens=3) as engine:
        text: str | None = engine.decode("a", calibration=calibration, beta=0.5).text
        scores: list[float] = engine.score(["a"], ["b"])
    print(one, of_chat, of_ids, many, chats, ids, ends, events, text, scores)


def wrong(model: LlamaForCausalLM, engine: Engine) -> None:
    stars_kernels.decode(model, reward, "a", segment_sizes=3)  # error
    stars_kernels.decode(model, reward, "a", seed="0")  # error
    stars_kernels.decode(model, reward, "a", accept="maybe")  # error
    stars_kernels.decode(model, reward, "a", errors="ignore")  # error
    stars_kernels.decode(model, reward, 3)  # error
    stars_kernels.decode(model, 3, "a")  # error
    stars_kernels.decode(model, reward, ["a"]).text  # error
    stars_kernels.decode(model, reward, "a")[0]  # error
    stars_kernels.decode(model, reward, ["a"], errors="return")[0].text  # error
    stars_kernels.stream(model, reward, "a", alpha="half")  # error
    stars_kernels.calibrate(model, reward, ["a"], calibration_sample=8)  # error
    engine.decode(["a"], max_attempts=2.5)  # error
    engine.decode("a", calibration=0.5)  # error
    engine.score(["a"], [0.5])  # error
    Engine(model, reward, tokeniser=None)  # error
    BestOf("many")  # error
"""


def check(checker, folder, code):
    """The lines that a checker complains of, and all it says, of code in a folder of its own."""
    (folder / "uses.py").write_text(code)
    options = {
        "mypy": [
            "-m",
            "mypy",
            "--config-file",
            str(ROOT / "pyproject.toml"),
            "--cache-dir",
            str(ROOT / ".mypy_cache"),
            "uses.py",
        ],
        "pyright": ["-m", "pyright", "--pythonpath", sys.executable, "uses.py"],
    }[checker]
    done = subprocess.run([sys.executable, *options], cwd=folder, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if checker == "pyright" and ("npm" in said or "nodeenv" in said) and "uses.py" not in said:
        pytest.skip(f"pyright could not be fetched: {said.strip().splitlines()[-1]}")
    assert done.returncode in (0, 1), said
    return sorted({int(n) for n in re.findall(r"uses\.py:(\d+)(?::\d+)?(?: -|:) error", said)}), said


@pytest.mark.parametrize("checker", CHECKERS)
def test_the_readme_s_examples(checker, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) > 3
    lines, said = check(checker, tmp_path, "\n".join(blocks))
    assert lines == [], said


@pytest.mark.parametrize("checker", CHECKERS)
def test_what_is_right_passes_and_what_is_wrong_does_not(checker, tmp_path):
    expected = [n for n, line in enumerate(USES.splitlines(), 1) if line.endswith("# error")]
    lines, said = check(checker, tmp_path, USES)
    assert lines == expected, said


def test_keywords_are_the_settings():
    assert list(Settings.__annotations__) == list(StarsConfig.__dataclass_fields__)
