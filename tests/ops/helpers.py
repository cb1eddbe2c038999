"""What the op tests share."""

import torch

from stars_kernels.ops import backends

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def compiled(op):
    return backends()[op]["cpu"] == "cpp"


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def longs(*values):
    return torch.tensor(values, dtype=torch.int64)


def bits_of(tensor):
    """A tensor's bytes: NaN compares equal to itself, and -0.0 differs from 0.0."""
    return tensor.contiguous().view(torch.uint8)


def strided(tensor):
    """The same values on every second element of a larger buffer: not contiguous in any dimension."""
    buffer = torch.full([2 * n for n in tensor.shape], 99, device=tensor.device).to(tensor.dtype)
    view = buffer[tuple(slice(None, None, 2) for _ in tensor.shape)]
    view.copy_(tensor)
    return view


def assert_no_worse(out, plain, truth):
    """`out` is as near the float64 truth as `plain` torch in its dtype is, whatever the order of its sums.

    By the root mean square, which the order moves little; the worst element may be three times as far off. In
    float64 the truth itself is rounded, in fp32 a sum's order weighs most: they get a little more.
    """
    assert out.isfinite().all()
    eps = {torch.float64: 50, torch.float32: 1}.get(plain.dtype, 0.05) * torch.finfo(plain.dtype).eps
    error, plain_error = out.double() - truth, plain.double() - truth
    for factor, size in ((1.25, lambda t: t.square().mean().sqrt()), (3.0, lambda t: t.abs().max())):
        found, allowed = size(error), factor * size(plain_error) + eps * size(truth)
        assert found <= allowed, f"error {found:.3g}, plain torch {size(plain_error):.3g}, allowed {allowed:.3g}"


def moved(case, device):
    """The arguments of an op, copied to `device`."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in case.items()}
