"""Make the demo's two reward heads: on the language model's own hidden states, and on an encoder's.

Both models stay frozen, and run once over plain answers of the language model. The label is VADER's score of the answer
so far, at prefixes of each answer, as for the demo's reward model: that is what STARS asks about.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BertForSequenceClassification, LlamaForCausalLM, PreTrainedTokenizerBase

import stars_kernels
from demo.arguments import whole
from demo.models import (
    ENCODER_HEAD_FILE,
    ENCODER_TEMPLATE,
    OWN_HEAD_FILE,
    base_encoder_reward_model,
    load_encoder_reward_model,
    load_language_model,
    load_own_head,
    vader,
)
from demo.prompts import TRAIN_PROMPTS, UNSEEN_PROMPTS, messages
from demo.train_reward_model import Sample, correlations, prefix_labels
from stars_kernels.decoder.rules import Plain

PIECE = 40
"""Tokens of a piece of an answer, at most."""
EVERY = 15
"""Tokens of an answer between two prefixes that count in the figures, as for the demo's reward model."""


def sample_answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, per_prompt: int, args: argparse.Namespace
) -> list[Sample]:
    """`per_prompt` labelled answers to each prompt of the set `name`; an answer depends on no other, nor on batches."""
    prompts = {"train": TRAIN_PROMPTS, "unseen": UNSEEN_PROMPTS}[name]
    owners = [p for _ in range(per_prompt) for p in range(len(prompts))]
    outputs = stars_kernels.decode(
        model, lambda prompts, answers: [0.0] * len(answers), [messages(prompts[p]) for p in owners],
        tokenizer=tokenizer, request_ids=[f"{name} {p} {i // len(prompts)}" for i, p in enumerate(owners)],
        seed=args.seed, max_new_tokens=args.max_new_tokens, temperature=1.0, top_k=40, batch_size=48,
        rule=Plain(),
    )  # fmt: skip
    samples = []
    for p, output in zip(owners, outputs, strict=True):
        prompt_ids = tokenizer.apply_chat_template(messages(prompts[p]), add_generation_prompt=True)["input_ids"]
        ids = torch.tensor(prompt_ids + output.token_ids)
        samples.append(Sample(p, ids, prefix_labels(tokenizer, output.token_ids)))
    return samples


def load_data(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> tuple[list[Sample], list[Sample]]:
    """Samples of the training prompts and of the unseen ones, cached if possible."""
    if not args.data.exists():
        counts = {"train": args.per_prompt, "unseen": args.per_unseen}
        sets = {name: sample_answers(model, tokenizer, name, count, args) for name, count in counts.items()}
        args.data.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: [asdict(s) for s in samples] for name, samples in sets.items()}, args.data)
    sets = torch.load(args.data)
    return [Sample(**s) for s in sets["train"]], [Sample(**s) for s in sets["unseen"]]


@torch.no_grad()
def hidden_states(model: LlamaForCausalLM, samples: list[Sample]) -> list[Tensor]:
    """Of each sample (answer tokens + 1, 576): at the last token of the prompt, and at each token of the answer."""
    return [
        model.model(s.ids[None], use_cache=False).last_hidden_state[0, -len(s.labels) :]
        for s in tqdm(samples, desc="language model")
    ]


def fit_own_head(states: list[Tensor], samples: list[Sample], ridge: float) -> dict[str, Tensor]:
    """The linear head of least squared error over all prefixes; ridge: penalty of its weights, as a share of the mean
    square of a hidden state's elements."""
    x, y = torch.cat(states).double(), torch.cat([s.labels for s in samples]).double()  # (n, 576), (n,)
    mean = x.mean(dim=0)
    covariance = (x - mean).T @ (x - mean) / len(x)
    penalty = ridge * covariance.diagonal().mean() * torch.eye(len(mean), dtype=torch.float64)
    weight = torch.linalg.solve(covariance + penalty, (x - mean).T @ (y - y.mean()) / len(x))
    bias = y.mean() - weight @ mean
    return {"weight": weight[None].float(), "bias": bias[None].float()}


def answer_text(tokenizer: PreTrainedTokenizerBase, sample: Sample, start: int, stop: int) -> str:
    """The answer's tokens from `start` to `stop` as STARS shows them to a reward model that reads text."""
    answer = sample.ids[len(sample.ids) - len(sample.labels) + 1 :]
    return tokenizer.decode(answer[start:stop], skip_special_tokens=True).strip("\ufffd")  # parts of a character


def random_pieces(samples: list[Sample], args: argparse.Namespace) -> Iterator[tuple[Sample, int, int]]:
    """What the encoder's head learns from: of each answer nothing, some prefixes and some short pieces (start, stop).

    The pieces are not what STARS asks about. They are cheap, and teach it words rather than prompts.
    """
    generator = torch.Generator().manual_seed(args.seed)

    def draw(low: int, high: int) -> int:
        """low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=generator))

    for s in samples:
        length = len(s.labels) - 1
        yield s, 0, 0
        for _ in range(args.prefixes):
            yield s, 0, draw(1, length)
        for _ in range(args.pieces):
            size = draw(1, min(PIECE, length))
            start = draw(0, length - size)
            yield s, start, start + size


@torch.no_grad()
def first_states(model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """The encoder's last hidden state at [CLS] (texts, 384), which pooler and classifier read."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # neighbours need little padding
    states = torch.empty(len(texts), model.config.hidden_size)
    for chosen in tqdm([order[i : i + 32] for i in range(0, len(order), 32)], desc="encoder"):
        filled = [ENCODER_TEMPLATE.format(answer=texts[i]) for i in chosen]
        inputs = tokenizer(filled, padding=True, return_tensors="pt")
        states[chosen] = model.bert(**inputs).last_hidden_state[:, 0]
    return states


def fit_encoder_head(
    model: BertForSequenceClassification, states: Tensor, labels: Tensor, args: argparse.Namespace
) -> dict[str, Tensor]:
    """Train pooler and classifier, in place, with a squared error; return them, named as in the model.

    states (n, 384) at [CLS]; labels (n,).
    """
    torch.manual_seed(args.seed)
    nn.init.zeros_(model.classifier.weight)
    nn.init.zeros_(model.classifier.bias)
    trained = {n: p for n, p in model.named_parameters() if n.startswith(("bert.pooler", "classifier"))}
    optimizer = torch.optim.AdamW(trained.values(), lr=args.lr, weight_decay=args.weight_decay)
    steps = args.epochs * -(-len(states) // args.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in tqdm(range(args.epochs), desc="epochs"):
        for chosen in torch.randperm(len(states)).split(args.batch_size):
            pooled = model.dropout(model.bert.pooler(states[chosen, None]))
            loss = nn.functional.mse_loss(model.classifier(pooled)[:, 0], labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    return {name: parameter.detach() for name, parameter in trained.items()}


def scored_prefixes(samples: list[Sample]) -> list[tuple[int, int]]:
    """(sample, answer tokens) of the prefixes that count in the figures."""
    return [(i, n) for i, s in enumerate(samples) for n in range(EVERY, len(s.labels), EVERY)]


def figures(rewards: Tensor, samples: list[Sample]) -> dict[str, float]:
    """How well rewards (prefixes,), one for each of `scored_prefixes`, follow VADER's score."""
    facts = [(samples[i].labels[n].item(), samples[i].prompt, n) for i, n in scored_prefixes(samples)]
    return correlations(torch.cat([rewards.double()[:, None], torch.tensor(facts, dtype=torch.float64)], dim=1))


def train_own_head(
    model: LlamaForCausalLM, train: list[Sample], unseen: list[Sample], args: argparse.Namespace
) -> dict[str, float]:
    """Write the head of the language model's hidden states; the figures of the file as it is loaded."""
    tensors = fit_own_head(hidden_states(model, train), train, args.ridge)
    save_file(tensors, args.own_output)
    states = hidden_states(model, unseen)
    with torch.no_grad():
        rewards = load_own_head(args.own_output)(torch.stack([states[i][n] for i, n in scored_prefixes(unseen)]))
    found = figures(rewards[:, 0], unseen)
    facts = {"base": "SmolLM2-135M-Instruct", "train_samples": len(train), "ridge": args.ridge, "seed": args.seed}
    save_file(tensors, args.own_output, {name: str(value) for name, value in (facts | found).items()})
    return found


def train_encoder_head(
    lm_tokenizer: PreTrainedTokenizerBase, train: list[Sample], unseen: list[Sample], args: argparse.Namespace
) -> dict[str, float]:
    """Write the encoder's pooler and classifier; the figures of the file as it is loaded."""
    model, tokenizer = base_encoder_reward_model()
    texts = [answer_text(lm_tokenizer, *piece) for piece in random_pieces(train, args)]
    labels = torch.tensor([vader(text) for text in texts])
    trained = fit_encoder_head(model, first_states(model, tokenizer, texts), labels, args)
    tensors = {name: tensor.half() for name, tensor in trained.items()}
    save_file(tensors, args.encoder_output)
    model, tokenizer = load_encoder_reward_model(args.encoder_output)
    texts = [answer_text(lm_tokenizer, unseen[i], 0, n) for i, n in scored_prefixes(unseen)]
    with torch.no_grad():
        rewards = model.classifier(model.bert.pooler(first_states(model, tokenizer, texts)[:, None]))
    found = figures(rewards[:, 0], unseen)
    facts = {
        "base": "all-MiniLM-L6-v2", "train_samples": len(train), "prefixes_of_each": args.prefixes,
        "pieces_of_each": args.pieces, "epochs": args.epochs, "lr": args.lr, "seed": args.seed,
    }  # fmt: skip
    save_file(tensors, args.encoder_output, {name: str(value) for name, value in (facts | found).items()})
    return found


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demo.train_heads",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data", type=Path, default=Path(".cache/heads_data.pt"),
        help="labelled samples: read if the file is there, else made and written",
    )  # fmt: skip
    parser.add_argument("--own-output", type=Path, default=OWN_HEAD_FILE, help="the head of the LM's hidden states")
    parser.add_argument("--encoder-output", type=Path, default=ENCODER_HEAD_FILE, help="the encoder's head")
    parser.add_argument("--per-prompt", type=whole(1), default=4, help="answers sampled to a training prompt")
    parser.add_argument("--per-unseen", type=whole(1), default=2, help="answers sampled to an unseen prompt")
    parser.add_argument("--max-new-tokens", type=whole(1), default=128, help="longest answer")
    parser.add_argument("--ridge", type=float, default=0.3, help="penalty of the own head's weights")
    parser.add_argument("--prefixes", type=whole(1), default=8, help="of an answer that the encoder's head learns from")
    parser.add_argument("--pieces", type=whole(1), default=32, help="of an answer that it learns from, too")
    parser.add_argument("--epochs", type=whole(1), default=10, help="passes over prefixes and pieces")
    parser.add_argument("--batch-size", type=whole(1), default=64, help="of them in an optimizer step")
    parser.add_argument("--lr", type=float, default=5e-4, help="highest learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="AdamW's weight decay")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling and of training")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    model, tokenizer = load_language_model()
    train, unseen = load_data(model, tokenizer, args)
    found = {
        "own head": train_own_head(model, train, unseen, args),
        "encoder": train_encoder_head(tokenizer, train, unseen, args),
    }
    for name, values in found.items():
        print(name)
        for key, value in values.items():
            print(f"  {key}: {value:.3f}" if isinstance(value, float) else f"  {key}: {value}")


if __name__ == "__main__":
    main()
