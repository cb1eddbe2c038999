"""Launches of the engine on a GPU: counts, not estimates. Change them here alone, by `python -m bench.launches`.

tests/test_launches.py counts them again in the engine itself, for a Llama and a Qwen2 in bf16, and asks for equality.
"""

LINEARS = 7  # of a layer
LAYER = {"add": 4, "cat": 2, "copy": 2, "mul": 5, "neg": 2, "rms_norm": 2, "silu": 1}  # beside these and its attention
PREFILL_ELEMENTWISE = 22  # of a layer that reads prompts, however many
FORWARD = 12  # of a forward around its layers: embedding, rotary table, final norm; the LM head apart
STEP = 12  # of a step of a segment around its forward and its draw
SEGMENT = 7  # of a segment around its steps
LAST_TOKEN = 25  # around the forward of the last tokens, kv_commit apart
SCORE = 20  # around the reward model's forward, reward_head apart
WAVES = 12  # more, in a round that is scored in waves
WAVE = 29  # around the reward model's forward of a second wave, reward_head apart
PREFILL, PREFILL_REWARD = 10, 11  # around a forward that reads prompts, reward_head apart
ROUND = 40  # of a round beside all of these: rows, candidates' ends, the graph's inputs and outputs, commits
ON_DEVICE = False  # whether a round in one wave is judged on the device: the host is one round behind then
