"""A server's beginning and end: what it needs, how it stops, and the command `stars serve`."""

import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from stars_kernels import BestOf, Engine
from stars_kernels.cli.app import app
from stars_kernels.serve import Limits, make_app, running, serve
from stars_kernels.serve.server import is_loopback
from tests.serve.conftest import SET
from tests.serve.helpers import Paced, error_of, until
from tests.tiny import byte_tokenizer, tiny_language_model, tiny_reward_model

ROOT = Path(__file__).parents[2]
BODY = {"model": "tiny", "prompt": "ab", "seed": 1, "stream": True}


def test_what_a_server_needs(engine, lm, rm, tokenizer):
    plain = dict(tokenizer=tokenizer, progress=False)
    with Engine(lm, rm, **plain) as own:
        with pytest.raises(ValueError, match="needs r\\* and beta, which are not known; expected --calibration FILE"):
            make_app(own)
        known = own.calibrate(["ab", "cd"], calibration_samples=4, seed=0, max_new_tokens=4)
        make_app(own, calibration=known)
    with Engine(lm, rm, rule=BestOf(2), **plain) as own:
        make_app(own)
    with pytest.raises(ValueError, match="the calibration was made with the language model"):
        make_app(engine, calibration=known.__class__(**{**vars(known), "model": "another"}))
    with Engine(lm, rm, progress=False) as own, pytest.raises(ValueError, match="no tokenizer, expected one"):
        make_app(own)
    with pytest.raises(ValueError, match="waiting is 0, expected an integer >= 1"):
        Limits(waiting=0)
    with pytest.raises(ValueError, match="max_time is 0, expected seconds >= "):
        Limits(max_time=0)
    with pytest.raises(ValueError, match="port is 65536, expected 0 to 65535"):
        serve(engine, port=65536)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} of 127.0.0.1 cannot be taken"):
            serve(engine, port=port)


def test_it_warns_where_others_can_ask(engine, caplog):
    assert [host for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::", "my.host") if is_loopback(host)] == [
        "127.0.0.1", "localhost", "::1",
    ]  # fmt: skip
    for host, more, warned in (("0.0.0.0", {}, True), ("0.0.0.0", {"api_key": "x"}, False), ("127.0.0.1", {}, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING), running(engine, host, **more):
            assert ("it asks for no API key" in caplog.text) == warned


@pytest.mark.parametrize("grace", [30.0, 0.3])
def test_a_stop_lets_requests_end(lm, tokenizer, grace):
    """Until the time of grace is over; then what is under way is told so."""
    pace, found = Paced(), []
    pace.free.clear()
    with Engine(lm, pace, tokenizer=tokenizer, **SET) as engine:
        with running(engine, model_name="tiny", limits=Limits(grace=grace)) as url:
            ask = threading.Thread(target=lambda: found.append(httpx.post(f"{url}/v1/completions", json=BODY)))
            ask.start()
            assert pace.asked.wait(30)
            threading.Timer(1.0, pace.free.set).start()
        ask.join()
        if grace > 1:
            assert found[0].status_code == 200 and found[0].text.endswith("data: [DONE]\n\n")
        else:
            assert error_of(found[0], 503)["code"] == "stopping"
        until(lambda: engine.load() == (0, 0))


REWARD = """
import time
def slow(prompts, answers):
    if any(answers):
        time.sleep(0.05)
    return [float(len(answer)) for answer in answers]
"""


def test_the_command_and_sigterm(tmp_path):
    """A process on a port of its own: with a key, drained by SIGTERM, exit code 0."""
    tiny_language_model().save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "rewards.py").write_text(REWARD)
    command = (
        "from stars_kernels.cli import main; main()", "serve", "-m", "tiny", "-r", "rewards:slow", "--port", "0",
        "--reward-threshold", "1000", "--beta", "0.1", "--max-new-tokens", "40", "--set", "segment_size=4",
        "--set", "max_attempts=2", "--set", "eos_token_id=[]",
    )  # fmt: skip
    environment = {**os.environ, "STARS_API_KEY": "key", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", *command], stderr=subprocess.PIPE, cwd=tmp_path, env=environment, text=True
    )
    try:
        url = next(line for line in process.stderr if line.startswith("serving at ")).split()[2]
        with httpx.Client(base_url=url, headers={"Authorization": "Bearer key"}, timeout=60) as http:
            assert httpx.get(f"{url}/models").status_code == 401
            with http.stream("POST", "/completions", json=BODY) as response:
                chunks = response.iter_lines()
                assert "text" in next(chunks)
                process.send_signal(signal.SIGTERM)
                health = url.removesuffix("/v1") + "/health"
                until(lambda: httpx.get(health).status_code == 503)
                with httpx.Client(headers={"Authorization": "Bearer key"}) as other:
                    refused = other.post(f"{url}/completions", json=BODY)
                assert error_of(refused, 503)["code"] == "stopping" and refused.headers["retry-after"]
                rest = [line for line in chunks if line]
            assert rest[-1] == "data: [DONE]" and '"finish_reason": "length"' in rest[-2] and len(rest) == 11
        assert process.wait(30) == 0
        assert process.stderr.read() == "stopped\n"
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "--model is missing"),
        (["-m", "m", "-r", "r", "--waiting", "0"], "waiting is 0, expected an integer >= 1"),
        (["-m", "m", "-r", "r", "--api-key-env", "NOWHERE"], "--api-key-env names NOWHERE, which is not set"),
        (["-m", "m", "-r", "r", "--calibration", "missing.json"], "missing.json"),
        (["-m", "m", "-r", "r", "--set", "waitin=3"], "unknown option 'waitin'; did you mean 'waiting'?"),
        (["-m", "m", "-r", "r", "--rule", "best"], "rule is 'best', expected one of"),
    ],
)
def test_a_wrong_command_line_is_told(arguments, why):
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and why in result.stderr


def test_without_r_star_the_command_says_how_to_make_it(tmp_path):
    for name, model in (("lm", tiny_language_model()), ("rm", tiny_reward_model())):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    result = CliRunner().invoke(app, ["serve", "-m", str(tmp_path / "lm"), "-r", str(tmp_path / "rm"), "--port", "0"])
    assert result.exit_code == 2 and "made by `stars calibrate -m MODEL -r RM" in result.stderr


def test_an_extra_that_is_missing_is_named(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else find_spec(name))
    monkeypatch.delitem(sys.modules, "stars_kernels.serve")
    result = CliRunner().invoke(app, ["serve", "-m", "m", "-r", "r"])
    assert result.exit_code == 2 and "needs fastapi: pip install 'stars-kernels[serve]'" in result.stderr
