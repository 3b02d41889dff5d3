"""GPT-2, whole: no library and no base class.

[Radford et al. 2019; the layout is the published one]

B rows, T columns per row, n of all B*T columns no padding, D width, H heads, d head width,
V vocabulary.

A row holds a prompt and its K responses side by side. `branch` says which of them a column belongs
to (0 the prompt, k response k, -1 padding), `positions` where it stands in its own text. Which
column sees which is one rule: attention.prefix_mask.

Parameter names and shapes are those of the published checkpoints, so a state dict is a file of
theirs, key by key.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import KVCache, Layout, run_block


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


class Projection(nn.Module):
    """y = x W + b with W stored (in, out), as GPT-2 was published; nn.Linear stores (out, in)."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Projection(config.n_embd, 3 * config.n_embd)
        self.c_proj = Projection(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, layout: Layout, layer: int, keep: Tensor | None) -> Tensor:
        qkv = self.c_attn(x).split(x.shape[1], dim=1)
        query, key, value = (y.unflatten(1, (self.n_head, -1)) for y in qkv)       # (n,H,d)
        y = layout.attend(query, key, value, layer)                                # (n,D)
        return self.c_proj(y if keep is None else y[keep])


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Projection(config.n_embd, n_inner)
        self.c_proj = Projection(n_inner, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, layout: Layout, layer: int, keep: Tensor | None) -> Tensor:
        """x (n,D) -> (n,D), or (m,D) where only the columns `keep` (m,) are wanted of the layer"""
        residual = x if keep is None else x[keep]
        x = residual + self.attn(self.ln_1(x), layout, layer, keep)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    family = "gpt2"                              # model_type of its checkpoints
    prefix = "transformer."                      # how a checkpoint calls the trunk
    Config = GPT2Config
    lm_head_matmul = staticmethod(F.linear)      # run/kernels.py knows faster ones
    flex = False                                 # FlexAttention instead of a mask per row
    activation_checkpointing = False             # keep each block's input alone for the backward

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.width = config.n_embd
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.01)
        for block in self.h:                     # 2 n_layer terms add up: keep their variance
            for projection in (block.attn.c_proj, block.mlp.c_proj):
                nn.init.normal_(projection.weight, std=0.02 / (2 * config.n_layer) ** 0.5)

    @property
    def final_norm(self) -> nn.LayerNorm:
        return self.ln_f

    @property
    def blocks(self) -> nn.ModuleList:
        return self.h

    def new_cache(self, rows: int, max_columns: int, static: bool = False) -> KVCache:
        return KVCache(self.config.n_layer, rows, max_columns, self.wte.weight.device, static)

    def hidden(
        self, tokens: Tensor, positions: Tensor, branch: Tensor, cache: KVCache | None = None,
        at: Tensor | None = None, lengths: list[int] | None = None,
    ) -> Tensor:
        """Final hidden states, after the last norm.  (B,T) int64 each  ->  (B,T,D), 0 at padding

        at: of these columns alone, as Layout.find takes them: (m,D).  cache, lengths: see Layout.
        """
        layout = Layout(branch, cache, lengths, self.flex)
        keep = layout.find(at)
        x = self.wte(layout.gather(tokens)) + self.wpe(layout.gather(positions))   # (n,D)
        for layer, block in enumerate(self.h):
            is_last = layer == len(self.h) - 1
            x = run_block(
                block, x, layout, layer, keep if is_last else None,
                cached=cache is not None, activation_checkpointing=self.activation_checkpointing,
            )
        x = self.ln_f(x)
        return layout.scatter(x) if at is None else x

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits, for the columns that need them.  (...,D) -> (...,V)"""
        head = self.wte if self.lm_head is None else self.lm_head
        return self.lm_head_matmul(hidden, head.weight)
