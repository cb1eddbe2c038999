"""`check_model` says of a model what an engine would make of it, or why it is refused."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from stars_kernels import RewardModel
from stars_kernels.hf.check import check_model, check_pair
from tests.tiny import byte_tokenizer, tiny_language_model, tiny_reward_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("lm", tiny_language_model()), ("rm", tiny_reward_model())):
        model.float().save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return folder


def test_a_language_model(folder):
    found = check_model(folder / "lm")
    assert found.refused is None and found.kind == "language model" and found.name.startswith("LlamaForCausalLM")
    assert found.facts["path"].startswith("attention through the hook")
    assert found.facts["vocabulary"] == "260 tokens" and found.facts["context"] == "160 tokens"
    assert found.facts["end tokens"] == "257" and found.facts["chat template"] == "no"
    cache = sum(2 * 4 * p.out_features for n, p in tiny_language_model().named_modules() if n.endswith("k_proj"))
    assert found.facts["kept per token"].startswith(f"{cache / 1024:.1f} KiB in 2 layers")
    assert sum(found.rewrites.values()) > 0


def test_a_reward_model(folder):
    found = check_model(folder / "rm")
    assert (
        found.refused is None and found.kind == "reward model, a sequence classifier" and found.facts["labels"] == "1"
    )
    encoder = BertForSequenceClassification(BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1,
                                                       num_attention_heads=2, intermediate_size=32))  # fmt: skip
    found = check_model(encoder.eval())
    assert found.kind == "reward model, an encoder" and found.facts["labels"] == "2"


def test_states_are_told():
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    found = check_model(model)
    assert "states" in found.facts["kept per token"] and "states" in found.facts["CUDA graphs"]


def test_why_it_is_refused(folder, tmp_path):
    small = dict(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    known = RobertaForCausalLM(RobertaConfig(is_decoder=True, **small))
    assert "counts positions from pad_token_id" in check_model(known).refused
    known.config.architectures = ["RobertaForCausalLM"]
    known.config.save_pretrained(tmp_path / "no-weights")  # which are not looked for
    assert "counts positions from pad_token_id" in check_model(tmp_path / "no-weights").refused
    other = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    assert "not tested with STARS decoding" in check_model(other).refused
    headless = tiny_language_model()
    headless.save_pretrained(tmp_path / "headless")
    text = (tmp_path / "headless" / "config.json").read_text()
    (tmp_path / "headless" / "config.json").write_text(text.replace("ForCausalLM", "ForSequenceClassification"))
    assert "not in the checkpoint" in check_model(tmp_path / "headless").refused
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check_model("./nothing")


def test_a_pair(folder):
    assert "token ids" in check_pair(folder / "lm", folder / "rm")
    text = RewardModel(str(folder / "rm"), template="{prompt}{answer}")
    assert "reads text" in check_pair(folder / "lm", text)
