"""The list of commands is quick: nothing is imported for it that takes seconds."""

import inspect
import subprocess
import sys
from importlib import import_module

import pytest

import stars_kernels
from stars_kernels.cli.app import COMMANDS, LateCommand

HEAVY = ("torch", "transformers", "matplotlib", "ray", "fastapi")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_of_help_is_the_commands_own(name):
    place, line = COMMANDS[name]
    module, _, function = place.partition(":")
    command = getattr(import_module(f"stars_kernels.cli.{module}"), function)
    assert " ".join(inspect.getdoc(command).partition("\n\n")[0].split()) == line
    assert LateCommand(name, place, line).itself().name == name


@pytest.mark.parametrize("words", [["--help"], ["--version"], [], ["rum"]], ids=" ".join)
def test_the_list_imports_no_library_that_takes_seconds(words):
    code = (
        "import sys; from stars_kernels.cli import main; sys.argv = ['stars', *sys.argv[1:]]\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print('heavy:', [name for name in {HEAVY} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert run.stdout.endswith("heavy: []\n"), run.stdout + run.stderr


def test_every_name_of_the_package_is_there():
    for name in stars_kernels.__all__:
        assert getattr(stars_kernels, name) is not None and name in dir(stars_kernels)
    places = [name for names in stars_kernels._PLACES.values() for name in names]
    assert sorted(places) == sorted(stars_kernels.__all__)
    assert stars_kernels.data.load_prompts and stars_kernels.report.write_report
    with pytest.raises(AttributeError, match=r"module 'stars_kernels' has no attribute 'decod'"):
        stars_kernels.decod  # noqa: B018
