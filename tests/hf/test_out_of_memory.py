"""Out of memory: half the width, then half the prompts, or fewer at once; said once each, and the same answers."""

import gc
import random
import re
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import stars_kernels
from stars_kernels import StarsConfig, StarsError
from stars_kernels.decoder.memory import is_out_of_memory
from stars_kernels.hf.cache.storage import Group
from stars_kernels.hf.engine import Engine
from stars_kernels.hf.proposing.graphs import captured
from stars_kernels.hf.proposing.processors import TokenHooks
from stars_kernels.hf.proposing.proposer import ModelProposer
from stars_kernels.hf.scoring.classifier import ClassifierScorer
from stars_kernels.hf.scoring.likelihood import LikelihoodScorer
from stars_kernels.hf.scoring.text import TextClassifierScorer
from stars_kernels.hf.scoring.total import SumScorer
from tests.hf import families
from tests.sequential import sequential_decode
from tests.tiny import EOS, byte_tokenizer, tiny_language_model, tiny_reward_model

PROMPTS = [[1, 2, 3], [40], [7, 8, 9, 10, 11], [90, 91]]
IDS = [10, 11, "twelve", 13]
CONFIG = StarsConfig(
    seed=3,
    reward_threshold=3.0,
    beta=1.0,
    max_new_tokens=22,
    segment_size=4,
    max_attempts=7,
    width=7,
    eos_token_id=(EOS, 3, 77),
)
EXHAUSTED = {
    "cuda": (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": (RuntimeError, "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to"),
    "python": (MemoryError, ""),
}


def exhausted(kind="cuda"):
    error, message = EXHAUSTED[kind]
    return error(message)


def limited(model, rows, tokens=10**9, error="cuda", nth=1):
    """`model` with memory for forwards of `rows` rows, or of `tokens` packed tokens where there is one row.

    nth: the layer in which it runs out: before it, all of a forward's work is done.
    """

    def check(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[0] > rows or (hidden.shape[0] == 1 and hidden.shape[1] > tokens):
            raise exhausted(error)

    model.base_model.layers[nth].register_forward_pre_hook(check, with_kwargs=True)
    return model


def told(caught):
    """The messages of the warnings, which are all about memory."""
    assert {warning.category for warning in caught} <= {RuntimeWarning}
    return [str(warning.message) for warning in caught]


def run(lm, rm, prompts=PROMPTS, **changes):
    """Outputs by `decode`, and the warnings; `stream` gives the same."""
    settings = dict(dict(config=CONFIG, request_ids=IDS[: len(prompts)]), **changes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = stars_kernels.decode(lm, rm, prompts, **settings)
    with warnings.catch_warnings(record=True) as again:
        warnings.simplefilter("always")
        events = list(stars_kernels.stream(lm, rm, prompts, **settings))
    assert told(again) == told(caught)
    for index, output in enumerate(outputs):
        mine = [event for event in events if event.index == index]
        assert [token for event in mine for token in event.token_ids] == output.token_ids
        assert [event.segment for event in mine] == output.segments
        assert mine[-1].output.memory_limits == output.memory_limits
    return outputs, told(caught)


@pytest.fixture(scope="module")
def truth(lm, rm):
    return [
        sequential_decode(lm, rm, prompt, id_, CONFIG, CONFIG.eos_token_id)
        for prompt, id_ in zip(PROMPTS, IDS, strict=True)
    ]


def check(outputs, truth):
    assert [(o.token_ids, [s.attempts for s in o.segments]) for o in outputs] == truth[: len(outputs)]
    for output in outputs:  # nothing is counted twice
        assert output.counts.attempts == sum(s.attempts for s in output.segments)
        assert output.counts.judged == sum(sum(s.lengths) for s in output.segments)


WIDTHS = [f"in a round of 4 prompts x {n} attempts: going on with width={n // 2}" for n in (7, 3)]
TURNS = [f"in a round of {n} prompts x 1 attempts: going on with batch_size={n // 2}" for n in (4, 2)]
BY_ROWS = {  # rows that fit: what is said, and what the limits are in the end
    28: ([], {}),
    27: (WIDTHS[:1], {"width": 3}),
    11: (WIDTHS, {"width": 1}),
    4: (WIDTHS, {"width": 1}),
    3: ([*WIDTHS, TURNS[0]], {"width": 1, "batch_size": 2}),
    1: ([*WIDTHS, *TURNS], {"width": 1, "batch_size": 1}),
}


@pytest.mark.parametrize("rows", BY_ROWS)
def test_a_round_is_halved_until_it_fits(rm, truth, rows):
    outputs, said = run(limited(tiny_language_model(), rows), rm)
    check(outputs, truth)
    words, limits = BY_ROWS[rows]
    assert said == [f"out of memory {what}" for what in words]
    assert outputs[-1].memory_limits == limits
    widths = [width for output in outputs for segment in output.segments for width in segment.widths]
    assert max(widths) == limits.get("width", 7)


READING = r"out of memory as the reward model read (\d+) tokens at once: going on with (\d+); rewards do not change"


@pytest.mark.parametrize("rows", BY_ROWS)
def test_what_the_reward_model_reads_is_halved_before_the_round(lm, truth, rows):
    outputs, said = run(lm, limited(tiny_reward_model(), rows), wave=7)
    check(outputs, truth)
    sizes = [tuple(map(int, re.fullmatch(READING, message).groups())) for message in said]
    assert all(size // 2 == rest for size, rest in sizes) and bool(sizes) == (rows < 28)
    assert outputs[-1].memory_limits == {}
    assert max(width for output in outputs for segment in output.segments for width in segment.widths) == 7


@pytest.mark.parametrize("error", EXHAUSTED)
@pytest.mark.parametrize("width", [2, 5, "auto"])
def test_every_width_and_kind_of_error(lm, rm, truth, error, width):
    outputs, said = run(limited(tiny_language_model(), 5, error=error), rm, width=width)
    check(outputs, truth)
    assert said and outputs[-1].memory_limits["width"] == 1
    assert all(re.fullmatch(r"out of memory in a round of 4 prompts x \d+ attempts: going on with .*", s) for s in said)


def test_memory_that_runs_out_on_the_way(lm, rm, truth):
    """Not in the first round but between others, in every forward in turn: a round leaves nothing behind."""
    outcomes = set()
    for when in range(3, 61):  # the first two forwards are the layouts' probes: one token of one row
        calls = 0

        def fail_once(module, args, when=when):
            nonlocal calls
            calls += 1
            if calls == when:
                raise exhausted()

        models = tiny_language_model(), tiny_reward_model()
        for model in models:
            model.base_model.layers[1].register_forward_pre_hook(fail_once)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outputs = stars_kernels.decode(*models, PROMPTS, request_ids=IDS, config=CONFIG)
        check(outputs, truth)
        outcomes |= {"were admitted" in message for message in told(caught)}
    assert outcomes == {True, False}  # rounds and admissions were hit


@pytest.mark.parametrize("whose", ["lm", "rm"])
@pytest.mark.parametrize("rows", [100, 3])
def test_fewer_are_admitted_until_they_fit(lm, rm, truth, whose, rows):
    models = {"lm": lm, "rm": rm}
    models[whose] = limited(tiny_language_model() if whose == "lm" else tiny_reward_model(), rows, tokens=7)
    outputs, said = run(**models)
    check(outputs, truth)
    assert said[0] == "out of memory as 4 prompts were admitted: going on with batch_size=2"
    limits = {"batch_size": 2}
    if rows == 3 and whose == "rm":
        assert said[1:] and all(re.fullmatch(READING, message) for message in said[1:])
    elif rows == 3:  # then rounds of 2 prompts x 7 attempts; what was learned holds for the second batch too
        assert said[1:] == [
            f"out of memory in a round of 2 prompts x {n} attempts: going on with width={n // 2}" for n in (7, 3)
        ]
        limits["width"] = 1
    assert outputs[-1].memory_limits == limits


def test_calibration_takes_the_same_path(lm, rm):
    settings = dict(config=CONFIG.replace(reward_threshold=None, beta=None), calibration_samples=12)
    expected, said = run(lm, rm, **settings)
    assert not said
    outputs, said = run(limited(tiny_language_model(), 5), rm, **settings)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert [o.config for o in outputs] == [o.config for o in expected]
    assert outputs[0].calibration.rewards == expected[0].calibration.rewards
    assert said[0] == "out of memory in a round of 4 prompts x 3 attempts: going on with width=1"
    assert len(said) == 1  # decoding begins with what calibration learned
    outputs, said = run(limited(tiny_language_model(), 100, tokens=7), rm, **settings)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert said == ["out of memory as 4 prompts were admitted: going on with batch_size=2"]


def test_one_row_that_does_not_fit_fails_its_prompt_alone(lm, rm, truth):
    prompts = [*PROMPTS[:2], list(range(100, 150)), PROMPTS[3]]
    model = limited(tiny_language_model(), 100, tokens=20)
    with warnings.catch_warnings(record=True) as caught, pytest.raises(StarsError) as failed:
        warnings.simplefilter("always")
        stars_kernels.decode(model, rm, prompts, request_ids=IDS, config=CONFIG)
    assert [message.partition("going on with ")[2] for message in told(caught)] == ["batch_size=2", "batch_size=1"]
    check([failed.value.results[i] for i in (0, 1, 3)], [truth[i] for i in (0, 1, 3)])
    assert list(failed.value.errors) == [2]
    assert "prompt 2 (request twelve), segment 0: the batch failed: OutOfMemoryError" in str(failed.value.results[2])
    with warnings.catch_warnings(record=True) as caught, pytest.raises(RuntimeError, match="CUDA out of memory"):
        warnings.simplefilter("always")
        stars_kernels.decode(limited(tiny_language_model(), 0), rm, [1], config=CONFIG)
    assert not caught  # it ran out in the prefill of one prompt: there is nothing to halve


@pytest.fixture
def no_collection():
    gc.disable()
    yield
    gc.enable()


def test_the_failed_rounds_tensors_are_gone_before_the_next(lm, no_collection):
    """Else there would be no more room for half of them. No collection of cycles is needed."""
    held, alive = [], []

    def watch(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        if held:
            alive.append(held[0]() is not None)
        held.clear()
        if hidden.shape[0] > 4:
            held.append(weakref.ref(hidden))
            raise exhausted()

    for nth in (0, 1):
        rm = tiny_reward_model()
        rm.model.layers[nth].register_forward_pre_hook(watch, with_kwargs=True)
        with pytest.warns(RuntimeWarning, match="out of memory"):
            stars_kernels.decode(lm, rm, PROMPTS, request_ids=IDS, config=CONFIG)
    assert alive and not any(alive)


def raising_reward(prompts, answers):
    if any(answers):
        raise ValueError("once")
    return [0.0] * len(answers)


def raising_from_reward(prompts, answers):
    """Its cause has a traceback of its own, whose frames were called by the package's."""
    try:
        return raising_reward(prompts, answers)
    except ValueError as error:
        raise ValueError("once") from error


def raising_template(prompt, answer):
    if answer:
        raise ValueError("once")
    return prompt


class RaisingHead(torch.nn.Linear):
    def forward(self, hidden):
        if hidden.shape[0] > 1:
            try:
                raise KeyError("before")
            except KeyError:
                raise ValueError("once")  # noqa: B904 - an implicit context is the point
        return super().forward(hidden)


@pytest.mark.parametrize("kind", ["reward", "raise from", "template", "head", "processor"])
def test_a_failed_answer_holds_no_memory(kind, lm, rm, monkeypatch):
    """Its exception may be kept, and a cause with a traceback of frames that held everything."""
    storages, make = [], Group.make_room

    def watched(group, rows):
        make(group, rows)
        storages.extend(weakref.ref(t.untyped_storage()) for t in (group.arena, group.suffix))

    monkeypatch.setattr(Group, "make_room", watched)
    rewards = {
        "reward": raising_reward,
        "raise from": raising_from_reward,
        "template": stars_kernels.RewardModel(rm, byte_tokenizer(), raising_template),
        "head": RaisingHead(lm.config.hidden_size, 1).double(),
    }
    texts, settings = ["ab", "cd", "ef", "gh"], dict(CONFIG.__dict__, batch_size=1, eos_token_id=())
    if kind == "processor":

        def process(input_ids, scores):
            raise ValueError("once") from KeyError("before")

        ids = torch.tensor([byte_tokenizer()(text)["input_ids"] for text in texts])
        hooks = TokenHooks([process], (), ids)
        results = [None] * len(texts)
        with Engine(lm, rm, tokenizer=byte_tokenizer()) as engine:
            list(engine.events(texts, IDS, results, StarsConfig(**settings), hooks=hooks))
    else:
        with pytest.raises(StarsError) as failed:
            stars_kernels.decode(lm, rewards[kind], texts, tokenizer=byte_tokenizer(), request_ids=IDS, **settings)
        results = failed.value.results
        failed.value.__traceback__ = None
        del failed
    gc.collect()
    for result in results:
        assert "ValueError: once" in str(result)
        assert 'raise ValueError("once")' in result.__notes__[0] and result.__cause__.__traceback__ is None
    assert storages and not any(storage() for storage in storages)


def test_suffixes_are_given_back(lm, rm):
    from stars_kernels.hf.cache import open_cache
    from stars_kernels.hf.view.copying import view_of

    cache = open_cache(view_of(lm), [10, 10], 4)
    empty = cache.kv_tokens
    cache.fork(torch.tensor([0, 0, 1]))
    assert cache.kv_tokens == empty + 3 * 4
    suffix = weakref.ref(cache.groups[0].suffix.untyped_storage())
    cache.release()
    assert cache.kv_tokens == empty and suffix() is None
    cache.fork(torch.tensor([1]))
    assert cache.kv_tokens == empty + 4


def test_what_is_out_of_memory():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(failed.value)
    assert all(is_out_of_memory(exhausted(kind)) for kind in EXHAUSTED)
    late = RuntimeError("operation failed due to a previous error during capture")
    late.__cause__ = exhausted()
    assert is_out_of_memory(late)
    handled = RuntimeError("raised where the caller was handling another error")
    handled.__context__ = exhausted()
    assert not is_out_of_memory(handled)
    circle = ValueError("raised from itself")
    circle.__cause__ = circle
    assert not is_out_of_memory(circle)
    circle.__cause__ = late
    late.__cause__.__cause__ = circle
    assert is_out_of_memory(circle)
    for other in (RuntimeError("shape mismatch"), ValueError("can't allocate memory"), KeyError("x"), OSError()):
        assert not is_out_of_memory(other)


class ShortOfMemory(TorchDispatchMode):
    """Raises before the `at`-th op, from now on, that takes memory; counts them.

    What takes none: views, and a write into memory that is there (`copy_`, `kv_commit`).
    """

    FREE = ("aten::copy_", "stars::kv_commit")

    def __init__(self, at=-1):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        schema = function._schema
        new = any(value.alias_info is None for value in schema.returns)
        if schema.name not in self.FREE and (new or schema.is_mutable):
            self.count += 1
            if self.count == self.at:
                raise exhausted()
        return function(*args, **(kwargs or {}))


SIDES = {
    "proposer": (ModelProposer, ("_read_last", "commit")),
    "classifier": (ClassifierScorer, ("commit",)),
    "likelihood": (LikelihoodScorer, ("commit",)),
    "text": (TextClassifierScorer, ("commit",)),
    "sum": (SumScorer, ("commit",)),
}
COMMITS = ("classifier", "likelihood", "text", "sum", "own head", "states")


def models_that_commit(kind, lm, rm):
    """Models whose commits are of this kind, and the settings of a call with them."""
    text = dict(tokenizer=byte_tokenizer())
    if kind == "likelihood":
        return lm, stars_kernels.Likelihood(lm, tiny_language_model(seed=3)), {}
    if kind == "text":
        return lm, stars_kernels.RewardModel(rm, byte_tokenizer(reverse=True)), text
    if kind == "sum":
        return lm, [rm, stars_kernels.RewardModel(tiny_reward_model(seed=4), weight=0.5)], {}
    if kind == "own head":
        torch.manual_seed(0)
        return lm, torch.nn.Linear(lm.config.hidden_size, 1).double(), {}
    if kind == "states":
        return families.tiny("qwen3_next"), lambda prompts, answers: [len(set(a)) / 4 for a in answers], text
    return lm, rm, {}


@pytest.mark.parametrize("kind", COMMITS)
def test_memory_that_runs_out_at_any_op_of_a_commit(kind, lm, rm, monkeypatch):
    """Of what a judged round writes, all or nothing is true: the round is tried again, and the answers are the same."""
    model, reward, settings = models_that_commit(kind, lm, rm)
    config = CONFIG.replace(max_new_tokens=10, width=4, eos_token_id=(), top_k=20)

    def run(mode):
        watched = {SIDES["proposer"], SIDES.get(kind, SIDES["proposer"])}
        with monkeypatch.context() as patch:
            for owner, names in watched:
                for name in names:
                    real = getattr(owner, name)

                    def watch(self, *args, real=real):
                        with mode:
                            settle = real(self, *args)

                        def settle_watched():
                            with mode:
                                settle()

                        return settle_watched

                    patch.setattr(owner, name, watch)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                outputs = stars_kernels.decode(model, reward, PROMPTS, request_ids=IDS, config=config, **settings)
        return [(o.token_ids, o.reward, [(s.rewards, s.chosen) for s in o.segments]) for o in outputs], told(caught)

    count = ShortOfMemory()
    expected, said = run(count)
    assert not said and count.count > 20
    later = range(40, count.count)
    some = random.Random(0).sample(later, min(20, len(later)))
    places = [*range(1, min(count.count, 40)), *some, count.count]
    for at in places:
        found, said = run(ShortOfMemory(at))
        assert found == expected, at
        assert len(said) == 1 and said[0].startswith("out of memory in a round of "), (at, said)


def test_a_round_whose_commits_are_partly_visible_is_not_tried_again(lm, rm, monkeypatch):
    """What was written cannot be taken back: out of memory there, which should not be, ends the round's answers."""
    real, calls = ModelProposer.commit, []

    def commit(self, commit):
        settle = real(self, commit)

        def failing():
            settle()
            calls.append(1)
            if len(calls) == 2:
                raise exhausted()

        return failing

    monkeypatch.setattr(ModelProposer, "commit", commit)
    with warnings.catch_warnings(), pytest.raises(StarsError) as failed:
        warnings.simplefilter("error")
        stars_kernels.decode(lm, rm, PROMPTS, config=CONFIG, request_ids=IDS)
    assert len(calls) == 2 and sorted(failed.value.errors) == [0, 1, 2, 3]
    assert "the batch failed: OutOfMemoryError" in str(failed.value)


def test_memory_that_runs_out_in_a_capture():
    """The end of a CUDA capture fails too, with an error of its own."""

    class Capture:
        def __enter__(self):
            return self

        def __exit__(self, kind, error, trace):
            if kind is not None:
                raise RuntimeError("operation failed due to a previous error during capture")

    def run():
        raise exhausted()

    with pytest.raises(RuntimeError, match="previous error") as failed:
        captured(run, Capture())
    assert is_out_of_memory(failed.value)
    assert captured(lambda: 3, Capture()) == 3


def test_other_errors_are_not_tried_again(rm):
    calls = []

    def fail(module, args, kwargs):
        if kwargs["input_ids"].shape[0] > 3:
            calls.append(1)
            raise RuntimeError("a bug")

    model = tiny_language_model()
    model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(StarsError, match="the batch failed: RuntimeError: a bug"):
        stars_kernels.decode(model, rm, PROMPTS, config=CONFIG)
    assert calls == [1]


SMALL_PROCESS = """
import resource, warnings, torch, stars_kernels
from tests.tiny import tiny_language_model, tiny_reward_model

torch.set_num_threads(1)
lm, rm = tiny_language_model(torch.float64, intermediate_size=16384), tiny_reward_model()
settings = dict(seed=0, reward_threshold=50.0, beta=0.5, max_new_tokens=6, segment_size=3, max_attempts=64, pack=False)

def decode(width):
    return [o.token_ids for o in stars_kernels.decode(lm, rm, [[1, 2], [3], [4, 5], [6]], width=width, **settings)]

expected = decode(width=2)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, used + 2**24))  # a round of 64 would take 3 times 33 MB
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert decode(width=64) == expected
print(*(warning.message for warning in caught), sep="\\n")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_truly_runs_out():
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", SMALL_PROCESS], cwd=root, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "out of memory in a round of 4 prompts x 64 attempts: going on with width=32" in run.stdout
