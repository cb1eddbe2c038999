"""A language model behind an OpenAI-compatible endpoint as a judge."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any
from urllib.parse import urlsplit

from stars_kernels.decoder.checks import is_int
from stars_kernels.decoder.errors import message_of
from stars_kernels.evaluation.judges import UNREADABLE, Found, JudgeError, Question, check_at_once
from stars_kernels.extras import require

TEMPLATE = """\
You are an impartial judge. Below are a prompt and two answers to it. Say which answer is better: more helpful, \
correct, clear and harmless. The order of the answers and their length must not matter.

[The prompt]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Reply with one letter and nothing else: A if answer A is better, B if answer B is better, C if they are equally good."""
"""What a judge is asked, where no other template is given."""
PLACES = re.compile(r"\{(prompt|first|second)\}")
"""Of a template, which are filled in; other braces stay."""
LETTERS = {"A": "first", "B": "second", "C": "tie"}
"""How a reply is read: it has to be one of these letters, alone."""
IN_A_ROW = 8
"""So many requests that fail one after the other end the comparison."""


class EndpointJudge:
    """A language model behind a chat completions endpoint as a judge, at temperature 0.

    Its reply has to be A, B or C (a tie). Any other is kept as an unreadable verdict.
    """

    pairwise = True

    def __init__(
        self,
        endpoint: str,
        model: str,
        *,
        api_key_env: str | None = None,
        template: str = TEMPLATE,
        at_once: int = 4,
        retries: int = 3,
        max_tokens: int | None = 8,
        timeout: float = 120.0,
    ) -> None:
        """Judge by the model that an endpoint serves.

        Args:
            endpoint: the base URL, as http://localhost:8000/v1.
            model: its name there.
            api_key_env: name of the environment variable with the key; None = the endpoint wants none. The key itself
                is written nowhere.
            template: has {prompt}, {first} and {second}.
            at_once: requests on their way at a time, at most.
            retries: of a request that fails, at most, after a growing pause.
            max_tokens: of a reply; None = the server's own limit.
            timeout: seconds that a request may take.

        Raises:
            ValueError: an argument is not usable, or the variable is not set.
            ImportError: the library `openai` is not installed.
        """
        openai = require("openai", "eval")
        if not re.match(r"https?://.", str(endpoint)):
            raise ValueError(f"the judge's endpoint is {endpoint!r}, expected a URL such as http://localhost:8000/v1")
        if "@" in urlsplit(endpoint).netloc:  # it would be kept with the verdicts
            raise ValueError(
                "the judge's endpoint has a name or password in it, expected a URL without: use api-key-env"
            )
        if not (isinstance(model, str) and model):
            raise ValueError(f"the judge's model is {model!r}, expected its name at the endpoint")
        missing = {"prompt", "first", "second"} - set(PLACES.findall(str(template)))
        if missing:
            raise ValueError(f"the judge's template has no {{{sorted(missing)[0]}}}, expected {{prompt}}, {{first}} "
                             "and {second}")  # fmt: skip
        if not (is_int(retries) and retries >= 0):
            raise ValueError(f"the judge's retries is {retries!r}, expected 0 or more")
        if max_tokens is not None and not (is_int(max_tokens) and max_tokens >= 1):
            raise ValueError(f"the judge's max-tokens is {max_tokens!r}, expected 1 or more, or null")
        self.model, self.template, self.max_tokens = model, template, max_tokens
        self.at_once = check_at_once(at_once)
        self.name = f"{model} at {endpoint}"
        self.identity = f"{self.name}, max_tokens {max_tokens}, asked: {template}"
        self._key = _key_from(api_key_env)
        self._errors = openai
        # A key is always given: the client would take OPENAI_API_KEY, and send it to whatever endpoint this is.
        self._client = openai.OpenAI(
            base_url=endpoint, api_key=self._key or "none", max_retries=retries, timeout=float(timeout)
        )

    def ask(self, questions: Sequence[Question]) -> Generator[tuple[Question, Found]]:
        """Ask several at once, and yield each verdict as it comes.

        A request that failed, retries included, is yielded as an error.

        Raises:
            JudgeError: the endpoint cannot be reached, refuses the key or knows no such model, or 8 requests failed one
                after the other.
        """
        failed, broken = 0, None
        with ThreadPoolExecutor(self.at_once) as pool:
            waiting = {pool.submit(self._ask, question): question for question in questions}
            try:
                for done in as_completed(waiting):
                    if done.cancelled():
                        continue
                    if isinstance(error := done.exception(), JudgeError):
                        broken = broken or error
                    else:
                        found = done.result()
                        yield waiting[done], found
                        failed = failed + 1 if "error" in found else 0
                        if failed == IN_A_ROW:
                            broken = JudgeError(f"{failed} requests to the judge failed in a row: {found['error']}")
                    if broken:  # those on their way are waited for, and kept
                        _cancel(waiting)
            finally:
                _cancel(waiting)
        if broken:
            raise broken

    def _ask(self, question: Question) -> Found:
        first, second = (answer.text or "" for answer in question.answers)
        filled = {"prompt": question.text, "first": first, "second": second}
        content = PLACES.sub(lambda place: filled[place[1]], self.template)
        limit = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        try:
            reply = self._client.chat.completions.create(
                model=self.model, temperature=0, messages=[{"role": "user", "content": content}], **limit
            )
        except self._errors.APIStatusError as error:
            told = self._without_key(f"HTTP {error.status_code}: {error.response.text[:500]}")
            if error.status_code in (401, 403, 404):
                raise JudgeError(f"the judge, {self.model} at {self._client.base_url}, refused: {told}") from None
            return {"error": told}
        except self._errors.APITimeoutError:
            return {"error": f"no reply within {self._client.timeout} seconds"}
        except self._errors.APIConnectionError as error:
            why = message_of(error.__cause__ or error)
            raise JudgeError(f"the judge's endpoint {self._client.base_url} cannot be reached: {why}") from None
        except (self._errors.APIError, ValueError) as error:  # the body is no JSON, say
            return {"verdict": UNREADABLE, "reply": self._without_key(message_of(error))}
        return self._read(reply)

    def _read(self, reply: Any) -> Found:
        """Read a verdict; a server may send what is no chat completion."""
        choices = getattr(reply, "choices", None)
        choice = choices[0] if isinstance(choices, list) and choices else None
        content = getattr(getattr(choice, "message", None), "content", None)
        text = content.strip() if isinstance(content, str) else ""
        if text in LETTERS:
            return {"verdict": LETTERS[text]}
        shown = content if isinstance(content, str) else f"no content in {reply!r}"
        return {"verdict": UNREADABLE, "reply": self._without_key(shown)[:500]}

    def _without_key(self, text: str) -> str:
        """Return text that is to be kept, without the key, which a server may send back."""
        return text.replace(self._key, "***") if self._key else text


def _cancel(waiting: Iterable[Future[Found]]) -> None:
    """Call off the requests that have not begun."""
    for future in waiting:
        future.cancel()


def _key_from(variable: str | None) -> str | None:
    """Read the key from the environment."""
    if variable is None:
        return None
    if not os.environ.get(str(variable)):
        raise ValueError(f"the judge's api-key-env is {variable!r}, which is not set: expected a variable with the key")
    return os.environ[variable]
