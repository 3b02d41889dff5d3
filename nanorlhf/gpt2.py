"""GPT-2, whole and alone: read it without any other file.            [Radford et al. 2019; the layout is the published one]

B rows, T columns, S columns seen so far (T without a cache), D width, H heads, V vocabulary.

A row holds a prompt and its K responses side by side. `branch` says who a column belongs to (0 the prompt, k response k,
-1 padding), `positions` where it stands in its own text. The one rule of the whole repository is in `visible`.

Parameter names and shapes are those of the published checkpoints, so a state dict is a file of theirs, key by key.
"""
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


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
        self.keys = self.values = None           # (layers,B,H,columns,d), born with the first key, in its number format
        self.layers, self.length = layers, 0

    def extend(self, layer, key, value):
        """Writes T new columns of one layer behind the others, gives back all of them.  (B,H,T,d) -> (B,H,S,d)"""
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

    def forward(self, x, mask, cache, layer):
        B, T, D = x.shape
        split = lambda y: y.view(B, T, self.n_head, D // self.n_head).transpose(1, 2)     # (B,H,T,d)
        query, key, value = (split(y) for y in self.c_attn(x).split(D, dim=-1))
        if cache is not None:
            key, value = cache.extend(layer, key, value)                                   # (B,H,S,d)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)              # (B,H,T,d)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D))


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

    def forward(self, x, mask, cache, layer):
        x = x + self.attn(self.ln_1(x), mask, cache, layer)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    family, prefix = "gpt2", "transformer."      # how a checkpoint calls the trunk
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

    def new_cache(self, rows, columns):
        return Cache(self.config.n_layer, rows, columns, self.wte.weight.device)

    def hidden(self, tokens, positions, branch, cache=None):
        """Final hidden states, after the last LayerNorm.  tokens, positions, branch (B,T) int64  ->  (B,T,D)

        With a cache the T columns stand behind those it holds, and are added to it.
        """
        seen = branch
        if cache is not None:
            cache.branch[:, cache.length : cache.length + tokens.shape[1]] = branch
            seen = cache.branch[:, : cache.length + tokens.shape[1]]
        mask = visible(branch, seen)                                   # (B,1,T,S)
        x = self.wte(tokens) + self.wpe(positions)                     # (B,T,D)
        for layer, block in enumerate(self.h):
            x = block(x, mask, cache, layer)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.ln_f(x)

    def logits(self, hidden):
        """Next-token logits for chosen columns alone: the head is the widest matrix, most columns never need it.  (...,D) -> (...,V)"""
        return F.linear(hidden, self.wte.weight if self.lm_head is None else self.lm_head.weight)
