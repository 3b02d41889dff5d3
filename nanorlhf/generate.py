"""K samples of each prompt. Prefill: the prompt is computed once, and its keys and values are
stored once per group. Decode: its row grows by K columns at a time, one per sample, under the same
rule of which column sees which as in training (attention.prefix_mask).

Every draw is a function of (seed, stream, step, index of the prompt, sample): no generator has a
state to save, and a sample of a prompt does not depend on which other prompts are in the batch.

B prompts, K samples each, R new tokens at most, P prompt columns, V vocabulary.
"""
import contextlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .batching import Row, Stream, micro_batches, pack_rows
from .run.kernels import allow_nondeterministic_writes, capture_cudagraph

MIN_TOKENS_FOR_GRAPH = 8         # up to here, recording a CUDA graph takes longer than it saves


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""
    k: int                       # responses per prompt
    max_new_tokens: int          # R, EOS included
    eos_id: int
    seed: int
    stream: Stream
    temperature: float = 1.0     # 0 takes the likeliest token
    top_p: float = 1.0
    max_tokens: int = 8192       # columns per batch


def uniforms(seed: int, stream: int, step: int, index: int, sample: int, n: int) -> np.ndarray:
    """n numbers in [0, 1), one per token.  -> (n,) float64

    A counter-based generator: its key and counter are the address of the draw.
    """
    address = np.random.Philox(key=[seed, stream], counter=[0, step, index, sample])
    return np.random.Generator(address).random(n)


def distribution(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Probabilities to draw from, float64, summing to 1 over token ids.  (...,V) -> (...,V)

    top_p keeps the fewest most likely tokens that hold at least top_p of the mass. No sort unless
    it is asked for.
    """
    assert temperature > 0 and top_p > 0, (temperature, top_p)   # top_p 0 keeps no token: 0 / 0
    scaled = logits if temperature == 1 else logits.double() / temperature
    probs = torch.softmax(scaled, -1, dtype=torch.float64)
    if top_p < 1:
        ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
        likelier = ordered.cumsum(-1) - ordered                        # mass of the likelier tokens
        ordered = torch.where(likelier < top_p, ordered, torch.zeros_like(ordered))
        probs = torch.zeros_like(probs).scatter(-1, ids, ordered)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def sample_next_token(
    logits: Tensor, u: Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> Tensor:
    """Inverse CDF over token ids: the first token whose cumulated probability exceeds u.

    temperature 0 takes the likeliest.
    logits (...,V);  u (...) float64 in [0, 1)  ->  token ids (...)
    Not torch.multinomial: its draws would depend on the other prompts of the batch.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cdf = distribution(logits, temperature, top_p).cumsum(-1)
    total = cdf[..., -1:]                                        # rounding may leave it below u
    below_total = torch.nextafter(total, total - 1)
    u = torch.minimum(u.unsqueeze(-1), below_total)
    return torch.searchsorted(cdf, u, right=True).squeeze(-1)


@dataclass
class Decoder:
    """B prompts with K samples each on one KV cache. `tokens` (B,K) are the newest of each sample.

    decode_step works in place, since a CUDA graph repeats it as it is.
    """

    model: nn.Module
    u: Tensor                    # (B,K,R) float64, the draws
    temperature: float
    top_p: float
    static_cache: bool

    def prefill(self, prompts: list[list[int]]):
        """All prompts in one forward, padded on the right, and the first token of each sample."""
        B, K, R = self.u.shape
        device = self.u.device
        batch = pack_rows([Row(prompt, []) for prompt in prompts]).to(device)
        P = max(batch.lengths)
        self.prompt_lengths = torch.tensor(batch.lengths, device=device)           # (B,)
        self.sample_branch = torch.arange(1, K + 1, device=device).expand(B, K)
        self.cache = self.model.new_cache(B, P + K * (R - 1), self.static_cache)
        self.t = torch.zeros((), dtype=torch.long, device=device)    # the newest token's place
        last = torch.arange(B, device=device) * P + self.prompt_lengths - 1
        hidden = self.model.hidden(
            batch.tokens, batch.positions, batch.branch, self.cache, at=last, lengths=batch.lengths
        )                                                                          # (B,D)
        logits = self.model.logits(hidden)[:, None].expand(B, K, -1)               # (B,K,V)
        self.tokens = sample_next_token(logits, self.u[:, :, 0], self.temperature, self.top_p)

    def decode_step(self):
        """From token t of every sample to token t + 1."""
        positions = (self.prompt_lengths + self.t)[:, None].expand_as(self.tokens)
        branch = self.sample_branch[: len(self.tokens)]
        hidden = self.model.hidden(self.tokens, positions, branch, self.cache)     # (B,K,D)
        self.t += 1
        logits = self.model.logits(hidden.flatten(0, 1)).unflatten(0, self.tokens.shape)
        u = self.u.index_select(2, self.t[None]).squeeze(2)
        self.tokens.copy_(sample_next_token(logits, u, self.temperature, self.top_p))

    def select(self, rows: Tensor):
        """Goes on with the prompts in `rows` (B,) bool alone."""
        self.tokens = self.tokens[rows]
        self.prompt_lengths = self.prompt_lengths[rows]
        self.u = self.u[rows]
        self.cache.select(rows)


@torch.no_grad()
def generate_batch(
    model: nn.Module,
    prompts: list[list[int]],
    u: Tensor | np.ndarray,
    eos_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    static_cache: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Continues each of B prompts K times, up to EOS or R tokens.

    prompts: B lists of ids;  u (B,K,R) float64, the draws
    ->  (tokens (B,K,R) int64, lengths (B,K)), EOS included
    static_cache: every step on the same memory, as a CUDA graph needs it (default: on CUDA). A
    sample that has ended then computes on until all have; else until all of its own prompt have,
    whose row then leaves the batch.
    """
    device = next(model.parameters()).device
    static_cache = device.type == "cuda" if static_cache is None else static_cache
    u = torch.as_tensor(u, device=device)
    B, K, R = u.shape
    tokens = torch.zeros(B, K, R, dtype=torch.long, device=device)
    lengths = torch.full((B, K), R, device=device)
    active = torch.arange(B, device=device)      # prompts with an unfinished sample
    decoder = Decoder(model, u, temperature, top_p, static_cache)
    decoder.prefill(prompts)
    replay = None
    for t in range(R):
        tokens[active, :, t] = decoder.tokens
        ends = (decoder.tokens == eos_id) & (lengths[active] == R)
        lengths[active] = torch.where(ends, t + 1, lengths[active])
        unfinished = (lengths[active] == R).any(-1)
        if t == R - 1 or not unfinished.any():
            break
        if not static_cache and not unfinished.all():
            active = active[unfinished]
            decoder.select(unfinished)
        # the first step is done by hand: it warms the kernels up
        use_graph = static_cache and device.type == "cuda" and t > 0 and R > MIN_TOKENS_FOR_GRAPH
        if use_graph:
            replay = replay or capture_cudagraph(decoder.decode_step)
            replay()
        else:
            decoder.decode_step()
    return tokens, lengths


def room(rows: list[Row], k: int, max_new_tokens: int) -> list[int]:
    """Columns that each row may fill with its K responses."""
    return [len(row.prompt) + k * max_new_tokens for row in rows]


def generate(
    model: nn.Module, rows: list[Row], sampling: Sampling, step: int, first_sample: int = 0
) -> list[list[list[int]]]:
    """K responses to each row's prompt, in batches of at most sampling.max_tokens columns.

    -> for each row K lists of ids, EOS included
    first_sample: number of the first sample (drawing again takes later numbers)
    """
    k = sampling.k
    max_new_tokens = sampling.max_new_tokens
    responses = [None] * len(rows)
    on_cuda = next(model.parameters()).is_cuda
    for batch in micro_batches(room(rows, k, max_new_tokens), sampling.max_tokens, padded=True):
        u = np.empty((len(batch), k, max_new_tokens))
        for b, i in enumerate(batch):
            for s in range(k):
                address = (sampling.seed, sampling.stream, step, rows[i].index, first_sample + s)
                u[b, s] = uniforms(*address, max_new_tokens)
        with allow_nondeterministic_writes() if on_cuda else contextlib.nullcontext():
            tokens, lengths = generate_batch(
                model, [rows[i].prompt for i in batch], u, sampling.eos_id,
                temperature=sampling.temperature, top_p=sampling.top_p,
            )
        tokens, lengths = tokens.tolist(), lengths.tolist()
        for b, i in enumerate(batch):
            responses[i] = [tokens[b][s][: lengths[b][s]] for s in range(k)]
    return responses
