"""Processes. One process is world size 1 of the same path: a script never asks how many there are, it only adds up.

torchrun sets RANK, LOCAL_RANK and WORLD_SIZE.
"""
import ctypes
import errno
import os
import signal

import torch


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


def autocast(model, dtype):
    """The forward's number format: bfloat16 for the matrix products, while weights, softmax, losses and optimizer stay float32."""
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=dtype == "bfloat16")
