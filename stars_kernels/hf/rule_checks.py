"""What a rule asks of the models, looked at before anything is decoded."""

from __future__ import annotations

from transformers import PreTrainedModel

from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.config import StarsConfig
from stars_kernels.decoder.rules import Plan, Rule
from stars_kernels.hf.loading.language_model import name_of
from stars_kernels.hf.scoring.rewarder import Rewarder
from stars_kernels.hf.view.layout import layout_of, vocabulary
from stars_kernels.ops.philox import MAX_ATTEMPTS


def first_plan(config: StarsConfig, rule: Rule | None = None) -> Plan:
    """Return the plan for an answer's first segment; rule: None = the config's. A race's rows hold whole answers."""
    rule = config.resolved_rule if rule is None else rule
    plan = rule.plan(Answer(key=0, prompt=[], limit=config.max_new_tokens))
    return plan._replace(size=config.max_new_tokens) if plan.race else plan


def check_rule(config: StarsConfig, lm: PreTrainedModel, rewarder: Rewarder) -> None:
    """Refuse a rule whose first plan asks for what cannot be done; lm: a view."""
    rule, plan, max_new_tokens = config.resolved_rule, first_plan(config), config.max_new_tokens
    if plan.draw == "likeliest" and plan.attempts > vocabulary(lm):
        raise ValueError(
            f"rule={rule!r} takes the {plan.attempts} likeliest tokens, expected at most the {vocabulary(lm)} of the "
            "vocabulary"
        )
    if plan.race and (plan.entropy is not None or plan.draw == "likeliest"):
        what = "of the likeliest tokens" if plan.entropy is None else "of attempts that end by entropy"
        raise ValueError(f"rule={rule!r} plans a race {what}, expected a race of sampled attempts of a fixed size")
    if plan.entropy is not None:
        if plan.attempts * max_new_tokens >= MAX_ATTEMPTS:  # numbered on through the answer: `Answer.number`
            raise ValueError(
                f"rule={rule!r} may make {plan.attempts} attempts at each of {max_new_tokens} tokens, expected less "
                f"than {MAX_ATTEMPTS} in all"
            )
        decoders = [(name_of(lm), lm), *((f"reward_model {name}", body) for name, body in rewarder.decoders)]
        with_states = [name for name, view in decoders if layout_of(view).states]
        if with_states:
            raise ValueError(
                f"rule={rule!r} ends segments by entropy, and {with_states[0]} has states, which are kept after a "
                "round's last token alone; expected models of attention alone, or a rule with segments of a fixed size"
            )


def why_logits(plan: Plan) -> str | None:
    """Say why whole rows of logits are needed; None where drawing is all that is asked of them."""
    if plan.entropy is not None:
        return "the rule asks for entropies"
    if plan.draw == "likeliest":
        return "the rule asks for the likeliest tokens"
    return None
