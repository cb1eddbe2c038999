"""A head on the language model's own hidden states: the plain rewards, the sequential answers, and no forward more."""

import pytest
import torch
from torch import Tensor, nn
from transformers import GraniteConfig, GraniteForCausalLM

import stars_kernels
from stars_kernels import RewardModel
from stars_kernels.decoder.config import StarsConfig
from stars_kernels.decoder.errors import DecodeError
from stars_kernels.decoder.protocols import Rows
from stars_kernels.decoder.rules import Plan
from stars_kernels.hf.cache.hidden import HiddenStates
from stars_kernels.hf.proposing.graphs import Graphs
from stars_kernels.hf.proposing.proposer import ModelProposer
from stars_kernels.hf.scoring.own_head import OwnHeadScorer
from stars_kernels.hf.view.copying import view_of
from tests.captured import rerun
from tests.hf.loops import check_rewards, count_forwards, decided, loop_of, stop_at
from tests.hf.proposing.test_segment_waits import Watch
from tests.hf.test_exactness import EOS_IDS, IDS, PROMPTS
from tests.runs import admit
from tests.sequential import sequential_decode
from tests.tiny import byte_tokenizer, tiny_config, tiny_language_model, tiny_reward_model

CONFIGS = {
    "soft": StarsConfig(seed=3, reward_threshold=3.0, beta=1.0),
    "hard": StarsConfig(seed=4, reward_threshold=1.0, beta=1.0, accept="hard", max_attempts=5, top_k=None),
    "filters": StarsConfig(seed=5, reward_threshold=2.0, beta=0.5, temperature=0.7, top_k=20, top_p=0.9, min_p=0.01),
    "fallback": StarsConfig(seed=6, reward_threshold=100.0, beta=0.1, max_attempts=7, top_k=None),
}
CONFIGS = {name: config.replace(max_new_tokens=22, segment_size=4) for name, config in CONFIGS.items()}


def linear(dtype=torch.float64, bias=True):
    torch.manual_seed(2)
    head = nn.Linear(24, 1, bias=bias).to(dtype)
    head.weight.data *= 4
    return head.requires_grad_(False)


def perceptron():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 1)).double().requires_grad_(False)


def plain_reward(lm, head):
    def reward(prompt, answer):
        with torch.no_grad():
            hidden = lm(torch.tensor([list(prompt) + answer]), output_hidden_states=True).hidden_states[-1]
            return head(hidden[0, -1]).item()

    return reward


def loop_with(lm, head, config, eos=(), find_stop=None, graphs=None, fuse=False, prompts=PROMPTS, ids=IDS):
    view = view_of(lm)
    hidden = HiddenStates(view)
    proposer = ModelProposer(view, graphs, fuse, hidden)
    return loop_of(proposer, OwnHeadScorer(head, hidden), config, prompts, ids, eos, find_stop)


@pytest.fixture(scope="module", params=CONFIGS)
def truth(request, lm):
    config, reward = CONFIGS[request.param], plain_reward(lm, linear())
    return config, [sequential_decode(lm, reward, p, i, config, EOS_IDS) for p, i in zip(PROMPTS, IDS, strict=True)]


@torch.inference_mode()
@pytest.mark.parametrize("fuse", [False, True], ids=["logits", "fused"])
@pytest.mark.parametrize("width", [1, 5, "auto"])
def test_every_width_is_the_sequential_answer(truth, lm, width, fuse):
    config, expected = truth
    loop = loop_with(lm, linear(), config.replace(width=width), EOS_IDS, fuse=fuse)
    assert decided(loop) == expected
    check_rewards(loop, plain_reward(lm, linear()))
    assert all(answer.counts.rm_scored == 0 for answer in loop.answers)


def test_the_truth_is_varied(lm):
    """Ends early and late, in the first segment too, after few attempts and many."""
    reward = plain_reward(lm, linear())
    answers = [sequential_decode(lm, reward, p, i, CONFIGS["soft"], EOS_IDS) for p, i in zip(PROMPTS, IDS, strict=True)]
    assert len({len(tokens) for tokens, _ in answers}) > 2
    assert len({n for _, attempts in answers for n in attempts}) > 2


@torch.inference_mode()
@pytest.mark.parametrize("width", [1, 3])
def test_stop_strings_cut_inside_a_segment(lm, width):
    """To the sequential algorithm a stop string of one token is an EOS."""
    config, reward = CONFIGS["soft"].replace(width=width), plain_reward(lm, linear())
    expected = [sequential_decode(lm, reward, p, i, config, EOS_IDS) for p, i in zip(PROMPTS, IDS, strict=True)]
    loop = loop_with(lm, linear(), config, find_stop=stop_at(EOS_IDS))
    assert decided(loop) == expected
    assert "stop" in [answer.finish_reason for answer in loop.answers]
    check_rewards(loop, reward)


@torch.inference_mode()
def test_a_fallback_from_an_earlier_round_goes_on_from_its_own_logits(lm):
    config, reward = CONFIGS["fallback"].replace(width=2), plain_reward(lm, linear())
    loop = loop_with(lm, linear(), config)
    expected = [sequential_decode(lm, reward, p, i, config, ()) for p, i in zip(PROMPTS, IDS, strict=True)]
    assert decided(loop) == expected
    segments = [segment for answer in loop.answers for segment in answer.segments]
    assert any(s.outcome == "fallback" and s.chosen < s.attempts - s.widths[-1] for s in segments)


@torch.inference_mode()
def test_a_head_of_several_layers(lm):
    head, config = perceptron(), CONFIGS["soft"].replace(reward_threshold=0.3, beta=0.1, width=3)
    reward = plain_reward(lm, head)
    expected = [sequential_decode(lm, reward, p, i, config, EOS_IDS) for p, i in zip(PROMPTS, IDS, strict=True)]
    loop = loop_with(lm, head, config, EOS_IDS)
    assert decided(loop) == expected
    check_rewards(loop, reward)


@torch.inference_mode()
@pytest.mark.parametrize("width", [1, 3])
def test_logits_that_are_more_than_the_output_layers(width):
    """Granite divides what its output layer returns; the next segment's first tokens must see that."""
    given = tiny_config().to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    torch.manual_seed(5)
    config = GraniteConfig(
        **{name: given[name] for name in names}, num_key_value_heads=2, max_position_embeddings=160,
        initializer_range=0.4, logits_scaling=3.0, attention_multiplier=0.5, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    lm, head = GraniteForCausalLM(config).double().eval(), linear()
    config, reward = CONFIGS["soft"].replace(width=width), plain_reward(lm, head)
    expected = [sequential_decode(lm, reward, p, i, config, ()) for p, i in zip(PROMPTS, IDS, strict=True)]
    assert decided(loop_with(lm, head, config)) == expected


@torch.inference_mode()
def test_forwards_are_those_of_the_segments_and_no_more(lm):
    """One of every candidate's token, none for the reward, none for the last accepted token."""
    config = CONFIGS["hard"].replace(reward_threshold=-100.0, width=3, max_new_tokens=8)  # every first attempt is taken
    loop = loop_with(lm, linear(), config)
    loop.admit()
    shapes = count_forwards(loop.round.proposer.model)
    for _ in loop.rounds():
        pass
    assert shapes == 8 * [[3 * len(PROMPTS), 1]]
    assert [len(answer.tokens) for answer in loop.answers] == [8] * len(PROMPTS)


@torch.inference_mode()
@pytest.mark.parametrize("fuse", [False, True], ids=["logits", "fused"])
@pytest.mark.parametrize("width", [1, 3, "auto"])
def test_segments_as_graphs(lm, width, fuse):
    """A replay writes the memory that it was captured with; it must be in use."""

    def capture(run):
        place = list(map(Tensor.data_ptr, loop.round.proposer.hidden.tensors))
        replay = rerun(run)

        def checked():
            assert list(map(Tensor.data_ptr, loop.round.proposer.hidden.tensors)) == place
            replay()

        return checked

    graphs, config = Graphs(capture), CONFIGS["fallback"].replace(width=width)
    loop = loop_with(lm, linear(), config, graphs=graphs, fuse=fuse)
    assert decided(loop) == decided(loop_with(lm, linear(), config))
    assert graphs.counts.replays > 1
    check_rewards(loop, plain_reward(lm, linear()))


@torch.inference_mode()
@pytest.mark.parametrize("fuse", [False, True], ids=["logits", "fused"])
def test_a_segment_waits_for_nothing(monkeypatch, fuse):
    view = view_of(tiny_language_model(torch.float32))
    proposer = ModelProposer(view, fuse=fuse, hidden=HiddenStates(view))
    admit(proposer, [[1, 2, 3], [40]], 20, 5)
    proposer.hidden.open(6)
    index = torch.arange(6)
    rows = Rows(slots=(index // 3).tolist(), slot=index // 3, attempt=index % 3, key=index + 100, position=index * 0)
    sampling, eos = StarsConfig(top_k=None).sampling, torch.tensor([257])
    for name in ("tolist", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, None)
    with Watch() as watch:
        proposer._segment(rows, Plan(5, 1), sampling, 0, eos)
    assert watch.seen.count("fork_attention") == 5 * 2
    assert watch.waits == 4 * ["is_nonzero"], "more than the CPU's looks whether all rows have ended"


@torch.inference_mode()
def test_an_early_end_of_all_rows_keeps_the_last_hidden_state(lm):
    """On a CPU a segment ends where all rows have: at once where every token is an end."""
    config = CONFIGS["hard"].replace(width=2)
    loop = loop_with(lm, linear(), config, eos=range(260))
    decided(loop)
    assert [len(answer.tokens) for answer in loop.answers] == [1] * len(PROMPTS)
    check_rewards(loop, plain_reward(lm, linear()))


@torch.inference_mode()
@pytest.mark.parametrize("head", [linear(torch.float32), linear(torch.float32, bias=False), perceptron().float()])
def test_a_head_of_another_dtype_than_the_model(head):
    lm = tiny_language_model(torch.bfloat16)
    loop = loop_with(lm, head, CONFIGS["hard"].replace(width=1), EOS_IDS)
    decided(loop)

    def reward(prompt, answer):
        hidden = lm(torch.tensor([list(prompt) + answer]), output_hidden_states=True).hidden_states[-1]
        return head(hidden[0, -1].float()).item()

    check_rewards(loop, reward, tolerance=0.3)  # bfloat16: the forwards round otherwise


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.Linear(24, 2).double(), r"the head returned shape \[5, 2\] for 5 hidden states, expected \[5, 1\]"),
        (lambda x: (x,), r"the head returned tuple for 5 hidden states, expected \[5, 1\]"),
    ],
)
@torch.inference_mode()
def test_a_head_that_returns_something_else(lm, head, message):
    if not isinstance(head, nn.Module):
        function, head = head, nn.Identity()
        head.forward = function
    loop = loop_with(lm, head, CONFIGS["hard"].replace(width=1))
    assert len(loop.admit()) == len(PROMPTS)
    for answer in loop.answers:
        with pytest.raises(DecodeError, match=message):
            raise answer.error


class Scorer(nn.Module):
    """A user's own reward model, which reads token ids."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(260, 1)

    def forward(self, input_ids, attention_mask):
        return self.embedding(input_ids).sum(1)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Scorer(), r"reward_model Scorer was taken for a head .* TypeError: .*'attention_mask'"),
        (nn.DataParallel(tiny_reward_model()), "reward_model DataParallel was taken for a head"),
        (nn.Linear(64, 1), r"Linear was taken for a head .* ValueError: weight has shape \[64\], expected \[24\]"),
        (nn.Linear(24, 2).double(), r"reward_model Linear was taken for a head .*: the head returned shape \[1, 2\]"),
    ],
)
def test_a_module_that_is_no_head(lm, module, message):
    expected = r"; expected a module \[R, 24\] -> \[R, 1\], or a function of texts"
    with pytest.raises(ValueError, match=message + "(.|\n)*" + expected):
        stars_kernels.decode(lm, module, [1], seed=0)


def test_a_forward_that_passes_by_the_output_layer(lm):
    view = view_of(lm)
    hidden = HiddenStates(view)
    with pytest.raises(RuntimeError, match="called its output layer 0 times in a forward, expected once"):
        with hidden.catch():
            lm(torch.tensor([[1]]))  # not the view
    assert not view.get_output_embeddings()._forward_pre_hooks


def test_a_model_without_an_output_layer(rm):
    with pytest.raises(ValueError, match="LlamaForSequenceClassification has no output layer"):
        HiddenStates(rm)


class ValueHead(nn.Module):
    """As in TRL: with dropout, which must be off."""

    def __init__(self):
        super().__init__()
        self.dropout, self.summary = nn.Dropout(0.5), linear()

    def forward(self, hidden):
        return self.summary(self.dropout(hidden))


@pytest.mark.parametrize("head", [linear(), ValueHead().train()], ids=["linear", "with dropout"])
@pytest.mark.parametrize("width", [1, 5])
def test_decode(truth, lm, head, width):
    config, expected = truth
    outputs = stars_kernels.decode(
        lm, head, PROMPTS, request_ids=IDS, config=config, width=width, eos_token_id=EOS_IDS, batch_size=3
    )
    assert [(o.token_ids, [s.attempts for s in o.segments]) for o in outputs] == expected
    assert {o.counts.rm_scored for o in outputs} == {0}


def test_decode_with_a_sum_and_calibration(lm, rm):
    """Twice the head, plus a function of the text."""
    tokenizer, reward = byte_tokenizer(), plain_reward(lm, linear())
    parts = [RewardModel(linear(), weight=2.0), lambda prompts, answers: [0.1 * len(answer) for answer in answers]]
    outputs = stars_kernels.decode(lm, parts, ["a", "bc"], tokenizer=tokenizer, seed=1, max_new_tokens=12, width=2)
    for output, prompt in zip(outputs, ["a", "bc"], strict=True):
        expected = 2 * reward(tokenizer(prompt)["input_ids"], output.token_ids) + 0.1 * len(output.text)
        assert output.reward == pytest.approx(expected, abs=1e-6)
        assert output.calibration.rm_scored == 0


def test_fp32_rewards_are_bit_equal_whatever_the_width():
    if stars_kernels.backends()["packed_linear"]["cpu"] != "cpp":
        pytest.skip("needs the compiled extension")
    lm, config = tiny_language_model(torch.float32), CONFIGS["fallback"].replace(max_attempts=20)
    for head in (linear(torch.float32), perceptron().float()):
        outputs = [stars_kernels.decode(lm, head, PROMPTS, config=config, width=width) for width in (1, 2, 5, 20)]
        seen = [[[s.rewards for s in output.segments] for output in of_width] for of_width in outputs]
        assert seen == seen[:1] * 4


def test_settings_of_other_kinds_are_refused(lm):
    with pytest.raises(ValueError, match="label is given, but reward_model is a head on hidden states"):
        stars_kernels.decode(lm, RewardModel(linear(), label=0), [1], seed=0)
