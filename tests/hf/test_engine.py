"""An engine that lives over many calls: it pays its set-up once, and what it keeps changes no answer."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch

import stars_kernels
from stars_kernels import BestOf, Cards, Engine, Likelihood, RewardModel, StarsConfig
from stars_kernels.decoder.slots import Slots
from stars_kernels.hf import call, serving
from stars_kernels.hf.cache.buffers import Buffers
from stars_kernels.hf.proposing.graphs import Graphs
from stars_kernels.hf.view import layout
from stars_kernels.hf.view.rewrites import packed
from tests.captured import rerun
from tests.tiny import byte_tokenizer, tiny_language_model, tiny_reward_model

PROMPTS = [[1, 2, 3], [40], [7, 8, 9, 10], [5, 6]]
SET = dict(reward_threshold=2.0, beta=1.0, max_new_tokens=14, segment_size=4, max_attempts=5)

CARDS = Cards(reward_threshold=2.0, beta=1.0, segment_size=4, max_attempts=3, entropy_threshold=1.0)


def length_reward(prompts, answers):
    return [float(len(answer)) for answer in answers]


def told(outputs):
    return [(o.token_ids, o.reward, o.request_id, o.text) for o in outputs]


@pytest.fixture(scope="module")
def fp32():
    return tiny_language_model(torch.float32), tiny_reward_model(torch.float32)


def kinds(lm, rm):
    """A reward model of each kind that keeps something."""
    torch.manual_seed(5)
    return {
        "ids": rm,
        "text": RewardModel(rm, byte_tokenizer(), "{prompt}: {answer}"),
        "likelihood": Likelihood(lm, tiny_language_model(lm.dtype, seed=5)),
        "head": torch.nn.Linear(lm.config.hidden_size, 1).to(lm.dtype),
        "function": length_reward,
        "sum": [rm, RewardModel(rm, byte_tokenizer(), "{prompt}: {answer}", weight=0.5)],
    }


@pytest.mark.parametrize("kind", ["ids", "text", "likelihood", "head", "function", "sum"])
def test_many_calls_give_the_answers_of_single_ones(fp32, kind):
    lm, rm = fp32
    reward = kinds(lm, rm)[kind]
    with Engine(lm, reward, tokenizer=byte_tokenizer(), **SET) as engine:
        calls = [
            (PROMPTS[:2], SET),
            (PROMPTS[:1], SET),
            (PROMPTS, {"max_new_tokens": 14, "rule": BestOf(3)}),
            (PROMPTS, SET),
        ]
        for seed, (prompts, settings) in enumerate(calls):  # larger batches and smaller ones
            expected = stars_kernels.decode(lm, reward, prompts, tokenizer=byte_tokenizer(), seed=seed, **settings)
            assert told(engine.decode(prompts, config=StarsConfig(seed=seed, **settings))) == told(expected)


def test_what_is_kept_is_never_read_before_it_is_written(fp32):
    lm, rm = fp32
    for reward in kinds(lm, rm).values():
        with Engine(lm, reward, tokenizer=byte_tokenizer(), **SET) as engine:
            first = told(engine.decode(PROMPTS, seed=1))
            poison(engine._idle[0].buffers)
            assert told(engine.decode(PROMPTS, seed=1)) == first


def poison(buffers):
    for tensor in buffers._kept.values():
        with torch.inference_mode():
            tensor.fill_(torch.nan if tensor.is_floating_point() else -(2**40))
    for part in buffers._parts.values():
        poison(part)


def test_a_second_call_sets_nothing_up(monkeypatch, fp32):
    lm, rm = fp32
    made = []

    def counted(where, name):
        real = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *given, **options: made.append(name) or real(*given, **options))

    counted(layout, "_probe")
    counted(packed.ops, "content_hash")
    counted(packed.ops, "pack_linear")
    for module in ("models", "scoring.rewarder"):
        monkeypatch.setattr(
            f"stars_kernels.hf.{module}.view_of",
            lambda model: made.append("view") or stars_kernels.hf.view.copying.view_of(model),
        )
    take = Buffers.take

    def taken(self, *given):
        kept = dict(self._kept)
        found = take(self, *given)
        if not any(found is tensor for tensor in kept.values()):
            made.append("buffer")
        return found

    monkeypatch.setattr(Buffers, "take", taken)
    with Engine(lm, rm, **SET) as engine:
        assert {"view", "_probe", "content_hash"} <= set(made)
        first = engine.decode(PROMPTS, seed=3)
        assert "buffer" in made
        made.clear()
        assert told(engine.decode(PROMPTS, seed=3)) == told(first)
        assert engine.decode(PROMPTS[:2], seed=4)
        assert made == []


def test_graphs_stay(monkeypatch, fp32):
    lm, rm = fp32
    captures = []

    def capture(run):
        captures.append(1)
        return rerun(run)

    graphs = Graphs(capture)
    monkeypatch.setattr(call.Workspace, "make_graphs", staticmethod(lambda device: graphs))
    monkeypatch.setattr(serving.Serving, "_why_eager", lambda self: None)
    with Engine(lm, rm, eos_token_id=(), width=2, **SET) as engine:
        first = engine.decode(PROMPTS, seed=3)
        assert captures and graphs.counts.replays
        engine.decode(PROMPTS, seed=3)  # captures what was met once
        captures.clear()
        assert told(engine.decode(PROMPTS, seed=3)) == told(first)
        assert not captures
        given, found = [], []
        for prompts in (PROMPTS[:1], PROMPTS[1:3], PROMPTS[:1], PROMPTS):  # what graphs read is what they were given
            for eos, rule in (((), CARDS), (7, None), ([7, 8, 9], CARDS)):
                given.append((prompts, dict(seed=4, eos_token_id=eos, rule=rule)))
                found.append(told(engine.decode(prompts, **given[-1][1])))
        longer = told(engine.decode([[9] * 140, *PROMPTS], seed=5))  # the arena moves: old graphs are worth nothing
    monkeypatch.undo()
    with Engine(lm, rm, eos_token_id=(), width=2, **SET) as engine:
        assert [told(engine.decode(prompts, **settings)) for prompts, settings in given] == found
        assert told(engine.decode([[9] * 140, *PROMPTS], seed=5)) == longer


def test_graphs_are_bounded():
    graphs, done = Graphs(lambda run: run), []
    for _ in range(2):
        for size in range(200):
            graphs.run(size, lambda size=size: done.append(size))
    assert done == 2 * list(range(200))
    assert len(graphs.holds) <= 64


def test_an_open_run_decodes_as_a_call_does_and_holds_the_turn(fp32):
    lm, rm = fp32
    given = dict(seed=3, request_ids=range(4))
    with Engine(lm, rm, eos_token_id=(), **SET) as engine, ThreadPoolExecutor(1) as pool:
        expected = [(o.token_ids, o.reward, o.prompt_reward) for o in engine.decode(PROMPTS, **given)]
        with engine.open_run(PROMPTS, **given) as run:
            assert [a.prompt_reward for a in run.answers] == [prompt_reward for *_, prompt_reward in expected]
            other = pool.submit(engine.decode, PROMPTS, **given)
            for _ in run.rounds():
                assert not other.done()
        assert [(a.tokens, a.reward, a.prompt_reward) for a in run.answers] == expected
        assert [(o.token_ids, o.reward, o.prompt_reward) for o in other.result()] == expected
        for prompts, settings, message in (
            ([], {}, "prompts is an empty list"),
            ([[]], {}, "it has no tokens"),
            (PROMPTS, {"beta": None}, "reward_threshold or beta is None, expected both"),
        ):
            with pytest.raises((ValueError, TypeError), match=message), engine.open_run(prompts, **settings):
                pass
        assert engine.decode(PROMPTS, **given)


def test_threads_take_turns(fp32):
    lm, rm = fp32
    expected = {seed: told(stars_kernels.decode(lm, rm, PROMPTS, seed=seed, **SET)) for seed in range(8)}
    with Engine(lm, rm, **SET) as engine, ThreadPoolExecutor(max_workers=4) as pool:

        def work(seed):
            if seed % 2:
                return told(engine.decode(PROMPTS, seed=seed))
            outputs = [event.output for event in engine.stream(PROMPTS, seed=seed) if event.output is not None]
            return told(sorted(outputs, key=lambda o: PROMPTS.index(list(prompt_of[o.request_id]))))

        ids = [o.request_id for o in engine.decode(PROMPTS, seed=0)]
        prompt_of = dict(zip(ids, PROMPTS, strict=True))
        assert dict(zip(range(8), pool.map(work, range(8)), strict=True)) == expected


def test_calls_inside_of_calls(fp32):
    """A stream that is not asked on holds nobody up, and a reward function may decode with the engine it serves."""
    lm, rm = fp32
    with Engine(lm, rm, **SET) as engine:
        expected = told(engine.decode(PROMPTS, seed=1))
        with closing(engine.stream(PROMPTS, seed=2)) as events:
            next(events)
            assert told(engine.decode(PROMPTS, seed=1)) == expected
            with ThreadPoolExecutor(max_workers=1) as pool:
                assert told(pool.submit(engine.decode, PROMPTS, seed=1).result(timeout=60)) == expected
            rest = list(events)
        assert sum(event.output is not None for event in rest) == len(PROMPTS)
    asked, inner = [], []

    def asks(prompts, answers):
        asked.append(1)
        if len(asked) == 2:  # the first asks of empty answers
            inner.extend(told(outer.decode([[40]])))
        return length_reward(prompts, answers)

    settings = dict(tokenizer=byte_tokenizer(), rule=BestOf(2), seed=0, max_new_tokens=6)
    with Engine(lm, asks, **settings) as outer:
        found = told(outer.decode(PROMPTS))
    assert found == told(stars_kernels.decode(lm, length_reward, PROMPTS, **settings))
    assert inner == told(stars_kernels.decode(lm, length_reward, [[40]], **settings))


def test_settings_of_the_engine_and_of_a_call(fp32):
    lm, rm = fp32
    with Engine(lm, rm, seed=4, **SET) as engine:
        assert engine.decode([PROMPTS[0]])[0].config.seed == 4
        output = engine.decode(PROMPTS[0], segment_size=3, seed=5)
        assert (output.config.segment_size, output.config.beta, output.config.seed) == (3, 1.0, 5)
        assert engine.decode(PROMPTS[0], config={"alpha": 0.1}).config.max_attempts == 5
        assert engine.decode(PROMPTS[0], config=StarsConfig(reward_threshold=2, beta=1)).config.max_attempts == 20
        assert engine.decode([]) == []
        best = engine.decode(PROMPTS[0], rule=BestOf(2))  # in place of the engine's settings of STARS
        assert best.config.resolved_rule == BestOf(2) and best.config.max_new_tokens == 14
        with pytest.raises(ValueError, match=r"alpha is given beside rule=BestOf\(n=2\)"):
            engine.decode(PROMPTS[0], rule=BestOf(2), alpha=0.1)
        with pytest.raises(TypeError, match="unknown setting 'segment_sizes'; did you mean 'segment_size'"):
            engine.decode(PROMPTS, segment_sizes=3)
        with pytest.raises(ValueError, match=r"pack is False, but this engine's models were packed with pack=True"):
            engine.decode(PROMPTS, pack=False)
        with pytest.raises(ValueError, match='errors is \'maybe\', expected "raise" or "return"'):
            engine.decode(PROMPTS, errors="maybe")
    with Engine(lm, rm, pack=False, **SET) as engine:
        assert engine.decode(PROMPTS[0], config=StarsConfig(reward_threshold=2, beta=1, seed=0)).config.pack is False


def test_failures_can_be_returned(lm, rm):
    prompts = [[1, 2], [999], [3]]
    with Engine(lm, rm, **SET) as engine:
        first, wrong, last = engine.decode(prompts, seed=0, errors="return")
        assert isinstance(wrong, ValueError) and "prompt 1: token id 999" in str(wrong)
        assert told([first, last]) == told(engine.decode([[1, 2], [3]], seed=0))
        assert isinstance(engine.decode([999], errors="return"), ValueError)
        with pytest.raises(stars_kernels.StarsError) as failed:
            engine.decode(prompts, seed=0)
        assert [type(result) for result in failed.value.results] == [type(first), ValueError, type(last)]


def test_an_engine_that_is_closed(lm, rm):
    engine = Engine(lm, rm, **SET)
    events = engine.stream(PROMPTS, seed=0)
    next(events)
    view = weakref.ref(engine.models.lm)
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed, expected an open one") as ended:
        next(events)
    assert len(ended.value.results) == len(PROMPTS)
    assert all(result.finish_reason == "interrupted" for result in ended.value.results)
    del ended, events
    uses = [
        lambda: engine.decode(PROMPTS),
        lambda: engine.stream(PROMPTS),
        lambda: engine.calibrate(PROMPTS),
        lambda: engine.score([[1]], [[2]]),
        lambda: engine.__enter__(),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match="the engine is closed, expected an open one"):
            use()
    gc.collect()
    assert view() is None


def test_one_idle_workspace_is_kept(lm, rm):
    with Engine(lm, rm, **SET) as engine:
        streams = [engine.stream(PROMPTS, seed=seed) for seed in range(3)]
        for events in streams:
            next(events)
        for events in streams:
            events.close()
        assert len(engine._idle) == 1 and engine._idle[0].used


def test_memory_of_an_earlier_call_is_given_back_before_there_are_fewer_slots(monkeypatch, lm, rm):
    """Prompts that have no room beside what an earlier call left are admitted again, as many as there were."""
    with Engine(lm, rm, **SET) as engine:
        expected = told(engine.decode(PROMPTS, seed=1))
        assert engine._idle[0].buffers._parts
        admit = Slots.admit

        def scarce(self, *args):
            if engine_workspace[0].used:
                raise torch.OutOfMemoryError("CUDA out of memory")
            admit(self, *args)

        engine_workspace = [engine._idle[0]]
        monkeypatch.setattr(Slots, "admit", scarce)
        outputs = engine.decode(PROMPTS, seed=1)
        assert told(outputs) == expected and outputs[0].memory_limits == {}
        assert told(engine.decode(PROMPTS[:1], seed=1)) == expected[:1]


def test_the_callers_mode_is_that_of_the_call(lm):
    seen = []

    def asks(prompts, answers):
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return length_reward(prompts, answers)

    with Engine(lm, asks, tokenizer=byte_tokenizer(), max_new_tokens=3, calibration_samples=2) as engine:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            engine.calibrate(["a", "b"])
            engine.score(["a"], ["b"])
            engine.decode(["a"], rule=BestOf(1))
        assert set(seen) == {(True, True)}
        seen.clear()
        with torch.no_grad():
            engine.score(["a"], ["b"])
        assert set(seen) == {(False, False)}


def test_a_stream_may_be_closed_after_its_engine(lm, rm):
    engine = Engine(lm, rm, **SET)
    begun, untouched = engine.stream(PROMPTS, seed=0), engine.stream(PROMPTS, seed=0)
    next(begun)
    engine.close()
    begun.close()
    untouched.close()


@pytest.mark.parametrize("kind", ["ids", "text", "likelihood", "head", "function", "sum"])
def test_scores_are_the_rewards_of_answers(lm, rm, kind):
    with Engine(lm, kinds(lm, rm)[kind], tokenizer=byte_tokenizer(), **SET) as engine:
        outputs = engine.decode(PROMPTS, seed=1)
        found = engine.score(PROMPTS, [output.token_ids for output in outputs])
        assert found == pytest.approx([output.reward for output in outputs], abs=1e-9)
        empty = engine.score(PROMPTS, [[], outputs[1].token_ids, [], [3]])
        assert empty[:3] == pytest.approx(
            [outputs[0].prompt_reward, outputs[1].reward, outputs[2].prompt_reward], abs=1e-9
        )
        one = engine.score(PROMPTS, [[], outputs[1].token_ids, [], [3]])
        assert one == pytest.approx(empty, abs=1e-9)


def test_scores_of_texts_and_what_is_refused(lm, rm):
    with Engine(lm, length_reward, tokenizer=byte_tokenizer(), stop_strings=["ll"]) as engine:
        assert engine.score(["a", "b", "c"], ["hello", "", "é"]) == [5.0, 0.0, 1.0]
        hello = byte_tokenizer()("hello", add_special_tokens=False)["input_ids"]
        assert engine.score(["a"], [hello]) == [2.0]  # as `decode` would have read it
        with pytest.raises(TypeError, match="prompts is one prompt, expected a list"):
            engine.score("a", ["b"])
        with pytest.raises(ValueError, match="1 answers to 2 prompts, expected one each"):
            engine.score(["a", "b"], ["c"])
        with pytest.raises(TypeError, match="answers is of type str, expected a list"):
            engine.score(["a"], "b")
        with pytest.raises(ValueError, match="prompt 1: token id 999"):
            engine.score(["a", [999]], ["b", "c"])
        with pytest.raises(ValueError, match="answer 0: token id 999 is outside the vocabulary"):
            engine.score(["a"], [[999]])
        with pytest.raises(ValueError, match=r"answer 0 has 600 tokens, expected at most"):
            engine.score(["a"], [[3] * 600])
        with pytest.raises(ValueError, match=r"answer 0 is '.*', but its tokens mean"):
            engine.score(["a"], ["x\ufffd"])

    def nan(prompts, answers):
        return [float("nan")] * len(answers)

    def fails(prompts, answers):
        raise KeyError("x")

    for function, what in ((nan, "the reward is nan"), (fails, "the reward model failed")):
        with Engine(lm, function, tokenizer=byte_tokenizer()) as engine:
            with pytest.raises(stars_kernels.DecodeError, match=f"answer 0: {what}") as failed:
                engine.score(["a"], ["b"])
            assert (failed.value.index, failed.value.what) == (0, what)


def test_scoring_shrinks_where_memory_runs_out(monkeypatch, lm, rm):
    from stars_kernels.hf import score

    sizes, real = [], score._score_batch

    def scarce(called, batch):
        sizes.append(len(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(called, batch)

    with Engine(lm, rm) as engine:
        expected = engine.score(PROMPTS, [[3], [4, 5], [6], [7]])
        monkeypatch.setattr(score, "_score_batch", scarce)
        assert engine.score(PROMPTS, [[3], [4, 5], [6], [7]]) == pytest.approx(expected)
    assert sizes == [4, 4, 2, 1, 1, 1, 1] or sizes[-4:] == [1] * 4


def test_an_engine_waits_for_a_call_before_it_closes(lm):
    """Closing from another thread comes between two rounds, never inside of one."""
    inside, closed = threading.Event(), threading.Event()

    def slow(prompts, answers):
        inside.set()
        closed.wait(0.2)
        assert not closed.is_set()
        return length_reward(prompts, answers)

    engine = Engine(lm, slow, tokenizer=byte_tokenizer(), rule=BestOf(1), max_new_tokens=3)
    with ThreadPoolExecutor(max_workers=1) as pool:
        running = pool.submit(engine.decode, ["a"], errors="return")
        inside.wait(30)
        engine.close()
        closed.set()
        error = running.exception(timeout=60)
    assert error is None or "the engine is closed" in str(error)
