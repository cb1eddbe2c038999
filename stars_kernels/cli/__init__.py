"""The command `stars`: a thin layer over the package's functions."""

from __future__ import annotations

import sys
from importlib.util import find_spec

NEEDED = ("typer", "rich", "yaml")


def main() -> None:
    """Run the command line; says what is missing where the extra `cli` is not installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(f"stars needs {', '.join(missing)}: pip install 'stars-kernels[cli]'")
    from stars_kernels.cli.app import app

    app()
