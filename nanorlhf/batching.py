"""The spine: a prompt and its K responses are one row.

    columns      p p p p p p  a a a  b b b b  c c  _ _          p prompt, a b c responses, _ padding
    branch       0 0 0 0 0 0  1 1 1  2 2 2 2  3 3 -1-1
    positions    0 1 2 3 4 5  6 7 8  6 7 8 9  6 7  0 0          a response follows the prompt

First a plan, in integers that can be printed and tested: which rows make a step, which process has
them, which share a micro-batch. Then tensors: `pack_rows`. Then the device: `prefetch`.

B rows (groups), K responses per group, R response tokens, T columns, M target values.
"""
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from .io.data import Group, derive_labels


class Stream(IntEnum):
    """What random numbers are for: streams that never meet."""
    SHUFFLE = 1                          # order of the data
    ROLLOUT = 2                          # responses that PPO learns from
    EVALUATION = 3                       # responses to held-out prompts
    SAMPLE = 4                           # responses of nanorlhf.sample
    MINIBATCH = 5                        # order of PPO's minibatches


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
    def num_tokens(self) -> int:
        """Columns that the row fills: prompt and responses."""
        return len(self.prompt) + self.num_response_tokens

    @property
    def num_response_tokens(self) -> int:
        return sum(map(len, self.responses))


@dataclass
class Batch:
    tokens: Tensor                       # (B,T) int64
    positions: Tensor                    # (B,T) int64
    branch: Tensor                       # (B,T) int64: 0 prompt, k = 1 .. K response k, -1 padding
    lengths: list[int] | None            # columns of each row, padding on the right; on the host
    responses: Tensor                    # (B,K,R) int64, padded on the right
    response_mask: Tensor                # (B,K,R) bool: true on response tokens
    logit_index: Tensor                  # (B,K,R) int64: the column whose logits predict this token
    last_index: Tensor                   # (B,K) int64: the column of a response's last token
    valid: Tensor                        # (B,K) bool: is there such a response?
    place: Tensor                        # (B,K) float32; 0 throughout a group without places
    label: Tensor                        # (B,K) int64: 1, 0, or -1 where a response has none
    targets: Tensor                      # (B,K,M) float32
    target_mask: Tensor                  # (B,K,M) bool

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "lengths"}

    def map(self, function) -> "Batch":
        """Applies `function` to every tensor."""
        return replace(self, **{name: function(x) for name, x in self.tensors().items()})

    def to(self, device, **options) -> "Batch":
        return self.map(lambda tensor: tensor.to(device, **options))


# ------------------------------------------------------------------------------ text to integers

def encode(group: Group, tokenizer, index=0, labels="auto", target="label") -> Row:
    """A group of text -> Row.

    Prompt and responses are encoded apart; EOS follows a response that ended.
    labels, target: which judgements of the group become places, labels and targets.
    """
    responses = [tokenizer.encode(r.text) + [tokenizer.eos_id] * r.ended for r in group.responses]
    row = Row(tokenizer.encode_prompt(group.prompt), responses, index)
    derived = derive_labels(group.responses, labels)
    if derived:
        row.place, row.label, row.targets = derived
        if target == "scores":
            row.targets = [r.scores or [] for r in group.responses]
    return row


def encode_all(
    groups: list[Group], tokenizer, max_length: int, max_new_tokens: int = 0, **label_options
) -> tuple[list[Row], Counter]:
    """Encodes and fits groups into max_length positions, with room for max_new_tokens.

    -> (rows, how many were dropped or cut, by reason)
    A dialogue's prompt loses its beginning, so that the longest response fits whole; a passage that
    is too long, or a response that alone fills the context, is dropped. The end of a response is
    never cut.
    """
    rows = []
    drop_reasons = Counter()
    for index, group in enumerate(groups):
        row = encode(group, tokenizer, index, **label_options)
        budget = max_length - max(map(len, row.responses), default=max_new_tokens)
        if budget < 1:
            drop_reasons[f"response of {max_length} tokens (--max_length) or more"] += 1
        elif len(row.prompt) <= budget:
            rows.append(row)
        elif not group.truncatable:
            drop_reasons[f"prompt and response over {max_length} tokens (--max_length)"] += 1
        else:
            bos = row.prompt[:1] if row.prompt[0] == tokenizer.bos_id and budget > 1 else []
            row.prompt = bos + row.prompt[len(row.prompt) - budget + len(bos):]
            rows.append(row)
            drop_reasons["prompt cut from the left (kept)"] += 1
    return rows, drop_reasons


# -------------------------------------------------------------------------------------- the plan

def permutation(n: int, seed: int, epoch: int, stream: Stream = Stream.SHUFFLE) -> np.ndarray:
    """A permutation of 0 .. n-1 that depends on seed, epoch and stream alone."""
    philox = np.random.Philox(key=[seed, stream], counter=[0, epoch, 0, 0])
    return np.random.Generator(philox).permutation(n)


def batch_indices(n: int, groups: int, step: int, seed: int) -> list[int]:
    """The `groups` items of `step`, out of n: epoch after epoch, each in its own order.

    A step may span two epochs. With n = 3, groups = 2 and the orders [2,0,1] and [1,2,0]:
    step 0 is [2,0], step 1 is [1,1], step 2 is [2,0].
    """
    indices = []
    orders = {}                                  # epoch -> its permutation
    for position in range(step * groups, (step + 1) * groups):
        epoch, offset = divmod(position, n)
        if epoch not in orders:
            orders[epoch] = permutation(n, seed, epoch)
        indices.append(int(orders[epoch][offset]))
    return indices


def longest_first(num_tokens: list[int]) -> list[int]:
    return sorted(range(len(num_tokens)), key=lambda i: (-num_tokens[i], i))


def micro_batches(num_tokens: list[int], max_tokens: int, padded: bool = False) -> list[list[int]]:
    """Splits rows into micro-batches of at most max_tokens columns, like lengths together.

    num_tokens: of each row;  padded: each counts as the longest of its micro-batch, as where a
    cache gives all the same room  ->  lists of indices into `num_tokens`.
    A row longer than max_tokens is alone.
    """
    batches = []
    total = 0
    for i in longest_first(num_tokens):
        cost = num_tokens[batches[-1][0]] if batches and padded else num_tokens[i]
        if batches and total + cost <= max_tokens:
            batches[-1].append(i)
            total += cost
        else:
            batches.append([i])
            total = num_tokens[i]
    return batches


def partition(num_tokens: list[int], processes: int) -> list[list[int]]:
    """Whole rows for each process: the longest first, each to the process that has fewest columns.

    -> a sorted list of indices per process
    """
    shares = [[] for _ in range(processes)]
    loads = [0] * processes
    for i in longest_first(num_tokens):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += num_tokens[i]
    return [sorted(share) for share in shares]


def plan_micro_batches(
    rows: list[Row], max_tokens: int, processes: int
) -> list[list[list[int]]]:
    """A step's micro-batches, per process.

    -> plan[process][micro_batch] = indices into `rows`; a process may have none
    """
    num_tokens = [row.num_tokens for row in rows]
    plan = []
    for share in partition(num_tokens, processes):
        batches = micro_batches([num_tokens[i] for i in share], max_tokens)
        plan.append([[share[j] for j in batch] for batch in batches])
    return plan


# ---------------------------------------------------------------------------- integers to tensors

def pack_rows(rows: list[Row]) -> Batch:
    """Rows -> Batch.

    Groups may have different K, prompts and responses any length; an absent response is not
    `valid`.
    """
    B = len(rows)
    T = max(row.num_tokens for row in rows)
    K = max(1, max(len(row.responses) for row in rows))
    R = max([1] + [len(response) for row in rows for response in row.responses])
    M = max([1] + [len(targets) for row in rows for targets in row.targets])
    batch = Batch(                       # of numpy arrays first: their slices are quick to fill
        tokens=np.zeros((B, T), int),
        positions=np.zeros((B, T), int),
        branch=np.full((B, T), -1),
        lengths=[row.num_tokens for row in rows],
        responses=np.zeros((B, K, R), int),
        response_mask=np.zeros((B, K, R), bool),
        logit_index=np.zeros((B, K, R), int),
        last_index=np.zeros((B, K), int),
        valid=np.zeros((B, K), bool),
        place=np.zeros((B, K), "float32"),
        label=np.full((B, K), -1),
        targets=np.zeros((B, K, M), "float32"),
        target_mask=np.zeros((B, K, M), bool),
    )
    for b, row in enumerate(rows):
        P = end = len(row.prompt)
        batch.tokens[b, :P] = row.prompt
        batch.positions[b, :P] = np.arange(P)
        batch.branch[b, :P] = 0
        for k, response in enumerate(row.responses):
            n = len(response)
            start, end = end, end + n
            batch.tokens[b, start:end] = response
            batch.positions[b, start:end] = np.arange(P, P + n)
            batch.branch[b, start:end] = k + 1
            batch.responses[b, k, :n] = response
            batch.response_mask[b, k, :n] = True
            # the last prompt token predicts the first token of each response
            batch.logit_index[b, k, :n] = [P - 1, *range(start, end - 1)]
            # an empty response ends where the prompt does, not in its neighbour
            batch.last_index[b, k] = end - 1 if n else P - 1
            batch.valid[b, k] = True
        batch.place[b, :len(row.place)] = row.place
        batch.label[b, :len(row.label)] = [-1 if y is None else y for y in row.label]
        for k, values in enumerate(row.targets):
            batch.targets[b, k, :len(values)] = values
            batch.target_mask[b, k, :len(values)] = True
    return batch.map(torch.from_numpy)


def prefetch(
    rows: list[Row], plan: list[list[int]], device: torch.device
) -> Iterator[Batch]:
    """Micro-batch after micro-batch of a plan, on the device.

    On CUDA the next one is copied, from pinned memory, while this one is computed.
    """
    packed = (pack_rows([rows[i] for i in indices]) for indices in plan)
    if device.type != "cuda":
        yield from (batch.to(device) for batch in packed)
        return
    stream = torch.cuda.Stream(device)
    waiting = None
    for batch in packed:
        with torch.cuda.stream(stream):
            batch = batch.map(Tensor.pin_memory).to(device, non_blocking=True)
            copied = stream.record_event()
        if waiting:
            yield _wait_for_copy(*waiting, device)
        waiting = (batch, copied)
    if waiting:
        yield _wait_for_copy(*waiting, device)


def _wait_for_copy(batch, copied, device):
    """The computing stream waits for the copy.

    record_stream: the allocator learns that this stream uses the tensors too.
    """
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for tensor in batch.tensors().values():
        tensor.record_stream(current)
    return batch
