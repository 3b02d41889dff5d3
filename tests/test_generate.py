"""Draws: cached equals uncached, K together equal K alone, and frequencies are the distribution's."""
import math
import random

import numpy as np
import pytest
import torch

from nanorlhf.batching import Row, Stream, pack_rows
from nanorlhf.generate import (
    Sampling,
    distribution,
    generate,
    generate_batch,
    sample_next_token,
    uniforms,
)
from nanorlhf.gpt2 import GPT2, GPT2Config
from nanorlhf.llama import Llama, LlamaConfig

VOCAB, EOS = 13, 2
LLAMA = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32)
TRUNKS = {
    "gpt2": lambda: GPT2(GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=2, n_head=2)),
    "llama": lambda: Llama(LlamaConfig(**LLAMA)),
    "llama-grouped": lambda: Llama(LlamaConfig(**LLAMA, num_key_value_heads=2)),
}
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 3, 4, 5], [1, 1, 4, 6], [5, 3]]


def model_of(name, dtype=torch.float64):
    """Weights large enough that every token matters to every later one."""
    torch.manual_seed(0)
    model = TRUNKS[name]()
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)
    return model.to(dtype)


@torch.no_grad()
def recomputed(model, tokens):
    """Hidden state of the last of these tokens, from the whole text, with no cache and nothing beside it.  -> (D,)"""
    row = torch.tensor([tokens])
    return model.hidden(row, torch.arange(len(tokens))[None], torch.zeros_like(row))[0, -1]


def one_by_one(model, prompt, u, temperature=1.0, top_p=1.0, eos=EOS):
    """One sample, every step computed anew from the whole text.  -> list of ids, EOS included"""
    found = []
    for r in range(len(u)):
        logits = model.logits(recomputed(model, prompt + found))
        found.append(sample_next_token(logits, u[r], temperature, top_p).item())
        if found[-1] == eos:
            break
    return found


def draws(B, K, R, seed=0):
    return torch.from_numpy(np.stack([[uniforms(seed, Stream.ROLLOUT, 0, b, k, R) for k in range(K)] for b in range(B)]))


def cut(tokens, lengths):
    return [[row[:n] for row, n in zip(*pair)] for pair in zip(tokens.tolist(), lengths.tolist())]


# ------------------------------------------------------------------------------------------- cached equals uncached

@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8), (0, 1.0)])
@pytest.mark.parametrize("name", TRUNKS)
def test_cached_is_uncached(name, temperature, top_p, monkeypatch):
    """Prompts of unequal length, K = 3, samples that end at different steps, rows that are dropped when finished: the same tokens."""
    model, u, kept = model_of(name), draws(5, 3, 10), []
    made = model.new_cache
    def watched(*shape):
        cache = made(*shape)
        select = cache.select
        cache.select = lambda rows: (kept.append(rows.tolist()), select(rows))
        return cache
    monkeypatch.setattr(model, "new_cache", watched)
    tokens, lengths = generate_batch(model, PROMPTS, u, EOS, temperature, top_p)
    expected = [[one_by_one(model, prompt, u[b, k], temperature, top_p) for k in range(3)] for b, prompt in enumerate(PROMPTS)]
    found = cut(tokens, lengths)
    assert found == expected
    assert tokens.shape == (5, 3, 10) and tokens.dtype == torch.int64 and lengths.tolist() == [[len(x) for x in row] for row in expected]
    for ids in (ids for row in found for ids in row):
        assert EOS not in ids[:-1] and (ids[-1] == EOS or len(ids) == 10)                # EOS belongs to it, nothing comes after
    if (temperature, top_p) == (1.0, 1.0):
        ended = {len(ids) for row in found for ids in row if ids[-1] == EOS}
        assert len(ended) >= 3 and any(len(ids) == 10 for row in found for ids in row)   # both ways to stop, at several steps


@pytest.mark.parametrize("name", TRUNKS)
def test_finished_rows_leave_the_cache_and_disturb_nobody(name, monkeypatch):
    """Row 0 of three ends at once (its uniforms point into EOS), row 2 after two tokens; row 1 goes on as if alone."""
    model, prompts, u = model_of(name), PROMPTS[:3], draws(3, 2, 8)
    def aim(b, k, step):
        before = one_by_one(model, prompts[b], u[b, k, :step], eos=-1)
        probs = torch.softmax(model.logits(recomputed(model, prompts[b] + before)), -1)
        u[b, k, step] = probs[:EOS].sum() + probs[EOS] / 2                              # the middle of EOS's slice of the CDF
    aim(0, 0, 0), aim(0, 1, 0), aim(2, 0, 0), aim(2, 1, 1)
    kept, made = [], model.new_cache
    def watched(*shape):
        cache = made(*shape)
        select = cache.select
        cache.select = lambda rows: (kept.append(rows.tolist()), select(rows))
        return cache
    monkeypatch.setattr(model, "new_cache", watched)
    found = cut(*generate_batch(model, prompts, u, EOS))
    assert [len(ids) for ids in found[0]] == [1, 1] and [len(found[2][0]), found[2][1][-1]] == [1, EOS]
    assert kept[0] == [False, True, True]                                               # row 0 left; then row 2, if row 1 lives longer
    for b in range(3):
        assert found[b] == cut(*generate_batch(model, prompts[b : b + 1], u[b : b + 1], EOS))[0]
        assert found[b] == [one_by_one(model, prompts[b], u[b, k]) for k in range(2)]


@pytest.mark.parametrize("name", TRUNKS)
def test_hidden_states_of_the_cache(name, monkeypatch):
    """What the head reads at each step is the training path's hidden state at `logit_index`, to 1e-10."""
    model, u, read = model_of(name), draws(4, 3, 7), []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: (read.append(hidden), logits(hidden))[1])
    tokens, _ = generate_batch(model, PROMPTS[:4], u, eos_id=-1)                                # nothing ends: all 7 steps, all rows
    batch = pack_rows([Row(prompt, tokens[b].tolist()) for b, prompt in enumerate(PROMPTS[:4])])
    with torch.no_grad():
        whole = model.hidden(batch.tokens, batch.positions, batch.branch)               # (4,T,16)
    assert len(read) == 7
    for r, hidden in enumerate(read):
        expected = torch.stack([whole[b, batch.logit_index[b, :, r]] for b in range(4)])   # (4,3,16)
        found = hidden[:, None] if r == 0 else hidden.view(4, 3, 16)                     # the prompt's last column is read once for all samples
        assert (found - expected).abs().max() < 1e-10
        assert (expected[1, 0] - recomputed(model, PROMPTS[1] + tokens[1, 0, :r].tolist())).abs().max() < 1e-10


@pytest.mark.parametrize("name", TRUNKS)
def test_k_together_are_k_alone(name):
    model, u = model_of(name), draws(5, 4, 9, seed=1)
    together = cut(*generate_batch(model, PROMPTS, u, EOS))
    for b, prompt in enumerate(PROMPTS):
        for k in range(4):
            assert cut(*generate_batch(model, [prompt], u[b : b + 1, k : k + 1], EOS)) == [[together[b][k]]]
    assert len({tuple(ids) for row in together for ids in row}) > 10                     # the draws do differ


def test_sample_is_a_function_of_the_address():
    """Not of batch, order, micro-batch, or how many others are drawn: later numbers (first_sample=) continue the same stream."""
    model = model_of("llama-grouped")
    def run(which, k=3, max_tokens=8192, first_sample=0, stream=Stream.ROLLOUT, step=2):
        sampling = Sampling(k, 8, EOS, 5, stream, max_tokens=max_tokens)
        return generate(model, [Row(PROMPTS[i], [], 10 + i) for i in which], sampling, step, first_sample)
    all_of_them = run(range(5))
    assert run([3, 0, 4])[1] == all_of_them[0] and run([3, 0, 4])[0] == all_of_them[3]
    assert run(range(5), max_tokens=1) == run(range(5), max_tokens=60) == all_of_them
    assert [row[:2] for row in all_of_them] == run(range(5), k=2)
    assert [row[2:] for row in all_of_them] == run(range(5), k=1, first_sample=2)
    for b in range(5):
        for k in range(3):
            assert all_of_them[b][k] == one_by_one(model, PROMPTS[b], torch.from_numpy(uniforms(5, Stream.ROLLOUT, 2, 10 + b, k, 8)))
    assert all_of_them != run(range(5), step=3)
    assert all_of_them != run(range(5), stream=Stream.EVALUATION)


@pytest.mark.parametrize("name", TRUNKS)
def test_float32_differs_only_at_a_boundary(name):
    """DESIGN 7: a first difference happens only where the uniform lies within 1e-4 of a CDF boundary.

    Half of the samples get one uniform that is 1e-9 beside a boundary of the float64 model; float32 then falls on either side.
    """
    exact, rounded, generator = model_of(name), model_of(name, torch.float32), random.Random(4)
    u, R = draws(len(PROMPTS), 12, 8, seed=3), 8
    for b, prompt in enumerate(PROMPTS):
        for k in range(0, 12, 2):
            step = generator.randrange(R)
            before = one_by_one(exact, prompt, u[b, k, :step], eos=-1)
            edges = distribution(exact.logits(recomputed(exact, prompt + before)), 1.0, 1.0).cumsum(-1)
            u[b, k, step] = edges[generator.randrange(VOCAB - 1)] + generator.choice([-1e-9, 1e-9])
    found, _ = generate_batch(rounded, PROMPTS, u, eos_id=-1)
    differ = 0
    for b, prompt in enumerate(PROMPTS):
        for k in range(12):
            for dtype, model in ((torch.float32, rounded), (torch.float64, exact)):
                expected = one_by_one(model, prompt, u[b, k], eos=-1)
                first = next((r for r in range(R) if found[b, k, r] != expected[r]), None)
                if first is not None:
                    differ += dtype == torch.float64
                    edges = distribution(model.logits(recomputed(model, prompt + expected[:first])), 1.0, 1.0).cumsum(-1)
                    assert (edges - u[b, k, first]).abs().min() < 1e-4, (b, k, first, dtype)
                    assert k % 2 == 0, "a uniform of no special place"                   # probability 60 x 8 x 13 x 2e-7 = 0.001
    assert differ >= 5                                                                   # of 30 coin flips: else nothing was tested


def test_one_new_token():
    """R = 1 needs no second forward, and a single token may be EOS or not."""
    model = model_of("gpt2")
    tokens, lengths = generate_batch(model, PROMPTS, draws(5, 6, 1), EOS)
    assert tokens.shape == (5, 6, 1) and (lengths == 1).all()
    assert all(tokens[b, k].tolist() == one_by_one(model, PROMPTS[b], draws(5, 6, 1)[b, k]) for b in range(5) for k in range(6))


# ---------------------------------------------------------------------------------------------------------- uniforms

def test_uniforms_are_pinned():
    """Philox is specified, so what was drawn once is drawn on every machine and in every later run."""
    assert uniforms(0, Stream.ROLLOUT, 0, 0, 0, 3).tolist() == [0.8144335776159864, 0.4396808049627232, 0.2997200291784332]
    assert uniforms(7, Stream.EVALUATION, 12, 345, 6, 5).tolist() == [0.18521066549578125, 0.4325510410750597, 0.0647589609242667, 0.4056241487318982, 0.44575115690181577]
    assert uniforms(7, Stream.EVALUATION, 12, 345, 6, 2).tolist() == [0.18521066549578125, 0.4325510410750597]                  # a longer draw begins like a shorter one
    assert uniforms(0, Stream.ROLLOUT, 0, 0, 0, 3).dtype == np.float64


def test_distinct_addresses_distinct_numbers():
    # 4^5 = 1,024 addresses, 8 numbers each: 8,192 of 2^53 values; two equal by chance with probability 8192^2 / 2^54 = 4e-9
    address = [(a, b, c, d, e) for a in range(4) for b in (2, 3, 4, 5) for c in range(4) for d in range(4) for e in range(4)]
    numbers = np.array([uniforms(*at, 8) for at in address])
    assert numbers.shape == (1024, 8) and len(np.unique(numbers)) == 8192 and numbers.min() >= 0 and numbers.max() < 1
    # mean 1/2 +- 5 x sqrt(1/12 / 8192) = .016; neighbours (the next sample) uncorrelated to 5 / sqrt(8184) = .055
    assert abs(numbers.mean() - 0.5) < 0.016
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.055
    ends = [uniforms(2**63 - 1 - i, Stream.ROLLOUT, 2**40, 2**40, 2**40, 1)[0] for i in range(3)]     # the largest seeds are three different ones
    assert len(set(ends)) == 3


# -------------------------------------------------------------------------------------------- 100,000 draws and extremes

def chi_square(found, probs):
    """Pearson's statistic of observed counts against probabilities, over tokens that can occur; no other may have occurred."""
    found, expected = found.double(), probs * found.sum()
    assert not found[probs == 0].any() and (expected[probs > 0] > 5).all()
    return (((found - expected) ** 2)[probs > 0] / expected[probs > 0]).sum().item()


def bound(outcomes):
    """A chi-square variable of d degrees passes d + 2 sqrt(d x) + 2 x with probability under exp(-x)  [Laurent & Massart 2000]; x = 14: 8e-7.

    For d = 11 this is 64. A probability of .1 that is off by .01 adds 100,000 x .01^2 / .1 = 100, so it would be found.
    """
    d = outcomes - 1
    return d + 2 * math.sqrt(14 * d) + 28


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.8), (0.7, 0.5)])
def test_a_hundred_thousand_draws(temperature, top_p):
    logits = torch.tensor([0.3, -1.2, 1.5, 0.0, 0.9, -0.4, 2.0, -2.0, 0.7, 1.1, -0.8, 0.2])
    n = 100_000
    tokens = sample_next_token(logits.expand(n, 12), torch.from_numpy(uniforms(1, Stream.ROLLOUT, 0, 0, 0, n)), temperature, top_p)
    found = torch.bincount(tokens, minlength=12)
    # by hand: softmax of logits / T; the likeliest tokens until they hold top_p; renormalised
    weights = [math.exp(x / temperature) for x in logits.tolist()]
    probs = [w / sum(weights) for w in weights]
    kept, mass = set(), 0.0
    for i in sorted(range(12), key=lambda i: -probs[i]):
        if mass < top_p:
            kept.add(i)
            mass += probs[i]
    expected = torch.tensor([probs[i] / mass if i in kept else 0.0 for i in range(12)], dtype=torch.float64)
    assert set(found.nonzero().flatten().tolist()) == kept and (len(kept) < 12) == (top_p < 1)
    assert chi_square(found, expected) < bound(len(kept))
    shifted = expected.clone()                                                            # able to fail: .01 from one token to another
    a, b = sorted(kept, key=lambda i: probs[i])[-2:]
    shifted[a], shifted[b] = shifted[a] + 0.02, shifted[b] - 0.02
    assert chi_square(found, shifted) > bound(len(kept))
    assert torch.allclose(distribution(logits, temperature, top_p), expected, atol=1e-7)


def test_samples_of_one_prompt_have_the_model_s_distribution():
    """20,000 responses of one prompt through sample(): first tokens, whose uniforms differ in the sample number alone."""
    model = model_of("gpt2")
    with torch.no_grad():
        probs = torch.softmax(model.logits(recomputed(model, PROMPTS[0])), -1)
    found = generate(model, [Row(PROMPTS[0], [])], Sampling(20_000, 1, EOS, 0, Stream.ROLLOUT), 0)[0]
    assert chi_square(torch.bincount(torch.tensor(found).flatten(), minlength=VOCAB), probs) < bound(VOCAB)


def test_top_p_is_the_smallest_set():
    # ids are not in order of probability: .4 at id 3, .3 at 0, .15 at 4, .1 at 1, .05 at 2
    logits = torch.tensor([0.3, 0.1, 0.05, 0.4, 0.15], dtype=torch.float64).log()
    for top_p, kept in ((0.39, {3}), (0.41, {3, 0}), (0.69, {3, 0}), (0.71, {3, 0, 4}), (0.84, {3, 0, 4}), (0.86, {3, 0, 4, 1}), (0.96, {0, 1, 2, 3, 4}), (1e-300, {3})):
        probs = distribution(logits, 1.0, top_p)
        assert set(probs.nonzero().flatten().tolist()) == kept and probs.sum().item() == pytest.approx(1, abs=1e-15)
        mass = sum(logits.exp()[i].item() for i in kept)
        assert all(probs[i].item() == pytest.approx(logits.exp()[i].item() / mass, rel=1e-12) for i in kept)
    assert distribution(torch.zeros(4), 1.0, 0.5).tolist() == [0.5, 0.5, 0, 0]            # of equal ones the first: .25 + .25 is enough
    torch.manual_seed(0)
    for _ in range(100):                                                                  # against sums over prefixes, many shapes
        logits, top_p = 3 * torch.randn(2, 9, dtype=torch.float64), torch.rand(()).item()
        probs, plain = distribution(logits, 1.0, top_p), torch.softmax(logits, -1)
        for got, p in zip(probs, plain):
            ordered = p.sort(descending=True).values
            size = next(n for n in range(1, 10) if ordered[:n].sum() >= top_p)
            assert (got > 0).sum() == size and ordered[:size].sum() >= top_p and torch.equal(got > 0, p >= ordered[size - 1])
    with pytest.raises(AssertionError):
        distribution(logits, 1.0, 0.0)


def test_extremes_never_draw_what_has_no_probability():
    largest = 1 - 2.0**-53                                                                # the last float64 below 1, as Philox may give
    inf = torch.inf
    at = lambda logits, u, **how: sample_next_token(torch.as_tensor(logits, dtype=torch.float32), torch.tensor(u, dtype=torch.float64), **how).item()
    assert at([-inf, -inf, 0.0, 1.0, -inf], 0.0) == 2 and at([-inf, -inf, 0.0, 1.0, -inf], largest) == 3
    assert at([0.0, -inf, 0.0], 0.5) == 2 and at([0.0, -inf, 0.0], np.nextafter(0.5, 0)) == 0     # u on the boundary: the next one that can be
    assert at([0.0, 0.0, 0.0, 0.0], 0.25) == 1 and at([0.0, 0.0, 0.0, 0.0], largest) == 3
    assert at([5.0], 0.0) == 0 and at([5.0], largest) == 0
    assert at([0.0, -800.0, -800.0], largest) == 0                                        # exp(-800) is 0 in float64 too
    assert at([1.0, 3.0, 2.0], largest, top_p=0.1) == 1 and at([1.0, 3.0, 2.0], 0.0, top_p=0.1) == 1
    # a real vocabulary: 50,257 rounded summands; the CDF may end short of the largest u, or beyond it
    torch.manual_seed(0)
    logits = 4 * torch.randn(8, 50_257)
    logits[:, ::3] = -inf                                                                 # ids 0 and 50,256 are among these
    for temperature, top_p in ((1.0, 1.0), (0.3, 1.0), (1.0, 0.9)):
        probs = distribution(logits, temperature, top_p)
        for u in (0.0, 2.0**-53, 0.5, largest):
            tokens = sample_next_token(logits, torch.full((8,), u, dtype=torch.float64), temperature, top_p)
            assert (probs.gather(-1, tokens[:, None]) > 0).all()
    # the CDF's own numbers as uniforms: the token after the boundary, never one of probability 0 (ids 0, 3, 6 ...)
    edges = distribution(logits[0], 1.0, 1.0).cumsum(-1)[1:2000:7]
    tokens = sample_next_token(logits[0].expand(len(edges), -1), edges)
    assert (tokens % 3 > 0).all() and (distribution(logits[0], 1.0, 1.0).cumsum(-1)[tokens] > edges).all()


def test_draw_by_hand():
    # probabilities 1/8, 1/2, 1/4, 1/8: boundaries at .125, .625, .875
    logits = torch.tensor([0.125, 0.5, 0.25, 0.125]).log()
    u = torch.tensor([0.0, 0.1, 0.13, 0.62, 0.63, 0.87, 0.88, 0.99], dtype=torch.float64)
    assert sample_next_token(logits.expand(8, 4), u).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    # T = 1/2 squares them: 1, 16, 4, 1 of 22 -> boundaries .045, .773, .955
    assert sample_next_token(logits.expand(8, 4), u, temperature=0.5).tolist() == [0, 1, 1, 1, 1, 2, 2, 3]
    assert sample_next_token(logits.expand(8, 4), u, temperature=0).tolist() == [1] * 8                # the likeliest, whatever u
    assert sample_next_token(logits.view(1, 1, 4).expand(2, 4, 4), u.view(2, 4)).tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]   # any leading shape


def test_temperature_zero_is_greedy():
    model = model_of("llama")
    tokens, lengths = generate_batch(model, PROMPTS, draws(5, 2, 6), EOS, temperature=0)
    for b, prompt in enumerate(PROMPTS):
        text = list(prompt)
        for _ in range(lengths[b, 0]):
            text.append(model.logits(recomputed(model, text)).argmax().item())
        assert text[len(prompt):] == tokens[b, 0, : lengths[b, 0]].tolist() == tokens[b, 1, : lengths[b, 1]].tolist()
    assert Stream.SAMPLE == 4 and len(Stream) == len(set(map(int, Stream))) == 5           # streams that never meet
