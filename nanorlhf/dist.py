"""Processes. One process is world size 1 of the same path: a script never asks how many there are, it only adds up.

torchrun sets RANK, LOCAL_RANK and WORLD_SIZE.
"""
import ctypes
import errno
import os
import signal

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

LARGE = 2**18              # weights from which on a product is worth a detour


def setup(device, seed):
    """Chooses the device ("auto", "cpu", "cuda" or "cuda:N"), seeds, asks for repeatable sums.  -> torch.device

    Raises OSError for a device that is not there, and for more than one process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OSError(errno.ENOTSUP, "this version trains in one process: start it with python, or with torchrun --nproc_per_node=1", "WORLD_SIZE")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).item()
    except Exception as error:                   # torch raises AssertionError or RuntimeError, by its build
        raise OSError(errno.ENODEV, f"not usable here ({str(error).splitlines()[0]})", f"--device {device}") from None
    if device.type == "cpu":
        _keep_memory()
    torch.manual_seed(seed)
    # Gradients of gathered columns are scatter-adds; without this their order, so the last bit, depends on the threads.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False       # it guards against reading garbage, for a tenth of the time
    return device


def _keep_memory():
    """Freed memory stays with the process: a step frees and asks for the same gigabytes again, and fresh pages cost a fifth of its time.

    glibc's mallopt (3): no mmap for large blocks, nothing given back at the top. Another libc goes on as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


GO_ON = "stopped; the same command goes on from the last save"


class Stop:
    """Ctrl-C and SIGTERM let the step finish; the loop then saves and leaves. A second Ctrl-C leaves at once."""

    def __init__(self):
        self.asked = False
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._ask)

    def _ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt(GO_ON)
        self.asked = True


def onednn(x, weight, bias=None):
    """x (n,in), weight (out,in) or a transposed view of that shape  ->  x W^T + b"""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
    """x W + b with W (in,out), as GPT-2 stores it, or (out,in), as nn.Linear does, by oneDNN, gradients too.  x (n,in)  ->  (n,out)

    For float32 torch calls MKL, which is a tenth slower where n is hundreds, and half as fast where n is a decoding step's few.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, out_first):
        ctx.save_for_backward(x, weight)
        ctx.out_first = out_first
        return onednn(x, weight if out_first else weight.t(), bias)

    @staticmethod
    def backward(ctx, gradient):
        (x, weight), (of_x, of_weight, of_bias, _) = ctx.saved_tensors, ctx.needs_input_grad
        both = (gradient.t(), x.t()) if ctx.out_first else (x.t(), gradient.t())          # of the weight's own layout, so that nothing is copied
        return (onednn(gradient, weight.t() if ctx.out_first else weight) if of_x else None, onednn(*both) if of_weight else None,
                gradient.sum(0) if of_bias else None, None)


class OneDNN(TorchFunctionMode):
    """While this is on, large float32 products of a model's layers go through `Product`."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function is F.linear and self.fits(*arguments[:2]):
            return Product.apply(*arguments[:2], arguments[2] if len(arguments) > 2 else None, True)
        if function is torch.addmm and self.fits(*arguments[1:]):
            bias, x, weight = arguments
            return Product.apply(x, weight, bias, False)
        return function(*arguments, **(named or {}))

    @staticmethod
    def fits(x, weight):
        return x.ndim == 2 and x.dtype == weight.dtype == torch.float32 and weight.numel() >= LARGE


def arithmetic(model, dtype):
    """How a model's forward computes. bfloat16: for the matrix products, while weights, softmax, losses and optimizer stay float32.

    float32 on a CPU: large products by oneDNN; where the whole model is small, Python's share of watching for them would cost more.
    """
    weights = list(model.parameters())
    device, size = weights[0].device.type, sum(weight.numel() for weight in weights)
    if dtype == "float32" and device == "cpu" and size >= 16 * LARGE and torch.backends.mkldnn.is_available():
        return OneDNN()
    return torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
