"""A browser without a network, and reports of made-up runs."""

import os

import pytest

from stars_kernels import Args, BestOf, BlockBestOf, Cards, Engine, Plain, SpeculativeRejection
from stars_kernels.data import run_file
from stars_kernels.report import write_report
from tests.report.example import write_run
from tests.report.screenshot import browser
from tests.tiny import byte_tokenizer, spelling_model, tiny_reward_model

SET = dict(max_new_tokens=12, progress=False, seed=3, trace="full")
TARGET = dict(reward_threshold=1.0, beta=0.5)
RULES = {
    "stars": dict(segment_size=4, max_attempts=5, **TARGET),
    "hard": dict(segment_size=4, max_attempts=5, accept="hard", **TARGET),
    "cards": dict(rule=Cards(entropy_threshold=1.5, max_attempts=3, segment_size=4, **TARGET)),
    "best-of": dict(rule=BestOf(3)),
    "blocks": dict(rule=BlockBestOf((3, 2), segment_size=4)),
    "plain": dict(rule=Plain()),
    "args": dict(rule=Args(3)),
    "race": dict(rule=SpeculativeRejection(8, segment_size=2)),
}


@pytest.fixture(scope="module")
def engine():
    with Engine(spelling_model("aeinst é"), tiny_reward_model(), tokenizer=byte_tokenizer()) as engine:
        yield engine


@pytest.fixture(scope="module")
def runs(engine, tmp_path_factory):
    """A folder with a run of each rule, named like it."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "prompts.jsonl").write_text('"one"\n{"prompt": "two", "custom_id": "second"}\n""\n')
    for name, settings in RULES.items():
        run_file(engine, folder / "prompts.jsonl", folder / name, **SET, **settings)
    return folder


@pytest.fixture(scope="session")
def chromium():
    with browser() as found:
        if found is None:
            assert not os.environ.get("STARS_EXPECT_BROWSER"), "no browser on PATH"
            pytest.skip("no chromium and no google-chrome is on PATH")
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "stars", prompts=12)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "other", prompts=14, seed=1)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Addresses as of `pages`, of runs with little in them: a test of accessibility looks at every element."""
    folder = tmp_path_factory.mktemp("few")
    first, second = (write_run(folder / name, 4, 3, 4, seed) for seed, name in enumerate(("stars", "other")))
    single = write_report(first, folder / "single.html")
    return {"single": single.as_uri(), "beside": write_report(first, folder / "beside.html", second).as_uri()}


@pytest.fixture(scope="module")
def pages(run, other, tmp_path_factory):
    """Addresses of a report of one run, and of two side by side."""
    folder = tmp_path_factory.mktemp("pages")
    single = write_report(run, folder / "single.html")
    return {"single": single.as_uri(), "beside": write_report(run, folder / "beside.html", other).as_uri()}


@pytest.fixture
def visit(chromium):
    """Open an address; whatever the page asks for, logs as an error or shows as a dialog fails the test."""
    opened, wrong = [], []

    def visit(address, width=1280, height=900, told=None, **settings):
        page = chromium.new_page(viewport={"width": width, "height": height}, reduced_motion="reduce", **settings)
        opened.append(page)
        page.route("**/*", lambda route: route.continue_() if ours(route, address) else refused(route))
        page.on("console", lambda message: heard(message, told))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.goto(address)
        return page

    def heard(message, told):
        if message.type in ("error", "warning") and not (told and told in message.text):
            wrong.append(message.text)

    def ours(route, address):
        return route.request.url.split("#")[0] == address.split("#")[0]

    def refused(route):
        wrong.append(f"asked for {route.request.url}")
        route.abort()

    yield visit
    for page in opened:
        page.close()
    assert not wrong
