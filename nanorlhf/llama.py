"""LLaMA 1, 2 and 3, whole and alone: read it without any other file.        [Touvron et al. 2023a, 2023b; Llama 3, 2024]

B rows, T columns, n of them no padding, S columns seen so far, D width, H query heads, G key-value heads, d head width, V vocabulary.

A row holds a prompt and its K responses side by side. `branch` says who a column belongs to (0 the prompt, k response k,
-1 padding), `positions` where it stands in its own text. The one rule of the whole repository is in `visible`.

Parameter names and shapes are those of Hugging Face's folders, so a state dict is a file of theirs, key by key.
"""
import functools
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None       # fewer than the query heads: grouped-query attention; None: as many
    head_dim: int | None = None                  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048          # the context: a position may not reach it, a row may be longer
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_type: str = "default"                   # or "linear", "llama3"
    rope_factor: float = 1.0                     # linear, llama3: by how much the context was stretched
    rope_low_freq_factor: float = 1.0            # llama3: the three numbers that say which wavelengths are stretched
    rope_high_freq_factor: float = 4.0
    rope_original_context: int = 8192
    tie_word_embeddings: bool = False

    @property
    def context(self):
        return self.max_position_embeddings

    @property
    def key_value_heads(self):
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self):
        return self.head_dim or self.hidden_size // self.num_attention_heads


_LLAMA2 = dict(max_position_embeddings=4096, rms_norm_eps=1e-5)
_LLAMA3 = dict(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=500000.0)
_13B = dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
_70B = dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8)
SIZES = {
    "llama-7b": LlamaConfig(),
    "llama-13b": LlamaConfig(**_13B),
    "llama-30b": LlamaConfig(hidden_size=6656, intermediate_size=17920, num_hidden_layers=60, num_attention_heads=52),
    "llama-65b": LlamaConfig(hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64),
    "llama2-7b": LlamaConfig(**_LLAMA2),
    "llama2-13b": LlamaConfig(**_13B, **_LLAMA2),
    "llama2-70b": LlamaConfig(**_70B, **_LLAMA2),
    "llama3-8b": LlamaConfig(intermediate_size=14336, **_LLAMA3),
    "llama3-70b": LlamaConfig(**{**_70B, **_LLAMA3}),
    "llama-nano": LlamaConfig(vocab_size=2048, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
                              num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True),
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


def rope_frequencies(config):
    """Radians a position for each pair of a head's dimensions.  ->  (d/2,) float32              [Su et al. 2021; Llama 3.1's scaling]"""
    d = config.head_width
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, d, 2, dtype=torch.int64).float() / d)
    if config.rope_type == "linear":
        return frequency / config.rope_factor
    if config.rope_type == "llama3":             # long waves are stretched, short ones kept, those between interpolated
        wavelength = 2 * math.pi / frequency
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        kept = ((config.rope_original_context / wavelength - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * frequency / config.rope_factor + kept * frequency
    return frequency


def rotate(x, cos, sin):
    """Turns each pair (i, i + d/2) of a head by its angle; the halves are Hugging Face's layout.  x (n,heads,d), cos, sin (n,1,d/2)"""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))       # a mean of squares is float32's work
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.groups, self.d = config.num_attention_heads, config.key_value_heads, config.head_width
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.d, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.groups * self.d, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.groups * self.d, bias=False)
        self.o_proj = nn.Linear(self.heads * self.d, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, sight, layer, only=None):
        query, key, value = (y.unflatten(1, (-1, self.d)) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))   # (n,H,d), (n,G,d)
        y = attend(rotate(query, cos, sin), rotate(key, cos, sin), value, sight, layer)      # (n,H*d)
        return self.o_proj(y if only is None else y[only])


class FeedForward(nn.Module):
    """SwiGLU: a gate decides how much of each inner unit passes.                                   [Shazeer 2020]"""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x, cos, sin, sight, layer, only=None):
        """x (n,D) -> (n,D); after the last attention nobody needs the columns that are not in `only` (m,): -> (m,D)"""
        x = (x if only is None else x[only]) + self.self_attn(self.input_layernorm(x), cos, sin, sight, layer, only)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    family, prefix = "llama", "model."           # how a checkpoint calls the trunk
    product = staticmethod(F.linear)             # of the head; speed.tune knows faster ones
    flex = False                                 # FlexAttention instead of dense masks
    recompute = False                            # keep no activations but each block's input: less memory, a third more work
    Config = LlamaConfig

    def __init__(self, config):
        super().__init__()
        self.config, self.width = config, config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.frequencies = rope_frequencies(config)                    # no buffer: it is computed, not loaded
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    @property
    def final_norm(self):
        return self.norm

    @property
    def blocks(self):
        return self.layers

    def new_cache(self, rows, columns, fixed=False):
        return Cache(self.config.num_hidden_layers, rows, columns, self.embed_tokens.weight.device, fixed)

    def hidden(self, tokens, positions, branch, cache=None, at=None):
        """Final hidden states, after the last norm.  tokens, positions, branch (B,T) int64  ->  (B,T,D), 0 at padding

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
        x = self.embed_tokens(pick(tokens))                            # (n,D)
        self.frequencies = self.frequencies.to(x.device)               # once: a graph of decoding steps may not copy from the host
        angle = pick(positions)[:, None, None] * self.frequencies      # (n,1,d/2) float32
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for layer, block in enumerate(self.blocks):
            run = block if cache is None else block.forward            # compiled, a decoding step would cast every weight anew under autocast
            how = (x, cos, sin, sight, layer, only if layer == last else None)
            x = checkpoint(run, *how, use_reentrant=False) if self.recompute and torch.is_grad_enabled() else run(*how)
        x = self.norm(x)
        if at is not None:
            return x
        if index is not None:
            n = int((branch >= 0).sum())
            x = x.new_zeros(B * T, x.shape[1]).index_copy(0, index[:n], x[:n])
        return x.view(B, T, -1)

    def logits(self, hidden):
        """Next-token logits for chosen columns alone: the head is the widest matrix, most columns never need it.  (...,D) -> (...,V)"""
        return self.product(hidden, self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight)
