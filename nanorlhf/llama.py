"""LLaMA 1, 2 and 3, whole: no library and no base class.

[Touvron et al. 2023a, 2023b; Llama 3, 2024]

B rows, T columns per row, n of all B*T columns no padding, D width, H query heads, G key-value
heads, d head width, V vocabulary.

A row holds a prompt and its K responses side by side. `branch` says which of them a column belongs
to (0 the prompt, k response k, -1 padding), `positions` where it stands in its own text. Which
column sees which is one rule: attention.prefix_mask.

Parameter names and shapes are those of Hugging Face's folders, so a state dict is a file of theirs,
key by key.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import KVCache, Layout, run_block


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None       # fewer than query heads: grouped; None: as many
    head_dim: int | None = None                  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048          # the context: of positions, a row may be longer
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_type: str = "default"                   # or "linear", "llama3"
    rope_factor: float = 1.0                     # linear, llama3: how far the context was stretched
    rope_low_freq_factor: float = 1.0            # llama3: these three say which waves are stretched
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
_LLAMA3 = dict(
    vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192, rms_norm_eps=1e-5,
    rope_theta=500000.0,
)
_13B = dict(
    hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
)
_30B = dict(
    hidden_size=6656, intermediate_size=17920, num_hidden_layers=60, num_attention_heads=52
)
_65B = dict(
    hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64
)
_70B = dict(_65B, intermediate_size=28672, num_key_value_heads=8)
_NANO = dict(
    vocab_size=2048, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
    num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
)
SIZES = {
    "llama-7b": LlamaConfig(),
    "llama-13b": LlamaConfig(**_13B),
    "llama-30b": LlamaConfig(**_30B),
    "llama-65b": LlamaConfig(**_65B),
    "llama2-7b": LlamaConfig(**_LLAMA2),
    "llama2-13b": LlamaConfig(**_13B, **_LLAMA2),
    "llama2-70b": LlamaConfig(**_70B, **_LLAMA2),
    "llama3-8b": LlamaConfig(intermediate_size=14336, **_LLAMA3),
    "llama3-70b": LlamaConfig(**{**_70B, **_LLAMA3}),
    "llama-nano": LlamaConfig(**_NANO),
}


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """Radians per position for each pair of a head's dimensions.  ->  (d/2,) float32

    [Su et al. 2021; Llama 3.1's scaling]
    """
    d = config.head_width
    exponent = torch.arange(0, d, 2, dtype=torch.int64).float() / d
    frequency = 1.0 / config.rope_theta**exponent
    if config.rope_type == "linear":
        return frequency / config.rope_factor
    if config.rope_type == "llama3":             # long waves are stretched, short ones kept
        wavelength = 2 * math.pi / frequency
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        kept = ((config.rope_original_context / wavelength - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * frequency / config.rope_factor + kept * frequency
    return frequency


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (i, i + d/2) of a head by its angle; the halves are Hugging Face's layout.

    x (n,heads,d), cos, sin (n,1,d/2)  ->  (n,heads,d)
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # a mean of squares needs float32
        x_float = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x_float * scale).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        n_head, n_kv_head = config.num_attention_heads, config.key_value_heads
        self.head_width = config.head_width
        self.q_proj = nn.Linear(config.hidden_size, n_head * self.head_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, n_kv_head * self.head_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, n_kv_head * self.head_width, bias=False)
        self.o_proj = nn.Linear(n_head * self.head_width, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, layer: int, keep: Tensor | None
    ) -> Tensor:
        query = self.q_proj(x).unflatten(1, (-1, self.head_width))                 # (n,H,d)
        key = self.k_proj(x).unflatten(1, (-1, self.head_width))                   # (n,G,d)
        value = self.v_proj(x).unflatten(1, (-1, self.head_width))                 # (n,G,d)
        y = layout.attend(rotate(query, cos, sin), rotate(key, cos, sin), value, layer)    # (n,H*d)
        return self.o_proj(y if keep is None else y[keep])


class FeedForward(nn.Module):
    """SwiGLU: a gate decides how much of each inner unit passes.  [Shazeer 2020]"""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, layer: int, keep: Tensor | None
    ) -> Tensor:
        """x (n,D) -> (n,D), or (m,D) where only the columns `keep` (m,) are wanted of the layer"""
        residual = x if keep is None else x[keep]
        x = residual + self.self_attn(self.input_layernorm(x), cos, sin, layout, layer, keep)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    Config = LlamaConfig
    family = "llama"                             # model_type of its checkpoints
    prefix = "model."                            # how a checkpoint calls the trunk
    flex = False                                 # FlexAttention instead of a mask per row
    activation_checkpointing = False             # keep each block's input alone for the backward
    lm_head_matmul = staticmethod(F.linear)      # run/kernels.py knows faster ones

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.frequencies = rope_frequencies(config)        # no buffer: it is computed, not loaded
        self.width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    @property
    def final_norm(self) -> RMSNorm:
        return self.norm

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    def new_cache(self, rows: int, max_columns: int, static: bool = False) -> KVCache:
        n_layer = self.config.num_hidden_layers
        return KVCache(n_layer, rows, max_columns, self.embed_tokens.weight.device, static)

    def hidden(
        self, tokens: Tensor, positions: Tensor, branch: Tensor, cache: KVCache | None = None,
        at: Tensor | None = None, lengths: list[int] | None = None,
    ) -> Tensor:
        """Final hidden states, after the last norm.  (B,T) int64 each  ->  (B,T,D), 0 at padding

        at: of these columns alone, as Layout.find takes them: (m,D).  cache, lengths: see Layout.
        """
        layout = Layout(branch, cache, lengths, self.flex)
        keep = layout.find(at)
        x = self.embed_tokens(layout.gather(tokens))                               # (n,D)
        # once: a CUDA graph of decoding steps may not copy from the host
        self.frequencies = self.frequencies.to(x.device)
        angle = layout.gather(positions)[:, None, None] * self.frequencies         # (n,1,d/2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for layer, block in enumerate(self.layers):
            is_last = layer == len(self.layers) - 1
            x = run_block(
                block, x, cos, sin, layout, layer, keep if is_last else None,
                cached=cache is not None, activation_checkpointing=self.activation_checkpointing,
            )
        x = self.norm(x)
        return layout.scatter(x) if at is None else x

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits, for the columns that need them.  (...,D) -> (...,V)"""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return self.lm_head_matmul(hidden, head.weight)
