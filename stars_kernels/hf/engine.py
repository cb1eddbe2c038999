"""The models and settings of one call, and how batches of requests run on them."""

from __future__ import annotations

import functools
import math
import secrets
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from stars_kernels.decoder.answer import Answer, FindStop
from stars_kernels.decoder.calibration import calibrate_beta, calibrate_target
from stars_kernels.decoder.checks import shown
from stars_kernels.decoder.config import StarsConfig
from stars_kernels.decoder.errors import like, message_of, with_cause
from stars_kernels.decoder.memory import MemoryLimits, free_memory, is_out_of_memory
from stars_kernels.decoder.output import Calibration, FinishReason, StarsEvent, StarsOutput
from stars_kernels.decoder.round import Round
from stars_kernels.decoder.rules import BestOf, Plan, Rule, Stars
from stars_kernels.decoder.scheduler import Run
from stars_kernels.hf.cache.hidden import HiddenStates
from stars_kernels.hf.loading.language_model import (
    ModelOrPath,
    check_path,
    check_tokenizer,
    eos_ids,
    load_language_model,
)
from stars_kernels.hf.modes import run_without_autocast
from stars_kernels.hf.progress import Progress
from stars_kernels.hf.proposing.graphs import CudaCapture, SegmentGraphs
from stars_kernels.hf.proposing.output_layer import why_unfused
from stars_kernels.hf.proposing.processors import TokenHooks
from stars_kernels.hf.proposing.proposer import ModelProposer, is_unfiltered
from stars_kernels.hf.requests import Request, Result, Results, Told, carrying, failure, number_requests
from stars_kernels.hf.rule_checks import check_rule, why_logits
from stars_kernels.hf.scoring.reward_model import Reward, check_reward
from stars_kernels.hf.scoring.rewarder import Rewarder
from stars_kernels.hf.sizing import auto_batch_size, models_in, round_cost
from stars_kernels.hf.text.prompts import Codec, Prompt
from stars_kernels.hf.view.copying import view_of
from stars_kernels.hf.view.layout import context_limit, layout_of, vocabulary
from stars_kernels.hf.view.rewrites import pack
from stars_kernels.hf.view.rewrites.norm import RMSNorm
from stars_kernels.ops import backends
from stars_kernels.ops.philox import STREAM_CALIBRATE, STREAM_SAMPLE, request_key

CALIBRATION_WIDTH = 32
"""Continuations of a prompt decoded side by side, at most; as everywhere, it changes memory and speed only."""


class Engine:
    """The models of one call and how a batch of requests runs on them."""

    def __init__(
        self,
        model: ModelOrPath,
        rm: Reward,
        tokenizer: PreTrainedTokenizerBase | None,
        config: StarsConfig,
        trust_remote_code: bool,
        hooks: TokenHooks | None = None,
    ) -> None:
        self.hooks = TokenHooks() if hooks is None else hooks
        seed = secrets.randbits(63) if config.seed is None else config.seed
        self.config = config.replace(seed=seed)
        self.calibration: Calibration | None = None
        check_tokenizer(tokenizer)
        check_path("model", model)
        check_reward(rm)
        language_model, tokenizer = load_language_model(model, tokenizer, trust_remote_code)
        self.lm = view_of(language_model)
        self.rewarder = Rewarder(rm, language_model, tokenizer, trust_remote_code)
        rule = self.config.resolved_rule
        check_rule(rule, self._first_plan(rule), self.config.max_new_tokens, self.lm, self.rewarder)
        self.limit = min(context_limit(self.lm), self.rewarder.limit)
        self.bodies = [self.lm, *self.rewarder.bodies]
        self.reward_models = models_in(self.rewarder.bodies)
        self.packed_bytes = 0
        if config.pack:
            dtype = torch.bfloat16 if config.pack == "bfloat16" else torch.float32
            self.packed_bytes = sum(pack(body, dtype) for body in self.bodies)
        self.eager = self._why_eager()
        self.unfused = self._why_unfused()
        self.backends = self._backends()
        self._check_ids("eos_token_id", config.eos_token_id or ())
        self.eos = eos_ids(language_model) if config.eos_token_id is None else config.eos_token_id
        self.codec = Codec(tokenizer, config.stop_strings, self.eos)
        self.limits = MemoryLimits()
        self.results: Results = []
        self.told: Codec | None = None

    def run(
        self, prompts: list[Any], request_ids: Any, results: Results, texts: bool = False
    ) -> Generator[StarsEvent, None, None]:
        """Segments and finished prompts as they come, with their texts or not; wrong request ids raise at the call.

        results: gets what each prompt comes to; whatever ends the generator early carries it.
        """
        self.results, self.told = results, self.codec if texts else None
        return run_without_autocast(self._run(*self._admit(prompts, request_ids)))

    @torch.inference_mode()  # suspended at every yield: the consumer is in its own mode
    def _run(self, requests: list[Request], failed: list[StarsEvent]) -> Generator[StarsEvent, None, None]:
        with carrying(self.results):
            yield from self._failed(failed)
            if requests and self._uncalibrated():
                why = self._calibrate(requests)
                if why is not None:
                    yield from self._failed(
                        failure(self.codec, r.index, r.id, like(why, f"prompt {r.index}: {why}")) for r in requests
                    )
                    return
            with self._progress(len(requests) * self.config.max_new_tokens, "decode") as bar:
                while requests:
                    count = yield from self._run_batch(requests, bar)
                    requests = requests[count:]

    def _uncalibrated(self) -> bool:
        rule = self.config.resolved_rule
        if not isinstance(rule, Stars):
            return False
        return rule.reward_threshold is None or (rule.beta is None and rule.accept == "soft")

    def _failed(self, events: Iterable[StarsEvent]) -> Iterator[StarsEvent]:
        for event in events:
            self.results[event.index] = event.output
            yield event

    def _admit(self, prompts: list[Any], request_ids: Any) -> tuple[list[Request], list[StarsEvent]]:
        """Encode and check every prompt; those that fail are events at once."""
        encoded: dict[int, Prompt] = {}
        errors: dict[int, Exception] = {}
        for index, prompt in enumerate(prompts):
            try:
                encoded[index] = self._check(self.codec.encode(prompt))
            except Exception as error:  # a tokenizer's and a chat template's errors are of many kinds
                errors[index] = (TypeError if isinstance(error, TypeError) else ValueError)(
                    f"prompt {index}: {message_of(error)}"
                )
                with_cause(errors[index], error)
        ids = number_requests(request_ids, len(prompts), encoded)
        requests = [Request(index, ids[index], prompt) for index, prompt in encoded.items()]
        return requests, [failure(self.codec, index, ids.get(index), error) for index, error in errors.items()]

    def _check(self, prompt: Prompt) -> Prompt:
        self._check_ids("token id", prompt.ids)
        if not prompt.ids:
            raise ValueError("it has no tokens, expected at least one")
        if len(prompt.ids) >= self.limit:
            raise ValueError(f"it has {len(prompt.ids)} tokens, expected less than the context limit of {self.limit}")
        return prompt

    def _check_ids(self, name: str, ids: Sequence[int]) -> None:
        size = vocabulary(self.lm)
        wrong = next((i for i in ids if not 0 <= i < size), None)
        if wrong is not None:
            raise ValueError(f"{name} {shown(wrong)} is outside the vocabulary, expected 0 to {size - 1}")

    def _calibrate(self, requests: list[Request]) -> Exception | None:
        """Find what is not given of r* and beta; the error that says why that is not possible, or None."""
        began = time.perf_counter()
        config, chosen = self.config, requests[: self.config.calibration_samples]
        samples = -(-config.calibration_samples // len(chosen))
        answers: list[Answer] = []
        with self._progress(None, "calibrate") as bar:  # no total: how long the continuations get is not known
            while len(answers) < len(chosen):
                done = self._sample(chosen[len(answers) :], samples)
                answers += done
                bar.update(sum(answer.counts.sampled for answer in done))
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
            return RuntimeError(why) if error is None else like(error, why)
        rule = config.resolved_rule
        assert isinstance(rule, Stars)
        target, beta = rule.reward_threshold, rule.beta
        if target is None:
            target = calibrate_target(rewards, config.calibration_quantile)
        if beta is None and rule.accept == "soft":
            beta = calibrate_beta(rewards, target, config.calibration_acceptance)
        if config.rule is None:
            self.config = config.replace(reward_threshold=target, beta=beta)
        else:
            self.config = config.replace(rule=replace(rule, reward_threshold=target, beta=beta))
        self.calibration = Calibration(
            rewards=rewards,
            sampled=sum(answer.counts.sampled for answer in answers),
            rm_scored=sum(answer.counts.rm_scored for answer in answers),
            seconds=time.perf_counter() - began,
        )
        return None

    def _sample(self, requests: list[Request], samples: int) -> list[Answer]:
        """Sample plain continuations of the first of `requests`, as many as make a batch."""
        run = self._begin(requests, BestOf(samples), min(samples, CALIBRATION_WIDTH), STREAM_CALIBRATE)
        try:
            for _ in run.rounds():
                pass
        finally:
            run.close()
        return run.answers

    def _begin(self, requests: list[Request], rule: Rule, width: int | Literal["auto"], noise: int) -> Run:
        """Make a run that has read the first of `requests`: batch_size of them, or as many as memory allows."""
        size = self._batch_size(requests, rule, width)
        while True:
            batch = requests[: self.limits.batch_size or size]
            run = self._new_run(batch, rule, width, noise)
            try:
                run.begin()
                return run
            except Warning:  # which the caller has made an error
                raise
            except Exception as error:
                if len(batch) == 1 or not is_out_of_memory(error):
                    run.fail(range(len(batch)), error)
                    return run
            run.close()
            self.limits.halve_batch(len(batch))
            free_memory()

    def _batch_size(self, requests: list[Request], rule: Rule, width: int | Literal["auto"]) -> int:
        config = self.config
        if config.batch_size != "auto":
            return config.batch_size
        tokens = max(min(len(r.prompt.ids) + config.max_new_tokens, self.limit) for r in requests)
        plan = self._first_plan(rule)
        attempts = plan.attempts if width == "auto" else min(width, plan.attempts)
        return auto_batch_size(self.lm, self.reward_models, tokens, attempts, min(plan.size, config.max_new_tokens))

    def _first_plan(self, rule: Rule) -> Plan:
        plan = rule.plan(Answer(key=0, prompt=[], limit=self.config.max_new_tokens))
        return plan._replace(size=self.config.max_new_tokens) if plan.race else plan  # whose rows hold whole answers

    def _new_run(self, requests: list[Request], rule: Rule, width: int | Literal["auto"], noise: int) -> Run:
        config = self.config
        assert config.seed is not None
        answers = [
            Answer(
                key=request_key(config.seed, r.id),
                prompt=r.prompt.ids,
                limit=min(config.max_new_tokens, self.limit - len(r.prompt.ids)),
                find_stop=self._find_stop(r.index),
                max_new_tokens=config.max_new_tokens,
            )
            for r in requests
        ]
        hidden = HiddenStates(self.lm) if self.rewarder.reads_hidden else None
        scorer = self.rewarder.scorer([r.prompt for r in requests], self.codec, self.lm.device, hidden)
        graphs = SegmentGraphs(CudaCapture(self.lm.device)) if self.eager is None else None
        processors = self.hooks.batch([r.index for r in requests])
        proposer = ModelProposer(self.lm, graphs, fuse=self.unfused is None, hidden=hidden, processors=processors)
        cost = round_cost(self.lm, self.reward_models, self._first_plan(rule).size, graphs is not None)
        played = Round(proposer, scorer, rule, config.sampling, answers, self.eos, noise)
        return Run(played, width, self.limits, cost)

    def _find_stop(self, index: int) -> FindStop | None:
        """What ends the answer of prompt `index`: stop strings and criteria, whichever comes first."""
        finders = [self.codec.find_stop] if self.codec.stops else []
        if self.hooks.criteria:
            finders.append(functools.partial(self.hooks.find_stop, index))

        def find_stop(tokens: list[int], accepted: int) -> int | None:
            stop = None
            for find in finders:
                if (found := find(tokens, accepted)) is not None:
                    stop, tokens = found, tokens[:found]  # the next is not asked about what lies behind it
            return stop

        return find_stop if finders else None

    def _run_batch(self, requests: list[Request], bar: Progress) -> Generator[StarsEvent, None, int]:
        """Decode the first of `requests`, as many as make a batch; returns their number."""
        run = self._begin(requests, self.config.resolved_rule, self.config.width, STREAM_SAMPLE)
        batch = list(zip(requests, run.answers, [Told(self.told) for _ in run.answers], strict=False))
        try:
            for turn in run.rounds():
                for request, answer, told in (batch[p] for p in turn):
                    result, before = self._result(request, answer, run.seconds), told.tokens
                    if result is not None or len(answer.tokens) > before:
                        bar.update((len(answer.tokens) if result is None else self.config.max_new_tokens) - before)
                        yield self._event(request, answer, told, result, run.seconds)
        except BaseException:
            for request, answer, _ in batch:
                if answer.active:
                    answer.finish_reason = "interrupted"
                self._result(request, answer, run.seconds)
            raise
        finally:
            run.close()
        return len(batch)

    def _event(
        self, request: Request, answer: Answer, told: Told, result: Result | None, seconds: dict[str, float]
    ) -> StarsEvent:
        """What is new of a prompt; where its text cannot be told, the prompt ends with that."""
        try:
            return told.event(request, answer, result)
        except Exception as error:  # a tokenizer's, of any kind
            answer.fail("its text could not be made", error, segment=max(len(answer.segments) - 1, 0))
        result = self._result(request, answer, seconds)
        assert isinstance(result, Exception)
        return failure(self.codec, request.index, request.id, result)

    def _result(self, request: Request, answer: Answer, seconds: dict[str, float]) -> Result | None:
        """What a prompt has come to; None while it is on its way."""
        result: Result | None = None
        if answer.error is None and answer.finish_reason is not None:
            try:
                result = self._output(request, answer, answer.finish_reason, seconds)
            except Exception as error:  # a tokenizer's, of any kind
                answer.fail("its text could not be made", error, segment=max(len(answer.segments) - 1, 0))
        if answer.error is not None:
            result = like(answer.error, f"prompt {request.index} (request {request.id}), {answer.error}")
        self.results[request.index] = result
        return result

    def _output(
        self, request: Request, answer: Answer, finish_reason: FinishReason, seconds: dict[str, float]
    ) -> StarsOutput:
        return StarsOutput(
            text=None if self.codec.tokenizer is None else self.codec.decode(answer.tokens),
            token_ids=answer.tokens,
            reward=answer.reward,
            finish_reason=finish_reason,
            config=self.config,
            request_id=request.id,
            prompt_reward=answer.prompt_reward,
            segments=answer.segments,
            counts=answer.counts,
            seconds=dict(seconds) if self.calibration is None else {"calibrate": self.calibration.seconds, **seconds},
            calibration=self.calibration,
            backends=dict(self.backends),
            memory_limits=self.limits.halved,
        )

    def _why_eager(self) -> str | None:
        """Why segments do not run as CUDA graphs; None where they do."""
        if self.lm.device.type != "cuda":
            return "the model is not on a GPU"
        if not self.config.graphs:
            return "graphs=False"
        if self.hooks.processors:
            return "logits processors are asked at each token"
        if (why := layout_of(self.lm).why_eager) is not None:
            return why
        served = {op: backends()[op]["cuda"] for op in ("segment_sample", "fork_attention")}
        for op, implementation in served.items():
            if implementation != "triton":
                return f"{op} is served by its {implementation}"
        if self.lm.dtype == torch.float64:
            return "float64 is served by the definitions, which wait for the host"
        return None

    def _why_unfused(self) -> str | None:
        """Why logits are stored before tokens are drawn from them; None where the two are one op."""
        if self.lm.device.type != "cuda":
            return "the model is not on a GPU"
        if (implementation := backends()["lm_head_sample"]["cuda"]) != "triton":
            return f"lm_head_sample is served by its {implementation}"
        if self.hooks.processors:
            return "logits processors are asked at each token"
        if not is_unfiltered(self.config.sampling):
            return "top_k, top_p or min_p is set"
        return why_logits(self._first_plan(self.config.resolved_rule)) or why_unfused(self.lm)

    def _backends(self) -> dict[str, str]:
        """What ran: each op's implementation on this device, the models' linear layers, on a GPU the segments."""
        served = {op: devices[self.lm.device.type] for op, devices in backends().items()}
        if layout_of(self.lm).mode == "gathered":
            served["fork_attention"] = "gathered: the model has no attention hook"
        packed, *_ = (served.pop(op) for op in ("packed_linear", "packed_swiglu", "content_hash", "accept"))
        modules = [module for body in self.bodies for module in body.modules()]
        if not any(isinstance(module, RMSNorm) for module in modules):
            served["rms_norm"] = "the model's own"
        plain = sum(type(module) in (nn.Linear, Conv1D) for module in modules)
        linear = f"{packed}: packed, {self.packed_bytes / 1e6:.0f} MB of weights" if self.packed_bytes else "torch"
        if self.packed_bytes and plain:
            linear += f"; torch: {plain} layers"
        if self.unfused is not None:
            served["lm_head_sample"] = f"not used: {self.unfused}"
        if self.hooks.processors:
            served["processors"] = ", ".join(type(processor).__name__ for processor in self.hooks.processors)
        if self.lm.device.type == "cuda":
            served["segments"] = "CUDA graphs" if self.eager is None else f"eager: {self.eager}"
        return {**served, "linear": linear}

    def _progress(self, total: int | None, what: str) -> Progress:
        return Progress(total, what, self.config.progress)
