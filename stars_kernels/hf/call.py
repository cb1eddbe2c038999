"""One call of an engine: its prompts become requests, which are decoded in turn, and events tell of them."""

from __future__ import annotations

import dataclasses
import functools
import math
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Literal, cast

import torch

from stars_kernels.decoder.answer import Answer, FindStop
from stars_kernels.decoder.arenas import Arenas
from stars_kernels.decoder.calibration import calibrate, is_calibrated, with_target
from stars_kernels.decoder.checks import shown
from stars_kernels.decoder.config import StarsConfig
from stars_kernels.decoder.device_rounds import DeviceRounds
from stars_kernels.decoder.errors import Abandoned, DecodeError, message_of, with_cause
from stars_kernels.decoder.memory import MemoryLimits
from stars_kernels.decoder.output import Calibration, FinishReason, StarsEvent, StarsOutput
from stars_kernels.decoder.protocols import QueueingScorer
from stars_kernels.decoder.round import Round
from stars_kernels.decoder.rules import BestOf, Rule, Stars
from stars_kernels.decoder.scheduler import Played, Run
from stars_kernels.decoder.width import AcceptanceHistory, Cost, enough_slots
from stars_kernels.hf.cache.buffers import Buffers
from stars_kernels.hf.cache.hidden import HiddenStates
from stars_kernels.hf.models import Models
from stars_kernels.hf.modes import CallersMode
from stars_kernels.hf.progress import Progress
from stars_kernels.hf.proposing.graphs import Counts, CudaCapture, Graphs, Kept
from stars_kernels.hf.proposing.processors import TokenHooks
from stars_kernels.hf.proposing.proposer import ModelProposer
from stars_kernels.hf.requests import Request, Result, Results, Told, carrying, failure, number_requests
from stars_kernels.hf.rule_checks import check_rule, first_plan
from stars_kernels.hf.scoring.workplace import Workplace
from stars_kernels.hf.serving import Serving
from stars_kernels.hf.sharding import why_steps_differ
from stars_kernels.hf.sizing import fitting_prompts, free_memory_of, prompt_bytes, round_cost
from stars_kernels.hf.text.prompts import Codec, Prompt
from stars_kernels.hf.text.templates import TextPrompt
from stars_kernels.ops.philox import STREAM_CALIBRATE, STREAM_SAMPLE, request_key

CALIBRATION_WIDTH = 32
"""Continuations of a prompt decoded side by side, at most; as everywhere, it changes memory and speed only."""


class Workspace:
    """The memory that one call at a time works in; the next takes it over, with the CUDA graphs that work on it."""

    def __init__(self, device: torch.device, prefix_cache: int) -> None:
        """device: the language model's. prefix_cache: see `Engine`."""
        self.prefix_cache = prefix_cache
        self.used = False
        """Whether an earlier call may have left memory in it."""
        self.buffers = Buffers()
        self.arenas = Arenas(self.buffers.grow_arenas)
        self.graphs = self.make_graphs(device)
        self._counts = Counts()  # of the graphs, when the call began
        self.played = Played()
        """The rounds of the call."""

    @staticmethod
    def make_graphs(device: torch.device) -> Graphs | None:
        """Make what captures segments; None where there are no graphs."""
        return Graphs(CudaCapture(device)) if device.type == "cuda" else None

    def clear(self) -> None:
        """Give the memory back, and for the rest of the call take no more than is needed."""
        self.used, self.arenas.spare = False, 0
        self.arenas.forget()
        if self.graphs is not None:
            self.graphs.clear()
        self.buffers.clear()

    def begin(self) -> None:
        """Make ready for a call."""
        self.arenas.spare, self.played = self.prefix_cache, Played()
        self._counts = Counts() if self.graphs is None else dataclasses.replace(self.graphs.counts)
        if not self.prefix_cache:
            self.arenas.forget_texts()

    def end(self) -> None:
        """Keep the memory for the next call."""
        self.used = True

    @property
    def served(self) -> dict[str, str]:
        """What its CUDA graphs have done since the call began, and who judged, as entries of `StarsOutput.backends`."""
        if self.graphs is None:
            return {}
        judged = {"rounds": str(self.played)} if self.played.on_device else {}
        return {"graphs": str(self.graphs.counts - self._counts), **judged}


class Call:
    """The settings, requests and results of one call. It is given memory to work in before it decodes."""

    workspace: Workspace

    def __init__(
        self,
        models: Models,
        config: StarsConfig,
        calibration: Calibration | None = None,
        hooks: TokenHooks | None = None,
        texts: bool = False,
        mode: CallersMode | None = None,
        cancels: Sequence[threading.Event] = (),
        began: float | None = None,
    ) -> None:
        """calibration: whose r* and beta the config has. texts: whether events tell of text.

        mode: what the user's functions are called in; None = the one that this is called in.
        cancels: end the call once one is set. began: of `time.monotonic()`; None = now.
        """
        self._cancels, self._began = cancels, time.monotonic() if began is None else began
        self.models, self.calibration = models, calibration
        self.mode = CallersMode() if mode is None else mode
        self._steps_differ = why_steps_differ(config) if models.sharded else None
        self.config = config.replace(seed=secrets.randbits(63) if config.seed is None else config.seed)
        self.hooks = TokenHooks() if hooks is None else hooks
        check_rule(config, models.lm, models.rewarder)
        models.check_ids("eos_token_id", config.eos_token_id or ())
        self.eos = models.eos if config.eos_token_id is None else config.eos_token_id
        self.codec = Codec(models.tokenizer, config.stop_strings, self.eos)
        self.told = self.codec if texts else None
        self.serving = Serving(models, config, self.hooks)
        self.backends = self.serving.backends()
        self.limits = MemoryLimits()
        self.calibration_seconds: float | None = None
        self.results: Results = []

    def stop(self) -> FinishReason | None:
        """Return why the call is to end now; None = it goes on."""
        if any(cancel.is_set() for cancel in self._cancels):
            return "cancelled"
        limit = self.config.max_time
        return "time" if limit is not None and time.monotonic() - self._began >= limit else None

    def admit(self, prompts: list[Any], request_ids: Any) -> tuple[list[Request], list[StarsEvent]]:
        """Encode and check every prompt; those that fail are events at once. Wrong request ids raise."""
        encoded: dict[int, Prompt] = {}
        errors: dict[int, Exception] = {}
        for index, prompt in enumerate(prompts):
            try:
                encoded[index] = self._checked(self.codec.encode(prompt))
            except Exception as error:  # a tokenizer's and a chat template's errors are of many kinds
                errors[index] = (TypeError if isinstance(error, TypeError) else ValueError)(
                    f"prompt {index}: {message_of(error)}"
                )
                with_cause(errors[index], error)
        ids = number_requests(request_ids, len(prompts), encoded)
        requests = [
            Request(index, ids[index], prompt, TextPrompt(prompt, self.codec)) for index, prompt in encoded.items()
        ]
        return requests, [failure(self.codec, index, ids.get(index), error) for index, error in errors.items()]

    def admit_all(self, prompts: list[Any], request_ids: Any) -> list[Request]:
        """Admit prompts as `admit` does, and raise what the first failure was."""
        requests, failed = self.admit(prompts, request_ids)
        if failed:
            assert isinstance(failed[0].output, Exception)
            raise failed[0].output
        return requests

    def _checked(self, prompt: Prompt) -> Prompt:
        self.models.check_ids("token id", prompt.ids)
        if not prompt.ids:
            raise ValueError("it has no tokens, expected at least one")
        limit = self.models.limit
        if len(prompt.ids) >= limit:
            raise ValueError(f"it has {len(prompt.ids)} tokens, expected less than the context limit of {limit}")
        return prompt

    @torch.inference_mode()  # suspended at every yield: the consumer is in its own mode
    def events(
        self, requests: list[Request], failed: list[StarsEvent], results: Results
    ) -> Generator[StarsEvent, None, None]:
        """Decode; yields segments and finished prompts as they come.

        results: gets what each prompt comes to; whatever ends the generator early carries it.
        """
        self.results = results
        with carrying(results):
            yield from self._failed(failed)
            if requests and not is_calibrated(self.config):
                _warn_of_one(requests)
                try:
                    self.use_calibration_of(requests)
                except Abandoned:  # the answers end before they begin, below
                    pass
                except DecodeError as why:
                    for r in requests:
                        error = why.restated(f"prompt {r.index}: {why}", index=r.index, request_id=r.id)
                        yield from self._failed([failure(self.codec, r.index, r.id, error)])
                    return
            with self._progress(len(requests) * self.config.max_new_tokens, "decode") as bar:
                if requests:
                    yield from self._decode(requests, bar)

    def _failed(self, events: Iterable[StarsEvent]) -> Iterator[StarsEvent]:
        for event in events:
            self.results[event.index] = event.output
            yield event

    def use_calibration_of(self, requests: list[Request]) -> None:
        self.calibration = self.calibrate(requests[: self.config.calibration_samples])
        self.calibration_seconds = self.calibration.seconds
        self.config = with_target(self.config, self.calibration.reward_threshold, self.calibration.beta)

    @torch.inference_mode()
    def calibrate(self, requests: list[Request]) -> Calibration:
        """Find r* and beta from plain continuations, `calibration_samples` in all and at least one per request.

        Raises DecodeError where none has a reward, and Abandoned where the call is to end.
        """
        began = time.perf_counter()
        config, chosen = self.config, requests
        samples = -(-config.calibration_samples // len(chosen))
        run = self.new_run(chosen, BestOf(samples), min(samples, CALIBRATION_WIDTH), STREAM_CALIBRATE)
        answers = run.answers
        with self._progress(None, "calibrate") as bar:  # no total: how long the continuations get is not known
            try:
                for round_ in run.rounds():
                    bar.update(sum(answer.counts.sampled for answer in round_ if not answer.active))
            finally:
                run.close()
        if self.stop() is not None:
            raise Abandoned
        done = [answer for answer in answers if answer.error is None]
        failed = [(request, answer) for request, answer in zip(chosen, answers, strict=True) if answer.error]
        if failed and done:
            request, answer = failed[0]
            warnings.warn(
                f"calibration goes on without {len(failed)} of {len(answers)} prompts, unknown to r* and beta; "
                f"the first, prompt {request.index}: {answer.error}",
                RuntimeWarning,
                stacklevel=2,
            )
        rewards = [reward for answer in done for reward in answer.segments[0].rewards if math.isfinite(reward)]
        if not rewards:
            error = answers[0].error
            found = answers[0].segments[0].rewards if error is None else error
            why = f"calibration found no finite reward among its plain continuations; the first: {found}"
            raise DecodeError(why, what="calibration") if error is None else error.restated(why)
        target, beta = calibrate(config, rewards)
        return Calibration(
            reward_threshold=target,
            beta=beta,
            quantile=config.calibration_quantile,
            acceptance=config.calibration_acceptance,
            rewards=rewards,
            sampled=sum(answer.counts.sampled for answer in answers),
            rm_scored=sum(answer.counts.rm_scored for answer in answers),
            seconds=time.perf_counter() - began,
            model=self.models.fingerprint,
            reward_model=self.models.reward_fingerprint,
        )

    def _slots(self, requests: list[Request], rule: Rule, width: int | Literal["auto"], cost: Cost) -> int:
        """How many requests to decode side by side."""
        config, models = self.config, self.models
        if config.batch_size != "auto":
            return config.batch_size
        tokens = max(min(len(r.prompt.ids) + config.max_new_tokens, models.limit) for r in requests)
        plan = first_plan(config, rule)
        attempts = plan.attempts if width == "auto" else min(width, plan.attempts)
        size = min(plan.size, config.max_new_tokens)
        fitting = fitting_prompts(models.lm, models.reward_models, tokens, attempts, size, self._free)
        return min(fitting, enough_slots(plan.attempts, AcceptanceHistory().miss if plan.early else 1.0, cost))

    def _free(self, device: torch.device) -> int:
        """Return the bytes that a call's answers may take on a device.

        What an earlier call left in the workspace is among them, what is spared for later calls is not.
        """
        workspace, models = self.workspace, self.models
        spare = prompt_bytes(models.lm, models.reward_models, workspace.arenas.spare, 0, 0)
        return free_memory_of(device) + workspace.buffers.bytes_on(device) - spare.get(device, 0)

    def answer_to(self, request: Request) -> Answer:
        """Make the empty answer to a request."""
        config, prompt = self.config, request.prompt.ids
        assert config.seed is not None
        return Answer(
            key=request_key(config.seed, request.id),
            prompt=prompt,
            limit=min(config.max_new_tokens, self.models.limit - len(prompt)),
            request=request,
            find_stop=self._find_stop(request.index),
            max_new_tokens=config.max_new_tokens,
            trace=config.trace,
        )

    def shared_run(self, like: Request, stop: Callable[[], FinishReason | None]) -> Run:
        """Make an open run for answers of this call's settings to requests like this one; stop: as of `Round`."""
        run = self.new_run([like], self.config.resolved_rule, self.config.width, STREAM_SAMPLE)
        run.waiting.clear()
        run.answers.clear()
        run.round.stop, run.open = stop, True
        return run

    def new_run(self, requests: list[Request], rule: Rule, width: int | Literal["auto"], noise: int) -> Run:
        """Make a run of the answers to these requests."""
        if self._steps_differ is not None:
            raise ValueError(self._steps_differ)
        config, models, buffers = self.config, self.models, self.workspace.buffers
        answers = [self.answer_to(request) for request in requests]
        lm = models.lm
        hidden = HiddenStates(lm, buffers.part("hidden")) if models.rewarder.reads_hidden else None
        graphs = self.workspace.graphs if self.serving.eager is None else None
        scored = None if graphs is None else graphs.part("rewards")
        scorer = models.rewarder.scorer(Workplace(lm.device, hidden, self.mode, buffers.part("rewards"), scored))
        proposer = ModelProposer(
            lm, graphs, fuse=self.serving.unfused is None, hidden=hidden, processors=self.hooks.of_slots(),
            buffers=buffers.part("language model"),
        )  # fmt: skip
        asks = any(part.body is None for part in models.rewarder.parts)
        size = min(first_plan(config, rule).size, config.max_new_tokens)
        cost = round_cost(lm, models.reward_models, size, graphs is not None, asks)
        played = Round(proposer, scorer, rule, config.sampling, self.eos, noise, self.stop)
        slots = self._slots(requests, rule, width, cost)
        run = Run(played, answers, slots, width, config.wave, self.limits, cost, self.workspace)
        if noise == STREAM_SAMPLE:  # no calibration
            run.played = self.workspace.played
        if graphs is not None and self.serving.why_by_host(rule) is None:
            place = Kept(lm.device, buffers.part("rounds"), graphs.part("rounds"))
            run.device = DeviceRounds(played, cast(Stars, rule), proposer, cast(QueueingScorer, scorer), place)
        return run

    def _find_stop(self, index: int) -> FindStop | None:
        """What ends the answer of prompt `index`: stop strings and criteria, whichever comes first."""
        finders = [self.codec.find_stop] if self.codec.stops else []
        if self.hooks.criteria:
            finders.append(functools.partial(self.hooks.find_stop, index))

        def find_stop(tokens: list[int], decided: int) -> int | None:
            stop = None
            for find in finders:
                if (found := find(tokens, decided)) is not None:
                    stop, tokens = found, tokens[:found]  # the next is not asked about what lies behind it
            return stop

        return find_stop if finders else None

    def _decode(self, requests: list[Request], bar: Progress) -> Generator[StarsEvent, None, None]:
        """Decode; results hold what every prompt has come to, whatever ends it."""
        run = self.new_run(requests, self.config.resolved_rule, self.config.width, STREAM_SAMPLE)
        told = {request.index: Told(self.told) for request in requests}
        try:
            for answers in run.rounds():
                for answer in answers:
                    mine = told[answer.request.index]
                    before = mine.tokens
                    if (event := self.event(answer, mine, run.seconds)) is not None:
                        bar.update((len(answer.tokens) if answer.active else self.config.max_new_tokens) - before)
                        yield event
        except BaseException:
            for answer in run.active.values():
                if answer.active:
                    answer.finish_reason = "interrupted"
                self._result(answer, run.seconds)
            raise
        finally:
            run.close()

    def event(self, answer: Answer, told: Told, seconds: dict[str, float]) -> StarsEvent | None:
        """Tell what is new of a prompt, if anything is; where its text cannot be told, the prompt ends with that."""
        request: Request = answer.request
        result = self._result(answer, seconds)
        if result is None and len(answer.tokens) == told.tokens:
            return None
        try:
            return told.event(request, answer, result)
        except Exception as error:  # a tokenizer's, of any kind
            answer.fail("its text could not be made", error, segment=max(len(answer.segments) - 1, 0))
        result = self._result(answer, seconds)
        assert isinstance(result, Exception)
        return failure(self.codec, request.index, request.id, result)

    def _result(self, answer: Answer, seconds: dict[str, float]) -> Result | None:
        """What a prompt has come to; None while it is on its way."""
        request: Request = answer.request
        result: Result | None = None
        if answer.error is None and answer.finish_reason is not None:
            try:
                result = self._output(answer, answer.finish_reason, seconds)
            except Exception as error:  # a tokenizer's, of any kind
                answer.fail("its text could not be made", error, segment=max(len(answer.segments) - 1, 0))
        if answer.error is not None:
            message = f"prompt {request.index} (request {request.id}), {answer.error}"
            result = answer.error.restated(message, index=request.index, request_id=request.id)
        self.results[request.index] = result
        return result

    def _output(self, answer: Answer, finish_reason: FinishReason, seconds: dict[str, float]) -> StarsOutput:
        calibrating = {} if self.calibration_seconds is None else {"calibrate": self.calibration_seconds}
        own = dict[str, float]()
        if answer.began is not None:
            own = {phase: total - answer.began.get(phase, 0.0) for phase, total in seconds.items()}
        return StarsOutput(
            text=None if self.codec.tokenizer is None else self.codec.decode(answer.tokens),
            token_ids=list(answer.tokens),
            reward=answer.reward,
            finish_reason=finish_reason,
            config=self.config,
            request_id=answer.request.id,
            prompt_reward=answer.prompt_reward,
            segments=answer.segments,
            counts=answer.counts,
            seconds={**calibrating, **own},
            calibration=self.calibration,
            backends=self.backends | (self.workspace.served if self.serving.eager is None else {}),
            memory_limits=self.limits.halved,
        )

    def _progress(self, total: int | None, what: str) -> Progress:
        return Progress(total, what, self.config.progress)


def _warn_of_one(requests: list[Request]) -> None:
    if len(requests) > 1:
        return
    prompt = requests[0].prompt
    found = shown(prompt.ids if prompt.text is None else prompt.text)
    warnings.warn(
        f"r* is calibrated on the very prompt that is decoded, {found}: what is a high reward there says little "
        "of other prompts. Pass reward_threshold= and beta=, or calibration=, which "
        "stars_kernels.calibrate(model, reward_model, prompts) makes from several",
        UserWarning,
        stacklevel=2,
    )
