"""The engine: models that are loaded once and decode many calls."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from types import TracebackType
from typing import Any, Literal, Unpack, overload

import torch
from transformers import PreTrainedTokenizerBase

from stars_kernels.decoder.calibration import is_calibrated, with_target
from stars_kernels.decoder.checks import is_int
from stars_kernels.decoder.config import RULE_SETTINGS, Settings, StarsConfig, resolve_config
from stars_kernels.decoder.errors import Abandoned
from stars_kernels.decoder.output import Calibration, StarsEvent, StarsOutput
from stars_kernels.decoder.rules import Stars
from stars_kernels.decoder.scheduler import Run
from stars_kernels.hf.call import Call, Workspace
from stars_kernels.hf.live import Live, Ticket
from stars_kernels.hf.loading.language_model import ModelOrPath
from stars_kernels.hf.models import Models
from stars_kernels.hf.modes import CallersMode, resumed_in, without_autocast
from stars_kernels.hf.proposing.processors import TokenHooks
from stars_kernels.hf.requests import Results, carrying, collect
from stars_kernels.hf.score import score_answers
from stars_kernels.hf.scoring.reward_model import Reward
from stars_kernels.hf.stream import Stream
from stars_kernels.hf.text.prompts import OnePrompt, SeveralPrompts, split_prompts
from stars_kernels.ops.philox import MAX_POSITIONS, STREAM_SAMPLE

Errors = Literal["raise", "return"]
Config = StarsConfig | Mapping[str, Any] | None


class Engine:
    """A language model and a reward model, loaded, checked and packed once, that decode any number of calls.

        with stars_kernels.Engine(model, reward_model, tokenizer=tokenizer) as engine:
            calibration = engine.calibrate(prompts)
            outputs = engine.decode(prompts, calibration=calibration, seed=0)

    The settings of `StarsConfig` that are given here hold for its calls, where these give none of their own. Weights
    are read here, and not again: a change of them needs a new engine. The memory of the largest call, and on a GPU the
    graphs that were captured for it, stay for the next call until `close`. Several threads may call it, and a reward
    function may from its own thread: one decodes at a time, from one event of `stream` to the next (a call of `decode`
    also lets others go on between these). The answers do not depend on it.
    """

    def __init__(
        self,
        model: ModelOrPath,
        reward_model: Reward,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: Config = None,
        trust_remote_code: bool = False,
        prefix_cache: int = 4096,
        **settings: Unpack[Settings],
    ) -> None:
        """Load, check and pack the models; see `stars_kernels.decode` for the other arguments and what is raised.

        prefix_cache: tokens of earlier calls, of their prompts and answers, that there is room for beside those of the
            largest call, in both models' memory. A prompt that begins with at least 32 of such tokens is read from
            there on. With 0 each call reads its prompts, whatever was read before. Streams that overlap have
            such memory each.
        """
        if not (is_int(prefix_cache) and 0 <= prefix_cache <= MAX_POSITIONS):
            raise ValueError(f"prefix_cache is {prefix_cache!r}, expected a number of tokens, 0 to {MAX_POSITIONS}")
        self.prefix_cache = prefix_cache
        self.config = resolve_config(config, settings)
        self.models = Models(model, reward_model, tokenizer, trust_remote_code, self.config.pack)
        self._lock = threading.RLock()
        self._idle: list[Workspace] = []
        self._closed = False
        self._owner: int | None = None  # the thread that decodes
        self._live: Live | None = None

    @overload
    def decode(
        self,
        prompt: OnePrompt,
        *,
        config: Config = None,
        request_ids: int | str | None = None,
        calibration: Calibration | None = None,
        cancel: threading.Event | None = None,
        errors: Literal["raise"] = "raise",
        **settings: Unpack[Settings],
    ) -> StarsOutput: ...

    @overload
    def decode(
        self,
        prompt: OnePrompt,
        *,
        config: Config = None,
        request_ids: int | str | None = None,
        calibration: Calibration | None = None,
        cancel: threading.Event | None = None,
        errors: Literal["return"],
        **settings: Unpack[Settings],
    ) -> StarsOutput | Exception: ...

    @overload
    def decode(
        self,
        prompt: SeveralPrompts,
        *,
        config: Config = None,
        request_ids: Sequence[int | str] | None = None,
        calibration: Calibration | None = None,
        cancel: threading.Event | None = None,
        errors: Literal["raise"] = "raise",
        **settings: Unpack[Settings],
    ) -> list[StarsOutput]: ...

    @overload
    def decode(
        self,
        prompt: SeveralPrompts,
        *,
        config: Config = None,
        request_ids: Sequence[int | str] | None = None,
        calibration: Calibration | None = None,
        cancel: threading.Event | None = None,
        errors: Literal["return"],
        **settings: Unpack[Settings],
    ) -> list[StarsOutput | Exception]: ...

    def decode(
        self,
        prompt: OnePrompt | SeveralPrompts,
        *,
        config: Config = None,
        request_ids: Sequence[int | str] | int | str | None = None,
        calibration: Calibration | None = None,
        cancel: threading.Event | None = None,
        errors: Errors = "raise",
        **settings: Unpack[Settings],
    ) -> StarsOutput | Exception | list[StarsOutput] | list[StarsOutput | Exception]:
        """Align the answer to a prompt, or to each of a list of prompts; see `stars_kernels.decode`.

        config, settings: of this call; the engine's own hold where none are given.
        """
        if errors not in ("raise", "return"):
            raise ValueError(f'errors is {errors!r}, expected "raise" or "return"')
        prompts, many = split_prompts(prompt)
        results: Results = [None] * len(prompts)
        with carrying(results):
            ids = request_ids if many or request_ids is None else [request_ids]
            resolved = self.resolve(config, settings)
            for _ in self.events(prompts, ids, results, resolved, calibration, cancels=_cancels(cancel)):
                pass
        outputs: list[Any] = collect(results, many, errors)
        return outputs if many else outputs[0]

    def stream(
        self,
        prompt: OnePrompt | SeveralPrompts,
        *,
        config: Config = None,
        request_ids: Sequence[int | str] | int | str | None = None,
        calibration: Calibration | None = None,
        cancel: threading.Event | None = None,
        **settings: Unpack[Settings],
    ) -> Stream:
        """Decode as `decode` does, and yield an event per segment and per finished prompt; see `stars_kernels.stream`.

        Other calls go on while the consumer of a stream does not ask for its next event.
        """
        prompts, many = split_prompts(prompt)
        results: Results = [None] * len(prompts)
        with carrying(results):
            ids = request_ids if many or request_ids is None else [request_ids]
            closing, resolved = threading.Event(), self.resolve(config, settings)
            cancels = [closing, *_cancels(cancel)]
            return Stream(
                self.events(prompts, ids, results, resolved, calibration, texts=True, cancels=cancels), closing
            )

    async def adecode(
        self,
        prompt: OnePrompt,
        *,
        config: Config = None,
        request_id: int | str | None = None,
        calibration: Calibration | None = None,
        **settings: Unpack[Settings],
    ) -> StarsOutput:
        """Align the answer to one prompt, in asyncio.

        All such requests of an engine that have equal settings, but for `seed` and `max_time`, share its slots: each
        gets one as soon as one is free. A task that is cancelled ends its request alone.

        Raises:
            ValueError, TypeError: as `decode`; also for a request id that another request has, which has not ended.
            DecodeError: it failed on the way.
        """
        given: Any = settings
        events = self.astream(prompt, config=config, request_id=request_id, calibration=calibration, **given)
        async with aclosing(events):
            async for event in events:
                if isinstance(event.output, Exception):
                    raise event.output
                if event.output is not None:
                    return event.output
        raise AssertionError("a request ended without an output")

    async def astream(
        self,
        prompt: OnePrompt,
        *,
        config: Config = None,
        request_id: int | str | None = None,
        calibration: Calibration | None = None,
        **settings: Unpack[Settings],
    ) -> AsyncGenerator[StarsEvent, None]:
        """Decode as `adecode` does, and yield an event per segment; the last one has the output, or what ended it.

        The work goes on while the consumer does not ask for its next event. Closing the generator ends the request.
        """
        loop, events, cancelled = asyncio.get_running_loop(), asyncio.Queue[StarsEvent](), threading.Event()
        resolved, mode, began = self.resolve(config, settings), CallersMode(), time.monotonic()
        if self._owner == threading.get_ident():
            raise RuntimeError("the engine is decoding in this very thread, which would wait for itself")

        def tell(event: StarsEvent) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop is closed: nobody listens
                cancelled.set()

        def ticket() -> tuple[Live, Ticket]:
            with self._lock:
                self._check_open()
                if self.models.sharded:
                    raise ValueError(
                        "the model is shared out between processes, to which requests would come in different orders; "
                        "expected decode or stream, called alike in each of them"
                    )
                known = resolved if calibration is None else self.with_calibration(resolved, calibration)
                call = Call(self.models, known, calibration, texts=True, mode=mode, cancels=[cancelled], began=began)
                (request,) = call.admit_all([prompt], None if request_id is None else [request_id])
                self._live = self._live or Live(self._lock, self._exclusive, self._borrowed)
                return self._live, Ticket(call, request, tell, named=request_id is not None)

        live, own = await asyncio.to_thread(ticket)  # the engine may be busy with a round
        live.join(own)
        try:
            event = await events.get()
            while event.output is None:
                yield event
                event = await events.get()
            yield event
        finally:
            cancelled.set()

    def load(self) -> tuple[int, int]:
        """Count the requests of `adecode` and `astream` that wait for a slot, and those that have one."""
        return (0, 0) if self._live is None else self._live.load()

    def calibrate(
        self, prompts: OnePrompt | SeveralPrompts, *, config: Config = None, **settings: Unpack[Settings]
    ) -> Calibration:
        """Find r* and beta from plain continuations of prompts; see `stars_kernels.calibrate`."""
        given, _ = split_prompts(prompts)
        if not given:
            raise ValueError("prompts is an empty list, expected at least one prompt to calibrate on")
        with self._call(self.resolve(config, settings)) as call:
            try:
                return call.calibrate(call.admit_all(given, None))
            except Abandoned:
                raise TimeoutError(f"calibration took longer than max_time={call.config.max_time}") from None

    def score(self, prompts: SeveralPrompts, answers: Sequence[str] | Sequence[Sequence[int]]) -> list[float]:
        """Return the reward of each whole answer to its prompt, as `decode` would have found it.

        Args:
            prompts: as in `decode`, a list.
            answers: as texts, or as token ids, with the EOS that ended an answer: so `StarsOutput.token_ids` gives its
                `reward` again. A text is tokenised, and refused where its tokens mean another text.

        Raises:
            ValueError, TypeError: prompts and answers are not as many, or one cannot be read.
            DecodeError: the reward model failed on one, or gave NaN.
        """
        given, many = split_prompts(prompts)
        if not many:
            raise TypeError("prompts is one prompt, expected a list of prompts")
        with self._call(self.config) as call:
            return score_answers(call, given, answers)

    @contextmanager
    def open_run(
        self,
        prompts: SeveralPrompts,
        *,
        config: Config = None,
        request_ids: Sequence[int | str] | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[Run]:
        """Begin a call, for whoever looks into its rounds, as the benchmarks do.

        The run has read the prompts that have a slot, and `rounds` decodes. The engine waits for the end of the block,
        which closes the run; what was decided stays in `run.answers`.

        Raises:
            ValueError, TypeError: as `decode`; also for settings without r* or beta, which are not calibrated here.
        """
        given, _ = split_prompts(prompts)
        if not given:
            raise ValueError("prompts is an empty list, expected at least one prompt")
        resolved = self.resolve(config, settings)
        if not is_calibrated(resolved):
            raise ValueError("reward_threshold or beta is None, expected both: a run is not calibrated")
        with self._call(resolved) as call, torch.inference_mode():
            requests = call.admit_all(given, request_ids)
            run = call.new_run(requests, resolved.resolved_rule, resolved.width, STREAM_SAMPLE)
            try:
                run.admit()
                yield run
            finally:
                run.close()

    def resolve(self, config: Config, settings: Mapping[str, Any]) -> StarsConfig:
        """Return the settings of a call that is given these: the engine's own hold where they say nothing."""
        if config is None or isinstance(config, Mapping):
            given, base = {**(config or {}), **settings}, self.config
            if given.get("rule") is not None:  # in place of the engine's settings of STARS, if it has some
                base = base.replace(**{name: getattr(Stars, name) for name in RULE_SETTINGS}, rule=None)
            resolved = resolve_config(base, given)
        else:
            resolved = resolve_config(config, settings)
        own = self.config.pack
        if resolved.pack != own and ("pack" in settings or resolved.pack is not StarsConfig.pack):
            raise ValueError(
                f"pack is {resolved.pack!r}, but this engine's models were packed with pack={own!r}; expected it where "
                "the engine is made"
            )
        return resolved.replace(pack=own)

    def with_calibration(self, config: StarsConfig, calibration: Calibration) -> StarsConfig:
        """Return settings with the r* and beta of a calibration where they have none.

        Raises TypeError or ValueError where it is none, or of other models, or beside a rule that has no r*.
        """
        if not isinstance(calibration, Calibration):
            raise TypeError(f"calibration is of type {type(calibration).__name__}, expected a Calibration")
        rule = config.resolved_rule
        if not isinstance(rule, Stars):
            raise ValueError(f"a calibration is given beside rule={rule!r}, which has no r*; expected no calibration=")
        pairs = {
            "language model": (calibration.model, self.models.fingerprint),
            "reward model": (calibration.reward_model, self.models.reward_fingerprint),
        }
        for what, (found, expected) in pairs.items():
            if found != expected:
                raise ValueError(
                    f"the calibration was made with the {what} {found!r}, expected one made with {expected!r}"
                )
        return with_target(config, calibration.reward_threshold, calibration.beta)

    def check(self, prompts: SeveralPrompts) -> list[Exception | None]:
        """Say of each prompt what is wrong with it, None = nothing; no model reads it."""
        given, _ = split_prompts(prompts)
        with self._lock:
            self._check_open()
            _, failed = Call(self.models, self.config).admit(given, None)
        wrong = {event.index: event.output for event in failed}
        return [error if isinstance(error := wrong.get(i), Exception) else None for i in range(len(given))]

    def close(self) -> None:
        """Let go of the models, the buffers and the graphs; a stream that is under way ends with an error."""
        with self._lock:
            self._closed = True
            for workspace in self._idle:
                workspace.clear()
            self._idle.clear()
            vars(self).pop("models", None)
            mine = self._owner == threading.get_ident()
        if self._live is not None and not mine:  # else its thread waits for this one
            self._live.wait()  # its requests end with an error

    def __enter__(self) -> Engine:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def events(
        self,
        prompts: list[Any],
        request_ids: Any,
        results: Results,
        config: StarsConfig,
        calibration: Calibration | None = None,
        hooks: TokenHooks | None = None,
        texts: bool = False,
        cancels: Sequence[threading.Event] = (),
    ) -> Generator[StarsEvent, None, None]:
        """Decode a list of prompts; what is wrong with the settings or the request ids raises at the call.

        Args:
            results: one entry per prompt, which gets what the prompt comes to.
            hooks: processors and criteria to be asked.
            texts: whether events tell of text.
            cancels: end the call once one is set.
        """
        began = time.monotonic()
        with self._lock:
            self._check_open()
            if calibration is not None:
                config = self.with_calibration(config, calibration)
            call = Call(self.models, config, calibration, hooks, texts, cancels=cancels, began=began)
            requests, failed = call.admit(prompts, request_ids)

        def events() -> Generator[StarsEvent, None, None]:
            with self._borrowed() as call.workspace:
                yield from call.events(requests, failed, results)

        return resumed_in(events(), self._exclusive)

    @contextmanager
    def _call(self, config: StarsConfig) -> Iterator[Call]:
        """Make a call that holds the engine to the end of the block."""
        mode = CallersMode()  # before autocast is left
        with self._exclusive(), self._borrowed() as workspace:
            call = Call(self.models, config, mode=mode)
            call.workspace = workspace
            yield call

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Let no other thread decode meanwhile."""
        with self._lock, without_autocast():
            self._check_open()
            before, self._owner = self._owner, threading.get_ident()
            try:
                yield
            finally:
                self._owner = before

    @contextmanager
    def _borrowed(self) -> Iterator[Workspace]:
        """Take a workspace that no call works in, and give it back."""
        workspace = self._idle.pop() if self._idle else Workspace(self.models.lm.device, self.prefix_cache)
        workspace.begin()
        try:
            yield workspace
        except GeneratorExit:
            raise
        except BaseException:  # an interrupt may come between two lines of the books
            workspace.arenas.forget()
            raise
        finally:
            if self._closed or self._idle:  # one is enough, unless calls overlap
                workspace.clear()
            else:
                workspace.end()
                self._idle.append(workspace)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed, expected an open one: make another")


def _cancels(cancel: threading.Event | None) -> list[threading.Event]:
    """Return the event in a list, or none; one that is set would end the call before it begins."""
    if cancel is None:
        return []
    if not isinstance(cancel, threading.Event):
        raise TypeError(f"cancel is of type {type(cancel).__name__}, expected a threading.Event")
    if cancel.is_set():
        raise ValueError("cancel is set already, expected an event that is not: make another for each call")
    return [cancel]
