"""Processes: torchrun starts them, torch.distributed connects them.

One process is world size 1 of the same path: a script has no branch for it. Numbers and texts
travel as JSON, which is exact for float64 and is never unpickled; tensors are summed where they
are.
"""
import atexit
import contextlib
import ctypes
import errno
import json
import os
import sys

import torch
from torch import distributed

from ..io.read import InputError
from . import cli


def rank():
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size():
    return distributed.get_world_size() if distributed.is_initialized() else 1


# -------------------------------------------------------------------------------------- set up

def setup(device, seed):
    """Joins the processes that torchrun started, chooses the device, seeds, makes sums repeatable.

    Process 0 alone prints.
    device: "auto", "cpu", "cuda" or "cuda:N"  ->  torch.device
    Raises OSError for a device that is not there.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" and not distributed.is_initialized():
        _init_process_group()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if world_size() > 1 and device.startswith("cuda"):
        if device != "cuda":
            raise InputError(
                f"--device {device}: torchrun gives each process its own GPU; say cuda"
            )
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).item()
    except Exception as error:             # AssertionError or RuntimeError, by torch's build
        reason = f"not usable here ({str(error).splitlines()[0]})"
        raise OSError(errno.ENODEV, reason, f"--device {device}") from None
    if device.type == "cpu":
        _keep_freed_memory()
    elif device.index is not None:
        torch.cuda.set_device(device)      # NCCL and new tensors go where the model is
    torch.manual_seed(seed)
    # Gradients of gathered columns are scatter-adds. Without this the order of their additions, and
    # so the last bit of a sum, depends on the threads.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # it guards against reading uninitialised memory, for a tenth of the time
    torch.utils.deterministic.fill_uninitialized_memory = False
    return device


def _init_process_group():
    """Connects torchrun's processes: NCCL sums tensors on GPUs, gloo everything else."""
    _check_environment()
    with _collective_errors():
        store, rank, world_size = next(distributed.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            # torchrun's store outlives a restart, and with it the addresses of dead processes. On
            # several machines the restart counts differ: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
            # gives every start its own store.
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            store = distributed.PrefixStore(f"start {restart}", store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    # after a traceback, destroying the group might wait for ever
    atexit.register(lambda: hasattr(sys, "last_value") or distributed.destroy_process_group())
    cli.report_store = distributed.PrefixStore("reports", store)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")


def _check_environment():
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    values = {name: os.environ.get(name, "") for name in names}
    *numbers, address, port = values.values()
    if not address or not all(map(str.isdigit, [*numbers, port])):
        raise InputError(f"several processes are started by torchrun, which sets all of {values}")


def _keep_freed_memory():
    """Freed memory stays with the process.

    A step frees and allocates the same gigabytes again, and fresh pages cost a fifth of its time.
    glibc's mallopt (3): no mmap for large blocks, nothing returned at the top of the heap. Another
    libc is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-4, 0)                     # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)             # M_TRIM_THRESHOLD


# --------------------------------------------------------------------------------- collectives

@contextlib.contextmanager
def _collective_errors():
    """A collective call ends with a ConnectionError where another process has ended."""
    try:
        yield
    except RuntimeError as error:
        reason = f"lost another process ({str(error).splitlines()[0][:120]})"
        raise ConnectionError(errno.ECONNRESET, reason, f"process {os.environ['RANK']}") from None


def all_gather_object(value):
    """The values of all processes, in order of rank, at every process.

    value: anything that JSON holds  ->  list of world_size() values
    """
    text = json.dumps(value).encode()
    sizes = torch.zeros(world_size(), dtype=torch.long)
    sizes[rank()] = len(text)
    all_reduce(sizes)
    texts = torch.zeros(world_size(), int(sizes.max()), dtype=torch.uint8)
    texts[rank(), : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    all_reduce(texts)
    return [json.loads(bytes(row[:size])) for row, size in zip(texts.numpy(), sizes)]


def all_gather_by_index(n, local_ids, local_values):
    """Every process's values (anything that JSON holds), in the order of the n indices they share.

    -> list of n
    """
    values = [None] * n
    for pairs in all_gather_object(list(zip(local_ids, local_values))):
        for i, value in pairs:
            values[i] = value
    return values


def all_reduce(tensor):
    """Sums a tensor over all processes, in place.

    What one process alone has filled, and the others left 0, arrives as it is.
    """
    if world_size() > 1:
        with _collective_errors():
            distributed.all_reduce(tensor)


def all_reduce_gradients(model):
    """Sums every gradient over all processes, in place.

    Losses are sums divided by counts of the whole step, so their gradients add up. A process
    without a row has zeros. One all_reduce per parameter, all under way at once, always in the same
    order: the bits of a sum do not depend on when a run was resumed, as they would with buckets,
    which are laid out anew after the first step. The cost: hundreds of calls for a large model, and
    no overlap with the backward.
    """
    if world_size() == 1:
        return
    with _collective_errors():
        pending = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                pending.append(distributed.all_reduce(parameter.grad, async_op=True))
        for work in pending:
            work.wait()


def broadcast(tensors):
    """Copies process 0's tensors to all processes, in place."""
    if world_size() > 1:
        with _collective_errors(), torch.no_grad():
            for tensor in tensors:
                distributed.broadcast(tensor, 0)


def on_rank_zero(work):
    """Process 0 does the work - it alone reads and writes the run folder - while the others wait.

    -> its result (anything that JSON holds), at every process; its InputError or OSError is raised
    at every process too, so that all of them end alike
    """
    outcome = None
    if rank() == 0:
        try:
            outcome = {"result": work()}
        except InputError as error:
            outcome = {"input_error": str(error)}
        except OSError as error:
            reason = error.strerror or str(error)
            outcome = {"os_error": [error.errno, reason, error.filename and str(error.filename)]}
    outcome = all_gather_object(outcome)[0]
    if "input_error" in outcome:
        raise InputError(outcome["input_error"])
    if "os_error" in outcome:
        raise OSError(*outcome["os_error"])
    return outcome["result"]
