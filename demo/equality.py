"""How often the answer depends on the width, that is on rounding: the share of answers equal to width 1's.

    python -m demo.equality

In exact arithmetic the width never changes an answer (in float64 the tests find every token equal). In fp32 and bf16 a
batch of another shape rounds differently, so an answer can part where two choices lie within rounding.
"""

import argparse

import torch
from transformers.utils import logging

import stars_kernels
from demo.arguments import whole
from demo.models import load_language_model, load_reward_model
from demo.prompts import UNSEEN_PROMPTS, messages


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.equality", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--prompts", type=whole(1, len(UNSEEN_PROMPTS)), default=8, help="how many unseen prompts (default 8)"
    )
    parser.add_argument("--tokens", type=whole(1), default=30, help="tokens of an answer, at most (default 30)")
    parser.add_argument("--widths", type=whole(1), nargs="+", default=[2, 5, 20], help="compared with width 1")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    chats = [messages(prompt) for prompt in UNSEEN_PROMPTS[: args.prompts]]
    names = [f"width {width}" for width in args.widths] + ["width 5, one prompt at a time"]
    print(f"{len(chats)} prompts, at most {args.tokens} tokens: share of answers equal to width 1's in all tokens\n")
    print("| dtype | " + " | ".join(names) + " | width 1 again |")
    print("|---" * (len(names) + 2) + "|")
    for dtype in args.dtypes:
        lm, tokenizer = load_language_model(getattr(torch, dtype))
        rm = load_reward_model(lm)

        def answers(config=None, chats=chats, lm=lm, rm=rm, tokenizer=tokenizer, **settings):
            outputs = stars_kernels.decode(
                lm, rm, chats, tokenizer=tokenizer, config=config, request_ids=list(range(len(chats))), **settings
            )
            return outputs[0].config, [output.token_ids for output in outputs]

        config, truth = answers(seed=0, width=1, max_new_tokens=args.tokens)
        columns = [answers(config, width=width)[1] for width in args.widths]
        columns.append(answers(config, width=5, batch_size=1)[1])
        columns.append(answers(config)[1])
        shares = [sum(a == b for a, b in zip(truth, column, strict=True)) / len(truth) for column in columns]
        print(f"| {dtype} | " + " | ".join(f"{share:.0%}" for share in shares) + " |", flush=True)


if __name__ == "__main__":
    main()
