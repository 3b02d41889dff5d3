"""What makes a step fast, and how fast it is beside what the machine could do: its matrix product is the limit of all this work.

One column is one token's way through the model. Operations are counted as the mathematics needs them: a multiplication and an
addition are two; what is computed twice, or for nobody, does not count.
"""
import functools
import re
import resource
import sys
import time
from pathlib import Path

import torch

BLOCK = 128                # FlexAttention computes columns by the block
BEFORE = ("c_attn", "q_proj", "k_proj", "v_proj")      # of the last block, what every column needs














# ------------------------------------------------------------------------------------------------------- how fast it is

@functools.cache
def measured_flops(device, dtype, repeats=3):
    """Operations a second of a large matrix product in this number format: the best of a few."""
    n = 8192 if device.type == "cuda" else 1024
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[dtype]
    own = torch.Generator(device).manual_seed(0)                                       # nobody else's random numbers change
    a, b = (torch.randn(n, n, device=device, generator=own).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):                 # the first call sets the library up
        began = _now(device)
        a @ b
        best = min(best, _now(device) - began)
    return 2 * n**3 / best


def _now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def forward_flops(trunk, rows, head):
    """Operations of one forward over rows (batching.Row).

    head: logits of every response token (a policy); else only each response's last column is read (a reward model). After the last
    attention nobody needs the other columns.
    """
    matrices = [(name, weight.numel()) for name, weight in trunk.blocks.named_parameters() if weight.ndim == 2]
    last = f"{len(trunk.blocks) - 1}."
    late = sum(size for name, size in matrices if name.startswith(last) and not any(word in name for word in BEFORE))
    every = sum(size for _, size in matrices) - late
    columns = sum(row.num_tokens for row in rows)
    read = sum(sum(map(len, row.responses)) if head else len(row.responses) for row in rows)
    seen = sum(len(row.prompt) * (len(row.prompt) + 1) // 2 + sum(len(r) * (len(r) + 1) // 2 + len(r) * len(row.prompt) for r in row.responses)
               for row in rows)                                                        # pairs of columns that attend
    heads = next(size for name, size in matrices if name.endswith(("attn.c_proj.weight", "attn.o_proj.weight"))) // trunk.width     # of all heads, their width
    table = trunk.config.vocab_size * trunk.width                                      # the head
    return 2 * (columns * every + read * late) + 4 * len(trunk.blocks) * heads * seen + 2 * read * table * head


def describe_model(trunk, model):
    """Words for a run's header."""
    return f"{trunk.family}, {sum(p.numel() for p in model.parameters()):,} parameters"


def peak_memory(device):
    """Greatest memory so far in GB: of the process, or of the tensors on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")           # Linux; getrusage there may tell the parent's peak
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


class Meter:
    """What a training step's log says of its speed, over all processes."""

    def __init__(self, trunk, device, dtype, processes=1):
        self.trunk, self.limit = trunk, measured_flops(device, dtype) * processes

    def __str__(self):
        kind = f"FlexAttention, padded to {BLOCK} columns a micro-batch" if self.trunk.flex else "a dense mask a row, no padding"
        return f"{self.limit / 1e9:.0f} GFLOP/s in a matrix product, the limit that mfu refers to; attention by {kind}"

    def __call__(self, rows, plans, operations, seconds):
        """rows of the step, each process's plan of micro-batches, operations counted, seconds  ->  numbers by name"""
        sizes = [sum(rows[i].num_tokens for i in part) for plan in plans for part in plan]
        computed = sum(size + (-size % BLOCK if self.trunk.flex else 0) for size in sizes)
        return {"tokens": sum(sizes), "tokens_per_second": sum(sizes) / seconds, "padding": 1 - sum(sizes) / computed,
                "mfu": operations / seconds / self.limit, "seconds": seconds}
