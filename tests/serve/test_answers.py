"""Answers by OpenAI's own client are those of `engine.decode`, one by one, as streams, and of many clients at once."""

import asyncio
import json
import math
import random
import socket
import threading

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

from stars_kernels import BestOf, Engine
from stars_kernels.serve import Limits, running
from stars_kernels.serve.answers import FINISH, of
from tests.serve.conftest import SET
from tests.serve.helpers import CHAT, Paced, chat, error_of, metric, until


@pytest.fixture(scope="module")
def client(url):
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_chat(engine, client):
    found = client.chat.completions.create(model="tiny", messages=CHAT, seed=3, max_completion_tokens=9)
    (choice,), expected = found.choices, engine.decode(CHAT, seed=3, max_new_tokens=9)
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert choice.finish_reason == FINISH[expected.finish_reason] == "length"
    assert choice.stars["reward"] == expected.reward and choice.stars["seed"] == 3
    assert choice.stars["request_id"] == expected.request_id and choice.stars["counts"]["attempts"] > 0
    assert found.usage.completion_tokens == len(expected.token_ids) == 9
    assert found.usage.prompt_tokens == len("user: hi\nassistant:") == expected.counts.prompt
    assert found.id.startswith("chatcmpl-") and found.object == "chat.completion" and found.model == "tiny"
    again = client.chat.completions.create(model="tiny", messages=CHAT, seed=3, max_tokens=9)
    assert again.choices[0].message == choice.message and again.system_fingerprint == found.system_fingerprint


def test_a_stream_is_the_answer_segment_by_segment(engine, client):
    expected = engine.decode(CHAT, seed=5)
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=CHAT, seed=5, stream=True, stream_options={"include_usage": True}
        )
    )
    *pieces, end, last = chunks
    assert "".join(chunk.choices[0].delta.content for chunk in pieces) == expected.text
    told = [chunk.choices[0].stars for chunk in pieces]
    assert [(s["reward"], s["attempts"], s["outcome"]) for s in told] == [
        (s.reward, s.attempts, s.outcome) for s in expected.segments
    ]
    assert [chunk.choices[0].delta.role for chunk in pieces] == ["assistant", None, None]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, None, "length"]
    assert end.choices[0].stars["reward"] == expected.reward
    assert last.choices == [] and last.usage.completion_tokens == 12 and pieces[0].usage is None
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_ends_with_done(http):
    with http.stream("POST", "/v1/completions", json={"model": "tiny", "prompt": "ab", "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.read().decode("ascii").split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(json.loads(line[6:])["choices"] for line in lines[:-2])


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_to_several_prompts(engine, client, stream):
    """Choice i is decoded with the seed plus i; equal prompts have different answers."""
    prompts = ["ab", [5, 6, 7], "ab"] if stream else ["ab", "cd", "ab"]
    found = client.completions.create(model="tiny", prompt=prompts, n=2, seed=7, stream=stream)
    expected = [engine.decode(prompts[i // 2], seed=7 + i).text for i in range(6)]
    if stream:
        texts = [""] * 6
        for chunk in found:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    else:
        texts = [choice.text for choice in found.choices]
        assert [choice.stars["seed"] for choice in found.choices] == list(range(7, 13))
        assert found.usage.prompt_tokens == 6 and found.usage.completion_tokens == 72
    assert texts == expected and texts[0] != texts[4]


def test_settings_of_a_request(engine, client):
    cases = [
        (dict(temperature=0.5, top_p=0.9, max_tokens=5), dict(temperature=0.5, top_p=0.9, max_new_tokens=5)),
        (dict(stop=["e", "t"]), dict(stop_strings=("e", "t"))),
        (dict(stop="e"), dict(stop_strings="e")),
        (dict(extra_body={"stars": {"rule": "best-of", "n": 3}}), dict(rule=BestOf(3))),
        (dict(extra_body={"stars": {"segment_size": 6, "alpha": 0.2, "top_k": None}}),
         dict(segment_size=6, alpha=0.2, top_k=None)),
        (dict(extra_body={"stars": {"reward_threshold": 1, "beta": 0.5, "accept": "soft", "eos_token_id": []}}),
         dict(reward_threshold=1.0, beta=0.5, eos_token_id=())),
        (dict(user="me", frequency_penalty=0, n=1, logprobs=False, presence_penalty=0.0, tools=[],
              response_format={"type": "text"}), {}),
    ]  # fmt: skip
    for given, expected in cases:
        found = client.chat.completions.create(model="tiny", messages=CHAT, seed=1, **given)
        assert found.choices[0].message.content == engine.decode(CHAT, seed=1, **expected).text, given


def test_a_rule_of_the_server_is_changed_by_its_own_settings(engine, tokenizer, lm, rm):
    """And r*, beta of the server hold for a request that names a rule which has them."""
    with Engine(lm, rm, tokenizer=tokenizer, rule=BestOf(2), max_new_tokens=8, progress=False) as own:
        known = engine.calibrate(["ab", "cd"], calibration_samples=4, seed=0, max_new_tokens=4)
        with running(own, model_name="tiny", calibration=known) as url, httpx.Client(base_url=url) as http:
            target = {"reward_threshold": known.reward_threshold, "beta": known.beta}
            for stars, expected in [
                (None, {}),
                ({"n": 3}, {"rule": BestOf(3)}),
                ({"rule": "stars", "segment_size": 4}, {"rule": None, "segment_size": 4, **target}),
            ]:
                answer = http.post("/v1/completions", json={"model": "tiny", "prompt": "ab", "seed": 2, "stars": stars})
                assert answer.json()["choices"][0]["text"] == own.decode("ab", seed=2, **expected).text
        with running(own, model_name="tiny") as url, httpx.Client(base_url=url) as http:
            body = {"model": "tiny", "prompt": "ab", "stars": {"rule": "stars"}}
            assert (
                "needs reward_threshold (r*) and beta"
                in error_of(http.post("/v1/completions", json=body), 400)["message"]
            )


def test_messages_of_parts_and_of_earlier_answers(engine, client):
    answer = client.chat.completions.create(model="tiny", messages=CHAT, seed=1).choices[0].message.model_dump()
    parts = {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}
    found = client.chat.completions.create(model="tiny", messages=[*CHAT, answer, parts], seed=1)
    turns = [*CHAT, {"role": "assistant", "content": answer["content"]}, {"role": "user", "content": "one two"}]
    assert found.choices[0].message.content == engine.decode(turns, seed=1).text


def test_sixteen_clients_at_once(engine, url):
    """Each answer is the one that it is alone, whether streamed or not."""
    texts = [f"client {i}" for i in range(16)]

    async def ask(client, i):
        create = client.completions.create
        if i % 2:
            return (await create(model="tiny", prompt=texts[i], seed=i)).choices[0].text
        stream = await create(model="tiny", prompt=texts[i], seed=i, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def main():
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(16)))

    assert asyncio.run(main()) == [engine.decode(text, seed=i).text for i, text in enumerate(texts)]


def test_clients_that_hang_up(engine, url, http):
    """At any moment: the others have their answers, and no slot is lost."""
    rng, expected = random.Random(0), {i: engine.decode(f"text {i}", seed=i).text for i in range(8)}

    def leave(i):
        """Ask over a bare socket, and close it after a while."""
        body = json.dumps(
            {"model": "tiny", "prompt": f"gone {i}", "stream": bool(i % 2), "max_tokens": 60, "n": 1 + i % 3}
        )
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as peer:
            peer.sendall(f"{head}\r\n\r\n{body[: len(body) if i % 5 else 9]}".encode())
            if i % 7 == 0:  # reset, without a farewell
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            if i % 3 == 0:
                peer.settimeout(delays[i])
                try:
                    peer.recv(100)
                except TimeoutError:
                    return
            else:
                threading.Event().wait(delays[i])

    delays = [rng.random() * 0.3 for _ in range(24)]
    leavers = [threading.Thread(target=leave, args=[i]) for i in range(24)]
    found = {}

    def stay(i):
        body = {"model": "tiny", "prompt": f"text {i}", "seed": i}
        found[i] = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]

    threads = [*leavers, *(threading.Thread(target=stay, args=[i]) for i in range(8))]
    rng.shuffle(threads)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    until(lambda: engine.load() == (0, 0))
    assert metric(http, "stars_slots_active") == 0 == metric(http, "stars_waiting")
    assert metric(http, 'stars_requests_total{status="499"}') > 0
    test_sixteen_clients_at_once(engine, url)


def test_a_client_hangs_up_before_its_first_segment_and_while_it_waits(lm, tokenizer):
    pace = Paced()
    with (
        Engine(lm, pace, tokenizer=tokenizer, batch_size=1, **SET) as engine,
        running(engine, model_name="tiny") as url,
        httpx.Client(base_url=url) as http,
    ):
        for stream in (False, True):
            pace.asked.clear(), pace.free.clear()
            for text in ("has the slot", "waits"):
                with pytest.raises(httpx.ReadTimeout):
                    http.post("/v1/completions", json={"model": "tiny", "prompt": text, "stream": stream}, timeout=0.3)
            assert pace.asked.wait(30)
            until(lambda: metric(http, "stars_waiting") == 0)  # already: it does not take the engine's next round
            pace.free.set()
            until(lambda: engine.load() == (0, 0))
        assert metric(http, 'stars_requests_total{status="499"}') == 4


def test_too_many_wait(lm, tokenizer):
    pace, found = Paced(), []
    pace.free.clear()
    with (
        Engine(lm, pace, tokenizer=tokenizer, batch_size=1, **SET) as engine,
        running(engine, model_name="tiny", limits=Limits(waiting=2)) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        body = {"model": "tiny", "prompt": "ab", "seed": 1}
        threads = [threading.Thread(target=lambda: found.append(http.post("/v1/completions", json=body)))]
        threads[0].start()
        assert pace.asked.wait(30) and engine.load() == (0, 1)
        for n in (1, 2):
            threads.append(threading.Thread(target=lambda: found.append(http.post("/v1/completions", json=body))))
            threads[-1].start()
            until(lambda n=n: metric(http, "stars_waiting") == n)
        refused = http.post("/v1/completions", json=body)
        assert error_of(refused, 429)["code"] == "too_many_waiting" and int(refused.headers["retry-after"]) >= 1
        assert error_of(http.post("/v1/completions", json=body | {"stream": True}), 429)
        assert "at most 2 answers" in error_of(http.post("/v1/completions", json=body | {"n": 3}), 400)["message"]
        pace.free.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in found] == [200] * 3
        assert http.post("/v1/completions", json=body).status_code == 200
        assert metric(http, 'stars_requests_total{status="429"}') == 2


def test_requests_of_many_settings_all_have_their_turn(engine, url, http):
    """Eleven kinds of settings, in a mix: more than have memory at once."""

    async def main():
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            bodies = [{"model": "tiny", "prompt": f"{i}", "seed": i, "temperature": 1 + i % 11 / 10} for i in range(22)]
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))

    for i, answer in enumerate(asyncio.run(main())):
        expected = engine.decode(f"{i}", seed=i, temperature=1 + i % 11 / 10)
        assert answer.json()["choices"][0]["text"] == expected.text
    assert engine.load() == (0, 0)


def test_time(lm, rm, tokenizer):
    """What is decided by then is the answer; where nothing is, status 503 says so."""
    slow = dict(SET, max_new_tokens=100, rule=None, eos_token_id=())

    def reward(prompts, answers):
        if any(len(answer) > 8 for answer in answers):
            threading.Event().wait(0.05)
        return [0.0] * len(answers)

    with (
        Engine(lm, reward, tokenizer=tokenizer, **slow) as engine,
        running(engine, model_name="tiny", limits=Limits(max_time=0.7)) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        body = {"model": "tiny", "prompt": "ab", "seed": 1}
        (choice,) = http.post("/v1/completions", json=body).json()["choices"]
        assert choice["finish_reason"] == "length" and choice["stars"]["finish_reason"] == "time"
        whole = engine.decode("ab", seed=1).text
        assert 0 < len(choice["text"]) < len(whole) and whole.startswith(choice["text"])
        late = body | {"stars": {"max_time": 1e-9}}
        assert error_of(http.post("/v1/completions", json=late), 503)["code"] == "timeout"
        assert error_of(http.post("/v1/completions", json=late | {"stream": True}), 503)
        long = body | {"stars": {"max_time": 3}}
        assert (
            "max_time is 3.0, expected at most 0.7" in error_of(http.post("/v1/completions", json=long), 400)["message"]
        )


def test_failures_of_the_engine(lm, tokenizer, caplog):
    """Status 500 with the message; once a stream has begun, an event of it. The others go on."""

    def reward(prompts, answers):
        for prompt, answer in zip(prompts, answers, strict=True):
            if ("!" in prompt and answer) or ("?" in prompt and len(answer) > 6):
                raise ValueError("no reward for this")
        return [float(len(answer)) for answer in answers]

    with (
        Engine(lm, reward, tokenizer=tokenizer, **dict(SET, eos_token_id=(), max_new_tokens=40)) as engine,
        running(engine, model_name="tiny") as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        http = client._client
        for stream in (False, True):
            body = {"model": "tiny", "prompt": "ab!", "seed": 1, "stream": stream}
            error = error_of(http.post(f"{url}/v1/completions", json=body), 500)
            assert "no reward for this" in error["message"] and error["type"] == "server_error"
        chunks = client.completions.create(model="tiny", prompt="ab?", seed=1, stream=True)
        with pytest.raises(Exception, match="no reward for this"):
            for chunk in chunks:
                assert chunk.choices[0].finish_reason is None
        good = client.completions.create(model="tiny", prompt="ab", seed=1)
        assert good.choices[0].text == engine.decode("ab", seed=1).text
        assert engine.load() == (0, 0)
    assert "no reward for this" in caplog.text


def test_what_is_no_number_is_null(engine):
    output = engine.decode("ab", seed=1)
    output.reward, output.prompt_reward = math.nan, -math.inf
    told = json.loads(json.dumps(of(output), allow_nan=False))
    assert told["reward"] is None and told["prompt_reward"] is None


def test_other_routes(http, engine):
    assert http.get("/health").json() == {"status": "ok"}
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["tiny"]
    assert http.get("/v1/models/tiny").json()["id"] == "tiny"
    error_of(http.get("/v1/models/other"), 404)
    error_of(http.get("/v1/nothing"), 404)
    error_of(http.get("/v1/completions"), 405)
    before = {kind: metric(http, f'stars_tokens_total{{kind="{kind}"}}') for kind in ("prompt", "answer", "sampled")}
    attempts = metric(http, "stars_attempts_total")
    http.post("/v1/chat/completions", json=chat())
    expected = engine.decode(CHAT, seed=3)
    after = {kind: metric(http, f'stars_tokens_total{{kind="{kind}"}}') - old for kind, old in before.items()}
    assert after["prompt"] == expected.counts.prompt and after["answer"] == 12 <= after["sampled"]
    assert metric(http, "stars_attempts_total") - attempts == expected.counts.attempts
    assert metric(http, "stars_request_seconds_count") > 0 and 0 <= metric(http, "stars_acceptance_rate") <= 1
