"""What stands behind a mask in tests, on purpose, and the check that nobody looks there."""
import torch

NAN = float("nan")
GARBAGE = [NAN, float("inf"), -float("inf"), 1e30]


def gradient(f, x):
    x = x.clone().requires_grad_()
    value = f(x)
    value.backward()
    return value.detach(), x.grad


def assert_ignored(f, x, mask):
    """Neither value nor gradient of f depend on what stands behind the mask, where the gradient is exactly 0."""
    value, grad = gradient(f, x.masked_fill(~mask, 0.0))
    assert value.isfinite() and grad.isfinite().all() and grad[mask].abs().sum() > 0
    for garbage in GARBAGE:
        other_value, other_grad = gradient(f, x.masked_fill(~mask, garbage))
        assert torch.equal(other_value, value), garbage
        assert torch.equal(other_grad, grad) and (other_grad[~mask] == 0).all(), garbage


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
