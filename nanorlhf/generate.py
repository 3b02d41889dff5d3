"""K samples of each prompt. The prompt is computed once; then its row grows by K columns at a time, one a sample, under the
same rule of who sees whom as in training (gpt2.visible). So the prompt's keys and values are stored once a group.

Every draw is a function of (seed, purpose, step, index of the prompt, sample): no generator has a state to save, and what a
prompt's sample says does not depend on which other prompts are in the batch.

B prompts, K samples each, R new tokens at most, P prompt columns, V vocabulary.
"""
import contextlib
import functools

import numpy as np
import torch

from .batching import micro_batches

ROLLOUT, EVALUATION, SAMPLE, MINIBATCH = 2, 3, 4, 5    # purposes: streams of random numbers that never meet (1 is batching.SHUFFLE)
FEW = 8                    # tokens for which recording a graph takes longer than it saves


def uniforms(seed, purpose, step, index, sample, n):
    """n numbers in [0, 1), one a token.  -> (n,) float64.  A counter-based generator: its key and counter are the address of the draw."""
    address = np.random.Philox(key=[seed, purpose], counter=[0, step, index, sample])
    return np.random.Generator(address).random(n)


def distribution(logits, temperature, top_p):
    """Probabilities to draw from, float64, summing to 1 over token ids.  (...,V) -> (...,V)

    top_p keeps the fewest most likely tokens that hold at least top_p of the mass. No sort unless it is asked for.
    """
    assert temperature > 0 and top_p > 0, (temperature, top_p)         # top_p 0 would keep no token: 0 / 0
    probs = torch.softmax(logits if temperature == 1 else logits.double() / temperature, -1, dtype=torch.float64)
    if top_p < 1:
        ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered                          # mass of the likelier ones
        ordered = torch.where(before < top_p, ordered, torch.zeros_like(ordered))
        probs = torch.zeros_like(probs).scatter(-1, ids, ordered)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(logits, u, temperature=1.0, top_p=1.0):
    """Inverse CDF over token ids: the first token whose cumulated probability exceeds u. temperature 0 is the likeliest token.

    logits (...,V);  u (...) float64 in [0, 1)  ->  token ids (...)
    """
    if temperature == 0:
        return logits.argmax(-1)
    cdf = distribution(logits, temperature, top_p).cumsum(-1)
    total = cdf[..., -1:]                                              # rounding may leave it short of u
    return torch.searchsorted(cdf, torch.minimum(u.unsqueeze(-1), torch.nextafter(total, total - 1)), right=True).squeeze(-1)


def step(model, cache, new, ends, u, count, samples, temperature, top_p):
    """From token `count` of every sample to the next, in place, since a CUDA graph repeats this as it is.

    new (rows,K) tokens;  ends (rows,) prompt lengths;  u (rows,K,R);  count (), a tensor;  samples (B,K) branches
    """
    hidden = model.hidden(new, (ends + count)[:, None].expand_as(new), samples[: len(new)], cache)
    count += 1
    logits = model.logits(hidden.flatten(0, 1)).unflatten(0, new.shape)                 # (rows,K,V)
    new.copy_(draw(logits, u.index_select(2, count[None]).squeeze(2), temperature, top_p))


@contextlib.contextmanager
def quick_writes():
    """On CUDA without the guard against sums of unknown order: every place in the cache is written once, and the guard copies all of it."""
    strict = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=True)


def captured(work):
    """What `work` launches on the GPU, recorded once and repeated without Python. The recording itself computes nothing.

    Recording waits for the GPU and gives unused memory back, so it pays for tens of tokens, not for a handful.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@torch.no_grad()
def extend(model, prompts, u, eos_id, temperature=1.0, top_p=1.0, fixed=None):
    """Continues each of B prompts K times, up to EOS or R tokens.

    prompts: B lists of ids;  u (B,K,R) float64, the draws  ->  (tokens (B,K,R) int64, lengths (B,K)), EOS included.
    fixed: every step on the same memory, as a CUDA graph needs it (default: on CUDA); else finished rows leave the batch.
    """
    device = next(model.parameters()).device
    fixed = device.type == "cuda" if fixed is None else fixed
    u = torch.as_tensor(u, device=device)
    (B, K, R), longest = u.shape, max(map(len, prompts))
    ends = torch.tensor([len(prompt) for prompt in prompts], device=device)            # (B,)
    tokens, branch = torch.zeros(B, longest, dtype=torch.long), torch.full((B, longest), -1)
    for b, prompt in enumerate(prompts):
        tokens[b, :len(prompt)], branch[b, :len(prompt)] = torch.tensor(prompt), 0
    positions = torch.arange(longest, device=device) * (branch == 0).to(device)

    cache = model.new_cache(B, longest + K * (R - 1), fixed)
    last = torch.arange(B, device=device) * longest + ends - 1
    hidden = model.hidden(tokens.to(device), positions, branch.to(device), cache, at=last)       # (B,D): the prompt, once
    new = draw(model.logits(hidden)[:, None].expand(B, K, -1), u[:, :, 0], temperature, top_p)   # (B,K)
    out = torch.zeros(B, K, R, dtype=torch.long, device=device)
    lengths = torch.full((B, K), R, device=device)
    alive, count = torch.arange(B, device=device), torch.zeros((), dtype=torch.long, device=device)    # rows with an unfinished sample
    samples, replay = torch.arange(1, K + 1, device=device).expand(B, K), None         # branch of each new column
    for r in range(R):
        out[alive, :, r] = new
        lengths[alive] = torch.where((new == eos_id) & (lengths[alive] == R), r + 1, lengths[alive])
        going = (lengths[alive] == R).any(-1)
        if r == R - 1 or not going.any():
            break
        if not fixed and not going.all():
            alive, new, ends, u = alive[going], new[going], ends[going], u[going]
            cache.keep(going)
        work = functools.partial(step, model, cache, new, ends, u, count, samples, temperature, top_p)
        if fixed and device.type == "cuda" and r > 0 and R > FEW:              # the first step is done by hand: it warms the kernels up
            replay = replay or captured(work)
            replay()
        else:
            work()
    return out, lengths


def sample(model, prompts, indices, k, max_new, eos_id, seed, purpose, step, temperature=1.0, top_p=1.0, max_tokens=8192, first=0):
    """K responses for each prompt, in batches of at most max_tokens columns.  -> for each prompt K lists of ids, EOS included

    indices: each prompt's place in the data;  first: number of the first sample (drawing again takes later numbers).
    """
    found = [None] * len(prompts)
    for part in micro_batches([len(prompt) + k * max_new for prompt in prompts], max_tokens, padded=True):
        u = np.stack([[uniforms(seed, purpose, step, indices[i], first + s, max_new) for s in range(k)] for i in part])
        with quick_writes() if next(model.parameters()).is_cuda else contextlib.nullcontext():
            tokens, lengths = (x.tolist() for x in extend(model, [prompts[i] for i in part], u, eos_id, temperature, top_p))
        for b, i in enumerate(part):
            found[i] = [tokens[b][s][: lengths[b][s]] for s in range(k)]
    return found
