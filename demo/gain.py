"""What STARS gains over plain sampling on prompts the reward model was not trained on.

    python -m demo.gain

Plain sampling, STARS and best-of-N at as many judged tokens as STARS used: mean reward and mean VADER compound score
of the answers, with 95 % bootstrap intervals of the gain over prompts. Prints a Markdown table.
"""

import argparse

import torch
from transformers.utils import logging

import stars_kernels
from demo.arguments import whole
from demo.models import (
    ENCODER_TEMPLATE,
    load_encoder_reward_model,
    load_language_model,
    load_own_head,
    load_reward_model,
    vader,
)
from demo.prompts import UNSEEN_PROMPTS, messages
from stars_kernels import RewardModel
from stars_kernels.decoder.rules import BestOf, Plain

REWARDS = {
    "model": load_reward_model,
    "own-head": lambda lm: RewardModel(load_own_head()),
    "encoder": lambda lm: RewardModel(*load_encoder_reward_model(), template=ENCODER_TEMPLATE),
}


def interval(gains: torch.Tensor, draws: int = 10_000) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of `gains` [prompts]."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(gains), (draws, len(gains)), generator=generator)
    low, high = gains[picks].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=gains.dtype)).tolist()
    return low, high


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.gain", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--prompts",
        type=whole(1, len(UNSEEN_PROMPTS)),
        default=len(UNSEEN_PROMPTS),
        help="how many unseen prompts (default all)",
    )
    parser.add_argument("--tokens", type=whole(1), default=120, help="tokens of an answer, at most (default 120)")
    parser.add_argument(
        "--plain-samples", type=whole(1), default=4, help="plain answers averaged per prompt (default 4)"
    )
    parser.add_argument("--reward", choices=REWARDS, default="model", help="which of the demo's (default model)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    lm, tokenizer = load_language_model()
    rm = REWARDS[args.reward](lm)
    chats = [messages(prompt) for prompt in UNSEEN_PROMPTS[: args.prompts]]

    def answers(seed: int, **settings):
        outputs = stars_kernels.decode(
            lm, rm, chats, tokenizer=tokenizer, seed=seed, max_new_tokens=args.tokens, **settings
        )
        rewards = torch.tensor([output.reward for output in outputs], dtype=torch.float64)
        moods = torch.tensor([vader(output.text) for output in outputs], dtype=torch.float64)
        return outputs, rewards, moods

    def judged(outputs) -> int:
        return sum(output.counts.judged for output in outputs)

    stars = answers(args.seed)
    used = stars[0][0].config
    plain = [answers(args.seed + 1 + k, rule=Plain()) for k in range(args.plain_samples)]
    plain_tokens = sum(judged(p[0]) for p in plain) / len(plain)
    n = max(1, round(judged(stars[0]) / plain_tokens))
    best = answers(args.seed, rule=BestOf(n))

    plain_reward = torch.stack([p[1] for p in plain]).mean(dim=0)
    plain_mood = torch.stack([p[2] for p in plain]).mean(dim=0)
    print(f"{len(chats)} unseen prompts, at most {args.tokens} tokens, segment {used.segment_size}, ", end="")
    print(f"r* = {used.reward_threshold:.3f}, beta = {used.beta:.3f}, seed {args.seed}\n")
    print("| method | judged tokens | mean reward | gain (95 %) | mean VADER | gain (95 %) |")
    print("|---|---|---|---|---|---|")
    print(
        f"| plain sampling (mean of {len(plain)}) | {plain_tokens:.0f} | {plain_reward.mean():.3f} | | "
        f"{plain_mood.mean():.3f} | |"
    )
    for name, (outputs, rewards, moods) in (("STARS", stars), (f"best of {n}", best)):
        cells = [f"{name}", f"{judged(outputs)}"]
        for values, base in ((rewards, plain_reward), (moods, plain_mood)):
            low, high = interval(values - base)
            cells += [f"{values.mean():.3f}", f"{(values - base).mean():+.3f} ({low:+.3f} to {high:+.3f})"]
        print("| " + " | ".join(cells) + " |")
    reward_share = (stars[1] - plain_reward).mean() / (best[1] - plain_reward).mean()
    mood_share = (stars[2] - plain_mood).mean() / (best[2] - plain_mood).mean()
    attempts = sum(output.counts.attempts for output in stars[0])
    accepted = sum(output.counts.accepted for output in stars[0])
    fallbacks = sum(segment.outcome == "fallback" for output in stars[0] for segment in output.segments)
    print(f"\nSTARS' gain as a share of best-of-{n}'s: reward {reward_share:.0%}, VADER {mood_share:.0%}.")
    print(f"STARS: {attempts} attempts, {accepted} accepted, {fallbacks} fallbacks.")


if __name__ == "__main__":
    main()
