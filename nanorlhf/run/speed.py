"""What makes a step fast, and how fast it is beside what the machine could do.

The limit is the machine's matrix product. One column is one token's way through the model.
Operations are counted as the mathematics needs them: a multiplication and an addition are two; what
is computed twice, or not used, does not count.
"""
import functools
import re
import resource
import sys
import time
from pathlib import Path

import torch

from ..attention import FLEX_BLOCK
from . import dist

QKV_NAMES = ("c_attn", "q_proj", "k_proj", "v_proj")


@functools.cache
def measured_flops(device, dtype, repeats=3):
    """Operations per second of a large matrix product in this number format: the best of a few."""
    n = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)     # leaves all other random numbers alone
    factors = torch.randn(2, n, n, device=device, generator=generator)
    a, b = factors.to(getattr(torch, dtype))
    best = float("inf")
    for _ in range(repeats + 1):                 # the first call sets the library up
        began = synchronised_time(device)
        a @ b
        best = min(best, synchronised_time(device) - began)
    return 2 * n**3 / best


def synchronised_time(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def forward_flops(trunk, rows, head):
    """Operations of one forward over rows (batching.Row).

    head: logits of every response token (a policy); else only each response's last column is read
    (a reward model). The other columns are not needed after the last attention.
    """
    per_token = 0              # weights of the matrices that every column goes through
    after_attention = 0        # of the last block's, only the columns that are read
    last_block = f"{len(trunk.blocks) - 1}."
    for name, weight in trunk.blocks.named_parameters():
        if weight.ndim < 2:
            continue
        if name.endswith(("attn.c_proj.weight", "attn.o_proj.weight")):
            heads_width = weight.numel() // trunk.width    # of all heads together
        if name.startswith(last_block) and not any(qkv in name for qkv in QKV_NAMES):
            after_attention += weight.numel()
        else:
            per_token += weight.numel()

    num_tokens = 0
    tokens_read = 0
    attended_pairs = 0         # pairs of columns, query and key
    for row in rows:
        lengths = [len(response) for response in row.responses]
        num_tokens += row.num_tokens
        tokens_read += sum(lengths) if head else len(lengths)
        attended_pairs += _triangle(len(row.prompt))
        for length in lengths:
            attended_pairs += _triangle(length) + length * len(row.prompt)

    matrices = 2 * (num_tokens * per_token + tokens_read * after_attention)
    attention = 4 * len(trunk.blocks) * heads_width * attended_pairs
    logits = 2 * tokens_read * trunk.config.vocab_size * trunk.width if head else 0
    return matrices + attention + logits


def _triangle(n):
    """Pairs of n columns, where each attends to itself and to those before it."""
    return n * (n + 1) // 2


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
    unit = 1 if sys.platform == "darwin" else 2**10        # bytes of what getrusage counts
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Meter:
    """What a training step's log says of its speed, over all processes.

    mfu is the share of the *measured* matrix product's rate, not of a data sheet's.
    """

    def __init__(self, trunk, device, dtype):
        self.trunk = trunk
        self.limit = measured_flops(device, dtype) * dist.world_size()

    def __str__(self):
        attention = "a dense mask a row, no padding"
        if self.trunk.flex:
            attention = f"FlexAttention, padded to {FLEX_BLOCK} columns per micro-batch"
        return (
            f"{self.limit / 1e9:.0f} GFLOP/s in a matrix product, the limit that mfu refers to; "
            f"attention by {attention}"
        )

    def __call__(self, rows, plan, flops, seconds):
        """rows of the step, plan[process][micro_batch] of them, operations counted, seconds

        ->  numbers by name
        """
        num_tokens = 0
        computed = 0
        for micro_batch in sum(plan, []):
            columns = sum(rows[i].num_tokens for i in micro_batch)
            num_tokens += columns
            computed += columns
            if self.trunk.flex:
                computed += -columns % FLEX_BLOCK
        return {
            "tokens": num_tokens,
            "tokens_per_second": num_tokens / seconds,
            "padding": 1 - num_tokens / computed,
            "mfu": flops / seconds / self.limit,
            "seconds": seconds
        }
