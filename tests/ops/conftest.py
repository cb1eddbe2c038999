import pytest
import torch

import stars_kernels
from stars_kernels.ops.dispatch import load_extension


@pytest.fixture(params=["definition", "dispatched"])
def impl(request):
    """Runs a test twice: with the PyTorch definitions, and with whatever the dispatcher picks."""
    load_extension()  # here, so that torch.ops called without the public function sees it too
    if request.param == "definition":
        with stars_kernels.reference():
            yield request.param
    else:
        yield request.param


@pytest.fixture(autouse=True)
def poisoned():
    """What an op allocates starts as NaN, or the largest integer: a value that it forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # its one effect on these ops is on torch.empty
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
