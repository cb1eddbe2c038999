"""What serves a call: which implementation of each op, graphs or none, and why not better."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from stars_kernels.decoder.config import StarsConfig
from stars_kernels.decoder.rules import Rule, Stars
from stars_kernels.hf.models import Models
from stars_kernels.hf.proposing.processors import TokenHooks
from stars_kernels.hf.proposing.proposer import is_unfiltered
from stars_kernels.hf.rule_checks import first_plan, why_logits
from stars_kernels.hf.view import rewrites
from stars_kernels.hf.view.layout import layout_of
from stars_kernels.ops import backends


class Serving:
    """How the models of an engine are run in one call.

    eager: why segments do not run as CUDA graphs; None where they do. unfused: why logits are stored before tokens are
    drawn from them; None where the two are one op.
    """

    def __init__(self, models: Models, config: StarsConfig, hooks: TokenHooks) -> None:
        self._models, self._config, self._hooks = models, config, hooks
        self.eager = self._why_eager()
        self.unfused = self._why_unfused()

    def _why_eager(self) -> str | None:
        lm = self._models.lm
        if lm.device.type != "cuda":
            return "the model is not on a GPU"
        if not self._config.graphs:
            return "graphs=False"
        if self._hooks.processors:
            return "logits processors are asked at each token"
        if self._models.sharded:
            return "the model is shared out between processes"
        if (why := layout_of(lm).why_eager) is not None:
            return why
        served = {op: backends()[op]["cuda"] for op in ("segment_sample", "fork_attention")}
        for op, implementation in served.items():
            if implementation != "triton":
                return f"{op} is served by its {implementation}"
        if lm.dtype == torch.float64:
            return "float64 is served by the definitions, which wait for the host"
        return None

    def why_by_host(self, rule: Rule) -> str | None:
        """Why the host judges the rounds of a rule; None where the device may."""
        if self.eager is not None:
            return "segments do not run as CUDA graphs"
        if type(rule) is not Stars:
            return f"the rule is {type(rule).__name__}"
        if self._config.stop_strings or self._hooks.criteria:
            return "answers end at stops, which are looked for on the host"
        if not self._models.rewarder.queues:
            return "a reward model works on the host"
        return None

    def _why_unfused(self) -> str | None:
        if self._models.lm.device.type != "cuda":
            return "the model is not on a GPU"
        if (implementation := backends()["lm_head_sample"]["cuda"]) != "triton":
            return f"lm_head_sample is served by its {implementation}"
        if self._hooks.processors:
            return "logits processors are asked at each token"
        if not is_unfiltered(self._config.sampling):
            return "top_k, top_p or min_p is set"
        return why_logits(first_plan(self._config)) or self._models.why_unfused

    def backends(self) -> dict[str, str]:
        """What ran: each op's implementation on this device, the models' linear layers, on a GPU the segments."""
        models, device = self._models, self._models.lm.device.type
        served = {op: devices[device] for op, devices in backends().items()}
        if layout_of(models.lm).mode == "gathered":
            served["fork_attention"] = "gathered: the model has no attention hook"
        packed, *_ = (served.pop(op) for op in ("packed_linear", "packed_swiglu", "content_hash"))
        why = self.why_by_host(self._config.resolved_rule)
        if why is not None:
            del served["accept"]
        modules = [module for body in models.bodies for module in body.modules()]
        used = [rewrites.served(body) for body in models.bodies]
        served |= {op: "the model's own" for op in used[0] if not any(ops[op] for ops in used)}
        decoders = (models.lm, *(decoder for _, decoder in models.rewarder.decoders))
        if not any(layer.rotates for decoder in decoders for layer in layout_of(decoder).layers):
            served["rotary_store"] = "the model's own"
        plain = sum(type(module) in (nn.Linear, Conv1D) for module in modules)
        size = models.packed_bytes
        linear = f"{packed}: packed, {size / 1e6:.0f} MB of weights" if size else "torch"
        if models.merged_bytes:
            linear += f", {models.merged_bytes / 1e6:.0f} MB of merged weights"
        if size and plain:
            linear += f"; torch: {plain} layers"
        if self.unfused is not None:
            served["lm_head_sample"] = f"not used: {self.unfused}"
        if self._hooks.processors:
            served["processors"] = ", ".join(type(processor).__name__ for processor in self._hooks.processors)
        if device == "cuda":
            served["segments"] = "CUDA graphs" if self.eager is None else f"eager: {self.eager}"
            served["rounds"] = "judged on the device" if why is None else f"judged by the host: {why}"
        return {**served, "linear": linear}
