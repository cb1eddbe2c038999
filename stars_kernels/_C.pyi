from collections.abc import Sequence
from typing import TypedDict

class BuildInfo(TypedDict):
    torch: str
    compiler: str
    isa: str
    openmp: bool
    sanitized: bool
    cuda: bool
    cuda_archs: list[str]

OUTCOMES: dict[str, int]

def build_info() -> BuildInfo: ...
def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
