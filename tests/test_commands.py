"""The commands refuse a bad argument at once, naming what was found and what was expected."""

import importlib

import pytest


@pytest.mark.parametrize(
    ("command", "message"),
    [
        *[
            (
                f"{command} --prompts {count}",
                f"argument --prompts: it is '{count}', expected a whole number from 1 to 44",
            )
            for command in ("demo.__main__", "demo.equality")
            for count in ("0", "-1", "45", "x")
        ],
        *[
            (f"{command} --tokens 0", "argument --tokens: it is '0', expected a whole number >= 1")
            for command in ("demo.__main__", "demo.equality")
        ],
        ("demo.equality --widths 2 0", "argument --widths: it is '0', expected a whole number >= 1"),
        ("demo.save setup.py/out", "argument folder: it is 'setup.py/out', expected a folder or a place for one; "),
        ("bench.__main__ decode --prompts 0", "argument --prompts: it is '0', expected a whole number >= 1"),
        ("bench.neighbour --runs 0", "argument --runs: it is '0', expected a whole number >= 1"),
        (
            "bench.__main__ decode --json no/such/out.json",
            "argument --json: it is 'no/such/out.json', expected a file in a folder that exists",
        ),
        ("bench.__main__ first --seconds 0", "argument --seconds: it is '0', expected a whole number >= 1"),
        ("bench.__main__ first --model gpt-2", "argument --model: invalid choice: 'gpt-2' (choose from"),
        (
            "bench.__main__ first --out setup.py/first",
            "argument --out: it is 'setup.py/first', expected a folder or a place for one; ",
        ),
        *[
            (
                f"bench.__main__ roofline --acceptance {value}",
                f"argument --acceptance: it is '{value}', expected a number above 0, up to 1",
            )
            for value in ("0", "-0.1", "1.5", "nan", "often")
        ],
        *[
            (
                f"bench.__main__ roofline --{name} 0",
                f"argument --{name}: it is '0', expected a whole number from 1 to {high}",
            )
            for name, high in (("prompts", 10_000), ("prompt-tokens", 1_000_000))
        ],
        ("bench.__main__ roofline --gpu h999", "argument --gpu: invalid choice: 'h999' (choose from"),
        ("bench.__main__ roofline --model gpt-2", "argument --model: invalid choice: 'gpt-2' (choose from"),
    ],
)
def test_a_bad_argument_is_refused_before_anything_is_loaded(monkeypatch, capsys, command, message):
    module, *arguments = command.split()
    if module.startswith("demo"):
        pytest.importorskip("vaderSentiment")
    monkeypatch.setattr("sys.argv", [module, *arguments])
    with pytest.raises(SystemExit):
        importlib.import_module(module).main()
    assert message in capsys.readouterr().err
