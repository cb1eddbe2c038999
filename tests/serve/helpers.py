"""What the tests of the server share."""

import re
import threading
import time

CHAT = [{"role": "user", "content": "hi"}]


def chat(text="hi", **more):
    """A body of /v1/chat/completions."""
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "seed": 3, **more}


def error_of(response, status):
    """The error in a response of this status: it has OpenAI's form."""
    assert response.status_code == status, (response.status_code, response.text)
    body = response.json()
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and body["error"]["type"]
    return body["error"]


def metric(client, name):
    """A number of /metrics; name: with its labels."""
    text = client.get("/metrics").text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def until(condition, seconds=30.0):
    """Wait for a condition to hold."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


class Paced:
    """A reward function that waits, while it is held, where it is asked about answers; `asked` is set once it was."""

    def __init__(self):
        self.free, self.asked = threading.Event(), threading.Event()
        self.free.set()

    def __call__(self, prompts, answers):
        if any(answers):
            self.asked.set()
            assert self.free.wait(60)
        return [float(len(set(answer))) for answer in answers]
