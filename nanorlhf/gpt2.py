"""GPT-2, whole and alone: read it without any other file.            [Radford et al. 2019; the layout is the published one]

B rows, T columns, n of them no padding, S columns seen so far, D width, H heads (G = H of keys and values), V vocabulary.

A row holds a prompt and its K responses side by side. `branch` says who a column belongs to (0 the prompt, k response k,
-1 padding), `positions` where it stands in its own text. The one rule of the whole repository is in `visible`.

Parameter names and shapes are those of the published checkpoints, so a state dict is a file of theirs, key by key.
"""
import functools
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GPT2Config:
    vocab_size: int = 50257
    n_positions: int = 1024          # the context: a position may not reach it, a row may be longer
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None       # width of the feed-forward layer; None: 4 * n_embd
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True

    @property
    def context(self):
        return self.n_positions


SIZES = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "gpt2-nano": GPT2Config(vocab_size=2049, n_positions=512, n_embd=128, n_layer=4, n_head=4),
}


def visible(branch_query, branch_key, first=None):
    """Who sees whom: column i sees column j <= i if j is the prompt's or of i's own branch.

    branch_query (B,T), branch_key (B,S), the queries being columns first .. first + T - 1, by default the last T  ->  (B,1,T,S) bool
    What padding sees does not matter, because nobody sees padding; it sees itself, since an empty softmax is NaN.
    """
    T, S = branch_query.shape[1], branch_key.shape[1]
    column = torch.arange(S, device=branch_key.device)
    earlier = column <= column[:T, None] + (S - T if first is None else first)
    mine = (branch_key[:, None] == 0) | (branch_key[:, None] == branch_query[:, :, None])
    return (earlier & mine)[:, None]


class Cache:
    """Keys and values of the columns so far, with their branches: room for `columns` columns of B rows.

    A CUDA graph repeats its kernels on the same memory, so a fixed cache counts on the device and always reads the whole room:
    a column that is not written yet has branch -1, which nobody sees.
    """

    def __init__(self, layers, rows, columns, device, fixed=False):
        self.branch = torch.full((rows, columns), -1, device=device)
        self.length = torch.zeros((), dtype=torch.long, device=device)      # columns in use; `used` is the same number on the host
        self.keys = self.values = None           # (layers,B,G,columns,d), born with the first value, in its number format
        self.layers, self.fixed, self.used = layers, fixed, 0

    def extend(self, branch):
        """Takes in T more columns of each row.  branch (B,T)  ->  where they are kept, row and column (B*T,), and what they see (B,1,T,S)"""
        (rows, _), T = self.branch.shape, branch.shape[1]
        row = torch.arange(rows, device=branch.device).repeat_interleave(T)
        column = (self.length + torch.arange(T, device=branch.device)).repeat(rows)
        self.branch[row, column] = branch.flatten()
        self.used += T
        sees = visible(branch, self.branch if self.fixed else self.branch[:, : self.used], self.length)
        self.length += T
        return (row, column), sees

    def write(self, layer, places, key, value):
        """key, value (n,G,d) of one layer, to the places that `extend` gave; None: the last columns of each row, all of them."""
        (rows, room), (n, G, d) = self.branch.shape, key.shape
        if self.keys is None:
            self.keys, self.values = value.new_zeros(2, self.layers, rows, G, room, d)
        for kept, new in ((self.keys, key.to(value.dtype)), (self.values, value)):       # rotated keys are float32 under autocast
            if places is None:
                kept[layer, :, :, self.used - n // rows : self.used] = new.view(rows, -1, G, d).transpose(1, 2)
            else:
                row, column = places
                kept[layer][row, :, column] = new

    def read(self, layer):
        """-> keys, values (B,G,S,d)"""
        return [x[layer] if self.fixed else x[layer, :, :, : self.used] for x in (self.keys, self.values)]

    def keep(self, rows):
        """Forgets every row that is not in `rows` (B,) bool: finished ones need no more steps."""
        self.keys, self.values, self.branch = self.keys[:, rows], self.values[:, rows], self.branch[rows]


@dataclass
class Sight:
    """What the n columns of one forward see, and where their keys and values are kept if anybody wants them later."""
    sees: list | torch.Tensor | BlockMask        # a mask (1,1,t,t) a row; or one mask (B,1,T,S) over the cache; or FlexAttention's (1,1,n,n)
    cache: Cache | None = None
    places: tuple | None = None                  # row and column of each, (n,)


@functools.cache
def flex_kernel(function, device):
    """A part of FlexAttention, compiled where it has a kernel for training; uncompiled, it writes out every pair of columns."""
    return torch.compile(function, dynamic=True) if device == "cuda" else function


def lay_out(branch, flex):
    """Rows end to end without their padding.  branch (B,T)  ->  the columns kept, (n,) indices into (B*T), and what they see

    flex: FlexAttention's block mask, which skips what nobody sees; it wants n in blocks of 128, so the last column is repeated;
    the copies belong to no row and see each other, since an empty softmax is NaN. Else one dense mask a row: no row is as wide
    as the longest.
    """
    real = branch >= 0
    index = real.flatten().nonzero().squeeze(1)
    row, own = index // branch.shape[1], branch.flatten()[index]
    if not flex:
        return index, [visible(mine[None], mine[None]) for mine in own.split(real.sum(1).tolist())]
    more = -len(index) % 128
    index, row, own = torch.cat([index, index[-1:].expand(more)]), F.pad(row, (0, more), value=-1), F.pad(own, (0, more))
    rule = lambda b, h, i, j: (row[i] == row[j]) & (j <= i) & ((own[j] == 0) | (own[j] == own[i]))
    make = flex_kernel(create_block_mask, branch.device.type)
    return index, make(rule, None, None, len(index), len(index), device=branch.device)


def attend_cache(query, sight, layer):
    """T columns a row look at what the cache holds.  query (B*T,H,d)  ->  (B*T,H*d)

    Written out, as the few queries of a decoding step take longer to call a fused kernel than to compute; the H / G query heads
    of a key head stand side by side with the T columns, so that nothing is copied.
    """
    (B, _, T, _), (key, value) = sight.sees.shape, sight.cache.read(layer)
    G, d = key.shape[1], key.shape[3]
    query = query.view(B, T, G, -1, d).permute(0, 2, 3, 1, 4).reshape(B, G, -1, d) * d ** -0.5         # (B,G,H/G*T,d)
    weight = (query @ key.transpose(-1, -2)).unflatten(2, (-1, T))                                     # (B,G,H/G,T,S)
    weight = weight.masked_fill(~sight.sees[:, :, None], float("-inf")).softmax(-1).flatten(2, 3)
    return (weight @ value).view(B, G, -1, T, d).permute(0, 3, 1, 2, 4).reshape(B * T, -1)


@torch.compiler.disable
def attend(query, key, value, sight, layer):
    """Each column looks at those it sees.  query (n,H,d), key, value (n,G,d)  ->  (n,H*d)"""
    if sight.cache is not None:
        sight.cache.write(layer, sight.places, key, value)
    if isinstance(sight.sees, torch.Tensor):
        return attend_cache(query, sight, layer)
    shared = query.shape[1] > key.shape[1]                               # grouped-query attention
    across = lambda x: x.transpose(0, 1)[None]                           # (n,H,d) -> (1,H,n,d)
    if isinstance(sight.sees, BlockMask):
        flex = flex_kernel(flex_attention, query.device.type)
        y = flex(across(query), across(key), across(value), block_mask=sight.sees, enable_gqa=shared)
    else:
        rows = zip(*(across(x).split([mask.shape[-1] for mask in sight.sees], 2) for x in (query, key, value)), sight.sees)
        y = torch.cat([F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared) for q, k, v, mask in rows], 2)
    return y[0].transpose(0, 1).flatten(1)


class Projection(nn.Module):
    """y = x W + b with W stored (in, out), as GPT-2 was published; nn.Linear stores (out, in)."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Projection(config.n_embd, 3 * config.n_embd)
        self.c_proj = Projection(config.n_embd, config.n_embd)

    def forward(self, x, sight, layer, only=None):
        query, key, value = (y.unflatten(1, (self.n_head, -1)) for y in self.c_attn(x).split(x.shape[1], dim=1))      # (n,H,d)
        y = attend(query, key, value, sight, layer)                                        # (n,D)
        return self.c_proj(y if only is None else y[only])


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Projection(config.n_embd, inner)
        self.c_proj = Projection(inner, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = FeedForward(config)

    def forward(self, x, sight, layer, only=None):
        """x (n,D) -> (n,D); after the last attention nobody needs the columns that are not in `only` (m,): -> (m,D)"""
        x = (x if only is None else x[only]) + self.attn(self.ln_1(x), sight, layer, only)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    family, prefix = "gpt2", "transformer."      # how a checkpoint calls the trunk
    product = staticmethod(F.linear)             # of the head; speed.tune knows faster ones
    flex = False                                 # FlexAttention instead of dense masks
    recompute = False                            # keep no activations but each block's input: less memory, a third more work
    Config = GPT2Config

    def __init__(self, config):
        super().__init__()
        self.config, self.width = config, config.n_embd
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.01)
        for block in self.h:                     # 2 n_layer branches add up in the residual stream: keep its variance
            for projection in (block.attn.c_proj, block.mlp.c_proj):
                nn.init.normal_(projection.weight, std=0.02 / (2 * config.n_layer) ** 0.5)

    @property
    def final_norm(self):
        return self.ln_f

    @property
    def blocks(self):
        return self.h

    def new_cache(self, rows, columns, fixed=False):
        return Cache(self.config.n_layer, rows, columns, self.wte.weight.device, fixed)

    def hidden(self, tokens, positions, branch, cache=None, at=None):
        """Final hidden states, after the last LayerNorm.  tokens, positions, branch (B,T) int64  ->  (B,T,D), 0 at padding

        at: indices (m,) into the B*T columns, of those that are wanted; the others skip what only they need  ->  (m,D)
        With a cache the T columns stand behind those it holds, and are added to it.
        """
        B, T = tokens.shape
        behind = cache is not None and cache.used > 0                  # K new columns a row, none of them padding
        places, sees = cache.extend(branch) if cache else (None, None)
        index = None
        if not behind:
            index, sees = lay_out(branch, self.flex and cache is None)
            places = cache and tuple(place[index] for place in places)
        elif not cache.fixed:
            places = None                                              # a slice is quicker than indices
        pick = (lambda x: x.flatten()) if index is None else (lambda x: x.flatten()[index])
        only = at if at is None or index is None else torch.searchsorted(index, at).clamp(max=len(index) - 1)
        sight, last = Sight(sees, cache, places), len(self.blocks) - 1
        x = self.wte(pick(tokens)) + self.wpe(pick(positions))         # (n,D)
        for layer, block in enumerate(self.blocks):
            run = block if cache is None else block.forward            # compiled, a decoding step would cast every weight anew under autocast
            how = (x, sight, layer, only if layer == last else None)
            x = checkpoint(run, *how, use_reentrant=False) if self.recompute and torch.is_grad_enabled() else run(*how)
        x = self.ln_f(x)
        if at is not None:
            return x
        if index is not None:
            n = int((branch >= 0).sum())
            x = x.new_zeros(B * T, x.shape[1]).index_copy(0, index[:n], x[:n])
        return x.view(B, T, -1)

    def logits(self, hidden):
        """Next-token logits for chosen columns alone: the head is the widest matrix, most columns never need it.  (...,D) -> (...,V)"""
        return self.product(hidden, self.wte.weight if self.lm_head is None else self.lm_head.weight)
