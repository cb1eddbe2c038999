"""Which models the engine takes, how it loads them, and the view it works on."""

from __future__ import annotations

import copy
import itertools
import os
import sys
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from stars_kernels import ops
from stars_kernels.hf.attention import ATTENTION
from stars_kernels.hf.families import REFUSED, WORKS
from stars_kernels.hf.layout import has_hook, text_config
from stars_kernels.hf.packing import works_as
from stars_kernels.hf.rope import keep_phases_exact
from stars_kernels.ops._registry import call_op
from stars_kernels.versions import rope_by_matmul

BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}
"""RoPE variants whose frequencies depend on the longest row of the batch, so batch-mates would change an answer."""

PLAIN = ("__new__", "__reduce__", "__reduce_ex__", "__getstate__")
"""What a class overrides whose modules are not copied by their __dict__."""
HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith("_hooks"))
"""Where torch keeps a module's hooks."""

Model = TypeVar("Model", bound=nn.Module)
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


def load_language_model(
    model: ModelOrPath,
    tokenizer: PreTrainedTokenizerBase | None,
    trust_remote_code: bool,
    argument: str = "model",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model itself, or loaded from a path with its tokenizer; refused by name where it is not a tested class."""
    if isinstance(model, str | os.PathLike):
        path, options = _source(model)
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
    """The transformers model inside a PEFT model, its adapters in place; anything else as it is."""
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
    """The linear layer behind a classifier's rewards; PEFT's wrapper of a trained one is looked into."""
    head, peft = model.score, sys.modules.get("peft")
    if peft is not None and isinstance(head, peft.utils.ModulesToSaveWrapper):
        trained = not head.disable_adapters and head.active_adapters[0] in head.modules_to_save
        head = head.modules_to_save[head.active_adapters[0]] if trained else head.original_module
    if type(head) is not nn.Linear:
        kind = f"{type(head).__module__}.{type(head).__qualname__}"
        raise ValueError(f"{argument} {name_of(model)} has a {kind} as its head, expected a torch.nn.Linear")
    return head


def eval_copy(model: Model) -> Model:
    """A module in eval mode that shares every parameter and buffer with `model` but has its own config and modules.

    The user's model is left alone, so other threads may go on using it: what a forward may write on a module, such as
    a list or a dict, is the copy's own. What cannot be copied (a lock, an open file, a generator) is shared, and so is
    an object that holds such a thing. Hooks are the user's: they are called with the copy's module, and one that is a
    bound method runs on the object it was bound to, be it `model` itself.
    """
    memo: dict[int, Any] = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    # Empty modules first: the copying of what one holds then ends at the next, and fails for no fault of another.
    modules = [module for module in model.modules() if not _copies_itself(type(module))]
    for module in modules:
        memo[id(module)] = type(module).__new__(type(module))
    for module in modules:
        state = {
            name: copy.copy(value) if name in HOOKS else _copied(value, memo)
            for name, value in module.__getstate__().items()
        }
        memo[id(module)].__setstate__(state)
    twin: Model = _copied(model, memo)
    if isinstance(twin, PreTrainedModel) and rope_by_matmul():
        keep_phases_exact(twin)
    return twin.eval()


def _copies_itself(kind: type[nn.Module]) -> bool:
    """Whether modules of a class are more than a dict of their state, as TorchScript's are."""
    own = any(getattr(kind, name) is not getattr(nn.Module, name) for name in PLAIN)
    return own or hasattr(kind, "__deepcopy__")


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy`, but that what cannot be copied is shared; of a list and a dict, those parts that cannot."""
    known = len(memo)
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:  # whatever the things that a model holds raise
        if isinstance(value, nn.Module):  # shared, it would be the user's that the view's layers are swapped on
            raise ValueError(f"a module {type(value).__name__} cannot be copied for its view: {error}") from error
    while len(memo) > known:  # half-made copies
        memo.popitem()
    if not isinstance(value, dict | list | PreTrainedConfig):
        return value
    parts = memo[id(value)] = copy.copy(value)
    if isinstance(value, PreTrainedConfig):  # never shared: the view's has our attention written on it
        vars(parts).update({name: _copied(part, memo) for name, part in vars(value).items()})
        return parts
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        parts[key] = _copied(part, memo)
    return parts


def view_of(model: PreTrainedModel) -> PreTrainedModel:
    """`eval_copy` with our attention; a class without the attention hook keeps its own."""
    view = eval_copy(model)
    if has_hook(view):
        for part in view.modules():  # transformers 5.17 leaves out inner models whose config is of the outer's class
            if isinstance(part, PreTrainedModel) and type(part.config) is type(view.config):
                part.set_attn_implementation(ATTENTION)
    for parent in list(view.modules()):
        for name, child in list(parent.named_children()):
            if works_as(child, LlamaRMSNorm) and child.weight.dtype == torch.float32:
                setattr(parent, name, RMSNorm(child))
    return view


class RMSNorm(nn.Module):
    """LlamaRMSNorm, or another family's that does the same, in one op.

    (In float64 and half precision it rounds otherwise than LlamaRMSNorm, which stays.)
    """

    def __init__(self, norm: LlamaRMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return call_op("rms_norm", x, self.weight, self.eps)


def eos_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """The model's end-of-sequence ids, as `model.generate` would use them."""
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = getattr(text_config(model), "eos_token_id", None)
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def _source(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """from_pretrained's arguments for a folder, a hub name or a .gguf file."""
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
    """The rope types of a config's rope_parameters: one set of them, or one for each type of layer."""
    if not isinstance(parameters, dict):
        return set()
    found = {parameters["rope_type"]} if "rope_type" in parameters else set()
    return found.union(*map(_rope_types, parameters.values()))
