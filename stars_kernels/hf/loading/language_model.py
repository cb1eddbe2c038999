"""Language models: which classes are taken, how they are loaded and checked."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from stars_kernels import ops
from stars_kernels.hf.families import REFUSED, WORKS
from stars_kernels.hf.view.layout import text_config

BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}
"""RoPE variants whose frequencies depend on the longest row of the batch, so batch-mates would change an answer."""

ModelOrPath = PreTrainedModel | str | os.PathLike[str]


def check_tokenizer(tokenizer: object) -> None:
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer is of type {type(tokenizer).__name__}, expected a transformers tokenizer or None")


def check_path(argument: str, model: object) -> None:
    """Refuse a path that can be no hub's name and does not exist."""
    if not isinstance(model, str | os.PathLike):
        return
    text = os.fspath(model)
    local = isinstance(model, os.PathLike) or text.startswith(("/", "./", "../", "~")) or text.endswith(".gguf")
    if local and not Path(text).expanduser().exists():
        raise FileNotFoundError(
            f"{argument} is {text!r}, which does not exist; expected an existing path or a hub name"
        )


@contextmanager
def reading(argument: str, path: str) -> Iterator[None]:
    """Say of an OSError in this block which model could not be read; transformers' own text may name none."""
    try:
        yield
    except OSError as error:
        why = str(error).strip().partition("\n")[0]
        raise OSError(
            f"{argument} {path!r} cannot be read, neither as a folder nor as a model of the hub: {why}"
        ) from error


def load_language_model(
    model: ModelOrPath,
    tokenizer: PreTrainedTokenizerBase | None,
    trust_remote_code: bool,
    argument: str = "model",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Return the model, loaded with its tokenizer where it is a path; refuse by name a class that is not tested."""
    if isinstance(model, str | os.PathLike):
        path, options = _source(model)
        with reading(argument, path):
            if tokenizer is None:
                tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, trust_remote_code=trust_remote_code, dtype="auto", use_safetensors=not options,
                output_loading_info=True, **options,
            )  # fmt: skip
        model, info = loaded
        if new := sorted(info["missing_keys"]):
            raise ValueError(
                f"{argument} {path!r} has no {new[0]} in its checkpoint, which would be random; expected a causal "
                "language model's checkpoint"
            )
    inner = unwrapped(model, argument)
    check_model(inner, argument, WORKS, "a decoder-only language model of a tested family")
    return inner, tokenizer


def unwrapped(model: object, argument: str) -> Any:
    """Return the transformers model inside a PEFT model, its adapters in place; anything else as it is."""
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return model
    if model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type.value
        raise ValueError(
            f"{argument} is a PEFT model with {kind}, which puts virtual tokens before the prompt; expected adapters "
            "inside the layers, such as LoRA"
        )
    return model.get_base_model()


def score_head(model: PreTrainedModel, argument: str) -> nn.Linear:
    """Return the linear layer that gives a classifier's rewards; PEFT's wrapper of a trained one is looked into."""
    head, peft = model.score, sys.modules.get("peft")
    if peft is not None and isinstance(head, peft.utils.ModulesToSaveWrapper):
        trained = not head.disable_adapters and head.active_adapters[0] in head.modules_to_save
        head = head.modules_to_save[head.active_adapters[0]] if trained else head.original_module
    if type(head) is not nn.Linear:
        kind = f"{type(head).__module__}.{type(head).__qualname__}"
        raise ValueError(f"{argument} {name_of(model)} has a {kind} as its head, expected a torch.nn.Linear")
    return head


def eos_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """Return the model's end-of-sequence ids, as `model.generate` would use them."""
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = getattr(text_config(model), "eos_token_id", None)
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def _source(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """Return from_pretrained's arguments for a folder, a hub name or a .gguf file."""
    path = os.path.expanduser(path)
    if path.endswith(".gguf"):
        if find_spec("gguf") is None:
            raise ImportError(f"{path!r} needs the package gguf, which is missing: pip install 'stars-kernels[gguf]'")
        return str(Path(path).parent), {"gguf_file": Path(path).name}
    return path, {}


def has_tokenizer(path: str) -> bool:
    folder = Path(path)
    return not folder.is_dir() or any(folder.glob("tokenizer*"))


def name_of(model: PreTrainedModel) -> str:
    where = getattr(model.config, "name_or_path", "")
    return f"{type(model).__name__} ({where})" if where else type(model).__name__


def check_model(model: object, argument: str, works: Collection[str], expected: str) -> None:
    """Refuse by name what is not one of the classes in `works`, or cannot be decoded exactly."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{argument} is of type {type(model).__name__}, expected a transformers model or a path to one")
    kind = type(model).__name__
    if kind not in works or not type(model).__module__.startswith("transformers."):
        why = REFUSED.get(kind, "not tested with STARS decoding")
        raise ValueError(f"{argument} is a {kind}, {why}; expected {expected}")
    assert isinstance(model, PreTrainedModel)
    ropes = [_rope_types(getattr(config, "rope_parameters", None)) for config in (model.config, text_config(model))]
    for rope in sorted(set.union(*ropes) & BATCH_DEPENDENT_ROPE):
        raise ValueError(
            f"{argument} {name_of(model)} has rope_type {rope!r}, whose frequencies depend on the longest row of a "
            "batch, so other prompts would change an answer; expected another rope_type"
        )
    devices = {p.device for p in model.parameters()}
    if any(device.type not in ops.DEVICES for device in devices):
        raise ValueError(
            f"{argument} {name_of(model)} lies on {sorted(map(str, devices))}, expected devices of {ops.DEVICES}"
            "; 'meta' is where weights stand that are offloaded to the CPU or a disk"
        )


def _rope_types(parameters: Any) -> set[str]:
    """Return the rope types in a config's rope_parameters, which are one dict, or one per type of layer."""
    if not isinstance(parameters, dict):
        return set()
    found = {parameters["rope_type"]} if "rope_type" in parameters else set()
    return found.union(*map(_rope_types, parameters.values()))
