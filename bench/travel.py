"""python -m bench.travel: what would travel to a GPU machine, and how large it is; with --to, a copy of it.

That is what git tracks, and what it does not track and does not ignore.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import is_zipfile

ROOT = Path(__file__).parents[1]
MOST_BYTES = 64 * 2**20
SHOWN = 10
WHEELS = "wheels"
"""Where bench/gpu.sh looks for them."""


def travelling(root: Path) -> dict[Path, int]:
    """Return the bytes of each file, largest first; deleted ones are left out, a link counts as itself.

    Raises:
        subprocess.CalledProcessError: `root` is in no git repository.
    """
    listed = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0")[:-1]
    files = {Path(name): root / name for name in names}
    there = {name: file.lstat().st_size for name, file in files.items() if file.is_symlink() or file.is_file()}
    return dict(sorted(there.items(), key=lambda item: (-item[1], item[0])))


def copy(root: Path, names: list[Path], to: Path) -> None:
    """Copy files with their modes and links as links."""
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, to / name, follow_symlinks=False)


def wheel(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".whl" or not is_zipfile(path):
        raise argparse.ArgumentTypeError(f"it is {text!r}, expected a wheel")
    return path


def new_folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise argparse.ArgumentTypeError(f"it is {text!r}, expected a folder that is empty or does not exist")
    return path


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.travel", description=__doc__)
    parser.add_argument("--with", dest="wheels", type=wheel, action="append", default=[], metavar="WHEEL",
                        help=f"put it in {WHEELS}/, where bench/gpu.sh finds it; may be repeated")  # fmt: skip
    parser.add_argument("--to", type=new_folder, metavar="FOLDER", help="make a copy there")
    args = parser.parse_args(arguments)
    for file in args.wheels:
        (root / WHEELS).mkdir(exist_ok=True)
        if file.resolve().parent != (root / WHEELS).resolve():
            shutil.copy2(file, root / WHEELS)
    files = travelling(root)
    size = sum(files.values())
    for name, count in list(files.items())[:SHOWN]:
        print(f"{count / 2**20:8.2f} MiB  {name}")
    print(f"{size / 2**20:8.2f} MiB  in {len(files)} files, of {MOST_BYTES / 2**20:.0f} MiB that may travel")
    if size > MOST_BYTES:
        print(f"expected at most {MOST_BYTES} bytes, found {size}", file=sys.stderr)
        return 1
    if args.to:
        copy(root, list(files), args.to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
