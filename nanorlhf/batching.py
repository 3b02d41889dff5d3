"""The spine: a prompt and its K responses are one row.

    columns      p p p p p p  a a a  b b b b  c c  _ _          p prompt, a b c responses, _ padding
    branch       0 0 0 0 0 0  1 1 1  2 2 2 2  3 3 -1-1
    positions    0 1 2 3 4 5  6 7 8  6 7 8 9  6 7  0 0          each response continues where the prompt ended

First a plan, in integers that can be printed and tested: which groups make a step, which process has them, which share a micro-batch.
Then tensors: `pack_rows`. Then the device: `ahead`.

B groups, K responses a group, R response tokens, T columns, M target values.
"""
import sys
from collections import Counter
from dataclasses import dataclass, field, fields

import numpy as np
import torch

from .config import InputError
from .data import judge

SHUFFLE = 1                              # purpose of a random stream; generate.py has the others


@dataclass
class Row:
    """A group in integers. `index` is its place in the data, by which random draws are keyed."""
    prompt: list[int]
    responses: list[list[int]]           # EOS included where the response ended
    index: int = 0
    place: list[float] = field(default_factory=list)
    label: list[int | None] = field(default_factory=list)
    targets: list[list[float]] = field(default_factory=list)

    @property
    def columns(self):
        return len(self.prompt) + sum(map(len, self.responses))


@dataclass
class Batch:
    tokens: torch.Tensor                 # (B,T) int64
    positions: torch.Tensor              # (B,T) int64
    branch: torch.Tensor                 # (B,T) int64: 0 prompt, k = 1 .. K response k, -1 padding
    responses: torch.Tensor              # (B,K,R) int64, padded on the right
    mask: torch.Tensor                   # (B,K,R) bool: true on response tokens
    predictor: torch.Tensor              # (B,K,R) int64: the column that predicts this token
    last: torch.Tensor                   # (B,K) int64: the column of a response's last token
    valid: torch.Tensor                  # (B,K) bool
    place: torch.Tensor                  # (B,K) float32; 0 throughout a group without places
    label: torch.Tensor                  # (B,K) int64: 1, 0, or -1 where a response has none
    targets: torch.Tensor                # (B,K,M) float32
    target_mask: torch.Tensor            # (B,K,M) bool

    def to(self, device, **how):
        return Batch(*(getattr(self, f.name).to(device, **how) for f in fields(self)))

    def pin_memory(self):
        return Batch(*(getattr(self, f.name).pin_memory() for f in fields(self)))


# ------------------------------------------------------------------------------------------------- text to integers

def encode(group, tokenizer, index=0, labels="auto", target="label"):
    """A group of text -> Row. Prompt and responses are encoded apart; EOS follows a response that ended."""
    responses = [tokenizer.encode(r.text) + [tokenizer.eos_id] * r.ended for r in group.responses]
    row = Row(tokenizer.encode_prompt(group.prompt), responses, index)
    judged = judge(group.responses, labels)
    if judged:
        row.place, row.label, row.targets = judged.place, judged.label, judged.targets
        if target == "scores":
            row.targets = [r.scores or [] for r in group.responses]
    return row


def encode_all(groups, tokenizer, max_length, new=0, **how):
    """Encodes and fits groups into max_length positions, with room for `new` tokens.  -> (rows, what was dropped or cut, by reason)

    A dialogue's prompt loses its beginning, so that the longest response fits whole; a passage that is too long, or a
    response that alone fills the context, is dropped. The end of a response is never cut.
    """
    rows, reasons = [], Counter()
    for index, group in enumerate(groups):
        row = encode(group, tokenizer, index, **how)
        room = max_length - max(map(len, row.responses), default=new)
        if room < 1:
            reasons[f"response of {max_length} tokens (--max_length) or more"] += 1
        elif len(row.prompt) <= room:
            rows.append(row)
        elif not group.cut:
            reasons[f"prompt and response over {max_length} tokens (--max_length)"] += 1
        else:
            start = row.prompt[:1] if row.prompt[0] == tokenizer.bos_id and room > 1 else []
            row.prompt = start + row.prompt[len(row.prompt) - room + len(start):]
            rows.append(row)
            reasons["prompt cut from the left (kept)"] += 1
    return rows, reasons


# --------------------------------------------------------------------------------------------------------- the plan

def order(n, seed, epoch, purpose=SHUFFLE):
    """A permutation of 0 .. n-1 that depends on seed, epoch and purpose alone."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, epoch, 0, 0])).permutation(n)


def take(n, groups, step, seed):
    """The `groups` items of `step`, out of n: epoch after epoch, each in its own order; a step may span two epochs.  -> list of indices"""
    first, orders = step * groups, {}
    for at in range(first, first + groups):
        if at // n not in orders:
            orders[at // n] = order(n, seed, at // n)
    return [int(orders[at // n][at % n]) for at in range(first, first + groups)]


def micro_batches(columns, max_tokens, padded=False):
    """Splits rows into micro-batches of at most max_tokens columns; rows of like length go together.

    columns: length of each row;  padded: each counts as the longest of its batch, as where a cache gives all the same room
    ->  list of lists of indices into `columns`. A row longer than max_tokens is alone.
    """
    plan, width = [], 0
    for i in sorted(range(len(columns)), key=lambda i: (-columns[i], i)):
        cost = columns[plan[-1][0]] if plan and padded else columns[i]
        if plan and width + cost <= max_tokens:
            plan[-1].append(i)
            width += cost
        else:
            plan.append([i])
            width = columns[i]
    return plan


def deal(columns, processes):
    """Whole rows for each process, balanced by columns: the longest first, each to whoever has least. -> a sorted list of indices a process"""
    shares, loads = [[] for _ in range(processes)], [0] * processes
    for i in sorted(range(len(columns)), key=lambda i: (-columns[i], i)):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += columns[i]
    return [sorted(share) for share in shares]


def plans(columns, max_tokens, processes):
    """A step's micro-batches at each process.  -> for each a list of lists of indices into `columns`; a process may have none"""
    return [[[share[i] for i in part] for part in micro_batches([columns[i] for i in share], max_tokens)] for share in deal(columns, processes)]


# ------------------------------------------------------------------------------------------------ integers to tensors

def pack(groups, tokenizer, context=None, **how):
    """Groups of text -> Batch, in the order given. Raises InputError for a group that does not fit `context` positions."""
    rows, reasons = encode_all(groups, tokenizer, context or sys.maxsize, **how)
    if len(rows) < len(groups):
        raise InputError("; ".join(f"{n} of {len(groups)} groups: {reason}" for reason, n in reasons.items()))
    return pack_rows(rows)


def pack_rows(rows):
    """Rows -> Batch. Groups may have different K, prompts and responses any length; an absent response is not `valid`."""
    B, T = len(rows), max(row.columns for row in rows)
    K = max(1, max(len(row.responses) for row in rows))
    R = max([1] + [len(response) for row in rows for response in row.responses])
    M = max([1] + [len(targets) for row in rows for targets in row.targets])
    zeros = lambda *shape, dtype=np.int64: np.zeros(shape, dtype)
    tokens, positions, branch = zeros(B, T), zeros(B, T), np.full((B, T), -1)
    responses, mask, predictor = zeros(B, K, R), zeros(B, K, R, dtype=bool), zeros(B, K, R)
    last, valid = zeros(B, K), zeros(B, K, dtype=bool)
    place, label = zeros(B, K, dtype=np.float32), np.full((B, K), -1)
    targets, target_mask = zeros(B, K, M, dtype=np.float32), zeros(B, K, M, dtype=bool)
    for b, row in enumerate(rows):
        end = P = len(row.prompt)
        tokens[b, :P], positions[b, :P], branch[b, :P] = row.prompt, np.arange(P), 0
        for k, response in enumerate(row.responses):
            start, n = end, len(response)
            end = start + n
            tokens[b, start:end], positions[b, start:end], branch[b, start:end] = response, np.arange(P, P + n), k + 1
            responses[b, k, :n], mask[b, k, :n] = response, True
            predictor[b, k, :n] = [P - 1, *range(start, end - 1)]      # the last prompt token predicts the first token of each
            last[b, k], valid[b, k] = end - 1 if n else P - 1, True        # an empty response ends where the prompt does, not in its neighbour
        for k, value in enumerate(row.place):
            place[b, k] = value
        for k, value in enumerate(row.label):
            label[b, k] = value if value is not None else -1
        for k, values in enumerate(row.targets):
            targets[b, k, :len(values)], target_mask[b, k, :len(values)] = values, True
    arrays = (tokens, positions, branch, responses, mask, predictor, last, valid, place, label, targets, target_mask)
    return Batch(*map(torch.from_numpy, arrays))


def ahead(rows, plan, device):
    """Batch after batch of a plan, on the device. On CUDA the next one is copied, from pinned memory, while this one is computed."""
    packed = (pack_rows([rows[i] for i in part]) for part in plan)
    if device.type != "cuda":
        yield from (batch.to(device) for batch in packed)
        return
    stream, waiting = torch.cuda.Stream(device), None
    for batch in packed:
        with torch.cuda.stream(stream):
            batch = batch.pin_memory().to(device, non_blocking=True)
            copied = stream.record_event()
        if waiting:
            yield _arrived(*waiting, device)
        waiting = batch, copied
    if waiting:
        yield _arrived(*waiting, device)


def _arrived(batch, copied, device):
    """The computing stream waits for the copy, and the allocator learns that this stream uses the tensors too."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for f in fields(batch):
        getattr(batch, f.name).record_stream(current)
    return batch


def context_limit(max_length, context):
    """--max_length, 0 being the model's context; more than the context is refused."""
    if max_length > context:
        raise InputError(f"--max_length {max_length}: the model's context is {context}")
    return max_length or context
