"""Every way to compute the same numbers, against each response alone, written out here; what each way is for, it does."""
import copy
import dataclasses
import functools
import random
import shutil

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanorlhf import attention, generate, heads, losses
from nanorlhf.batching import Row, pack_rows
from nanorlhf.gpt2 import GPT2, GPT2Config
from nanorlhf.heads import Policy, RewardModel
from nanorlhf.llama import Llama, LlamaConfig
from nanorlhf.run import kernels, optim, precision

VOCAB, TEMPERATURE, CPU = 23, 0.7, torch.device("cpu")
LLAMA = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128)
TRUNKS = {
    "gpt2": lambda: GPT2(GPT2Config(vocab_size=VOCAB, n_positions=128, n_embd=16, n_layer=2, n_head=2)),
    "llama": lambda: Llama(LlamaConfig(**LLAMA)),
    "llama-grouped": lambda: Llama(LlamaConfig(**LLAMA, num_key_value_heads=2, tie_word_embeddings=True)),
}
DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5}


def ids(n, seed):
    return random.Random(seed).choices(range(VOCAB), k=n)


# K = 3, 1 and 2, so the second row has two absent responses, the third one; one response is empty. 9 + 15 + 6 = 30 columns.
ROWS = [Row(ids(3, 0), [ids(4, 1), [], ids(2, 2)]), Row(ids(9, 3), [ids(6, 4)]), Row(ids(1, 5), [ids(1, 6), ids(4, 7)])]
# 70 + 90 + 140 = 300 columns: FlexAttention pads them to 384, and its blocks end at 128 and 256, inside the second and third row
LONG = [Row(ids(40, 8), [ids(20, 9), ids(10, 10)]), Row(ids(30, 11), [ids(25, 12), ids(35, 13)]), Row(ids(60, 14), [ids(45, 15), ids(35, 16)])]
WHOLE = [Row(ids(50, 17), [ids(50, 18)]), Row(ids(40, 19), [ids(60, 20), ids(56, 21)])]             # 100 + 156 = 256 = 2 x 128, nothing to pad


def models(name, dtype=torch.float64):
    """A policy with a critic and a scorer of two outputs on one trunk; weights large enough that every column that is seen matters."""
    torch.manual_seed(0)
    trunk = TRUNKS[name]()
    both = torch.nn.ModuleList([Policy(trunk, value_head=True), RewardModel(trunk, outputs=2)])
    for parameter in both.parameters():
        parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)
    return both.to(dtype)


def spread(batch, where):
    """The same columns with padding put in: two before column 0 ("left") or three before column 2 ("middle") of each row."""
    at, n = {"left": (0, 2), "middle": (2, 3)}[where]
    wide = lambda x, pad: torch.cat([x[:, :at], torch.full((len(x), n), pad), x[:, at:]], 1)
    move = lambda x, keep: torch.where(keep & (x >= at), x + n, x)                    # of an absent response `last_index` stays 0: padding, at the left
    return dataclasses.replace(batch, tokens=wide(batch.tokens, 5), positions=wide(batch.positions, 7), branch=wide(batch.branch, -1), lengths=None,
                               logit_index=move(batch.logit_index, batch.response_mask), last_index=move(batch.last_index, batch.valid))


# ---------------------------------------------------------------------------------------------------- the reference

def turned(x, theta):
    """Rotary positions as complex numbers.  x (T,heads,d): dimension i is the real, i + d/2 the imaginary part."""
    T, _, d = x.shape
    angle = torch.arange(T)[:, None] * theta ** -(torch.arange(0, d, 2).float() / d)    # float32, as in the model
    z = torch.complex(*x.chunk(2, -1)) * torch.complex(angle.cos().double(), angle.sin().double())[:, None]
    return torch.cat([z.real, z.imag], -1)


def alone(trunk, text):
    """Final hidden states (T,D) of one text: full causal attention by its formula, with nothing of the code but weights and norms."""
    T, size = len(text), lambda x, heads: x.view(len(text), heads, -1)
    x = trunk.wte.weight[text] + trunk.wpe.weight[:T] if trunk.family == "gpt2" else trunk.embed_tokens.weight[text]
    for block in trunk.blocks:
        if trunk.family == "gpt2":
            H, a = trunk.config.n_head, block.attn
            q, k, v = (size(y, H) for y in (block.ln_1(x) @ a.c_attn.weight + a.c_attn.bias).chunk(3, -1))
        else:
            H, a, normed = trunk.config.num_attention_heads, block.self_attn, block.input_layernorm(x)
            q, k, v = size(normed @ a.q_proj.weight.T, H), size(normed @ a.k_proj.weight.T, (a.k_proj.out_features // a.head_width)), size(normed @ a.v_proj.weight.T, (a.k_proj.out_features // a.head_width))
            q, k = turned(q, trunk.config.rope_theta), turned(k, trunk.config.rope_theta)
            k, v = (y.repeat_interleave(H // (a.k_proj.out_features // a.head_width), 1) for y in (k, v))
        weight = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5 + torch.full((T, T), -torch.inf, dtype=x.dtype).triu(1)
        y = torch.einsum("hij,jhd->ihd", weight.softmax(-1), v).flatten(1)
        if trunk.family == "gpt2":
            x = x + y @ a.c_proj.weight + a.c_proj.bias
            x = x + F.gelu(block.ln_2(x) @ block.mlp.c_fc.weight + block.mlp.c_fc.bias, approximate="tanh") @ block.mlp.c_proj.weight + block.mlp.c_proj.bias
        else:
            x = x + y @ a.o_proj.weight.T
            m, normed = block.mlp, block.post_attention_layernorm(x)
            x = x + (F.silu(normed @ m.gate_proj.weight.T) * (normed @ m.up_proj.weight.T)) @ m.down_proj.weight.T
    return trunk.final_norm(x)


def expected(both, rows):
    """logprobs, entropy, values (B,K,R) and scores (B,K,2), each response alone with its prompt; 0 where there is none."""
    (policy, scorer), batch = both, pack_rows(rows)
    logprobs, entropy, values = (list(torch.zeros(batch.response_mask.shape, dtype=torch.float64).flatten(0, 1)) for _ in range(3))
    scores, (_, K, R) = list(torch.zeros(*batch.valid.shape, 2, dtype=torch.float64).flatten(0, 1)), batch.response_mask.shape
    for b, row in enumerate(rows):
        for k, response in enumerate(row.responses):
            hidden, n = alone(policy.trunk, row.prompt + response), len(response)
            before = hidden[len(row.prompt) - 1 : -1]                                  # column t predicts token t + 1
            logp = (policy.trunk.logits(before) / TEMPERATURE).log_softmax(-1)
            found = (logp[range(n), response], -(logp.exp() * logp).sum(-1), policy.value_head(before)[:, 0])
            for fields, x in zip((logprobs, entropy, values), found):
                fields[b * K + k] = F.pad(x, (0, R - n))
            scores[b * K + k] = scorer.score(hidden[-1])
    return [torch.stack(x).unflatten(0, (-1, K)) for x in (logprobs, entropy, values, scores)]


def computed(both, batch):
    out, scores = both[0](batch, TEMPERATURE, return_entropy=True), both[1](batch)
    return [out.logprobs, out.entropy, out.values, torch.where(batch.valid[..., None], scores, 0.0)]


def gradients(both, outputs):
    """Of a loss that weighs every output by another fixed number.  -> one long vector"""
    torch.manual_seed(1)
    both.zero_grad()
    sum((x * torch.randn(x.shape, dtype=torch.float64)).sum() for x in outputs).backward()
    return torch.cat([p.grad.flatten() for p in both.parameters()])


@functools.cache
def reference(name, which):
    both = models(name)
    outputs = expected(both, {"rows": ROWS, "long": LONG, "whole": WHOLE}[which])
    return [x.detach() for x in outputs], gradients(both, outputs)


def near(found, right, tolerance):
    assert found.isfinite().all() and (found - right).abs().max() <= tolerance * right.abs().max()


# -------------------------------------------------------------------------------------------------------- the paths

def dense(both, patch):
    """As the scripts run without --compile on a CPU."""


def flex(both, patch):
    """In eager mode. PyTorch refuses its backward on a CPU by a check of the device alone; the formulas are the same ones."""
    both[0].trunk.flex = True
    patch.setattr(flex_attention, "_validate_device", lambda *_: None)


def activation_checkpointing(both, patch):
    both[0].trunk.activation_checkpointing = True


def chunked(both, patch):
    patch.setattr(heads, "LOGITS_CHUNK", 3)


def all_columns(both, patch):
    """The last block computes every column, and what is wanted is picked after it."""
    hidden = both[0].trunk.hidden
    patch.setattr(both[0].trunk, "hidden", lambda *where, at, lengths: hidden(*where).flatten(0, 1)[at])


def traced(both, patch):
    """--compile without its C++ compiler: what was traced runs as it is."""
    torch._dynamo.reset()
    patch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    kernels.choose_kernels(both[0].trunk, CPU, "float64", compile=True, activation_checkpointing=False)
    assert not both[0].trunk.flex                                                      # on a CPU its backward would be refused


@pytest.mark.parametrize("path", [dense, flex, activation_checkpointing, chunked, all_columns, traced], ids=lambda path: path.__name__)
@pytest.mark.parametrize("name", TRUNKS)
def test_every_path_is_each_response_alone(name, path, monkeypatch):
    """logprobs, entropy, values, scores and gradients; padding at the right, the left or in the middle; 1e-10 and, in float32, 1e-5."""
    right, slope = reference(name, "rows")
    for dtype, tolerance in DTYPES.items():
        both, batch = models(name, dtype), pack_rows(ROWS)
        path(both, monkeypatch)
        for layout in (batch, spread(batch, "left"), spread(batch, "middle")):
            found = computed(both, layout)
            for x, y in zip(found, right):
                near(x, y, tolerance)
            near(gradients(both, found), slope, tolerance)
            with torch.no_grad():                                                      # another branch of activation_checkpointing and of the chunks
                for x, y in zip(computed(both, layout), right):
                    near(x, y, tolerance)
        monkeypatch.undo()


@pytest.mark.parametrize("which", ["long", "whole"])
@pytest.mark.parametrize("name", TRUNKS)
def test_several_blocks_of_flex_attention(name, which, monkeypatch):
    """300 columns, padded to 384, and 256, not padded: blocks of 128 end within rows."""
    right, slope = reference(name, which)
    both, batch = models(name), pack_rows(LONG if which == "long" else WHOLE)
    for path in (dense, flex):
        path(both, monkeypatch)
        found = computed(both, batch)
        for x, y in zip(found, right):
            near(x, y, 1e-10)
        near(gradients(both, found), slope, 1e-10)
    assert both[0].trunk.hidden(batch.tokens, batch.positions, batch.branch).shape == (*batch.tokens.shape, 16)     # copies of the last column are gone


def test_who_sees_whom_in_flex_attention():
    """Pair by pair, by the words: the same row, not later, the prompt or one's own branch; and 1 of 9 blocks, at least, is skipped."""
    branch = spread(pack_rows(LONG), "middle").branch
    layout = attention.Layout(branch, None, None, flex=True)
    index, mask = layout.index, layout.mask
    kept = (branch.flatten() >= 0).nonzero().flatten()
    assert len(index) == 384 and torch.equal(index[:300], kept) and (index[300:] == kept[-1]).all()
    row, own, at = kept // branch.shape[1], branch.flatten()[kept], torch.arange(384)
    found = mask.mask_mod(0, 0, at[:, None], at)
    right = (row[:, None] == row) & (at[:300, None] >= at[:300]) & ((own == 0) | (own[:, None] == own))
    assert torch.equal(found[:300, :300], right)
    assert not found[:300, 300:].any() and not found[300:, :300].any()                 # copies belong to nobody
    blocks = found.view(3, 128, 3, 128).any(3).any(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks) and not blocks[0, 2] and not blocks[2, 0]


@pytest.mark.parametrize("name", TRUNKS)
def test_what_the_host_knows_is_not_asked_of_the_device(name):
    """A tensor on the meta device has no values: a forward that asks for one fails. On a GPU each such question makes the host wait."""
    trunk, batch = models(name)[0].trunk, pack_rows(ROWS)
    assert batch.lengths == [9, 15, 6]
    where = batch.tokens, batch.positions, batch.branch
    known = trunk.hidden(*where, lengths=batch.lengths)
    assert torch.equal(known, trunk.hidden(*where))
    trunk, batch = trunk.to("meta"), batch.to("meta")
    where = batch.tokens, batch.positions, batch.branch
    at = batch.last_index.flatten()
    assert trunk.hidden(*where, at=at, lengths=batch.lengths).shape == (9, 16)
    assert trunk.hidden(*where, lengths=batch.lengths).shape == known.shape
    with pytest.raises(NotImplementedError, match="nonzero"):
        trunk.hidden(*where, at=at)


# ---------------------------------------------------------------------------------------------------------- compiled

@pytest.mark.parametrize("name", ["gpt2", "llama-grouped"])
def test_compiled_blocks_are_compiled_once(name, monkeypatch):
    """Not anew for each number of rows: PyTorch gives up after 8 times, and computes everything slowly from then on."""
    both = models(name)
    traced(both, monkeypatch)
    count = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.no_grad():
        both[1](pack_rows(LONG[:2]))
        before = count()
        for n in (3, 4, 5, 6):
            both[1](pack_rows((ROWS + LONG)[:n]))
    assert before > 0 and count() == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama-grouped"])
def test_compiled_by_inductor(name):
    """As test_every_path..., with the kernels that --compile makes: about 40 s of one core each."""
    if not any(map(shutil.which, ("g++", "clang++", "cl"))):
        pytest.skip("no C++ compiler")
    torch._dynamo.reset()
    (right, slope), both = reference(name, "rows"), models(name)
    kernels.choose_kernels(both[0].trunk, CPU, "float64", compile=True, activation_checkpointing=True)
    found = computed(both, spread(pack_rows(ROWS), "middle"))
    for x, y in zip(found, right):
        near(x, y, 1e-10)
    near(gradients(both, found), slope, 1e-10)


# --------------------------------------------------------------------------------------------------- chunks, recomputing

def test_never_more_than_chunk_logits_at_once(monkeypatch):
    """17 response tokens, 3 at a time: six pieces, and the same six again in the backward; without gradients no second time."""
    (policy, _), batch, read = models("gpt2"), pack_rows(ROWS), []
    monkeypatch.setattr(heads, "LOGITS_CHUNK", 3)
    logits = policy.trunk.logits
    monkeypatch.setattr(policy.trunk, "logits", lambda hidden: (read.append(len(hidden)), logits(hidden))[1])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.shape), x)[1], lambda x: x):
        out = policy(batch, return_entropy=True)
    assert read == [3, 3, 3, 3, 3, 2] and not any(shape[-1:] == (VOCAB,) and len(shape) == 2 and shape[0] <= 17 for shape in kept)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert sorted(read) == [2, 2] + 10 * [3]
    with torch.no_grad():
        policy(batch)
    assert len(read) == 18


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_activation_checkpointing_keeps_less_than_half(family):
    """Bytes of activations kept for the backward, 6 blocks. What `activation_checkpointing` keeps beside saved tensors is each block's input, n x D."""
    config = GPT2Config(vocab_size=VOCAB, n_positions=128, n_embd=16, n_layer=6, n_head=2)
    trunk, batch = GPT2(config) if family == "gpt2" else Llama(LlamaConfig(**{**LLAMA, "num_hidden_layers": 6})), pack_rows(LONG)
    weights, kept = {p.untyped_storage().data_ptr() for p in trunk.parameters()}, {}
    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x, x.untyped_storage().nbytes()      # x too, so that no address is used twice
        return x
    sizes = {}
    for trunk.activation_checkpointing in (False, True):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            trunk.hidden(batch.tokens, batch.positions, batch.branch)
        sizes[trunk.activation_checkpointing] = sum(size for _, size in kept.values()) + 6 * 300 * 16 * 4 * trunk.activation_checkpointing
    assert 0 < sizes[True] < 0.5 * sizes[False], sizes


# ---------------------------------------------------------------------------------------------------------- bfloat16

def trained_like(family):
    """4 blocks of width 128 whose logits are spread as a trained model's: each branch adds about as much as came in, logits have deviation 3."""
    torch.manual_seed(0)
    trunk = (GPT2(GPT2Config(vocab_size=512, n_positions=128, n_embd=128, n_layer=4, n_head=4)) if family == "gpt2" else
             Llama(LlamaConfig(vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                               max_position_embeddings=128, tie_word_embeddings=True)))
    for name, p in trunk.named_parameters():
        if p.ndim == 2:                                                                # tables: 3 / sqrt(128); matrices: 1 / sqrt(128)
            torch.nn.init.normal_(p, std=(3 if "wte" in name or "embed" in name else 1) / 128 ** 0.5)
    scorer = RewardModel(trunk)
    scorer.init_head()
    torch.nn.init.normal_(scorer.score.weight, std=128 ** -0.5)                        # scores of deviation 1, as a reward model's
    return torch.nn.ModuleList([Policy(trunk, value_head=True), scorer])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bfloat16_moves_little(family):
    """bfloat16 keeps 8 bits: one rounding is off by up to 2^-9 = 0.2 %, some 20 in a row (5 a block) by about 1 %. Logits have deviation 3 / 0.7,
    so 0.04 is the size of a logprob's error, and five times that the largest of 170. Found: mean 0.034 and 0.053, largest 0.12 and 0.23;
    entropy 0.07 and 0.13; scores 0.013 and 0.047, of deviation 0.35.
    """
    both, batch = trained_like(family), pack_rows(LONG)
    (policy, scorer), read = both, []
    found = {}
    for dtype in ("float32", "bfloat16"):
        with torch.no_grad(), precision.autocast(policy, dtype):
            out = policy(batch, TEMPERATURE, return_entropy=True)
            found[dtype] = out.logprobs[batch.response_mask], out.entropy[batch.response_mask], scorer(batch)[batch.valid]
        assert all(x.dtype == torch.float32 for x in found[dtype])
    logprobs, entropy, scores = ((a - b).abs() for a, b in zip(*found.values()))
    assert 1e-4 < logprobs.mean() < 0.1 and logprobs.max() < 0.5                      # more than nothing: autocast is on
    assert entropy.max() < 0.3 and scores.max() < 0.1

    # the softmax is float32's: from the same bfloat16 logits, it equals float64's to 1e-5; in bfloat16 it would be off by 2^-9 x 8 = 0.016
    logits = policy.trunk.logits
    policy.trunk.logits = lambda hidden: (read.append(logits(hidden)), read[-1])[1]
    with torch.no_grad(), precision.autocast(policy, "bfloat16"):
        out = policy(batch, TEMPERATURE)
    assert read[0].dtype == torch.bfloat16
    right = (read[0].double() / TEMPERATURE).log_softmax(-1).gather(1, batch.responses[batch.response_mask][:, None])[:, 0]
    assert (out.logprobs[batch.response_mask] - right).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_training_step_in_bfloat16(family):
    """Loss to 0.3 % (errors of 0.04 average over 170 tokens), gradient norm to 1 %, before and after; weights, gradients and AdamW's state float32.

    Found: 0.01 to 0.10 % of the loss, 0.02 to 0.17 % of the norm.
    """
    batch, losses_found, norms = pack_rows(LONG), {}, {}
    for dtype in ("float32", "bfloat16"):
        policy = trained_like(family)[0]
        optimizer, seen = optim.adamw(policy, 1e-4), []
        for _ in range(2):
            with precision.autocast(policy, dtype):
                loss = losses.sft_loss(policy(batch).logprobs, batch.response_mask)
            loss.backward()
            assert all(p.dtype == torch.float32 and (p.grad is None or p.grad.dtype == torch.float32) for p in policy.parameters())
            seen.append(loss.item())
            norms.setdefault(dtype, []).append(optim.gradient_norm(policy))
            optim.update(policy, optimizer, 1e-4, norms[dtype][-1])
        losses_found[dtype] = seen
        assert all(x.dtype == torch.float32 for state in optimizer.state.values() for x in state.values())
    for a, b, before, after in zip(*losses_found.values(), *norms.values()):
        assert 0 < abs(a - b) < 0.003 * a and abs(before - after) < 0.01 * before
    assert losses_found["bfloat16"][1] < losses_found["bfloat16"][0]


# ------------------------------------------------------------------------------------------------------------- decoding

PROMPTS = [ids(3, 30), ids(1, 31), ids(9, 32), ids(4, 33), ids(2, 34)]


def draws(B, K, R):
    return torch.rand(B, K, R, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def inside(tokens, lengths):
    """Responses up to their EOS; what comes after is no promise."""
    return [ids[:n] for ids, n in zip(tokens.flatten(0, 1).tolist(), lengths.flatten().tolist())]


@pytest.mark.parametrize("name", TRUNKS)
def test_a_static_cache_gives_the_same_tokens(name, monkeypatch):
    """As a CUDA graph needs it: every row to the last step, the whole room read. Else finished rows leave, at several steps."""
    trunk, u, left = models(name)[0].trunk, draws(5, 2, 24), []
    select = attention.KVCache.select
    monkeypatch.setattr(attention.KVCache, "select", lambda cache, rows: (left.append(cache.static), select(cache, rows))[1])
    eos = generate.generate_batch(trunk, PROMPTS, u, eos_id=-1)[0].flatten().bincount().argmax().item()        # what this model says most
    growing, static = (generate.generate_batch(trunk, PROMPTS, u, eos, static_cache=static) for static in (False, True))
    assert torch.equal(growing[1], static[1]) and inside(*growing) == inside(*static)
    assert len(growing[1].unique()) >= 4 and len(left) >= 2 and not any(left)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", TRUNKS)
def test_sampling_in_bfloat16(name, static):
    """The cache is bfloat16 as values are (LLaMA's rotated keys are float32 under autocast), and the first tokens are mostly float32's."""
    trunk, u, caches = models(name, torch.float32)[0].trunk, draws(5, 8, 6), []
    made = trunk.new_cache
    trunk.new_cache = lambda *shape: (caches.append(made(*shape)), caches[-1])[1]
    found = []
    for dtype in ("float32", "bfloat16"):
        with precision.autocast(trunk, dtype):
            found.append(generate.generate_batch(trunk, PROMPTS, u, eos_id=-1, static_cache=static)[0])
    assert [cache.keys.dtype for cache in caches] == [cache.values.dtype for cache in caches] == [torch.float32, torch.bfloat16]
    assert (found[0] == found[1])[:, :, 0].float().mean() > 0.7         # 40 draws; a CDF that is off by 0.02 moves about one in ten


class Products(TorchDispatchMode):
    """Counts matrix products with a weight by who computes them."""

    def __init__(self):
        super().__init__()
        self.mkl = self.onednn = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.mkl += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.linear.default)
        self.onednn += function is torch.ops.mkldnn._linear_pointwise.default
        return function(*arguments, **(named or {}))


WITH_ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")


@WITH_ONEDNN
@pytest.mark.parametrize("name", TRUNKS)
def test_decoding_with_onednn_says_the_same(name, monkeypatch):
    """Every product with a weight, in prompt and steps, goes to oneDNN; the uniforms lie at no boundary, so the tokens are the same."""
    trunk, u = models(name, torch.float32)[0].trunk, draws(5, 3, 8)
    usual = generate.generate_batch(trunk, PROMPTS, u, eos_id=-1)[0]
    monkeypatch.setattr(kernels, "MIN_WEIGHT_SIZE", 0)
    kernels.choose_kernels(trunk, CPU, "float32")
    with Products() as count:
        assert torch.equal(generate.generate_batch(trunk, PROMPTS, u, eos_id=-1)[0], usual)
    a_block = 4 if name == "gpt2" else 7                         # c_attn, c_proj, c_fc, c_proj; q, k, v, o, gate, up, down
    assert (count.onednn, count.mkl) == (8 * (2 * a_block + 1), 0)       # the prompt and 7 steps: 2 blocks and the head


@WITH_ONEDNN
@pytest.mark.parametrize("name", TRUNKS)
def test_training_with_onednn_is_the_same(name, monkeypatch):
    """Outputs and gradients to 1e-5, with chunks and activation_checkpointing too, whose backward computes a second time."""
    monkeypatch.setattr(kernels, "MIN_WEIGHT_SIZE", 0)
    right, slope = reference(name, "rows")
    for path in (dense, activation_checkpointing, chunked):
        both, batch = models(name, torch.float32), pack_rows(ROWS)
        path(both, monkeypatch)
        kernels.choose_kernels(both[0].trunk, CPU, "float32", activation_checkpointing=both[0].trunk.activation_checkpointing)
        with Products() as count:
            found = computed(both, batch)
        near(gradients(both, found), slope, 1e-5)
        for x, y in zip(found, right):
            near(x, y, 1e-5)
        assert count.onednn >= 17 and count.mkl == 2             # the value head and the scorer's own layer, which are no part of the trunk


@WITH_ONEDNN
def test_who_is_tuned(monkeypatch):
    """Large layers of a float32 trunk on a CPU; a copy of a tuned trunk multiplies by its own weights."""
    monkeypatch.setattr(kernels, "MIN_WEIGHT_SIZE", 16 * 33)
    for dtype, compile, tuned in (("float32", False, ["c_attn", "c_fc", "c_proj"]), ("bfloat16", False, []), ("float64", False, []), ("float32", True, [])):
        trunk = models("gpt2", torch.float32)[0].trunk
        kernels.choose_kernels(trunk, CPU, dtype, compile)                   # 16 x 48 and 16 x 64 are large, 16 x 16 is not
        names = [name for name, layer in trunk.named_modules() if "forward" in vars(layer)]
        assert sorted({name.split(".")[-1] for name in names}) == tuned and len(names) == 2 * len(tuned)
        assert (trunk.lm_head_matmul is kernels.large_product) == bool(tuned)
    trunk = models("gpt2", torch.float32)[0].trunk
    kernels.choose_kernels(trunk, CPU, "float32")
    copied, x = copy.deepcopy(trunk), torch.randn(3, 16)
    with torch.no_grad():
        trunk.h[0].mlp.c_fc.weight.zero_()
    assert trunk.h[0].mlp.c_fc(x).var(0).max() == 0 < copied.h[0].mlp.c_fc(x).var(0).min()


# ------------------------------------------------------------------------------------------- crossings of devices, on meta

class Crossings(TorchDispatchMode):
    """Lists the operations whose tensors lie on different devices. A number (no dimensions) on the CPU is passed by value."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if len({x.device.type for x in tensors if x.dim()}) > 1:
            self.found.append(str(operation))
        return result


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decoding_copies_nothing_from_the_host_after_the_first_forward(family):
    # A CUDA graph refuses a copy from the host while it records, and elsewhere such a copy makes every token wait.
    # LLaMA's rope table is no parameter, so `.to(device)` leaves it behind: the first forward may take it along.
    trunk = TRUNKS[family]().to("meta")
    with torch.no_grad():
        cache = trunk.new_cache(2, 12, static=True)
        tokens = torch.zeros(2, 3, dtype=torch.long, device="meta")
        cache.used = 3                               # as behind a prompt: laying a prompt out asks the device, which meta cannot answer
        with Crossings() as first:
            trunk.hidden(tokens, tokens, tokens, cache)
        with Crossings() as later:
            trunk.hidden(tokens, tokens, tokens, cache)
    assert len(first.found) == (family == "llama")   # the table itself, so the count can see it
    assert later.found == []
