"""The vLLM baseline without vLLM: its loop over engines of our own, and what it says where vllm is missing."""

import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from bench import decode, rival_vllm
from bench.common import sampler


@pytest.fixture(scope="module")
def job():
    return decode.make_job("tiny", prompts=2, prompt_tokens=40, dtype=torch.float64).cut(prompts=2, segments=2)


@pytest.fixture(scope="module", params=[True, False], ids=["script", "rewards"])
def truth(request, job):
    if not request.param:
        changes = dict(accept="soft", alpha=0.1, reward_threshold=1.5, beta=0.5, max_attempts=5)
        job = replace(job, config=job.config.replace(rule=None, **changes))
    return job, decode.naive(replace(job, seeded=True))


class Engine:
    """Draws the tokens of `bench decode` for the attempts that it is asked for, and counts them."""

    def __init__(self, job):
        self.job, self.asked, self.counts = job, {}, []

    @torch.inference_mode()
    def generate(self, texts, counts, sizes):
        self.counts.append(counts)
        return [self.samples(*request) for request in zip(texts, counts, sizes, strict=True)]

    def samples(self, text, count, size):
        prompt = next(p for p, ids in enumerate(self.job.prompts) if text[: len(ids)] == ids)
        first = self.asked.get(tuple(text), 0)
        self.asked[tuple(text)] = first + count
        draw = sampler(self.job.config, [self.job.keys[prompt]])
        rows = []
        for attempt in range(first, first + count):
            row = list(text)
            for _ in range(size):
                logits = self.job.model(torch.tensor([row])).logits[:, -1]
                row.append(draw(logits, [0], [attempt], len(row) - len(self.job.prompts[prompt])).item())
            rows.append(row[len(text) :])
        return rows


@pytest.mark.parametrize("width", [1, 4])
def test_the_loop_is_stars(truth, width):
    """On engines that draw the same tokens it gives the answers of the naive loop, fallbacks included."""
    job, expected = truth
    engine = Engine(job)
    found = rival_vllm.align(engine.generate, rival_vllm.hf_score(job.rm), job.prompts, job.config, width, job.keys)
    assert [(r.token_ids, r.attempts) for r in found] == [(r.token_ids, r.attempts) for r in expected]
    assert [r.reward for r in found] == pytest.approx([r.reward for r in expected], rel=1e-12)
    assert max(map(max, engine.counts)) == min(width, job.config.max_attempts)
    assert job.config.rule or any(5 in result.attempts for result in found)


def test_rewards_of_texts_of_several_lengths(job):
    texts = [job.prompts[0][:7], job.prompts[1], job.prompts[0][:1]]
    alone = [job.rm(torch.tensor([text])).logits.item() for text in texts]
    assert rival_vllm.hf_score(job.rm)(texts) == pytest.approx(alone, rel=1e-12)


def test_the_models_are_saved_as_they_are(job, tmp_path):
    rival_vllm.save(job, tmp_path)
    ids = torch.tensor([job.prompts[0][:20]])
    for folder, kind, model in (
        ("lm", AutoModelForCausalLM, job.model),
        ("rm", AutoModelForSequenceClassification, job.rm),
    ):
        loaded = kind.from_pretrained(tmp_path / folder, dtype=torch.float64)
        assert loaded.config.architectures == [type(model).__name__]
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-6, atol=1e-6)


def test_measure_prints_a_speed_for_each_width(job, capsys):
    job = job.cut(prompts=2, segments=1)
    speeds = rival_vllm.measure(Engine(job).generate, rival_vllm.hf_score(job.rm), job, [2, 20])
    assert set(speeds) == {2, 20} and all(speed > 0 for speed in speeds.values())
    assert "vLLM, 2 prompts, width 20:" in capsys.readouterr().out


def test_without_vllm(monkeypatch, capsys):
    monkeypatch.setattr(rival_vllm, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["rival_vllm"])
    assert rival_vllm.main() == 2
    assert "vllm is not installed: pip install vllm" in capsys.readouterr().err


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(rival_vllm, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["rival_vllm", "--rm", "hf"])
    assert rival_vllm.main() == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_nan_rewards_end_it(job):
    with pytest.raises(ValueError, match="prompt 0: a reward is nan"):
        rival_vllm.align(
            Engine(job).generate, lambda texts: [torch.nan] * len(texts), job.prompts, job.config, 2, job.keys
        )


def test_the_requests_of_vllm(job, monkeypatch):
    """What reaches vLLM's classes, by stand-ins with their names."""
    calls = []

    class LLM:
        def __init__(self, **options):
            calls.append(options)

        def generate(self, requests, params, use_tqdm):
            return [Output([Output(token_ids=(1, 2))] * p["n"]) for p in params]

        def classify(self, requests, pooling_params, use_tqdm):
            return [Output(Output(probs=[float(len(request["prompt_token_ids"]))])) for request in requests]

    class Output:
        def __init__(self, outputs=None, token_ids=None, probs=None):
            self.outputs, self.token_ids, self.probs = outputs, token_ids, probs

    module = type(sys)("vllm")
    module.LLM, module.SamplingParams, module.PoolingParams = LLM, dict, dict
    monkeypatch.setitem(sys.modules, "vllm", module)
    generate = rival_vllm.vllm_generate("lm", job, 0.4)
    assert generate([[1], [2]], [2, 1], [5, 5]) == [[[1, 2], [1, 2]], [[1, 2]]]
    assert rival_vllm.vllm_score("rm", job, 0.4)([[1], [2, 3]]) == [1.0, 2.0]
    assert all(call["enable_prefix_caching"] and call["skip_tokenizer_init"] for call in calls)
    assert calls[1]["runner"] == "pooling"
