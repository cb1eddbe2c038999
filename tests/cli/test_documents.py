"""Every `stars` command of the documents and of --help runs, in a folder that has what it names."""

import json
import re
import shlex
import shutil
import signal
import threading
import urllib.request
from pathlib import Path

from typer.testing import CliRunner

from stars_kernels.cli.app import COMMANDS, app
from tests.tiny import byte_tokenizer, tiny_language_model, tiny_reward_model

ROOT = Path(__file__).parents[2]
NAMES = list(COMMANDS)
LINE = re.compile(rf"^ {{4,}}(stars (?:{'|'.join(NAMES)})\b.*)$", re.MULTILINE)
SMALL = ["--set", "max_new_tokens=9"]
FEW = {
    "run": SMALL,
    "compare": SMALL,
    "calibrate": SMALL,
    "serve": [*SMALL, "--port", "0"],
    "demo": ["-m", "MODEL", "--max-new-tokens", "9"],
}
"""What is added to a command, so that it is quick and in nobody's way."""


def commands():
    documents = [(ROOT / "README.md").read_text(), *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
    helps = [path.read_text() for path in sorted((ROOT / "stars_kernels" / "cli").glob("*.py"))]
    found = [command for text in [*documents, *helps] for command in LINE.findall(text)]
    return list(
        dict.fromkeys(command for command in found if "--ray" not in command)
    )  # tests/data/test_ray.py has these


def ask_and_stop(url):
    """Ask a server, and stop it as a terminal would: in place of telling people where it is."""

    def visit():
        with urllib.request.urlopen(f"{url}/health") as response:
            assert json.load(response) == {"status": "ok"}
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=visit).start()


def save_demo(folder):
    """Write what `python -m demo.save` writes, but of tiny models and two prompts."""
    for name, of in (("lm", "MODEL"), ("rm", "RM")):
        shutil.copytree(of, folder / name)
    for name in ("calibration", "prompts"):
        (folder / f"{name}.jsonl").write_text('"Name a colour."\n"Name an animal."\n')
    Path("demo").mkdir()
    shutil.copy(ROOT / "demo" / "comparison.yaml", "demo")


def test_every_command_of_the_documents_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stars_kernels.cli.serve.announce", ask_and_stop)
    named = {"MODEL": tiny_language_model(), "RM": tiny_reward_model(), "OTHER": tiny_reward_model(seed=5)}
    for name, model in named.items():
        model.save_pretrained(name)
        byte_tokenizer().save_pretrained(name)
    save_demo(Path("out/demo"))
    Path("prompts.jsonl").write_text('"Name a colour."\n{"prompt": "Name an animal.", "custom_id": "animal"}\n')
    Path("rewards.py").write_text("def politeness(prompts, answers):\n    return [float(len(a)) for a in answers]\n")
    Path("run.yaml").write_text(
        "model: MODEL\nreward-model: RM\ninput: prompts.jsonl\noutput: yaml\nmax-new-tokens: 9\n"
    )
    Path("comparison.yaml").write_text((ROOT / "docs" / "compare.md").read_text().split("```yaml\n")[1].split("```")[0])
    found = commands()
    assert len(found) >= 14 and {command.split()[1] for command in found} == set(NAMES)
    for command in found:
        words = shlex.split(command)[1:]
        few = [] if "--config" in words else FEW.get(words[0], [])
        result = CliRunner().invoke(app, [*words, *few])
        assert result.exit_code == 0, (command, result.output, result.exception)
        assert result.stdout or result.stderr, command
    for folder in ("comparison", "quick"):
        rules = [line.split(",")[0] for line in Path(folder, "comparison.csv").read_text().splitlines()]
        assert rules == ["rule", "plain", "stars", "stars-hard", "best-of-8"]
    for page in ("traced/report.html", "both.html", "out/report.html"):
        assert "Content-Security-Policy" in Path(page).read_text()
    for folder in ("out", "best-of-8", "polite", "yaml", "traced", "traced-4"):
        rows = [json.loads(line) for line in Path(folder, "results.jsonl").read_text().splitlines()]
        assert [row["custom_id"] for row in rows] == [1, "animal"] and not any("error" in row for row in rows)
