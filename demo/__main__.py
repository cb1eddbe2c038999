"""The demo: align a real language model with a real reward model on this machine, beside plain sampling.

    python -m demo

Three prompts the reward model was not trained on: plain sampling, then STARS, then the naive loop on the same job with
the same random numbers, so that its answers must be STARS' own but for rounding.
"""

import argparse
import textwrap
import time

import torch
from transformers.utils import logging

import stars_kernels
from demo.arguments import whole
from demo.models import load_language_model, load_reward_model, vader
from demo.naive import naive_decode
from demo.prompts import UNSEEN_PROMPTS, messages
from stars_kernels.ops.philox import request_key


@torch.inference_mode()
def plain(lm, rm, tokenizer, chat, tokens: int) -> tuple[list[int], str, float]:
    """Sample an answer by `model.generate`; return its token ids, its text and its reward."""
    encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    start = encoded["input_ids"].shape[1]
    ids = lm.generate(**encoded, do_sample=True, temperature=1.0, top_k=40, max_new_tokens=tokens)
    text = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    return ids[0, start:].tolist(), text, rm(input_ids=ids).logits[0, 0].item()


def show(title: str, text: str, reward: float, more: str) -> None:
    print(f"  {title}: reward {reward:+.2f}, VADER {vader(text):+.2f}{more}")
    print(textwrap.fill(" ".join(text.split()), 110, initial_indent="    | ", subsequent_indent="    | "))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--prompts", type=whole(1, len(UNSEEN_PROMPTS)), default=3, help="how many unseen prompts (default 3)"
    )
    parser.add_argument("--tokens", type=whole(1), default=60, help="tokens of an answer, at most (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of every random number (default 0)")
    parser.add_argument("--no-naive", action="store_true", help="leave out the naive loop, which takes a minute or two")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    print("Loading SmolLM2-135M-Instruct and the sentiment reward model ...", flush=True)
    lm, tokenizer = load_language_model()
    rm = load_reward_model(lm)
    prompts = UNSEEN_PROMPTS[: args.prompts]
    chats = [messages(prompt) for prompt in prompts]

    print("Plain sampling (model.generate, no reward) ...", flush=True)
    torch.manual_seed(args.seed)
    began = time.perf_counter()
    unaligned = [plain(lm, rm, tokenizer, chat, args.tokens) for chat in chats]
    plain_seconds = time.perf_counter() - began

    print("STARS (r* and beta calibrated on plain continuations of these prompts) ...", flush=True)
    began = time.perf_counter()
    aligned = stars_kernels.decode(lm, rm, chats, tokenizer=tokenizer, seed=args.seed, max_new_tokens=args.tokens)
    calibration = aligned[0].seconds["calibrate"]
    stars_seconds = time.perf_counter() - began - calibration

    for prompt, (_, text, reward), output in zip(prompts, unaligned, aligned, strict=True):
        print(f"\n> {prompt}")
        show("plain", text, reward, "")
        attempts = "+".join(str(segment.attempts) for segment in output.segments)
        show("STARS", output.text, output.reward, f", attempts {attempts}, finished by {output.finish_reason}")

    settings = aligned[0].config
    tokens = sum(len(output.token_ids) for output in aligned)
    judged = sum(output.counts.judged for output in aligned)
    print(f"\nr* = {settings.reward_threshold:.3f}, beta = {settings.beta:.3f}, found in {calibration:.1f} s")
    plain_tokens = sum(len(ids) for ids, _, _ in unaligned)
    print(
        f"plain: {plain_tokens} tokens in {plain_seconds:.1f} s = {plain_tokens / plain_seconds:.1f} tokens/s, "
        "one prompt at a time"
    )
    print(
        f"STARS: {tokens} aligned tokens in {stars_seconds:.1f} s = {tokens / stars_seconds:.1f} tokens/s, "
        f"{judged} tokens judged, {sum(output.counts.attempts for output in aligned)} attempts"
    )
    print("ran on: " + ", ".join(f"{op}: {served.partition(':')[0]}" for op, served in aligned[0].backends.items()))
    if args.no_naive:
        return

    print("\nThe naive loop on the same job (generate and a full reward pass for each attempt) ...", flush=True)
    began = time.perf_counter()
    same = 0
    for output, chat in zip(aligned, chats, strict=True):
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = naive_decode(lm, rm, ids, settings, key=request_key(settings.seed, output.request_id))
        same += answer.tokens == output.token_ids
    naive_seconds = time.perf_counter() - began
    print(
        f"naive: {naive_seconds:.1f} s, {naive_seconds / stars_seconds:.1f}x STARS' time, and the same answer for "
        f"{same} of {len(aligned)} prompts (fp32: answers part where two choices lie within rounding)"
    )


if __name__ == "__main__":
    main()
