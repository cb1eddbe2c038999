"""r* and beta as an object that is made once, saved, and passed to calls with the same models."""

import functools
import json
import warnings

import pytest
import torch

import stars_kernels
from stars_kernels import BestOf, Calibration, Engine, Likelihood, RewardModel, Stars
from stars_kernels.hf.fingerprint import fingerprint_of
from tests.tiny import byte_tokenizer, tiny_language_model, tiny_reward_model

PROMPTS = [[1, 2, 3], [40], [7, 8, 9, 10]]
SET = dict(seed=0, max_new_tokens=10, segment_size=4, max_attempts=4, calibration_samples=6)


@pytest.fixture(scope="module")
def calibration(lm, rm):
    return stars_kernels.calibrate(lm, rm, PROMPTS, **SET)


def test_it_is_what_a_call_would_find(lm, rm, calibration):
    output = stars_kernels.decode(lm, rm, PROMPTS, **SET)[0]
    found = output.calibration
    assert found.rewards == calibration.rewards and len(found.rewards) == 6
    assert (found.reward_threshold, found.beta) == (calibration.reward_threshold, calibration.beta)
    assert (output.config.reward_threshold, output.config.beta) == (found.reward_threshold, found.beta)
    assert (found.quantile, found.acceptance) == (0.9, 0.25) and found.sampled > 0 and found.rm_scored > 0


def test_every_prompt_counts(lm, rm):
    """A call looks at the first prompts alone; `calibrate` at all that it gets."""
    prompts = [[i] for i in range(1, 9)]
    settings = {**SET, "calibration_samples": 4}
    assert len(stars_kernels.calibrate(lm, rm, prompts, **settings).rewards) == 8
    assert len(stars_kernels.decode(lm, rm, prompts, **settings)[0].calibration.rewards) == 4


def test_calls_that_are_given_it_sample_nothing_for_it(lm, rm, calibration):
    expected = stars_kernels.decode(lm, rm, PROMPTS, **SET)
    with Engine(lm, rm, **SET) as engine:
        for outputs in (
            stars_kernels.decode(lm, rm, PROMPTS, calibration=calibration, **SET),
            engine.decode(PROMPTS, calibration=calibration),
            [e.output for e in engine.stream(PROMPTS, calibration=calibration) if e.output is not None],
        ):
            outputs = sorted(outputs, key=lambda o: [e.request_id for e in expected].index(o.request_id))
            assert [(o.token_ids, o.config) for o in outputs] == [(e.token_ids, e.config) for e in expected]
            assert outputs[0].calibration == calibration and "calibrate" not in outputs[0].seconds
        given = engine.decode(PROMPTS, calibration=calibration, reward_threshold=3.5)[0]
        assert (given.config.reward_threshold, given.config.beta) == (3.5, calibration.beta)
        rule = Stars(segment_size=4, max_attempts=4)
        by_rule = stars_kernels.decode(
            lm, rm, PROMPTS, rule=rule, calibration=calibration, seed=0, max_new_tokens=10, calibration_samples=6
        )
        assert [o.token_ids for o in by_rule] == [e.token_ids for e in expected]
        hard = engine.decode(PROMPTS, calibration=calibration, accept="hard")[0]
        assert hard.config.beta is None


def test_it_is_saved_as_json(tmp_path, calibration):
    file = tmp_path / "calibration.json"
    calibration.save(file)
    assert Calibration.load(file) == calibration
    data = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert data["version"] == 1 and data["reward_threshold"] == calibration.reward_threshold
    for wrong in ({**data, "version": 2}, {}, []):
        file.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"the calibration has version .*, expected a dict of version 1"):
            Calibration.load(file)


def test_it_belongs_to_its_models(lm, rm, calibration):
    for models, what in (
        ((tiny_language_model(seed=9), rm), "language model"),
        ((lm, tiny_reward_model(seed=9)), "reward model"),
        ((lm, RewardModel(rm, weight=2.0)), "reward model"),
        ((lm, [rm, rm]), "reward model"),
        ((lm, torch.nn.Linear(24, 1).double()), "reward model"),
        ((lm, Likelihood(lm)), "reward model"),
    ):
        message = f"the calibration was made with the {what} '.*', expected one made with"
        with pytest.raises(ValueError, match=message):
            stars_kernels.decode(*models, PROMPTS, calibration=calibration, **SET)
    with pytest.raises(ValueError, match=r"a calibration is given beside rule=BestOf\(n=2\), which has no r\*"):
        stars_kernels.decode(lm, rm, PROMPTS, calibration=calibration, rule=BestOf(2))
    with pytest.raises(TypeError, match="calibration is of type float, expected a Calibration"):
        stars_kernels.decode(lm, rm, PROMPTS, calibration=0.5, **SET)


def shouting(prompts, answers):
    return [float(sum(map(str.isupper, answer))) for answer in answers]


def counting(prompts, answers):
    return [float(len(answer)) for answer in answers]


def test_functions_are_known_by_name(lm):
    made = stars_kernels.calibrate(lm, shouting, PROMPTS, tokenizer=byte_tokenizer(), **SET)
    assert made.reward_model.endswith("test_calibration.shouting")
    stars_kernels.decode(lm, shouting, PROMPTS, tokenizer=byte_tokenizer(), calibration=made, **SET)
    with pytest.raises(ValueError, match=r"the calibration was made with the reward model .*shouting.*counting"):
        stars_kernels.decode(lm, counting, PROMPTS, tokenizer=byte_tokenizer(), calibration=made, **SET)


def test_functions_without_a_name_are_known_by_their_code(lm):
    calls = dict(tokenizer=byte_tokenizer(), **SET)
    made = stars_kernels.calibrate(lm, lambda p, answers: [1.0 * len(a) for a in answers], PROMPTS, **calls)
    stars_kernels.decode(lm, lambda p, answers: [1.0 * len(a) for a in answers], PROMPTS, calibration=made, **calls)
    for other in (lambda p, answers: [2.0 * len(a) for a in answers], functools.partial(scaled, 2.0)):
        with pytest.raises(ValueError, match="the calibration was made with the reward model"):
            stars_kernels.decode(lm, other, PROMPTS, calibration=made, **calls)
    made = stars_kernels.calibrate(lm, functools.partial(scaled, 2.0), PROMPTS, **calls)
    with pytest.raises(ValueError, match="the calibration was made with the reward model"):
        stars_kernels.decode(lm, functools.partial(scaled, 3.0), PROMPTS, calibration=made, **calls)


def scaled(factor, prompts, answers):
    return [factor * len(answer) for answer in answers]


def test_fingerprints_see_training_and_nothing_else(lm):
    first = fingerprint_of(lm)
    assert first == fingerprint_of(tiny_language_model()) and first.startswith("LlamaForCausalLM ")
    assert first != fingerprint_of(tiny_language_model(torch.float32))
    trained = tiny_language_model()
    with torch.no_grad():
        trained.model.layers[1].mlp.up_proj.weight += 1e-6
    assert first != fingerprint_of(trained)
    assert fingerprint_of(torch.nn.ReLU()) != fingerprint_of(torch.nn.GELU())


def test_a_prompt_that_calibrates_on_itself_is_named(lm, rm):
    with pytest.warns(UserWarning, match=r"r\* is calibrated on the very prompt that is decoded, \[40, 41\]"):
        stars_kernels.decode(lm, rm, [40, 41], **SET)
    with pytest.warns(UserWarning, match=r"the very prompt that is decoded, 'Hello, .*calibrate\("):
        stars_kernels.decode(lm, rm, ["Hello, you"], tokenizer=byte_tokenizer(), **SET)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made = stars_kernels.calibrate(lm, rm, [40, 41], **SET)
        stars_kernels.decode(lm, rm, PROMPTS, **SET)
        stars_kernels.decode(lm, rm, [40, 41], calibration=made, **SET)


def test_what_cannot_be_calibrated_on(lm, rm):
    with pytest.raises(ValueError, match="prompts is an empty list, expected at least one prompt to calibrate on"):
        stars_kernels.calibrate(lm, rm, [])
    with pytest.raises(ValueError, match="prompt 1: token id 999"):
        stars_kernels.calibrate(lm, rm, [[1], [999]])

    def nothing(prompts, answers):
        return [0.0 if not answer else float("nan") for answer in answers]

    with pytest.raises(stars_kernels.DecodeError, match="calibration found no finite reward"):
        stars_kernels.calibrate(lm, nothing, PROMPTS, tokenizer=byte_tokenizer(), **SET)
