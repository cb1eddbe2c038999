"""Launches of the engine on a GPU: counts, not estimates. Change them here alone, by `python -m bench.launches`.

tests/test_launches.py counts them again in the engine itself, for a Llama and a Qwen2 in bf16, and asks for equality.
"""

LINEARS, MERGED_LINEARS = 7, 4  # of a layer, and where products of one tensor are one: `sizes.merges`
LAYER = {"add_rms_norm": 1, "gated": 1, "rms_norm": 1, "rotary_store": 1}  # beside these and its attention
PREFILL_ELEMENTWISE = 8  # of a layer that reads prompts, however many
FORWARD = 12  # of a forward around its layers: embedding, rotary table, final norm; the LM head apart
STEP = 12  # of a step of a segment around its forward and its draw
SEGMENT = 4  # of a segment around its steps
LAST_TOKEN = 25  # around the forward of the last tokens, kv_commit apart
SCORE = 20  # around the reward model's forward, reward_head apart
WAVES = -68  # more, in a round that is scored in waves: the host judges it
WAVE = 29  # around the reward model's forward of a second wave, reward_head apart
PREFILL, PREFILL_REWARD = 10, 11  # around a forward that reads prompts, reward_head apart
ROUND = 121  # of a round beside all of these: rows, candidates' ends, judgement, commits, what the next one begins with
ON_DEVICE = True  # whether a round in one wave is judged on the device: the host is one round behind then
