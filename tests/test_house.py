"""The house: which way imports run, and that the algorithm stays short enough to read."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("stars_kernels", "demo", "bench")
"""Each imports nothing of those behind it."""
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for package in PACKAGES
    for file in (ROOT / package).rglob("*.py")
}
ORDER = ["versions", "extras", "ops", "decoder", "hf", "api", "data", "evaluation", "report", "serve", "cli"]
"""Of stars_kernels: what imports what stands before it."""
ORDER_OF_HF = ["view", "cache", "loading", "text", "proposing", "scoring"]
"""Of hf: a folder imports those before it, and hf's own files; the engine imports all."""
LINES = {"round.py": 199, "sequential.py": 59, "rules/best_of.py": 65}
LINES |= {f"rules/{name}.py": 59 for name in ("stars", "cards", "args", "speculative_rejection")}
"""Of the decoder, at most, docstrings included; best_of.py has three rules."""


def imported(file):
    """(module, name or None) of every import of the project's own, at any depth."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole, None) if whole in FILES else (node.module, alias.name)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name in FILES)


def of_stars_kernels(module):
    package, _, rest = module.partition(".")
    return rest.split(".") if package == "stars_kernels" and rest else []


@pytest.mark.parametrize("module", FILES)
def test_imports_run_one_way(module):
    own = of_stars_kernels(module)
    for target, _ in imported(FILES[module]):
        theirs = of_stars_kernels(target)
        if own and theirs and own[0] in ORDER and theirs[0] in ORDER:
            assert ORDER.index(theirs[0]) <= ORDER.index(own[0]), target
            if own[0] == theirs[0] == "hf" and own[1] in ORDER_OF_HF and theirs[1] in ORDER_OF_HF:
                assert ORDER_OF_HF.index(theirs[1]) <= ORDER_OF_HF.index(own[1]), target
        assert PACKAGES.index(target.partition(".")[0]) <= PACKAGES.index(module.partition(".")[0]), target


@pytest.mark.parametrize("module", FILES)
def test_no_private_name_of_another_package(module):
    folder = FILES[module].parent
    for target, name in imported(FILES[module]):
        private = [part for part in (*target.split("."), name or "") if part.startswith("_") and part != "__main__"]
        assert not private or FILES[target].parent == folder, (target, name)


@pytest.mark.parametrize("folder", sorted({FILES[module].parent for module in FILES}, key=str), ids=lambda f: f.name)
def test_a_folder_says_what_lies_in_it(folder):
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))


def test_no_circles():
    TopologicalSorter({module: {target for target, _ in imported(FILES[module])} for module in FILES}).prepare()


@pytest.mark.parametrize("pattern", LINES)
def test_the_algorithm_stays_short(pattern):
    found = {file.name: len(file.read_text().splitlines()) for file in (ROOT / "stars_kernels/decoder").glob(pattern)}
    assert found and max(found.values()) <= LINES[pattern], found
