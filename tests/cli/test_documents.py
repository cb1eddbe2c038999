"""Every `stars` command of the documents and of --help runs, in a folder that has what it names."""

import json
import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from stars_kernels.cli.app import app
from tests.tiny import byte_tokenizer, tiny_language_model, tiny_reward_model

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^ {4,}(stars (?:run|calibrate|report|env|families)\b.*)$", re.MULTILINE)


def commands():
    documents = [(ROOT / "README.md").read_text(), *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
    helps = [path.read_text() for path in sorted((ROOT / "stars_kernels" / "cli").glob("*.py"))]
    return [command for text in [*documents, *helps] for command in LINE.findall(text)]


def test_every_command_of_the_documents_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, model in (("MODEL", tiny_language_model()), ("RM", tiny_reward_model())):
        model.save_pretrained(name)
        byte_tokenizer().save_pretrained(name)
    Path("prompts.jsonl").write_text('"Name a colour."\n{"prompt": "Name an animal.", "custom_id": "animal"}\n')
    Path("rewards.py").write_text("def politeness(prompts, answers):\n    return [float(len(a)) for a in answers]\n")
    Path("run.yaml").write_text(
        "model: MODEL\nreward-model: RM\ninput: prompts.jsonl\noutput: yaml\nmax-new-tokens: 9\n"
    )
    found = commands()
    kinds = {command.split()[1] for command in found}
    assert len(found) >= 14 and kinds == {"run", "calibrate", "report", "env", "families"}
    for command in found:
        words = shlex.split(command)[1:]
        few = ["--set", "max_new_tokens=9"] if words[0] in ("run", "calibrate") and "--config" not in words else []
        result = CliRunner().invoke(app, [*words, *few])
        assert result.exit_code == 0, (command, result.output, result.exception)
        assert result.stdout or result.stderr, command
    for page in ("traced/report.html", "both.html", "out/report.html"):
        assert "Content-Security-Policy" in Path(page).read_text()
    for folder in ("out", "best-of-8", "polite", "yaml", "traced", "traced-4"):
        rows = [json.loads(line) for line in Path(folder, "results.jsonl").read_text().splitlines()]
        assert [row["custom_id"] for row in rows] == [1, "animal"] and not any("error" in row for row in rows)
