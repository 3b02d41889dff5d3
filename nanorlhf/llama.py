"""LLaMA 1, 2 and 3, whole and alone: read it without any other file.        [Touvron et al. 2023a, 2023b; Llama 3, 2024]

B rows, T columns, S columns seen so far (T without a cache), D width, H query heads, G key-value heads, d head width, V vocabulary.

A row holds a prompt and its K responses side by side. `branch` says who a column belongs to (0 the prompt, k response k,
-1 padding), `positions` where it stands in its own text. The one rule of the whole repository is in `visible`.

Parameter names and shapes are those of Hugging Face's folders, so a state dict is a file of theirs, key by key.
"""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


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


def visible(branch_query, branch_key):
    """Who sees whom: column i sees column j <= i if j is the prompt's or of i's own branch.

    branch_query (B,T), branch_key (B,S), the queries being the last T of the S columns  ->  (B,1,T,S) bool
    What padding sees does not matter, because nobody sees padding; it sees itself, since an empty softmax is NaN.
    """
    T, S = branch_query.shape[1], branch_key.shape[1]
    earlier = torch.ones(T, S, dtype=torch.bool, device=branch_key.device).tril(S - T)
    mine = (branch_key[:, None] == 0) | (branch_key[:, None] == branch_query[:, :, None])
    return (earlier & mine)[:, None]


class Cache:
    """Keys and values of the columns so far, with their branches: room for `columns` columns of B rows."""

    def __init__(self, layers, rows, columns, device):
        self.branch = torch.full((rows, columns), -1, device=device)
        self.keys = self.values = None           # (layers,B,G,columns,d), born with the first key, in its number format
        self.layers, self.length = layers, 0

    def extend(self, layer, key, value):
        """Writes T new columns of one layer behind the others, gives back all of them.  (B,G,T,d) -> (B,G,S,d)"""
        if self.keys is None:
            B, heads, _, d = key.shape
            self.keys = key.new_zeros(self.layers, B, heads, self.branch.shape[1], d)
            self.values = torch.zeros_like(self.keys)
        end = self.length + key.shape[2]
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def keep(self, rows):
        """Forgets every row that is not in `rows`: finished ones need no more steps."""
        self.keys, self.values, self.branch = self.keys[:, rows], self.values[:, rows], self.branch[rows]


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
    """Turns each pair (i, i + d/2) of a head by its angle; the halves are Hugging Face's layout.  x (B,heads,T,d), cos, sin (B,1,T,d/2)"""
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

    def forward(self, x, mask, cos, sin, cache, layer):
        B, T, _ = x.shape
        query = rotate(self.q_proj(x).view(B, T, self.heads, self.d).transpose(1, 2), cos, sin)     # (B,H,T,d)
        key = rotate(self.k_proj(x).view(B, T, self.groups, self.d).transpose(1, 2), cos, sin)      # (B,G,T,d)
        value = self.v_proj(x).view(B, T, self.groups, self.d).transpose(1, 2)                      # (B,G,T,d)
        if cache is not None:
            key, value = cache.extend(layer, key, value)                                            # (B,G,S,d)
        shared = self.groups < self.heads
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=shared)    # (B,H,T,d)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


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

    def forward(self, x, mask, cos, sin, cache, layer):
        x = x + self.self_attn(self.input_layernorm(x), mask, cos, sin, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    family, prefix = "llama", "model."           # how a checkpoint calls the trunk
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

    def new_cache(self, rows, columns):
        return Cache(self.config.num_hidden_layers, rows, columns, self.embed_tokens.weight.device)

    def hidden(self, tokens, positions, branch, cache=None):
        """Final hidden states, after the last norm.  tokens, positions, branch (B,T) int64  ->  (B,T,D)

        With a cache the T columns stand behind those it holds, and are added to it.
        """
        seen = branch
        if cache is not None:
            cache.branch[:, cache.length : cache.length + tokens.shape[1]] = branch
            seen = cache.branch[:, : cache.length + tokens.shape[1]]
        mask = visible(branch, seen)                                   # (B,1,T,S)
        x = self.embed_tokens(tokens)                                  # (B,T,D)
        angle = positions[:, None, :, None] * self.frequencies.to(x.device)       # (B,1,T,d/2) float32
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for layer, block in enumerate(self.layers):
            x = block(x, mask, cos, sin, cache, layer)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x)

    def logits(self, hidden):
        """Next-token logits for chosen columns alone: the head is the widest matrix, most columns never need it.  (...,D) -> (...,V)"""
        return F.linear(hidden, self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight)
