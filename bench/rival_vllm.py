"""rival_vllm: STARS on vLLM, the strongest way to write it without this package. NEVER RUN: no GPU so far.

The same prompts, models, script of accepted attempts as `python -m bench decode`, in bfloat16. A round
asks vLLM for `n = width` samples of a segment of every unfinished prompt, with prefix caching, and a second engine
(vLLM's classification, or transformers' with --rm hf) for the reward of each. It prints aligned tokens per second for
every width; the best of them is the rival's figure.

Limits: vLLM's random numbers are its own, so its tokens differ and only the number of attempts is the same. Its prefix
cache holds whole blocks of 16 tokens, so up to 15 tokens of a prefix are read again. `--rm hf` keeps no cache.
Requests have no seed: with one, a rejected segment would be drawn again. vLLM pins its own torch: it may need an
environment of its own, where stars_kernels runs by its definitions (here it only judges).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForSequenceClassification

from bench import models
from bench.common import Result, check_plain
from bench.decode import SEGMENTS, Job, make_job
from demo.arguments import output_file, whole
from demo.naive import judge_attempt
from stars_kernels import StarsConfig
from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.rules import Candidate
from stars_kernels.ops.philox import accept_uniforms

Texts = list[list[int]]
Generate = Callable[[Texts, list[int], list[int]], list[Texts]]
"""(texts, samples of each, new tokens of each) -> the samples of each text."""
Score = Callable[[Texts], list[float]]


def align(
    generate: Generate,
    score: Score,
    prompts: Sequence[Sequence[int]],
    config: StarsConfig,
    width: int,
    keys: Sequence[int],
) -> list[Result]:
    """STARS over two engines. config: with all that its rule needs; keys: of each request, for its decisions."""
    check_plain(config)
    rule = config.resolved_rule
    answers = [
        Answer(key, prompt, config.max_new_tokens, prompt_reward=reward)
        for key, prompt, reward in zip(keys, prompts, score([list(prompt) for prompt in prompts]), strict=True)
    ]
    while active := [p for p, answer in enumerate(answers) if answer.active]:
        plans = [rule.plan(answers[p]) for p in active]
        widths = [min(width, plan.attempts - len(answers[p].candidates)) for p, plan in zip(active, plans, strict=True)]
        sizes = [answers[p].size(plan) for p, plan in zip(active, plans, strict=True)]
        texts = [[*prompts[p], *answers[p].tokens] for p in active]
        samples = generate(texts, widths, sizes)
        rewards = iter(score([text + sample for text, row in zip(texts, samples, strict=True) for sample in row]))
        numbers = [
            (keys[p], len(answers[p].tokens), len(answers[p].candidates) + column)
            for p, count in zip(active, widths, strict=True)
            for column in range(count)
        ]
        uniforms = iter(accept_uniforms(*zip(*numbers, strict=True)))
        for p, row in zip(active, samples, strict=True):
            answer, position = answers[p], len(answers[p].tokens)
            for tokens in row:
                candidate = Candidate(tokens, next(rewards), next(uniforms))
                if len(answer.tokens) > position:  # decided by a sample before
                    continue
                if math.isnan(candidate.reward):
                    raise ValueError(f"prompt {p}: a reward is nan, expected a number")
                judge_attempt(answer, rule, candidate)
    return [Result.of(answer) for answer in answers]


def vllm_generate(folder: Path, job: Job, share: float) -> Generate:
    """Load the language model in vLLM; share: of the GPU's memory that it may take."""
    from vllm import LLM, SamplingParams

    llm = LLM(**_engine(folder, job, share))
    config = job.config

    def generate(texts: Texts, counts: list[int], sizes: list[int]) -> list[Texts]:
        params = [
            SamplingParams(
                n=count,
                max_tokens=size,
                temperature=config.temperature,
                top_k=config.top_k or -1,
                top_p=1.0 if config.top_p is None else config.top_p,
                min_p=config.min_p or 0.0,
                ignore_eos=True,
                detokenize=False,
            )
            for count, size in zip(counts, sizes, strict=True)
        ]
        outputs = llm.generate(_requests(texts), params, use_tqdm=False)
        return [[list(sample.token_ids) for sample in output.outputs] for output in outputs]

    return generate


def vllm_score(folder: Path, job: Job, share: float) -> Score:
    from vllm import LLM, PoolingParams

    llm = LLM(runner="pooling", **_engine(folder, job, share))

    def score(texts: Texts) -> list[float]:
        logits = PoolingParams(use_activation=False)
        outputs = llm.classify(_requests(texts), pooling_params=logits, use_tqdm=False)
        return [output.outputs.probs[0] for output in outputs]

    return score


def _engine(folder: Path, job: Job, share: float) -> dict[str, Any]:
    return {
        "model": str(folder),
        "skip_tokenizer_init": True,  # token ids in, token ids out
        "dtype": "bfloat16",
        "enable_prefix_caching": True,
        "gpu_memory_utilization": share,
        "max_model_len": len(job.prompts[0]) + job.config.max_new_tokens + 1,
    }


def _requests(texts: Texts) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": text} for text in texts]


def hf_score(rm: LlamaForSequenceClassification) -> Score:
    """Score whole texts by transformers' classifier, padded on the right, which a causal model does not see."""

    @torch.inference_mode()
    def score(texts: Texts) -> list[float]:
        last = torch.tensor([len(text) - 1 for text in texts], device=rm.device)
        ids = torch.zeros(len(texts), int(last.max()) + 1, dtype=torch.int64, device=rm.device)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
        hidden = rm.model(input_ids=ids, use_cache=False).last_hidden_state
        rewards: list[float] = rm.score(hidden[torch.arange(len(texts), device=rm.device), last])[:, 0].tolist()
        return rewards

    return score


def save(job: Job, folder: Path) -> None:
    """Save the models as folders that vLLM can load: `lm` and `rm`."""
    job.model.save_pretrained(folder / "lm")
    job.rm.save_pretrained(folder / "rm")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.rival_vllm", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=models.MODELS, default="smol", help="as in bench decode")
    parser.add_argument("--prompts", type=whole(1), default=8, help="prompts of the batch (default 8)")
    parser.add_argument("--widths", type=whole(1), nargs="+", default=[1, 2, 4, 8], help="attempts side by side")
    parser.add_argument("--rm", choices=("vllm", "hf"), default="vllm", help="what computes the rewards")
    parser.add_argument("--quick", action="store_true", help="4 segments instead of 8")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures here")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse(sys.argv[1:])
    missing = "no CUDA device" if not torch.cuda.is_available() else None
    if find_spec("vllm") is None:
        missing = "vllm is not installed: pip install vllm, in an environment of its own where its torch is another"
    if missing:
        print(missing, file=sys.stderr)
        return 2
    job = make_job(args.model, args.prompts, dtype=torch.bfloat16).cut(args.prompts, 4 if args.quick else SEGMENTS)
    with tempfile.TemporaryDirectory() as name:
        save(job, Path(name))
        generate = vllm_generate(Path(name) / "lm", job, share=0.4)
        score = vllm_score(Path(name) / "rm", job, share=0.4) if args.rm == "vllm" else hf_score(job.rm.to("cuda"))
    speeds = measure(generate, score, job, args.widths)
    if args.json:
        args.json.write_text(json.dumps({"versions": versions(), "prompts": args.prompts, "speeds": speeds}) + "\n")
    return 0


def measure(generate: Generate, score: Score, job: Job, widths: Sequence[int]) -> dict[int, float]:
    """Aligned tokens per second, by width; each runs once untimed, so that nothing is compiled on the clock.

    The prompts are then in both prefix caches: reading them costs the rival nothing.
    """
    speeds = {}
    for width in widths:
        for _ in range(2):
            began = time.perf_counter()
            results = align(generate, score, job.prompts, job.config, width, job.keys)
            seconds = time.perf_counter() - began
        tokens = sum(len(result.token_ids) for result in results)
        speeds[width] = tokens / seconds
        print(f"vLLM, {len(job.prompts)} prompts, width {width}: {speeds[width]:.1f} aligned tokens/s", flush=True)
    return speeds


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"gpu": torch.cuda.get_device_name(0), **{name: version(name) for name in ("vllm", "torch", "transformers")}}


if __name__ == "__main__":
    sys.exit(main())
