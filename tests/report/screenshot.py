"""Take a picture of a report, as for the README.

    python -m tests.report.screenshot out/report.html docs/report.png

It needs playwright and a browser.
"""

import argparse
import shutil
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import sync_playwright


@contextmanager
def browser():
    """A browser of this machine, without a window; None where there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        yield None
        return
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


def take(page, target, full=False):
    page.screenshot(path=str(target), full_page=full)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="the HTML file")
    parser.add_argument("target", type=Path, help="the PNG file")
    parser.add_argument("--prompt", default="", help="what the address of a prompt has behind #/; none: the overview")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=960)
    parser.add_argument("--full", action="store_true", help="the whole page, not what is seen of it at first")
    args = parser.parse_args()
    with browser() as chromium:
        if chromium is None:
            raise SystemExit("no chromium and no google-chrome is on PATH")
        page = chromium.new_page(
            viewport={"width": args.width, "height": args.height},
            color_scheme="dark" if args.dark else "light",
            reduced_motion="reduce",
        )
        page.goto(f"{args.report.resolve().as_uri()}#/{args.prompt}")
        page.screenshot(path=args.target, full_page=args.full)


if __name__ == "__main__":
    main()
