"""Make the demo's reward model: sample answers, label every prefix with VADER, train low-rank adapters.

A reward model trained on whole texts misjudges partial ones, yet partial ones are what STARS asks about. Here
each position of an answer is a training example, all of them in one causal forward pass.
"""

import argparse
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerBase

from demo.models import (
    REWARD_FILE,
    REWARD_LAYERS,
    REWARD_PAD_ID,
    base_reward_model,
    load_language_model,
    load_reward_model,
    vader,
)
from demo.prompts import TRAIN_PROMPTS, UNSEEN_PROMPTS, messages


@dataclass
class Sample:
    """One chat. `ids` (length,) holds its tokens; `labels` (answer tokens + 1,) scores the empty answer, at
    the last token of the prompt, and then the answer after each of its tokens."""

    prompt: int
    ids: Tensor
    labels: Tensor


def prefix_labels(tokenizer: PreTrainedTokenizerBase, answer: list[int]) -> Tensor:
    """VADER scores (len(answer) + 1,) of the answer's prefixes, the empty one first."""
    texts = (tokenizer.decode(answer[:n], skip_special_tokens=True) for n in range(len(answer) + 1))
    return torch.tensor([vader(text.rstrip("\ufffd")) for text in texts])  # U+FFFD: half of a character


@torch.no_grad()
def sample_answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: tuple[str, ...],
    per_prompt: int,
    max_new_tokens: int,
    prompts_at_once: int = 8,
) -> list[Sample]:
    """`per_prompt` labelled answers to each prompt."""
    samples = []
    for start in tqdm(range(0, len(prompts), prompts_at_once), desc="sample"):
        chats = [messages(prompt) for prompt in prompts[start : start + prompts_at_once]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        outputs = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=40, top_p=1.0, max_new_tokens=max_new_tokens,
            num_return_sequences=per_prompt,
        )  # fmt: skip
        for row, output in enumerate(outputs):
            chat = row // per_prompt
            prompt_ids = inputs["input_ids"][chat][inputs["attention_mask"][chat].bool()]
            answer = output[inputs["input_ids"].shape[1] :].tolist()
            if tokenizer.eos_token_id in answer:
                answer = answer[: answer.index(tokenizer.eos_token_id) + 1]
            ids = torch.cat([prompt_ids, torch.tensor(answer)])
            samples.append(Sample(start + chat, ids, prefix_labels(tokenizer, answer)))
    return samples


def load_data(args: argparse.Namespace) -> tuple[list[Sample], list[Sample], LlamaForCausalLM]:
    """Samples of the training prompts and of the unseen ones, cached if possible; and the language model."""
    model, tokenizer = load_language_model()
    if not args.data.exists():
        torch.manual_seed(args.seed)
        sets = {
            "train": sample_answers(model, tokenizer, TRAIN_PROMPTS, args.per_prompt, args.max_new_tokens),
            "unseen": sample_answers(model, tokenizer, UNSEEN_PROMPTS, args.per_unseen, args.max_new_tokens),
        }
        args.data.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: [asdict(s) for s in samples] for name, samples in sets.items()}, args.data)
    sets = torch.load(args.data)
    return [Sample(**s) for s in sets["train"]], [Sample(**s) for s in sets["unseen"]], model


class LowRank(nn.Module):
    """A frozen linear layer W plus a trained delta B @ A: A (rank, in), B (out, rank), zero at first."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.lora_A = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.lora_A.T @ self.lora_B.T


def add_adapters(model: LlamaForSequenceClassification, rank: int) -> dict[str, nn.Parameter]:
    """Freeze the model, give each linear layer an adapter, and return what trains, named as in the file."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(block, name, LowRank(linear, rank))
    nn.init.zeros_(model.score.weight)
    model.model.norm.requires_grad_(True)
    model.score.requires_grad_(True)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def scores(model: LlamaForSequenceClassification, ids: Tensor) -> Tensor:
    """The reward (batch, length) read at every position of `ids` (batch, length)."""
    return model.score(model.model(ids, use_cache=False).last_hidden_state).squeeze(-1)


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both (batch, length), padded on the right, where causal attention needs no mask.
    Labels are NaN where nothing is learnt: in the padding, and in the prompt but for its last token."""
    ids = pad_sequence([s.ids for s in samples], batch_first=True, padding_value=REWARD_PAD_ID)
    labels = torch.full(ids.shape, torch.nan)
    for row, s in zip(labels, samples, strict=True):
        row[len(s.ids) - len(s.labels) : len(s.ids)] = s.labels
    return ids, labels


def train(model: LlamaForSequenceClassification, samples: list[Sample], args: argparse.Namespace) -> dict[str, Tensor]:
    """Fit adapters, final norm and head to all labels with a squared error; return the trained tensors."""
    torch.manual_seed(args.seed)
    parameters = add_adapters(model, args.rank)
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.lr, weight_decay=args.weight_decay)
    batches = math.ceil(len(samples) / args.batch_size)
    steps = args.epochs * math.ceil(batches / args.accumulate)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (1 + math.cos(math.pi * step / steps)) / 2)
    )
    for epoch in range(args.epochs):
        order = torch.randperm(len(samples)).tolist()
        progress = tqdm(range(batches), desc=f"epoch {epoch + 1}/{args.epochs}")
        mean_loss = 0.0
        for batch in progress:
            chosen = order[batch * args.batch_size : (batch + 1) * args.batch_size]
            ids, labels = collate([samples[i] for i in chosen])
            asked = ~labels.isnan()
            loss = (scores(model, ids)[asked] - labels[asked]).square().mean()
            (loss / args.accumulate).backward()
            mean_loss += (loss.item() - mean_loss) / (batch + 1)
            progress.set_postfix(mse=f"{mean_loss:.4f}")
            if (batch + 1) % args.accumulate == 0 or batch + 1 == batches:
                nn.utils.clip_grad_norm_(parameters.values(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def pearson(x: Tensor, y: Tensor, *keys: Tensor) -> float:
    """Pearson's r of x and y; with keys, after each group of equal keys has lost its mean. All are (n,)."""
    if keys:
        _, group = torch.stack(keys).unique(dim=1, return_inverse=True)
        count = group.bincount()
        x, y = (v - (group.bincount(weights=v) / count)[group] for v in (x, y))
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()


@torch.no_grad()
def evaluate(model: LlamaForSequenceClassification, samples: list[Sample], every: int = 15) -> dict[str, float]:
    """How well the rewards after 15, 30, ... tokens of an answer follow VADER's score of the same prefix."""
    rows = []
    for s in tqdm(samples, desc="evaluate"):
        predicted = scores(model, s.ids[None])[0, -len(s.labels) :]
        rows += [(predicted[n], s.labels[n], s.prompt, n) for n in range(every, len(s.labels), every)]
    return correlations(torch.tensor(rows, dtype=torch.float64))


def correlations(rows: Tensor) -> dict[str, float]:
    """How well rewards follow VADER's scores. rows (n, 4): reward, score, prompt and length of each prefix."""
    x, y, prompt, length = rows.T
    return {
        "prefixes": len(rows),
        "pearson": pearson(x, y),
        "pearson_within_prompt": pearson(x, y, prompt),
        "pearson_within_prompt_and_length": pearson(x, y, prompt, length),
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path(".cache/sentiment_rm_data.pt"),
        help="labelled samples: read if the file is there, else made and written",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=REWARD_FILE, help="the trained tensors")
    parser.add_argument("--per-prompt", type=int, default=6, help="answers sampled to a training prompt")
    parser.add_argument("--per-unseen", type=int, default=4, help="answers sampled to an unseen prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the training samples")
    parser.add_argument("--batch-size", type=int, default=8, help="answers in a forward pass")
    parser.add_argument("--accumulate", type=int, default=1, help="forward passes in an optimizer step")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="AdamW's weight decay")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling and of training")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    train_samples, unseen_samples, language_model = load_data(args)
    trained = train(base_reward_model(language_model), train_samples, args)
    tensors = {name: tensor.half().contiguous() for name, tensor in trained.items()}
    save_file(tensors, args.output)
    # The figures are those of the file as it will be loaded: rounded to float16, its adapters merged.
    figures = evaluate(load_reward_model(language_model, args.output), unseen_samples)
    for name, value in figures.items():
        print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    facts = {
        "base": "SmolLM2-135M-Instruct", "layers": REWARD_LAYERS, "train_samples": len(train_samples),
        "rank": args.rank, "epochs": args.epochs, "lr": args.lr, "seed": args.seed,
    }  # fmt: skip
    save_file(tensors, args.output, {name: str(value) for name, value in (facts | figures).items()})


if __name__ == "__main__":
    main()
