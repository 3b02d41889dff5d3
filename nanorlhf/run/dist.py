"""Processes: torchrun starts them, torch.distributed connects them. One process is world size 1 of the same path: a script never asks how
many there are, it tells everyone what it has and adds up what everyone told.

Numbers and texts travel as JSON, which is exact for float64 and is never unpickled; tensors are added up where they are.
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


# ------------------------------------------------------------------------------------------------------------- set up

def setup(device, seed):
    """Joins the processes that torchrun started, chooses the device ("auto", "cpu", "cuda" or "cuda:N"), seeds, asks for repeatable sums.

    Process 0 alone prints.  -> torch.device.  Raises OSError for a device that is not there.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" and not distributed.is_initialized():
        _init_process_group()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if world_size() > 1 and device.startswith("cuda"):
        if device != "cuda":
            raise InputError(f"--device {device}: torchrun gives each process its own GPU; say cuda")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).item()
    except Exception as error:                   # torch raises AssertionError or RuntimeError, by its build
        raise OSError(errno.ENODEV, f"not usable here ({str(error).splitlines()[0]})", f"--device {device}") from None
    if device.type == "cpu":
        _keep_freed_memory()
    elif device.index is not None:
        torch.cuda.set_device(device)            # NCCL and new tensors go where the model is
    torch.manual_seed(seed)
    # Gradients of gathered columns are scatter-adds; without this their order, so the last bit, depends on the threads.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False       # it guards against reading garbage, for a tenth of the time
    return device


def _init_process_group():
    """Tensors on GPUs are added up by NCCL, everything else by gloo."""
    told = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    if not all(told.values()) or not all(value.isdigit() for name, value in told.items() if name != "MASTER_ADDR"):
        raise InputError(f"several processes are started by torchrun, which sets all of {told}")
    with _collective_errors():
        store, number, size = next(distributed.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == told["WORLD_SIZE"]:
            # torchrun's store outlives a restart, and with it the addresses of processes that are dead. On several machines
            # the counts differ: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives every start a store of its own.
            store = distributed.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store, rank=number, world_size=size)
    atexit.register(lambda: hasattr(sys, "last_value") or distributed.destroy_process_group())       # after a traceback it might wait for ever
    said = distributed.PrefixStore("said", store)

    def first_to_say(message, echo):
        """Is this the first process with this message? An echo (of another one's end) is worth saying only where nobody has said why."""
        try:
            return said.add("anything", 1) == 1 if echo else said.add("anything", 1) and said.add(message, 1) == 1
        except RuntimeError:                     # the store has gone with the process that held it
            return True
    cli.should_report = first_to_say
    if number > 0:
        sys.stdout = open(os.devnull, "w")


def _keep_freed_memory():
    """Freed memory stays with the process: a step frees and asks for the same gigabytes again, and fresh pages cost a fifth of its time.

    glibc's mallopt (3): no mmap for large blocks, nothing given back at the top. Another libc goes on as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# ----------------------------------------------------------------------------------------------------------- together

@contextlib.contextmanager
def _collective_errors():
    """A collective call ends with an error where another process has ended."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(errno.ECONNRESET, f"lost another process ({str(error).splitlines()[0][:120]})", f"process {os.environ['RANK']}") from None


def all_gather_object(value):
    """What each process has to say, in order of rank, told to all.  value: anything that JSON holds  ->  list of world() values"""
    text = json.dumps(value).encode()
    if world_size() == 1:
        return [json.loads(text)]
    sizes = torch.zeros(world_size(), dtype=torch.long)
    sizes[rank()] = len(text)
    all_reduce(sizes)
    texts = [torch.zeros(int(sizes.max()), dtype=torch.uint8) for _ in sizes]
    mine = torch.zeros_like(texts[0])
    mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    with _collective_errors():
        distributed.all_gather(texts, mine)
    return [json.loads(bytes(text[:size].numpy())) for text, size in zip(texts, sizes.tolist())]


def all_gather_by_index(n, local_ids, local_values):
    """Every process's values (anything that JSON holds), in the order of the n indices that they share.  -> list of n"""
    values = [None] * n
    for pairs in all_gather_object(list(zip(local_ids, local_values))):
        for i, value in pairs:
            values[i] = value
    return values


def all_reduce(tensor):
    """Sums a tensor over all processes, in place. What one process alone has filled, and the others left 0, arrives as it is."""
    if world_size() > 1:
        with _collective_errors():
            distributed.all_reduce(tensor)


def all_reduce_gradients(model):
    """Sums every gradient over all processes, in place: losses are sums over counts of the whole step, so their gradients add up.

    A process without a row has zeros. One call a parameter, all under way at once, always in the same order: the bits of a sum
    do not depend on when a run was resumed, as they would with buckets that are laid out anew after the first step.
    """
    if world_size() == 1:
        return
    with _collective_errors():
        waiting = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                waiting.append(distributed.all_reduce(parameter.grad, async_op=True))
        for work in waiting:
            work.wait()


def broadcast(tensors):
    """Process 0's tensors become everyone's, in place."""
    if world_size() > 1:
        with _collective_errors(), torch.no_grad():
            for tensor in tensors:
                distributed.broadcast(tensor, 0)


def on_rank_zero(work):
    """Process 0 does the work - it alone reads and writes the run folder - while the others wait.

    -> what it returned (JSON), at every process; its InputError or OSError too, so that all of them end alike
    """
    told = error = None
    if rank() == 0:
        try:
            told = {"answer": work()}
        except InputError as problem:
            told, error = {"mistake": str(problem)}, problem
        except OSError as problem:
            told, error = {"system": [problem.errno, problem.strerror or str(problem), problem.filename and str(problem.filename)]}, problem
    told = all_gather_object(told)[0]
    if "answer" not in told:
        raise error or (InputError(told["mistake"]) if "mistake" in told else OSError(*told["system"]))
    return told["answer"]


# --------------------------------------------------------------------------------------------------------------- stop
