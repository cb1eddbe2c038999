import pytest

import stars_kernels
from stars_kernels.ops._registry import load_extension


@pytest.fixture(params=["definition", "dispatched"])
def impl(request):
    """Runs a test twice: with the PyTorch definitions, and with whatever the dispatcher picks."""
    load_extension()  # here, so that torch.ops called without the public function sees it too
    if request.param == "definition":
        with stars_kernels.reference():
            yield request.param
    else:
        yield request.param
