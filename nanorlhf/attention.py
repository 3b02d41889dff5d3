"""Attention over rows: which column sees which, the KV cache, and how rows lie in memory.

GPT-2 and LLaMA import this file alone.

    columns      p p p p p p  a a a  b b b b  c c  _ _          p prompt, a b c responses, _ padding
    branch       0 0 0 0 0 0  1 1 1  2 2 2 2  3 3 -1-1
    rule         column i sees column j <= i  if branch[j] is 0 or branch[j] is branch[i]

B rows, T columns per row, n of all B*T columns no padding, S columns in the KV cache so far,
H query heads, G key-value heads, d head width, D hidden width.
"""
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

FLEX_BLOCK = 128                 # FlexAttention computes columns by the block


def prefix_mask(
    query_branch: Tensor, key_branch: Tensor, offset: int | Tensor = 0
) -> Tensor:
    """Which column sees which: i sees j <= i if j is the prompt's or of i's own branch.

    query_branch (B,T), key_branch (B,S)  ->  (B,1,T,S) bool
    offset: the queries are the columns offset .. offset + T - 1 of the S.
    What padding sees does not matter, because nothing sees padding. It sees itself, since an empty
    softmax is NaN.
    """
    column = torch.arange(key_branch.shape[1], device=key_branch.device)
    causal = column <= column[: query_branch.shape[1], None] + offset
    same_branch = (key_branch[:, None] == 0) | (key_branch[:, None] == query_branch[:, :, None])
    return (causal & same_branch)[:, None]


class KVCache:
    """Keys and values of the columns so far, with their branches: room for `max_columns` per row.

    static: what a CUDA graph needs, which repeats its kernels on the same memory. The length is
    counted on the device, and the whole room is read: a column not yet written has branch -1,
    which nothing sees.
    """

    def __init__(self, n_layer: int, rows: int, max_columns: int, device, static: bool = False):
        self.branch = torch.full((rows, max_columns), -1, device=device)
        self.length = torch.zeros((), dtype=torch.long, device=device)
        self.used = 0                            # the same number as `length`, on the host
        self.keys = None                         # (n_layer,B,G,max_columns,d), allocated with the
        self.values = None                       # first value, in its number format
        self.n_layer = n_layer
        self.static = static

    def append(self, branch: Tensor) -> tuple[Tensor, Tensor]:
        """Takes in T more columns per row.

        branch (B,T)  ->  their slots: row and column, (B*T,) each
        """
        rows, T = branch.shape
        row = torch.arange(rows, device=branch.device).repeat_interleave(T)
        column = (self.length + torch.arange(T, device=branch.device)).repeat(rows)
        self.branch[row, column] = branch.flatten()
        self.used += T
        self.length += T
        return row, column

    def visible_branch(self) -> Tensor:
        """-> branch (B,S) of the columns that `read` gives"""
        return self.branch if self.static else self.branch[:, : self.used]

    def write(self, layer: int, slots: tuple | None, key: Tensor, value: Tensor):
        """key, value (n,G,d) of one layer, to the slots of `append`; None: the last columns."""
        rows, max_columns = self.branch.shape
        n, G, d = key.shape
        if self.keys is None:
            self.keys, self.values = value.new_zeros(2, self.n_layer, rows, G, max_columns, d)
        key = key.to(value.dtype)                # rotated keys are float32 under autocast
        for cache, new in ((self.keys, key), (self.values, value)):
            if slots is None:
                latest = slice(self.used - n // rows, self.used)
                cache[layer, :, :, latest] = new.view(rows, -1, G, d).transpose(1, 2)
            else:
                row, column = slots
                cache[layer][row, :, column] = new

    def read(self, layer: int) -> list[Tensor]:
        """-> keys, values (B,G,S,d)"""
        caches = (self.keys, self.values)
        return [x[layer] if self.static else x[layer, :, :, : self.used] for x in caches]

    def select(self, rows: Tensor):
        """Forgets every row that is not in `rows` (B,) bool: finished ones need no more steps."""
        self.keys = self.keys[:, rows]
        self.values = self.values[:, rows]
        self.branch = self.branch[rows]


class Layout:
    """How the columns of one forward lie in memory, and what each of them sees.

    Made once per forward, where the kernel is chosen too; every layer uses it. Without a cache, and
    for the prompts that fill one (prefill), rows lie end to end without their padding. A decoding
    step adds the same few columns to each row of the cache, none of them padding.

    cache: the T columns stand behind those it holds, and are added to it.
    lengths: columns of each row that are no padding, where the host knows them and padding is on
    the right; None: the device is asked.  flex: FlexAttention over all rows, not a mask per row.
    """

    def __init__(
        self, branch: Tensor, cache: KVCache | None, lengths: list[int] | None, flex: bool
    ):
        self.shape = branch.shape
        self.cache = cache
        self.index = None                        # (n,) of the columns kept among B*T; None: all are
        self.slots = None                        # where the cache keeps them
        if cache is None:
            self._unpad(branch, lengths, flex)
        elif cache.used == 0:                    # prefill
            row, column = cache.append(branch)
            self._unpad(branch, lengths, flex=False)
            self.slots = (row[self.index], column[self.index])
        else:                                    # decode
            slots = cache.append(branch)
            self.slots = slots if cache.static else None       # a slice is quicker than indices
            start = cache.length - branch.shape[1]
            self.mask = prefix_mask(branch, cache.visible_branch(), start)
            self.kernel = self._cached

    def _unpad(self, branch, lengths, flex):
        """Finds the columns that are no padding, and makes the masks."""
        B, T = branch.shape
        if lengths is None:
            is_token = branch >= 0
            self.index = is_token.flatten().nonzero().squeeze(1)
            lengths = is_token.sum(1).tolist()
        else:
            starts = range(0, B * T, T)
            rows = [torch.arange(b, b + n, device=branch.device) for b, n in zip(starts, lengths)]
            self.index = torch.cat(rows)
        self.n = len(self.index)
        if flex:
            self._block_mask(branch)
            return
        rows = branch.flatten()[self.index].split(lengths)
        self.masks = [prefix_mask(row[None], row[None]) for row in rows]
        self.kernel = self._row_by_row

    def _block_mask(self, branch):
        """FlexAttention's mask, which skips the blocks where nothing is seen.

        It wants n in whole blocks: the last column is repeated. The copies belong to no row and see
        each other, since an empty softmax is NaN.
        """
        pad = -self.n % FLEX_BLOCK
        row = F.pad(self.index // branch.shape[1], (0, pad), value=-1)
        own = F.pad(branch.flatten()[self.index], (0, pad))
        self.index = torch.cat([self.index, self.index[-1:].expand(pad)])

        def mask_mod(b, h, i, j):
            same_branch = (own[j] == 0) | (own[j] == own[i])
            return (row[i] == row[j]) & (j <= i) & same_branch

        n = len(self.index)
        make = compiled(create_block_mask, branch.device.type)
        self.mask = make(mask_mod, None, None, n, n, device=branch.device)
        self.kernel = self._flex

    def gather(self, x: Tensor) -> Tensor:
        """The columns kept.  (B,T) -> (n,)"""
        x = x.flatten()
        return x if self.index is None else x[self.index]

    def find(self, at: Tensor | None) -> Tensor | None:
        """Where the columns `at` (m,), indices into all B*T, lie among those kept.  -> (m,)"""
        if at is None or self.index is None:
            return at
        return torch.searchsorted(self.index, at).clamp(max=len(self.index) - 1)

    def scatter(self, x: Tensor) -> Tensor:
        """Back to rows.  (n,D) -> (B,T,D), 0 at padding"""
        B, T = self.shape
        if self.index is not None:
            blank = x.new_zeros(B * T, x.shape[1])
            x = blank.index_copy(0, self.index[: self.n], x[: self.n])
        return x.view(B, T, -1)

    @torch.compiler.disable
    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """Each column attends to those it sees.  query (n,H,d), key, value (n,G,d)  ->  (n,H*d)"""
        if self.cache is not None:
            self.cache.write(layer, self.slots, key, value)
        return self.kernel(query, key, value, layer)

    def _row_by_row(self, query, key, value, layer):
        """A fused kernel per row: no row is as wide as the longest."""
        grouped = query.shape[1] > key.shape[1]
        lengths = [mask.shape[-1] for mask in self.masks]
        split = [heads_first(x).split(lengths, 2) for x in (query, key, value)]
        outputs = [
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
            for q, k, v, mask in zip(*split, self.masks)
        ]
        return columns_first(torch.cat(outputs, 2))

    def _flex(self, query, key, value, layer):
        """One kernel for all rows."""
        grouped = query.shape[1] > key.shape[1]
        q, k, v = heads_first(query), heads_first(key), heads_first(value)
        kernel = compiled(flex_attention, query.device.type)
        return columns_first(kernel(q, k, v, block_mask=self.mask, enable_gqa=grouped))

    def _cached(self, query, key, value, layer):
        """T new columns per row attend to the cache.

        Written out: a fused kernel takes longer to call than these few queries to compute. The H /
        G query heads of a key head stand side by side with the T columns, so nothing is copied.
        """
        B, _, T, _ = self.mask.shape
        key, value = self.cache.read(layer)
        G, d = key.shape[1], key.shape[3]
        query = query.view(B, T, G, -1, d).permute(0, 2, 3, 1, 4)                  # (B,G,H/G,T,d)
        query = query.reshape(B, G, -1, d) * d**-0.5                               # (B,G,H/G*T,d)
        scores = (query @ key.transpose(-1, -2)).unflatten(2, (-1, T))             # (B,G,H/G,T,S)
        scores = scores.masked_fill(~self.mask[:, :, None], float("-inf"))
        weight = scores.softmax(-1).flatten(2, 3)                                  # (B,G,H/G*T,S)
        output = (weight @ value).view(B, G, -1, T, d)
        return output.permute(0, 3, 1, 2, 4).reshape(B * T, -1)


def heads_first(x: Tensor) -> Tensor:
    """(n,H,d) -> (1,H,n,d), as the kernels want it"""
    return x.transpose(0, 1)[None]


def columns_first(x: Tensor) -> Tensor:
    """(1,H,n,d) -> (n,H*d)"""
    return x[0].transpose(0, 1).flatten(1)


@functools.cache
def compiled(function: Callable, device: str) -> Callable:
    """A part of FlexAttention, compiled on CUDA alone.

    Elsewhere it has no kernel for training, and writes out every pair of columns.
    """
    return torch.compile(function, dynamic=True) if device == "cuda" else function


def run_block(
    block: nn.Module, *inputs, cached: bool, activation_checkpointing: bool
) -> Tensor:
    """One layer. activation_checkpointing: the backward computes it again, from its inputs alone.

    A compiled block is for training: in a decoding step it would cast every weight anew under
    autocast.
    """
    forward = block.forward if cached else block
    if activation_checkpointing and torch.is_grad_enabled():
        return checkpoint(forward, *inputs, use_reentrant=False)
    return forward(*inputs)
