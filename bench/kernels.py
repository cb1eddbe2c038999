"""Sizes of kernels, for the model of `roofline`: bytes and operations by formula.

What these cost is a floor: `Kernel.seconds` takes the machine's shortcomings from bench/assumptions.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from bench import counted
from bench.assumptions import Values
from bench.parts import BUILT, Engine
from bench.sizes import BF16, Gpu, Model

L2_BYTES = 40e6  # of the smallest of these GPUs: activations that fit cost no bandwidth
RACE_FLOPS = 150  # vector operations for a token's key in the race: 1/4 of Philox4x32-10, two logarithms
FILTER_FLOPS = 10  # and for finding the tokens that top-k and top-p leave
SURVIVORS = 1024  # candidates a row that the filters' second read writes into a buffer, 8 bytes each
QUERY_BLOCK = 32  # queries for which fork_attention reads a prefix once: whole rows x tokens x heads of a group
CHUNK, GROUP = 2048, 64  # segment_sample: tokens of a program, tokens behind one maximum
HEAD_BLOCK = 128  # lm_head_sample: tokens of a program
# fork_attention: how a prefix is split, and from which number of splits on programs share it
SPLIT_KEYS, MAX_SPLITS, TARGET_PROGRAMS, WHOLE_SPLITS, WORKSPACE = 256, 16, 264, 8, 128 << 20


class Kernel(NamedTuple):
    name: str
    bytes: float  # of a call, as the three below
    flops: float = 0.0  # on tensor cores
    vector_flops: float = 0.0
    l2_bytes: float = 0.0  # read from L2 and not from memory
    calls: float = 1  # a round
    launches: int = 1  # a call, alike
    searches: int = 0  # for a threshold in a call, by dependent passes
    attention: bool = False  # runs at `attention_share`
    phase: str = ""  # modelled as if the host waited at its end
    ahead: bool = False  # or not, in a round that the device judges
    graph: str = ""  # the CUDA graph that it is part of, where there are any

    def limits(self, gpu: Gpu, given: Values) -> dict[str, float]:
        """Seconds of a call by what may bound it: its floors."""
        bandwidth = given.bandwidth_share * gpu.bandwidth
        return {
            "memory": self.bytes / bandwidth,
            "L2": self.l2_bytes / (given.l2_speed * bandwidth),
            "tensor": self.flops / (given.flops_share * gpu.tensor_flops),
            "vector": self.vector_flops / (given.flops_share * gpu.vector_flops),
        }

    def seconds(self, gpu: Gpu, given: Values) -> float:
        """Of all its calls, without the gaps between launches."""
        moves = self.bytes or self.flops or self.vector_flops
        work = smooth_max(tuple(self.limits(gpu, given).values()), given.ridge) if moves else 0.0
        if self.attention:
            work /= given.attention_share
        return self.calls * max(work, self.searches * given.search_seconds, self.launches * given.small_kernel_seconds)


def smooth_max(limits: tuple[float, ...], ridge: float) -> float:
    """The p-norm of `limits` where two equal ones give `ridge` times either; the larger alone where they are far apart.

    ridge: 1 (the maximum) to 2 (the sum).
    """
    largest = max(limits)
    if ridge == 1 or largest == sum(limits):  # of one limit alone
        return largest
    p = math.log(2) / math.log(ridge)
    return largest * sum((limit / largest) ** p for limit in limits if limit) ** (1 / p)


def prefix_reads(m: Model, rows: float, tokens: float = 1) -> int:
    """Of fork_attention for a prompt with that many rows."""
    per_row = tokens * m.heads / m.kv_heads
    return math.ceil(rows / max(1, QUERY_BLOCK // per_row)) * math.ceil(per_row / QUERY_BLOCK)


def attention_whole(blocks: float) -> int:
    """Splits of a prefix up to which one program of fork_attention reads it all, where so many programs do."""
    return 1 if blocks < TARGET_PROGRAMS else WHOLE_SPLITS


def attention_splits(m: Model, prompts: float, rows: float, tokens: int, slots: float) -> int:
    """Parts of a query for which fork_attention makes room, to be merged by a second kernel; 1: there is none.

    slots: of the arena for a prompt, its answer included.
    """
    prompts, rows, per_row = math.ceil(prompts), math.ceil(rows), tokens * m.heads // m.kv_heads
    usual = math.ceil(rows / max(1, prompts))  # rows of a prompt
    together = math.ceil(usual / math.ceil(usual / max(1, QUERY_BLOCK // per_row)))
    blocks = math.ceil(rows / together) * math.ceil(per_row / QUERY_BLOCK) * m.kv_heads
    parts = min(MAX_SPLITS, math.ceil(prompts * int(slots) / SPLIT_KEYS)) + 1
    room = parts * rows * tokens * m.heads * (m.head_dim + 2) * 4
    return 1 if parts <= attention_whole(blocks) + 1 or room > WORKSPACE else parts


def fork_attention(
    m: Model, name: str, rows: float, tokens: float, *, prefixes: float, prefix: float, own: float, calls: float,
    splits: int = 1, reread: float = 0.0,
) -> list[Kernel]:  # fmt: skip
    """Read `prefix` tokens `prefixes` times from memory and `reread` times from L2, and each row's own tokens once.

    Keys and values of one layer; where there is room for `splits` parts, those that are stored, in fp32, and a merge.
    """
    queries = rows * tokens * m.query_size
    keys = prefix + own - (tokens - 1) / 2  # that a query sees, on average
    token = 2 * m.kv_size * BF16
    parts = min(MAX_SPLITS, math.ceil(prefix / SPLIT_KEYS)) + 1  # the last one is the row's own tokens
    stored = splits > 1 and parts - 1 > attention_whole((prefixes + reread) * m.kv_heads)
    partial = parts * rows * tokens * m.heads * (m.head_dim + 2) * 4 if stored else 0  # accumulator, maximum, sum
    out = BF16 * queries
    kernels = [
        Kernel(f"{name}: fork_attention", token * (prefixes * prefix + rows * own) + BF16 * queries
               + (partial or out), 4 * queries * keys, l2_bytes=token * reread * prefix, calls=calls,
               attention=True)
    ]  # fmt: skip
    if splits > 1:
        moved = partial + out if stored else 0  # a prefix that one program read is not merged
        kernels.append(Kernel(f"{name}: fork_attention merge", moved, calls=calls))
    return kernels


def forward(
    m: Model, name: str, rows: float, tokens: float = 1, *, prefixes: float, prefix: float, own: float,
    calls: int = 1, head: bool = True, engine: Engine = BUILT, splits: int = 1, reread: float = 0.0,
    prefill: bool = False, merged: bool = False,
) -> list[Kernel]:  # fmt: skip
    """`tokens` new tokens of each row, of `own` in its suffix; a prefix is read `prefixes` times, not for each row.

    Weights are read once. Activations cost bandwidth only where they do not fit into the L2 cache. prefill: of prompts.
    merged: products of one tensor are one.
    """
    new = rows * tokens
    cached = new * max(4 * m.hidden, BF16 * m.intermediate) <= L2_BYTES
    around = 8 * m.hidden + 2 * m.query_size + 2 * m.kv_size + 3 * m.intermediate  # inputs and outputs of the linears
    layers, moved = m.layers, 0 if cached else new
    kernels = [
        Kernel(f"{name}: linears", BF16 * layers * (m.linears + moved * around), 2 * layers * m.linears * new,
               calls=calls, launches=(counted.MERGED_LINEARS if merged else counted.LINEARS) * layers),
        Kernel(f"{name}: element-wise", layers * moved * engine.bytes(m), calls=calls,
               launches=engine.elementwise(prefill) * layers + engine.forward),
        *fork_attention(m, name, rows, tokens, prefixes=prefixes, prefix=prefix, own=own, calls=calls * layers,
                        splits=splits, reread=reread),
    ]  # fmt: skip
    if head:
        kernels.append(lm_head(m, name, rows, calls))
    return kernels


def lm_head(m: Model, name: str, rows: float, calls: int, logits: bool = True) -> Kernel:
    written = rows * m.vocabulary if logits else 0
    return Kernel(f"{name}: LM head", BF16 * (m.head + rows * m.hidden + written), 2 * m.head * rows, calls=calls)


def segment_sample(m: Model, name: str, rows: float, read: float, calls: int, filtered: bool) -> list[Kernel]:
    """`rows` tokens from `read` different rows of logits; filters read twice, and use a scratch.

    As launched: race and finish, or groups, bound, gather and draw (which is read from one candidate list a row).
    """
    logits, chunks, groups = (
        BF16 * read * m.vocabulary,
        math.ceil(m.vocabulary / CHUNK),
        math.ceil(m.vocabulary / GROUP),
    )

    def kernel(part: str, size: float, vector_flops: float, searches: int = 0) -> Kernel:
        title = f"{name}: segment_sample {part}"
        return Kernel(title, size, vector_flops=vector_flops, calls=calls, searches=searches)

    if not filtered:
        parts = 16 * rows * chunks  # winner 4, maximum 4, mass 8
        return [
            kernel("race", logits + parts, RACE_FLOPS * rows * m.vocabulary),
            kernel("finish", parts + 12 * rows, RACE_FLOPS * rows * chunks),
        ]
    maxima, candidates = 4 * read * groups, 8 * SURVIVORS
    return [
        kernel("groups", logits + maxima, FILTER_FLOPS / 2 * read * m.vocabulary),
        kernel("bound", maxima + 20 * read, FILTER_FLOPS * read * groups, searches=1),
        kernel("gather", logits + maxima + candidates * read, FILTER_FLOPS / 2 * read * m.vocabulary),
        kernel("draw", candidates * rows + 12 * rows, RACE_FLOPS * rows * SURVIVORS, searches=1),
    ]


def lm_head_sample(m: Model, name: str, rows: float, calls: int) -> list[Kernel]:
    """LM head and draw at temperature alone in one op, at best: no logits in memory, all arithmetic overlapped."""
    blocks = math.ceil(m.vocabulary / HEAD_BLOCK)
    parts = 20 * rows * blocks  # winner's score 4, maximum 4, winner 4, mass 8
    head = lm_head(m, name, rows, calls, logits=False)
    race = head._replace(
        name=f"{name}: lm_head_sample race", bytes=head.bytes + parts, vector_flops=RACE_FLOPS * rows * m.vocabulary
    )
    return [race, Kernel(f"{name}: lm_head_sample finish", parts + 12 * rows, calls=calls)]


def kv_commit(m: Model, name: str, tokens: float, calls: int = 1) -> Kernel:
    """Read and write keys and values of `tokens` tokens of all layers; lengths and offsets beside them are nothing."""
    return Kernel(f"{name}: kv_commit", 2 * m.kv_bytes * tokens, calls=calls)


def around(name: str, launches: int, calls: float = 1) -> Kernel:
    """Return the small launches around forwards and ops: positions, lengths, copies of a few numbers."""
    return Kernel(f"{name}: around", 0, calls=calls, launches=launches)


def reward_head(m: Model, name: str, rows: float) -> Kernel:
    return Kernel(f"{name}: reward_head", BF16 * m.hidden * (rows + 1) + 4 * rows, vector_flops=2 * rows * m.hidden)
