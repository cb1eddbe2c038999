"""What a server refuses: in OpenAI's form, with a status below 500, whatever it is sent; and it goes on."""

import copy
import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import httpx
import pytest

from stars_kernels.serve import Limits, running
from tests.serve.helpers import CHAT, chat, error_of, until

TEXT = {"model": "tiny", "prompt": "ab", "seed": 3, "max_tokens": 8, "stars": {"segment_size": 4}}
WRONG = [
    (chat(logprobs=True), "logprobs is True, which is not supported; expected null or False", "logprobs"),
    (chat(tools=[{"type": "function"}]), "tools is [{'type': 'function'}], which is not supported", "tools"),
    (chat(response_format={"type": "json_object"}), "expected null or {'type': 'text'}", "response_format"),
    (chat(frequency_penalty=0.1), "frequency_penalty is 0.1", "frequency_penalty"),
    (chat(frequency_penalty=False), "frequency_penalty is False", "frequency_penalty"),
    (chat(logit_bias={"5": 1}), "logit_bias is {'5': 1}", "logit_bias"),
    (TEXT | {"echo": True}, "echo is True", "echo"),
    (TEXT | {"best_of": 2}, "best_of is 2, which is not supported; expected null or 1", "best_of"),
    (chat(temprature=1), "unknown key 'temprature'; did you mean 'temperature'?", "temprature"),
    (chat(temperature=0), "temperature is 0.0, expected 1e-30 to 1e30: at 0 all attempts", "temperature"),
    (chat(temperature="1"), "temperature is '1': Input should be a valid number", "temperature"),
    (chat(top_p=1.5), "top_p is 1.5, expected in (0, 1]", "top_p"),
    (chat(max_tokens=0), "max_tokens is 0: Input should be greater than or equal to 1", "max_tokens"),
    (chat(max_tokens=2**40), "max_new_tokens is 1099511627776, expected less than", "max_tokens"),
    (chat(max_tokens=3, max_completion_tokens=4), "max_tokens is 3 and max_completion_tokens is 4", None),
    (chat(stop=list("abcde")), "stop has 5 strings, expected at most 4", "stop"),
    (chat(stop=""), "stop_strings is ('',), expected non-empty strings", "stop"),
    (chat(stop="</s>"), "stop string '</s>' is a special token", None),
    (chat(n=0), "n is 0", "n"),
    (chat(n=33), "n is 33, expected at most 32 answers of a request", "n"),
    (TEXT | {"prompt": ["a"] * 20, "n": 2}, "20 prompts with n = 2, expected at most 32", "n"),
    (chat(seed=1.5), "seed is 1.5: Input should be a valid integer", "seed"),
    (chat(seed=2**4097), "seed is <an integer of 4098 bits>, expected an integer or None", "seed"),
    (chat(stream_options={"include_usage": True}), "stream_options is given without stream", "stream_options"),
    (chat(messages=[]), "messages is []", "messages"),
    ({"model": "tiny"}, "messages is missing", "messages"),
    (chat(messages=[{"role": "user"}]), "messages.0.content is missing, expected a text", "messages.0.content"),
    (chat(messages=[{"role": "user", "content": 5}]), "messages.0.content is 5", "messages.0.content"),
    (chat(messages=[{"role": "user", "content": "a", "name": "b"}]), "name is not supported", "messages.0.name"),
    (chat(messages=[*CHAT, {"role": "user", "content": [{"type": "image_url"}]}]), "a part that is no text", None),
    (chat(messages=[{"role": "assistant", "content": "a"}]), "its last message is the assistant's", None),
    (chat("long" * 60), "tokens, expected less than the context limit of 160", None),
    (TEXT | {"prompt": ""}, "it has no tokens, expected at least one", None),
    (TEXT | {"prompt": [999]}, "token id 999", None),
    (TEXT | {"prompt": [[1], "a", None]}, "expected a string, token ids, or a list of", "prompt"),
    (TEXT | {"prompt": CHAT}, "expected a string, token ids, or a list of strings or of token ids", "prompt"),
    (chat(stars={"rule": "best"}), "stars.rule is 'best', expected one of args, best-of", None),
    (chat(stars={"rule": "best-of"}), "stars.rule is 'best-of' without n, expected a value for it", None),
    (chat(stars={"rule": ["stars"]}), "stars.rule is ['stars'], expected one of", None),
    (chat(stars={"rule": "best-of", "n": 2, "alpha": 0.7}), "alpha is given beside rule=BestOf(n=2)", "stars.alpha"),
    (chat(stars={"rule": "best-of", "n": 300}), "n is 300, expected at most 256", "stars.n"),
    (chat(stars={"rule": "block-best-of", "n": [2, 999]}), "n is 999, expected at most 256", "stars.n"),
    (chat(stars={"segmentsize": 3}), "unknown setting 'segmentsize'; did you mean 'segment_size'?", None),
    (chat(stars={"batch_size": 3}), "stars.batch_size is the server's own setting", "stars.batch_size"),
    (chat(stars={"seed": 3}), "stars.seed is given twice", "stars.seed"),
    (chat(stars={"beta": 0}), "beta is 0, expected a finite number > 0", "stars.beta"),
    (chat(stars={"accept": []}), 'accept is [], expected "soft" or "hard"', "stars.accept"),
    (chat(stars={"eos_token_id": 9**99}), "eos_token_id", None),
    (chat(stars=[]), "stars is []", "stars"),
]  # fmt: skip


def post(http, body):
    return http.post("/v1/completions" if "prompt" in body else "/v1/chat/completions", json=body)


@pytest.mark.parametrize(("body", "message", "param"), WRONG, ids=lambda value: str(value)[:40])
def test_a_request_that_is_wrong(http, body, message, param):
    error = error_of(post(http, body), 400)
    assert message in error["message"] and error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param
    if "stream_options" not in body:
        assert error_of(post(http, body | {"stream": True}), 400)["message"] == error["message"]


def test_another_model(http):
    error = error_of(post(http, chat(model="gpt-4")), 404)
    assert error["code"] == "model_not_found" and "'gpt-4' is not served, expected 'tiny'" in error["message"]


BAD_VALUES = [
    None, True, "x", "", 5, -1, 0.5, [], {}, [[]], [None], {"a": 1}, 10**400, -(10**30), 1e300, "\x00", ["x"] * 50,
    [{"role": 1, "content": "a"}], {"rule": {}}, {"n": -1}, {"segment_size": "4"}, {"temperature": [1]}, {"": 0},
]  # fmt: skip
"""Each is a wrong value of at least one key."""


def mutated(rng):
    """A body that is broken: bytes, and whether it cannot be right by any luck."""
    body = copy.deepcopy(rng.choice([TEXT, chat(max_tokens=8), chat(max_tokens=8, stars={"rule": "best-of", "n": 2})]))
    kind = rng.randrange(8)
    data = json.dumps(body).encode()
    if kind == 0:
        return data[: rng.randrange(len(data))], True
    if kind == 1:
        at = data.index(rng.choice([b"tiny", b"model"])) + rng.randrange(4)
        return data[:at] + bytes([rng.randrange(128, 256)]) + data[at:], True
    if kind == 2:
        bad = rng.choice(
            [b"NaN", b"Infinity", b"-Infinity", b"1e", b"01", b"'x'", b"9" * 5000, b'"\\ud800"', b'"\x01"']
        )
        return data.replace(b'"tiny"', bad), True
    if kind == 3:
        depth = rng.randrange(150, 3000)
        opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
        return data.replace(b'"tiny"', b'"tiny", "user": ' + opening * depth + b"1" + closing * depth), depth > 250
    if kind == 4:
        body[rng.choice(["x", "modell", "MODEL", "", "a" * 10_000, "__proto__", "\u2028"])] = rng.choice(BAD_VALUES)
        return json.dumps(body).encode(), True
    if kind == 5:
        return json.dumps(rng.choice([[], [body], "x", 5, None, True, [[[]]]])).encode(), True
    if kind == 6:
        at = rng.randrange(len(data))
        return data[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 4))) + data[at + 1 :], False
    names = (
        "model",
        "prompt",
        "messages",
        "max_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "n",
        "stream",
        "stars",
    )
    body[rng.choice(names)] = rng.choice(BAD_VALUES)
    return json.dumps(body).encode(), False


def test_a_thousand_broken_bodies(url, http, engine):
    rng = random.Random(7)

    def send(bodies):
        """Send some over one connection; returns how many were refused."""
        connection, refused = HTTPConnection(url.removeprefix("http://"), timeout=120), 0
        for data, hopeless in bodies:
            path = "/v1/completions" if b'"prompt"' in data else "/v1/chat/completions"
            connection.request("POST", path, data, {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                told = response.read()
            if response.status == 200:  # what was changed is of no matter, or is right
                assert not hopeless, data[:300]
                continue
            assert 400 <= response.status < 500, (response.status, told, data[:300])
            error_of(httpx.Response(response.status, content=told), response.status)
            refused += 1
        connection.close()
        return refused

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(send, [[mutated(rng) for _ in range(66)] for _ in range(16)])) >= 1000
    assert post(http, chat()).json()["choices"][0]["message"]["content"] == engine.decode(CHAT, seed=3).text
    until(lambda: engine.load() == (0, 0))


def test_bodies_of_another_kind_or_too_large(engine):
    with (
        running(engine, model_name="tiny", limits=Limits(body_bytes=1000, body_time=0.5)) as url,
        httpx.Client(base_url=url) as http,
    ):
        data = json.dumps(chat()).encode()
        for kind in ("text/plain", "application/x-www-form-urlencoded"):
            error_of(http.post("/v1/chat/completions", content=data, headers={"Content-Type": kind}), 415)
        error_of(http.post("/v1/chat/completions", json=chat("x" * 2000)), 413)
        parts = (b"x" * 600 for _ in range(3))
        as_json = {"Content-Type": "application/json; charset=utf-8"}
        error_of(http.post("/v1/chat/completions", content=parts, headers=as_json), 413)
        assert http.post("/v1/chat/completions", content=data, headers=as_json).status_code == 200
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as peer:  # a body that does not come
            kind = "Content-Type: application/json"
            peer.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{kind}\r\nContent-Length: 9\r\n\r\n{{".encode())
            assert peer.recv(100).startswith(b"HTTP/1.1 408 ")


def test_an_api_key(engine):
    with (
        running(engine, model_name="tiny", api_key="sécret") as url,
        httpx.Client(base_url=url) as http,
    ):
        for wrong in (None, "Bearer", "Bearer sécre", "Bearer sécrets", "Basic sécret", "sécret"):
            headers = {} if wrong is None else {"Authorization": wrong.encode()}
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                error = error_of(http.get(path, headers=headers), 401)
            assert error["code"] == "invalid_api_key" and error["type"] == "authentication_error"
            refused = http.post("/v1/chat/completions", json=chat(), headers=headers)
            assert error_of(refused, 401) and refused.headers["www-authenticate"] == "Bearer"
        assert http.get("/health").status_code == 200
        right = {"Authorization": "Bearer sécret".encode()}
        assert http.get("/v1/models", headers=right).status_code == 200
        assert http.post("/v1/chat/completions", json=chat(), headers=right).status_code == 200
