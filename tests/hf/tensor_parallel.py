"""Run by each of two processes of torchrun: decodes with models that they share, and writes what came."""

import asyncio
import json
import re
import sys
from pathlib import Path

import torch
from torch import distributed
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.distributed import DistributedConfig

from stars_kernels import Engine
from tests.hf.test_tensor_parallel import PROMPTS, SET

FAULTS = {"seed": {"seed": None}, "batch_size": {"batch_size": "auto"}, "max_time": {"max_time": 60}}


def loaded(kind, folder, dtype):
    return kind.from_pretrained(folder, dtype=dtype, distributed_config=DistributedConfig(tp_plan="auto"))


def example_of(folder):
    """The script of the document, with models that are there."""
    document = (Path(__file__).parents[2] / "docs" / "large_models.md").read_text()
    script = re.search(r"^```py\n(.*?)^```", document, re.MULTILINE | re.DOTALL)[1]
    return script.replace('"MODEL"', repr(str(folder / "lm"))).replace('"RM"', repr(str(folder / "rm")))


def refusal(ask):
    try:
        ask()
    except ValueError as error:
        return str(error)


async def ask_alone(engine):
    await engine.adecode(PROMPTS[0], **SET)


def main(folder):
    torch.set_num_threads(1)
    found = {}
    for dtype in (torch.float64, torch.float32):
        lm = loaded(AutoModelForCausalLM, folder / "lm", dtype)
        rm = loaded(AutoModelForSequenceClassification, folder / "rm", dtype)
        with Engine(lm, rm, progress=False) as engine:
            calibration = engine.calibrate(PROMPTS, calibration_samples=4, **SET)
            outputs = engine.decode(PROMPTS, calibration=calibration, **SET)
            found[str(dtype)] = [[output.token_ids, output.reward] for output in outputs]
            found["shards"] = [
                type(lm.lm_head.weight).__name__,
                *lm.model.layers[0].self_attn.q_proj.weight.to_local().shape,
            ]
            found["refused"] = {
                name: refusal(lambda: engine.decode(PROMPTS, calibration=calibration, **(SET | fault)))  # noqa: B023
                for name, fault in FAULTS.items()
            }
            found["refused"]["adecode"] = refusal(lambda: asyncio.run(ask_alone(engine)))
    example = {}
    exec(compile(example_of(folder), "docs/large_models.md", "exec"), example)
    found["example"] = [example["output"].text, example["output"].reward]
    (folder / f"rank{distributed.get_rank()}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
