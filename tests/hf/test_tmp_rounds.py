import pytest, torch
import stars_kernels
from stars_kernels import StarsConfig
from tests.captured import segments_as_graphs
from tests.sequential import sequential_decode
from tests.tiny import EOS, tiny_language_model, tiny_reward_model
PROMPTS = [[1, 2, 3], [40], [7, 8, 9, 10, 11, 12, 13, 200], [40], [90, 91, 92, 93, 94]]
EOS_IDS = (EOS, 3, 77, 130, *range(60, 70))
def test_it(monkeypatch):
    lm, rm = tiny_language_model(), tiny_reward_model()
    graphs = segments_as_graphs(monkeypatch)
    config = StarsConfig(seed=3, reward_threshold=2.0, beta=0.5, max_new_tokens=16, segment_size=4, max_attempts=6)
    expected = [sequential_decode(lm, rm, prompt, i, config, EOS_IDS) for i, prompt in enumerate(PROMPTS)]
    for width, slots in ((1,1),(1, 5), (3, 2), (6, 3), (4,5)):
        shaped = config.replace(width=width, wave=width, batch_size=slots, eos_token_id=EOS_IDS)
        outputs = stars_kernels.decode(lm, rm, PROMPTS, request_ids=range(5), config=shaped)
        assert outputs[0].backends["rounds"].endswith(", 0 by the host"), outputs[0].backends
        assert [(o.token_ids, [s.attempts for s in o.segments]) for o in outputs] == expected
