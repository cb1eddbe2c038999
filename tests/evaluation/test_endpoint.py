"""A judge behind an endpoint: a real server of chat completions, asked by the real client."""

import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("openai", reason="the library openai is not installed")

from stars_kernels import BestOf
from stars_kernels.evaluation import EndpointJudge, JudgeError, compare
from stars_kernels.evaluation.answers import Answer
from stars_kernels.evaluation.judges import UNREADABLE, Question

KEY = "sk-never-on-disk"
QUICK = dict(at_once=4, retries=0, timeout=20)


class Server(ThreadingHTTPServer):
    """Replies by `reply(text) -> (status, body)`; notes what it was asked, and how many were on their way at once."""

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.asked, self.headers, self.now, self.most = reply, [], [], 0, 0
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.asked.append(body)
            server.headers.append(self.headers["Authorization"])
            server.now += 1
            server.most = max(server.most, server.now)
        assert self.path == "/v1/chat/completions"
        status, reply = server.reply(body["messages"][0]["content"])
        with server.lock:
            server.now -= 1
        data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Keep stderr quiet."""


def says(content):
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


@contextmanager
def serving(reply):
    server = Server(reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answers_in(text):
    """The two answers in a question of the default template."""
    _, _, rest = text.partition("[Answer A]\n")
    first, _, rest = rest.partition("\n\n[Answer B]\n")
    return first, rest.partition("\n\nReply with one letter")[0]


def questions(count, **changes):
    answer = Answer("yes", [1], 0.0, {}, {})
    one = dict(rule="r", prompt="p", text="Is it?", answers=(answer, Answer("no", [2], 0.0, {}, {}))) | changes
    return [Question(key=f"k{i}", prompt_id=i, **one) for i in range(count)]


def found(judge, count=1, **changes):
    return [what for _, what in judge.ask(questions(count, **changes))]


@pytest.mark.usefixtures("no_pictures")
def test_a_comparison_judged_by_an_endpoint(engine, prompts, rules, tmp_path, monkeypatch):
    def later(text):
        first, second = answers_in(text)
        return says("A" if first > second else " B\n" if first < second else "C")

    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(later) as server:
        judge = EndpointJudge(server.url, "m", api_key_env="JUDGE_KEY", **QUICK)
        first = compare(engine, prompts, tmp_path / "out", rules, judge=judge)
        count = len(server.asked)
        again = compare(engine, prompts, tmp_path / "out", rules, judge=judge)
        assert again == first and len(server.asked) == count  # kept
        assert all(one["temperature"] == 0 and one["model"] == "m" for one in server.asked)
        assert set(server.headers) == {f"Bearer {KEY}"} and server.most <= 4
    for one in first.figures[1:]:
        against = one.against_plain
        assert against.wins + against.ties + against.losses == 7 and against.flip_rate == 0 and against.unreadable == 0
    assert not any(KEY in path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file())


@pytest.mark.usefixtures("no_pictures")
def test_a_judge_that_always_says_a_gets_ties_and_flips_alone(engine, prompts, tmp_path):
    with serving(lambda text: says("A")) as server:
        judge = EndpointJudge(server.url, "m", **QUICK)
        figures = compare(engine, prompts, tmp_path / "out", {"b": {"rule": BestOf(6)}}, judge=judge).figures
    against = figures[1].against_plain
    assert (against.wins, against.ties, against.losses, against.flip_rate, against.win_rate.mean) == (0, 7, 0, 1.0, 0.5)


@pytest.mark.usefixtures("no_pictures")
def test_unreadable_replies_are_counted_apart(engine, prompts, tmp_path):
    replies = iter([says("The first."), says("A"), says("AB")])
    with serving(lambda text: next(replies, says("B"))) as server:
        judge = EndpointJudge(server.url, "m", **(QUICK | {"at_once": 1}))
        rules = {"b": {"rule": BestOf(6)}}
        figures = compare(engine, prompts, tmp_path / "out", rules, judge=judge).figures
        count = len(server.asked)
        assert compare(engine, prompts, tmp_path / "out", rules, judge=judge).figures == figures
        assert len(server.asked) == count
    against, verdicts = figures[1].against_plain, (tmp_path / "out" / "verdicts.jsonl").read_text()
    assert against.unreadable == 2 and against.wins + against.ties + against.losses == 5 and against.flip_rate == 1.0
    assert '"verdict": "unreadable", "reply": "The first."' in verdicts
    assert "| 2 | 0 |" in (tmp_path / "out" / "comparison.md").read_text()


@pytest.mark.parametrize(
    "reply",
    [
        says(None), says(""), says("a"), says("A or B"), says("[[A]]"), says(["A"]),
        (200, b""), (200, b"{"), (200, b"[]"), (200, {"choices": []}),
        (200, {"choices": {"x": 1}}), (200, {"choices": [{}]}), (200, {"choices": [None]}),
    ],
)  # fmt: skip
def test_a_malformed_reply_is_unreadable(reply):
    with serving(lambda text: reply) as server:
        (one,) = found(EndpointJudge(server.url, "m", **QUICK))
    assert one["verdict"] == UNREADABLE and "reply" in one


@pytest.mark.parametrize("reply", [(400, {"error": {"message": "too long"}}), (413, b"<html>"), (422, {})])
def test_a_request_that_is_refused_is_no_verdict(reply):
    with serving(lambda text: reply) as server:
        (one,) = found(EndpointJudge(server.url, "m", **QUICK))
    assert list(one) == ["error"] and f"HTTP {reply[0]}" in one["error"]


@pytest.mark.parametrize(("letter", "verdict"), [("A", "first"), (" B ", "second"), ("C\n", "tie")])
def test_letters(letter, verdict):
    with serving(lambda text: says(letter)) as server:
        assert found(EndpointJudge(server.url, "m", **QUICK)) == [{"verdict": verdict}]


def test_a_server_s_fault_is_tried_again(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    statuses = iter([500, 429, 503])
    with serving(lambda text: says("A") if (status := next(statuses, 200)) == 200 else (status, {})) as server:
        assert found(EndpointJudge(server.url, "m", retries=3)) == [{"verdict": "first"}]
        assert len(server.asked) == 4
    with serving(lambda text: (500, {"error": f"I saw {KEY}"})) as server:
        monkeypatch.setenv("JUDGE_KEY", KEY)
        (one,) = found(EndpointJudge(server.url, "m", retries=2, api_key_env="JUDGE_KEY"))
        assert list(one) == ["error"] and "HTTP 500" in one["error"] and "***" in one["error"]
        assert len(server.asked) == 3 and KEY not in one["error"]


def test_a_server_that_is_ill_ends_it_soon():
    with serving(lambda text: (500, {})) as server, pytest.raises(JudgeError, match=r"8 requests .* failed in a row"):
        found(EndpointJudge(server.url, "m", **QUICK), count=200)
    assert len(server.asked) < 20


@pytest.mark.usefixtures("no_pictures")
def test_failed_verdicts_are_asked_again_on_demand(engine, prompts, tmp_path):
    replies, rules = iter([(500, {})]), {"b": {"rule": BestOf(6)}}
    with serving(lambda text: next(replies, says("C"))) as server:
        judge = EndpointJudge(server.url, "m", **(QUICK | {"at_once": 1}))
        first = compare(engine, prompts, tmp_path / "out", rules, judge=judge)
        assert (
            first.figures[1].against_plain.failed == 1 and first.errors == 2 + 1
        )  # and the empty prompt, under both rules
        assert compare(engine, prompts, tmp_path / "out", rules, judge=judge) == first
        again = compare(engine, prompts, tmp_path / "out", rules, judge=judge, retry=True)
        assert again.figures[1].against_plain.failed == 0 and again.figures[1].against_plain.ties == 7


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_ends_it_and_what_was_said_is_yielded(status):
    asked = Counter()

    def reply(text):
        asked["n"] += 1
        return says("A") if asked["n"] <= 3 else (status, {"error": {"message": "no"}})

    got = []
    with serving(reply) as server, pytest.raises(JudgeError, match=rf"m at http://127.0.0.1.* refused: HTTP {status}"):
        for _, what in EndpointJudge(server.url, "m", **(QUICK | {"at_once": 1})).ask(questions(30)):
            got.append(what)
    assert got == [{"verdict": "first"}] * 3 and len(server.asked) <= 6


def test_an_endpoint_that_is_away():
    with serving(lambda text: says("A")) as server:
        url = server.url
    with pytest.raises(JudgeError, match=r"the judge's endpoint http://127.0.0.1:\d+/v1/ cannot be reached: "):
        found(EndpointJudge(url, "m", **QUICK))


def test_a_template_of_one_s_own_and_braces_in_answers():
    seen = []
    with serving(lambda text: seen.append(text) or says("A")) as server:
        judge = EndpointJudge(server.url, "m", template="{first}|{second}|{prompt}|{other}", **QUICK)
        answers = (Answer("{second}", [1], 0.0, {}, {}), Answer("{prompt}", [2], 0.0, {}, {}))
        found(judge, answers=answers, text="{first}")
        assert seen == ["{second}|{prompt}|{first}|{other}"]
        assert judge.identity != EndpointJudge(server.url, "m", **QUICK).identity


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"endpoint": "localhost:8000"}, "the judge's endpoint is 'localhost:8000', expected a URL"),
        ({"endpoint": "http://me:secret@localhost/v1"}, "the judge's endpoint has a name or password in it"),
        ({"model": None}, "the judge's model is None, expected its name"),
        ({"template": "{prompt} {first}"}, r"the judge's template has no \{second\}"),
        ({"at_once": 0}, "at-once is 0"),
        ({"retries": -1}, "the judge's retries is -1"),
        ({"max_tokens": 0}, "the judge's max-tokens is 0"),
        ({"api_key_env": "NO_SUCH_VARIABLE"}, "api-key-env is 'NO_SUCH_VARIABLE', which is not set"),
    ],
)
def test_what_cannot_be_meant_is_told(changes, why):
    with pytest.raises(ValueError, match=why):
        EndpointJudge(**{"endpoint": "http://localhost:1/v1", "model": "m", **changes})


def test_no_key_is_sent_that_was_not_named(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(lambda text: says("A")) as server:
        found(EndpointJudge(server.url, "m", **QUICK))
        assert server.headers == ["Bearer none"]
