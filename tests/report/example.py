"""Run folders made up without a model: plausible prompts, attempts and rewards, in the form that run_file writes."""

import json
import random

from stars_kernels import Calibration, StarsConfig
from stars_kernels.data.manifest import Manifest

THINGS = ["lighthouse", "old clock", "river at night", "concert", "new bicycle", "winter garden", "long train journey"]
WAYS = ["Describe the {}.", "Write a short story about a {}.", "What do you think of the {}?", "Review the {}."]
WORDS = (
    "the light was warm and the evening felt calm so everyone stayed a little longer than they had planned because it "
    "rained again while a few of us walked home slowly talking about music work old friends and what might come next"
).split()
TARGET, BETA, ALPHA, SIZE, BUDGET = 0.8, 0.1, 0.5, 15, 120


def text(rng, tokens):
    words = [rng.choice(WORDS) for _ in range(tokens)]
    if rng.random() < 0.5:
        words[-1] += rng.choice([".", ",", ".\n\n"])
    return " " + " ".join(words)


def segment(rng, most, before, empty):
    """Attempts as STARS judges them; the reward wanders upwards, as the better ones stay."""
    start = (1 - ALPHA) * empty + ALPHA * TARGET
    found = {name: [] for name in ("rewards", "thresholds", "lengths", "texts", "tokens")}
    outcome, rewards = "fallback", found["rewards"]
    for _ in range(most):
        length = SIZE if rng.random() < 0.95 else rng.randint(4, SIZE - 1)
        rewards.append(max(-1.0, min(1.0, rng.gauss(0.45 + before / 400, 0.3))))
        found["thresholds"].append(min(TARGET, start + (before + length) * (TARGET - start) / BUDGET))
        found["lengths"].append(length)
        found["texts"].append(text(rng, length))
        found["tokens"].append([rng.randrange(50000) for _ in range(length)])
        if (rewards[-1] - found["thresholds"][-1]) / BETA > rng.gauss(0, 0.5):
            outcome = "accepted"
            break
    chosen = len(rewards) - 1 if outcome == "accepted" else rewards.index(max(rewards))
    return {**found, "chosen": chosen, "outcome": outcome, "kept": []}


def row(rng, name, prompt, segments, most):
    empty, before, parts = rng.gauss(0.0, 0.1), 0, []
    for _ in range(segments):
        parts.append(segment(rng, most, before, empty))
        before += parts[-1]["lengths"][parts[-1]["chosen"]]
    attempts = sum(len(part["rewards"]) for part in parts)
    judged = sum(sum(part["lengths"]) for part in parts)
    return {
        "custom_id": name,
        "prompt": prompt,
        "text": "".join(part["texts"][part["chosen"]] for part in parts),
        "token_ids": [token for part in parts for token in part["tokens"][part["chosen"]]],
        "reward": parts[-1]["rewards"][parts[-1]["chosen"]],
        "prompt_reward": empty,
        "finish_reason": rng.choice(["length", "length", "eos"]),
        "segments": parts,
        "counts": {
            "judged": judged,
            "rejected": judged - before,
            "attempts": attempts,
            "accepted": sum(part["outcome"] == "accepted" for part in parts),
            "rejections": attempts - segments,
        },
    }


def cost(rng, answer):
    counts = {**answer["counts"], "sampled": answer["counts"]["judged"] * 5 // 4, "rm_scored": 900, "shared": 12}
    seconds = {"admit": 0.4, "propose": rng.uniform(6, 9), "score": rng.uniform(2, 3), "judge": 0.3, "commit": 0.2}
    return {
        "custom_id": answer["custom_id"],
        "counts": counts,
        "widths": [[4, 8][: 1 + (len(part["rewards"]) > 4)] for part in answer["segments"]],
        "seconds": seconds,
        "backends": {"segment_sample": "cpp (avx2)", "fork_attention": "cpp (avx2)", "linear": "packed"},
        "memory_limits": {},
        "elapsed": rng.uniform(0.5, 3),
    }


def write_rows(folder, rows, costs, config=None, calibration=None):
    """Write a run of these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("results", rows), ("costs", costs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = config or StarsConfig(
        reward_threshold=TARGET, beta=BETA, segment_size=SIZE, max_new_tokens=BUDGET, seed=0, trace="full"
    )
    Manifest(
        {"stars-kernels": "0.1.0", "Python": "3.11.2", "torch": "2.11.0", "transformers": "5.17.0", "device": "cpu"},
        {"model": "LlamaForCausalLM 0123456789abcdef", "reward_model": "LlamaForSequenceClassification fedcba",
         "tokenizer": "PreTrainedTokenizerFast 00ff", "eos": "2, 7"},
        config.to_dict(), calibration, {line["custom_id"]: "0" for line in rows},
    ).save(folder / "manifest.json")  # fmt: skip
    return folder


def write_run(folder, prompts=64, segments=8, attempts=20, seed=0, full=False):
    """Write a run of made-up prompts; full: all attempts at every segment are rejected."""
    rng, rows = random.Random(seed), []
    for i in range(prompts):
        prompt = rng.choice(WAYS).format(rng.choice(THINGS))
        chat = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": prompt}]
        rows.append(row(rng, f"p{i}", chat if i % 2 else prompt, segments, attempts))
    if full:
        for one in rows:
            one["segments"] = [padded(rng, part, attempts) for part in one["segments"]]
    plain = [rng.gauss(0.25, 0.35) for _ in range(64)]
    calibration = Calibration(TARGET, BETA, 0.9, 0.25, plain, 7680, 9000, 41.5, "a", "b")
    return write_rows(folder, rows, [cost(rng, one) for one in rows], calibration=calibration)


def padded(rng, part, attempts):
    """Rejected attempts before the others, so that there are as many as may be."""
    more = attempts - len(part["rewards"])
    first = {"rewards": -0.5, "thresholds": part["thresholds"][0], "lengths": SIZE}
    grown = {name: [value] * more + part[name] for name, value in first.items()}
    grown["texts"] = [text(rng, SIZE) for _ in range(more)] + part["texts"]
    grown["tokens"] = [[rng.randrange(50000) for _ in range(SIZE)] for _ in range(more)] + part["tokens"]
    return {**part, **grown, "chosen": part["chosen"] + more}
