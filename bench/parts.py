"""What the engine launches, part by part: what is built is counted (bench/counted.py), what is not built is modelled.

`PARTS` is the one place where a part is said to save something. Whether it is built is read off the counts themselves,
so a part that gets built is paid for as counted, and saves nothing any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from bench import counted
from bench.sizes import Model

OUTSIDE = 6
"""Launches of a step outside its layers, draw and LM head, at least: half in a forward (embedding, RoPE, last norm)."""


class Part(NamedTuple):
    """What a part of the engine does away with.

    built: by the counts. launches: of a layer's element-wise ones. bytes: of a token in a layer.
    """

    what: str
    built: bool
    launches: int = 0
    bytes: Callable[[Model], int] = lambda m: 0


PARTS = {
    "norm": Part("a norm in one launch", "rms_norm" in counted.LAYER, 14, bytes=lambda m: 64 * m.hidden),
    "gate": Part("SiLU and its product in one launch", "silu" not in counted.LAYER, 1,
                 bytes=lambda m: 4 * m.intermediate),
    "residual": Part("a residual's sum and the norm behind it in one launch", counted.LAYER.get("rms_norm", 0) < 2, 1,
                     bytes=lambda m: 2 * m.hidden),
    "rotary": Part("queries and keys turned in one launch", "neg" not in counted.LAYER, 9,
                   bytes=lambda m: 16 * (m.query_size + m.kv_size)),
    "store": Part("and keys and values written to their places by it", not {"copy", "index_put_"} & {*counted.LAYER}, 2,
                  bytes=lambda m: 4 * m.kv_size),
    "outside": Part(f"{OUTSIDE} launches a step outside its layers, where {counted.FORWARD + counted.STEP} are counted",
                    counted.FORWARD + counted.STEP <= OUTSIDE),
    "device": Part("rounds in one wave are judged on the device, the host one round behind", counted.ON_DEVICE),
}  # fmt: skip
"""In the order in which they are added."""


@dataclass(frozen=True)
class Engine:
    """The engine as built, and with parts that are not."""

    added: frozenset[str] = frozenset()

    def has(self, part: str) -> bool:
        return PARTS[part].built or part in self.added

    @property
    def _new(self) -> list[Part]:
        return [PARTS[part] for part in self.added if not PARTS[part].built]

    def elementwise(self, prefill: bool = False) -> int:
        """Launches of a layer's element-wise work. prefill: where prompts are read."""
        launches = counted.PREFILL_ELEMENTWISE if prefill else sum(counted.LAYER.values())
        return launches - sum(part.launches for part in self._new)

    @property
    def forward(self) -> int:
        """Launches of a forward around its layers."""
        return OUTSIDE // 2 if "outside" in self.added else counted.FORWARD

    @property
    def step(self) -> int:
        """Launches of a segment's step around its forward and its draw."""
        return OUTSIDE // 2 if "outside" in self.added else counted.STEP

    def bytes(self, m: Model) -> int:
        """Of a layer's element-wise work for a token that does not stay in the L2 cache, each element read and written.

        Without any part 36 in the 8 kernels of a norm, 6 in a residual's sum, 20 in RoPE, 4 in a copy, 10 in SiLU and
        product.
        """
        plain = 84 * m.hidden + 20 * (m.query_size + m.kv_size) + 8 * m.kv_size + 10 * m.intermediate
        return plain - sum(part.bytes(m) for name, part in PARTS.items() if self.has(name))


BUILT = Engine()
MISSING = tuple(name for name, part in PARTS.items() if not part.built)


"""Of the parts, those that are not built."""


def with_parts(count: int) -> Engine:
    """Return the engine with the first `count` of `MISSING`."""
    return Engine(frozenset(MISSING[:count]))


WHOLE = with_parts(len(MISSING))
"""With all parts."""
