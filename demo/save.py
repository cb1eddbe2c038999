"""Save the demo's models and prompts as folders and files, for the command `stars`.

    python -m demo.save out/demo

The folder gets `lm` and `rm` (SmolLM2-135M-Instruct and the sentiment reward model, each with the tokenizer),
`calibration.jsonl` (prompts that the reward model was trained on) and `prompts.jsonl` (prompts that it was not).
"""

import argparse
import copy
import json
from pathlib import Path

from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import logging

from demo.arguments import output_folder
from demo.models import load_language_model, load_reward_model
from demo.prompts import CALIBRATION_PROMPTS, UNSEEN_PROMPTS, messages


def save(folder: Path) -> None:
    """Write the models and the prompts into a folder."""
    lm, tokenizer = load_language_model()
    for name, model in (("lm", lm), ("rm", load_reward_model(lm))):
        _plain(model).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, prompts in (("calibration", CALIBRATION_PROMPTS), ("prompts", UNSEEN_PROMPTS)):
        lines = (json.dumps({"custom_id": i, "messages": messages(text)}) for i, text in enumerate(prompts, 1))
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model without the mark that its weights came from a GGUF file, with which it cannot be saved."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    if isinstance(model, GenerationMixin):
        plain.generation_config = model.generation_config
    return plain


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.save", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=output_folder, help="where they go, about 1 GB")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    save(args.folder)
    print(f"{args.folder}: lm, rm, calibration.jsonl, prompts.jsonl")


if __name__ == "__main__":
    main()
