"""python -m bench.travel: what git tracks or does not ignore, its size, and a copy of it."""

import subprocess
from zipfile import ZipFile

import pytest

from bench import travel


@pytest.fixture
def tree(tmp_path):
    """A repository with a tracked, a deleted, an untracked and an ignored file, a script and a link."""
    root = tmp_path / "tree"
    root.mkdir()
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    (root / ".gitignore").write_text("build/\n")
    for name, size in (("a/tracked é.txt", 3000), ("gone.txt", 1), ("script.sh", 10)):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x" * size)
    (root / "script.sh").chmod(0o755)
    (root / "link").symlink_to("/no/such/file")
    subprocess.run(["git", "-C", str(root), "add", "."], check=True)
    (root / "gone.txt").unlink()
    (root / "untracked.bin").write_bytes(b"x" * 5000)
    (root / "build").mkdir()
    (root / "build" / "ignored.so").write_bytes(b"x" * 9000)
    return root


def test_the_copy_is_what_would_travel(tree, tmp_path, capsys):
    to = tmp_path / "copy"
    assert travel.main(["--to", str(to)], tree) == 0
    copied = {str(path.relative_to(to)) for path in to.rglob("*") if not path.is_dir()}
    assert copied == {".gitignore", "a/tracked é.txt", "untracked.bin", "script.sh", "link"}
    assert (to / "script.sh").stat().st_mode & 0o111 and (to / "link").is_symlink()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("untracked.bin") and printed[1].endswith("tracked é.txt")
    assert printed[-1].endswith("in 5 files, of 64 MiB that may travel")


def test_too_much_is_refused_and_not_copied(tree, tmp_path, capsys, monkeypatch):
    size = sum(travel.travelling(tree).values())
    monkeypatch.setattr(travel, "MOST_BYTES", size - 1)
    assert travel.main(["--to", str(tmp_path / "copy")], tree) == 1
    assert f"expected at most {size - 1} bytes, found {size}" in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()
    monkeypatch.setattr(travel, "MOST_BYTES", size)
    assert travel.main(["--to", str(tmp_path / "copy")], tree) == 0


def test_a_wheel_travels_where_the_script_finds_it(tree, tmp_path):
    wheel = tmp_path / "some-1.0-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        archive.writestr("some/__init__.py", "")
    for _ in range(2):  # as it is, and where it lies there already
        assert travel.main(["--with", str(wheel)], tree) == 0
        wheel = tree / "wheels" / wheel.name
    assert travel.main(["--to", str(tmp_path / "copy")], tree) == 0
    assert (tmp_path / "copy/wheels" / wheel.name).read_bytes() == wheel.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--with", "none.whl"], "argument --with: it is 'none.whl', expected a wheel"),
        (["--to", "."], "argument --to: it is '.', expected a folder that is empty or does not exist"),
    ],
)
def test_a_bad_argument_is_refused(tree, capsys, arguments, message):
    with pytest.raises(SystemExit):
        travel.main(arguments, tree)
    assert message in capsys.readouterr().err
