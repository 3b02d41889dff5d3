"""One row is K rows: packing, planning, and that no number depends on what shares a batch."""
import contextlib
import dataclasses
import random
from collections import Counter
from itertools import combinations

import pytest
import torch
from torch.nn.functional import logsigmoid

from nanorlhf import batching, losses, ppo
from nanorlhf.attention import prefix_mask
from nanorlhf.batching import (
    Row,
    batch_indices,
    encode_all,
    micro_batches,
    pack_rows,
    partition,
    permutation,
    plan_micro_batches,
    prefetch,
)
from nanorlhf.gpt2 import GPT2, GPT2Config
from nanorlhf.heads import Policy, RewardModel
from nanorlhf.io import data
from nanorlhf.io.data import Group, Response
from nanorlhf.io.read import InputError
from nanorlhf.llama import Llama, LlamaConfig
from nanorlhf.run.cli import context_limit

VOCAB, CONTEXT = 37, 16


LLAMA = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=CONTEXT)
TRUNKS = {
    "gpt2": lambda: GPT2(GPT2Config(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=16, n_layer=2, n_head=2)),
    "llama": lambda: Llama(LlamaConfig(**LLAMA)),
    "llama-grouped": lambda: Llama(LlamaConfig(**LLAMA, num_key_value_heads=2, tie_word_embeddings=True)),
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def random_model(name, head, dtype):
    """Weights large enough that every token matters to every later one; biases, norms and the value head random too."""
    torch.manual_seed(0)
    model = head(TRUNKS[name]())
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)
    return model.to(dtype)


def policy_of(name, dtype):
    return random_model(name, lambda trunk: Policy(trunk, value_head=True), dtype)


def scorer_of(name, dtype):
    return random_model(name, lambda trunk: RewardModel(trunk, outputs=4), dtype)


def random_rows(ks, seed=0):
    """Groups of these K, all lengths uneven; no position reaches 3 + 5 + 6, the rows themselves are longer than the context."""
    draw = random.Random(seed)
    tokens = lambda n: [draw.randrange(VOCAB) for _ in range(n)]
    rows = []
    for index, k in enumerate(ks):
        responses = [tokens(draw.randint(1, 6)) for _ in range(k)]
        label = [draw.choice([0, 1, None]) for _ in range(k)]
        targets = [[draw.uniform(-2, 2) for _ in range(draw.randint(0, 3))] for _ in range(k)]
        rows.append(Row(tokens(draw.randint(3, 8)), responses, index, [float(draw.randrange(k)) for _ in range(k)], label, targets))
    return rows


def gradients(model, loss):
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def relative(found, expected):
    """Largest difference over the largest expected number."""
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item() if expected.abs().max() > 0 else found.abs().max().item()


def alike(found, expected, tolerance):
    """Every tensor to `tolerance` of its own largest number; one that is 0 but for rounding (under 1e-6 of the largest of all) stays so.

    (The ranking loss has exactly no gradient in the last LayerNorm's bias: it cancels in every difference of scores.)
    """
    nothing = 1e-6 * max(x.abs().max() for x in expected.values())
    for name, x in expected.items():
        if x.abs().max() < nothing:
            assert found[name].abs().max() < nothing, name
        else:
            assert relative(found[name], x) < tolerance, name


def rollout_of(shape, logprobs, values):
    """Old logprobs and values near the new ones, so that clipped and free tokens both occur; advantages and returns of both signs."""
    torch.manual_seed(1)
    noise = lambda scale: scale * torch.randn(shape, dtype=torch.float64)
    return logprobs.detach().double() + noise(0.3), noise(1.0), values.detach().double() + noise(0.3), values.detach().double() + noise(1.0)


def policy_losses(out, mask, rollout, count):
    """What train_sft and train_ppo minimise, token means over `count`."""
    old, advantages, old_values, returns = (x.to(out.logprobs.dtype) for x in rollout)
    clipped = ppo.policy_loss(out.logprobs, old, advantages, mask, 0.2, count)[0]
    critic = ppo.value_loss(out.values, old_values, returns, mask, 0.2, count)[0]
    return {"sft": losses.sft_loss(out.logprobs, mask, count), "policy": clipped, "value": critic,
            "ppo": clipped + 0.1 * critic - 0.01 * ppo.masked_mean(out.entropy, mask, count)}


def scorer_losses(outputs, batch, count):
    """What train_rm minimises; count: groups with a pair, labelled responses, responses with a target."""
    mean, labelled = outputs.mean(-1), batch.valid & (batch.label >= 0)
    levels = losses.quantile_levels(outputs.shape[-1])
    return {"ranking": losses.ranking_loss(mean, batch.place, batch.valid, count["ranked"]),
            "classification": losses.classification_loss(mean, batch.label, labelled, losses.balanced_weights(batch.label, labelled), count["labelled"]),
            "quantile": losses.quantile_huber_loss(outputs, batch.targets, levels, 1.0, batch.target_mask, count["targets"])}


def counts(rows):
    return {"ranked": sum(len(set(row.place)) > 1 for row in rows), "labelled": sum(y is not None for row in rows for y in row.label),
            "targets": sum(bool(targets) for row in rows for targets in row.targets), "tokens": sum(len(r) for row in rows for r in row.responses)}


# ------------------------------------------------------------------------------------------------- one row is K rows

@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", TRUNKS)
def test_policy_one_row_is_k_rows(name, dtype):
    model, rows = policy_of(name, dtype), random_rows([1, 2, 3, 4, 5, 6])
    batch, tolerance = pack_rows(rows), TOLERANCE[dtype]
    assert batch.tokens.shape[1] > CONTEXT > batch.positions.max()          # a row may be longer than the context, a position may not
    out = model(batch, temperature=0.7, return_entropy=True)
    rollout = rollout_of(batch.response_mask.shape, out.logprobs, out.values)
    count = counts(rows)["tokens"]
    together = policy_losses(out, batch.response_mask, rollout, count)

    alone = {key: 0.0 for key in together}
    fields = {field: torch.zeros_like(getattr(out, field)) for field in out._fields}
    for b, row in enumerate(rows):
        for k, response in enumerate(row.responses):
            single = pack_rows([Row(row.prompt, [response])])               # the prompt again, one response, no padding
            here = (slice(b, b + 1), slice(k, k + 1), slice(0, len(response)))
            one = model(single, temperature=0.7, return_entropy=True)
            for field in out._fields:
                fields[field][here] = getattr(one, field).detach()
            for key, loss in policy_losses(one, single.response_mask, [x[here] for x in rollout], count).items():
                alone[key] = alone[key] + loss
    alike({field: getattr(out, field).detach() for field in out._fields}, fields, tolerance)
    for key in together:
        assert relative(together[key].detach(), alone[key].detach()) < tolerance, key
        alike(gradients(model, together[key]), gradients(model, alone[key]), tolerance)
    # the mean over tokens is what the default count gives
    assert together["sft"].item() == pytest.approx(losses.sft_loss(out.logprobs, batch.response_mask).item(), rel=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", TRUNKS)
def test_scorer_one_row_is_k_rows(name, dtype):
    model, rows = scorer_of(name, dtype), random_rows([1, 2, 3, 4, 5, 6])
    batch, count, tolerance = pack_rows(rows), counts(rows), TOLERANCE[dtype]
    outputs = model(batch)
    together = scorer_losses(outputs, batch, count)
    labelled = batch.valid & (batch.label >= 0)
    weight = losses.balanced_weights(batch.label, labelled)

    alone = {key: 0.0 for key in together}
    for b, row in enumerate(rows):
        ones = []
        for k, response in enumerate(row.responses):
            single = pack_rows([Row(row.prompt, [response], 0, [row.place[k]], [row.label[k]], [row.targets[k]])])
            ones.append(model(single))
            assert relative(outputs[b, k].detach(), ones[-1][0, 0].detach()) < tolerance, (b, k)
            if row.label[k] is not None:
                alone["classification"] += losses.classification_loss(ones[-1].mean(-1), single.label, single.valid, weight[b, k].view(1, 1), count["labelled"])
            alone["quantile"] += losses.quantile_huber_loss(ones[-1], single.targets, losses.quantile_levels(4), 1.0, single.target_mask, count["targets"])
        # the ranking loss with nothing but its formula: every pair of unequal place, mean in the group, mean over groups with a pair
        score = [one.mean() for one in ones]
        pairs = [-logsigmoid(score[i] - score[j]) for i in range(len(score)) for j in range(len(score)) if row.place[i] < row.place[j]]
        alone["ranking"] += sum(pairs) / len(pairs) / count["ranked"] if pairs else 0.0
    for key in together:
        assert relative(together[key].detach(), alone[key].detach()) < tolerance, key
        alike(gradients(model, together[key]), gradients(model, alone[key]), tolerance)


@pytest.mark.parametrize("name", TRUNKS)
def test_padding_changes_nothing(name):
    """Other ids, positions and columns in padding and behind masks, NaN where floats stand: bit for bit the same numbers."""
    rows = random_rows([1, 4, 2, 3], seed=3)
    clean, policy, scorer = pack_rows(rows), policy_of(name, torch.float32), scorer_of(name, torch.float32)
    assert (clean.branch == -1).any() and not clean.response_mask.all() and not clean.valid.all() and not clean.target_mask.all()
    torch.manual_seed(2)
    fill = lambda x, garbage, keep: torch.where(keep, x, garbage)
    integers = lambda x, high: torch.randint(0, high, x.shape)
    T, inside = clean.tokens.shape[1], clean.branch >= 0
    dirty = dataclasses.replace(
        clean, tokens=fill(clean.tokens, integers(clean.tokens, VOCAB), inside), positions=fill(clean.positions, integers(clean.tokens, CONTEXT), inside),
        responses=fill(clean.responses, integers(clean.responses, VOCAB), clean.response_mask), logit_index=fill(clean.logit_index, integers(clean.response_mask, T), clean.response_mask),
        last_index=fill(clean.last_index, integers(clean.last_index, T), clean.valid), place=fill(clean.place, torch.tensor(torch.nan), clean.valid),
        label=fill(clean.label, torch.tensor(-1), clean.valid), targets=fill(clean.targets, torch.tensor(torch.nan), clean.target_mask))
    assert not torch.equal(clean.tokens, dirty.tokens) and not torch.equal(clean.last_index, dirty.last_index)
    count, results = counts(rows), []
    for batch in (clean, dirty):
        out, outputs = policy(batch, return_entropy=True), scorer(batch)
        rollout = rollout_of(batch.response_mask.shape, *(results[0][0][key] for key in ("logprobs", "values"))) if results else rollout_of(batch.response_mask.shape, out.logprobs, out.values)
        if batch is dirty:
            rollout = [torch.where(batch.response_mask, x, torch.nan) for x in rollout]
        found = {**{field: getattr(out, field).detach() for field in out._fields}, "scores": outputs[clean.valid].detach()}
        assert all(not found[field][~clean.response_mask].any() for field in out._fields)      # zeros behind the mask
        grads = {}
        for model, parts in ((policy, policy_losses(out, batch.response_mask, rollout, count["tokens"])), (scorer, scorer_losses(outputs, batch, count))):
            found.update({key: loss.detach() for key, loss in parts.items()})
            grads.update({(key, parameter): g for key, loss in parts.items() for parameter, g in gradients(model, loss).items()})
        results.append((found, grads))
    for a, b in zip(*results):
        assert all(torch.equal(a[key], b[key]) for key in a), [key for key in a if not torch.equal(a[key], b[key])]


@pytest.mark.parametrize("name", TRUNKS)
def test_neighbours_change_nothing(name):
    """A group beside a much longer one (more padding, more branches) scores as it does alone; so does another order of responses."""
    scorer, rows = scorer_of(name, torch.float64), random_rows([2, 6, 6])
    alone, beside = scorer(pack_rows(rows[:1])), scorer(pack_rows(rows))[:1, :2]
    turned = scorer(pack_rows([Row(rows[0].prompt, rows[0].responses[::-1])])).flip(1)
    assert relative(beside, alone) < 1e-10 and relative(turned, alone) < 1e-10
    # able to fail: another prompt token, or another token in the response itself, moves the score
    changed = Row([(rows[0].prompt[0] + 1) % VOCAB, *rows[0].prompt[1:]], rows[0].responses)
    assert relative(scorer(pack_rows([changed])), alone) > 1e-3


@pytest.mark.parametrize("name", TRUNKS)
def test_accumulation_is_one_batch(name):
    """8 groups at once, 2 x 4 and 8 x 1 with the counts of the whole: one loss, one gradient.  A mean of means is another."""
    rows, dtype = random_rows([1, 3, 6, 2, 4, 5, 2, 3], seed=5), torch.float64
    policy, scorer, count, results = policy_of(name, dtype), scorer_of(name, dtype), counts(rows), {}
    whole = pack_rows(rows)
    full = policy(whole, return_entropy=True)
    rollout = rollout_of(whole.response_mask.shape, full.logprobs, full.values)
    for size in (8, 4, 1):
        total, naive = {}, 0.0
        for first in range(0, 8, size):
            part = rows[first : first + size]
            batch = pack_rows(part)
            here = (slice(first, first + size), slice(0, batch.response_mask.shape[1]), slice(0, batch.response_mask.shape[2]))
            out = policy(batch, return_entropy=True)
            for key, loss in {**policy_losses(out, batch.response_mask, [x[here] for x in rollout], count["tokens"]), **scorer_losses(scorer(batch), batch, count)}.items():
                total[key] = total.get(key, 0.0) + loss
            naive = naive + losses.sft_loss(out.logprobs, batch.response_mask) * size / 8
        results[size] = {key: (loss.detach(), gradients(policy if key in ("sft", "policy", "value", "ppo") else scorer, loss)) for key, loss in total.items()}
        if size == 1:
            assert relative(naive.detach(), results[8]["sft"][0]) > 1e-3
    for size in (4, 1):
        for key, (loss, grads) in results[8].items():
            assert relative(results[size][key][0], loss) < 1e-10, (size, key)
            alike(results[size][key][1], grads, 1e-10)


# ------------------------------------------------------------------------------------------------- the batch by hand

def test_batch_by_hand():
    # DESIGN 1:   p p p p p p  a a a  b b b b  c c  _ _     columns 0-5 | 6-8 | 9-12 | 13-14 | 15-16 (padding up to the other row's 17)
    first = Row([10, 11, 12, 13, 14, 15], [[21, 22, 23], [31, 32, 33, 34], [41, 42]], 7, [2.0, 0.0, 1.0], [0, 1, None], [[-1.0, -1.0], [1.0, 1.0], []])
    other = Row(list(range(15)), [[51, 52]], 3, [0.0], [1], [[0.5]])
    batch = pack_rows([first, other])
    assert first.num_tokens == 15 and batch.tokens.shape == (2, 17)
    assert batch.tokens[0].tolist() == [10, 11, 12, 13, 14, 15, 21, 22, 23, 31, 32, 33, 34, 41, 42, 0, 0]
    assert batch.branch[0].tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, -1, -1]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 6, 7, 8, 9, 6, 7, 0, 0]
    assert batch.tokens[1].tolist() == [*range(15), 51, 52] and batch.positions[1].tolist() == list(range(17))
    assert batch.branch[1].tolist() == [0] * 15 + [1, 1]
    assert batch.responses.tolist() == [[[21, 22, 23, 0], [31, 32, 33, 34], [41, 42, 0, 0]], [[51, 52, 0, 0], [0] * 4, [0] * 4]]
    assert batch.response_mask.tolist() == [[[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]], [[1, 1, 0, 0], [0] * 4, [0] * 4]]
    # the last prompt token (column 5) predicts the first token of each response; then the token before
    assert batch.logit_index[0].tolist() == [[5, 6, 7, 0], [5, 9, 10, 11], [5, 13, 0, 0]] and batch.logit_index[1, 0].tolist() == [14, 15, 0, 0]
    assert batch.last_index.tolist() == [[8, 12, 14], [16, 0, 0]]
    assert batch.valid.tolist() == [[True] * 3, [True, False, False]]
    assert batch.place.tolist() == [[2, 0, 1], [0, 0, 0]] and batch.label.tolist() == [[0, 1, -1], [1, -1, -1]]
    assert batch.targets.tolist() == [[[-1, -1], [1, 1], [0, 0]], [[0.5, 0], [0, 0], [0, 0]]]
    assert batch.target_mask.tolist() == [[[1, 1], [1, 1], [0, 0]], [[1, 0], [0, 0], [0, 0]]]
    floats, bools = ("place", "targets"), ("response_mask", "valid", "target_mask")
    for name, tensor in batch.tensors().items():
        expected = torch.float32 if name in floats else torch.bool if name in bools else torch.int64
        assert tensor.dtype == expected, name
        assert torch.equal(batch.to("cpu").tensors()[name], tensor)
    assert batch.lengths == batch.to("cpu").lengths == [15, 17] and len(batch.tensors()) == 12


def test_who_sees_whom():
    """prefix_mask: by the words of DESIGN 1, for every pair of columns of a row with padding."""
    branch = pack_rows([Row([1, 2], [[3, 4], [5]]), Row([1] * 4, [[2, 3, 4]])]).branch
    seen = prefix_mask(branch, branch)[:, 0]
    for b, i, j in torch.cartesian_prod(*map(torch.arange, seen.shape)).tolist():
        if branch[b, i] >= 0:
            assert seen[b, i, j] == (j <= i and branch[b, j] in (0, branch[b, i])), (b, i, j)
    assert seen.any(-1).all()                                                         # an empty softmax would be NaN


def test_empty_response_reads_the_prompt():
    # response 2 has no token: it ends where the prompt does (column 2), not at its neighbour's last token (column 4)
    batch = pack_rows([Row([1, 2, 0], [[3, 4], [], [5]])])
    assert batch.last_index.tolist() == [[4, 2, 5]] and batch.valid.all() and not batch.response_mask[0, 1].any()
    scorer = scorer_of("gpt2", torch.float64)
    assert relative(scorer(batch)[0, 1], scorer(pack_rows([Row([1, 2, 0], [[]])]))[0, 0]) < 1e-10


def test_no_response_at_all():
    batch = pack_rows([Row([1, 2, 3], [])])
    assert batch.response_mask.shape == batch.targets.shape == (1, 1, 1) and not batch.response_mask.any() and not batch.valid.any() and not batch.target_mask.any()
    assert pack_rows([Row([1, 2, 3], []), Row([1, 2, 3, 4], [])]).branch.tolist() == [[0, 0, 0, -1], [0, 0, 0, 0]]
    out = policy_of("llama", torch.float32)(batch, return_entropy=True)
    assert losses.sft_loss(out.logprobs, batch.response_mask).item() == 0.0


# ----------------------------------------------------------------------------------------------------------- the plan

def test_micro_batches_by_hand():
    # longest first: 9 + 5 (another 5 makes 19 > 16), 5 + 4 + 3 + 3 = 15, 2 + 1
    assert micro_batches([3, 9, 5, 1, 5, 4, 2, 3], 16) == [[1, 2], [4, 5, 0, 7], [6, 3]]
    # padded: 9 alone (two of 9 make 18), then 5 5 4 (3 rows of 5 = 15), then 3 3 2 1 (4 rows of 3 = 12)
    assert micro_batches([3, 9, 5, 1, 5, 4, 2, 3], 16, padded=True) == [[1], [2, 4, 5], [0, 7, 6, 3]]
    assert micro_batches([8, 8], 16) == [[0, 1]] and micro_batches([8, 8], 15) == [[0], [1]]      # the bound itself is allowed
    assert micro_batches([], 16) == []


def test_deal_by_hand():
    # the longest first, each to whoever has least: loads 5 0, 5 3, 5 6, 7 6, 7 8, 8 8
    assert partition([5, 3, 3, 2, 2, 1], 2) == [[0, 3, 5], [1, 2, 4]]
    assert partition([1, 9], 3) == [[1], [0], []] and partition([], 2) == [[], []]              # a process may have none
    assert partition([2, 2, 2, 2], 2) == [[0, 2], [1, 3]]                                  # equal rows in turn
    assert partition([4, 7, 1], 1) == [[0, 1, 2]]


def test_deal_at_random():
    """Every row once, and no two processes further apart than the longest row."""
    draw = random.Random(0)
    for n, processes in [(n, processes) for n in (1, 7, 40) for processes in (1, 2, 3, 8)]:
        columns = [draw.randint(1, 300) for _ in range(n)]
        shares = partition(columns, processes)
        loads = [sum(columns[i] for i in share) for share in shares]
        assert sorted(sum(shares, [])) == list(range(n)) and len(shares) == processes and max(loads) - min(loads) <= max(columns)


def test_plans_are_micro_batches_of_each_share():
    lengths = [5, 3, 3, 2, 2, 1]
    rows = [Row([1] * n, []) for n in lengths]
    assert plan_micro_batches(rows, 6, 1) == [micro_batches(lengths, 6)] == [[[0], [1, 2], [3, 4, 5]]]
    assert plan_micro_batches(rows, 6, 2) == [[[0], [3, 5]], [[1, 2], [4]]]           # indices of the step, not of the share
    assert plan_micro_batches(rows[:1], 6, 2) == [[[0]], []]


def test_micro_batches_at_random():
    draw = random.Random(0)
    for _ in range(300):
        columns, limit = [draw.randint(1, 60) for _ in range(draw.randint(0, 40))], draw.randint(1, 200)
        for padded in (False, True):
            plan = micro_batches(columns, limit, padded)
            assert sorted(i for part in plan for i in part) == list(range(len(columns)))
            cost = [len(part) * max(columns[i] for i in part) if padded else sum(columns[i] for i in part) for part in plan]
            assert all(part and (size <= limit or len(part) == 1) for part, size in zip(plan, cost))
            assert plan == micro_batches(list(columns), limit, padded)
            assert sum(cost) <= len(columns) * max(columns, default=0)                # never more padding than one big batch


@pytest.mark.parametrize("n, groups", [(10, 3), (7, 7), (5, 8), (1, 4), (12, 4)])
def test_take_every_item_once_an_epoch(n, groups):
    steps = 3 * n                                                                      # groups x 3n items: a whole number of epochs
    stream = [i for step in range(steps) for i in batch_indices(n, groups, step, seed=3)]
    epochs = [stream[at : at + n] for at in range(0, len(stream), n)]
    assert len(stream) == steps * groups and all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n >= 7:
        assert len(set(map(tuple, epochs))) == len(epochs)                             # each epoch in its own order
        assert stream != [i for step in range(steps) for i in batch_indices(n, groups, step, seed=4)]
    # resume: a step asked for alone, out of order, is the same step
    assert [batch_indices(n, groups, step, 3) for step in reversed(range(steps))] == [stream[at : at + groups] for at in range(0, len(stream), groups)][::-1]


def test_order_is_pinned():
    """A resumed run of an older version must meet the same items: Philox is specified, so these numbers stay."""
    assert permutation(8, 0, 0).tolist() == [2, 0, 4, 1, 7, 5, 3, 6] and permutation(8, 0, 1).tolist() == [0, 7, 6, 4, 1, 3, 2, 5]
    # step 3 of 4 items is items 12 to 15, the second half of epoch 1; integers that json knows
    assert batch_indices(8, 4, 3, seed=0) == [1, 3, 2, 5] and {type(i) for i in batch_indices(8, 4, 3, seed=0)} == {int}
    counts_of_first = Counter(int(permutation(5, seed, 0)[0]) for seed in range(2000))
    # each of 5 comes first 400 times, deviation sqrt(2000 * .2 * .8) = 17.9; five of them are 90
    assert all(abs(counts_of_first[i] - 400) < 90 for i in range(5))


# ------------------------------------------------------------------------------------------------- text to integers

class Letters:
    """One token a letter, BOS 1 or none, EOS 2."""
    eos_id = 2

    def __init__(self, bos_id=1):
        self.bos_id = bos_id

    def encode(self, text):
        return [ord(letter) for letter in text]

    def encode_prompt(self, text):
        return [self.bos_id] * (self.bos_id is not None) + self.encode(text)


def pack(groups, tokenizer, **label_options):
    """Groups of text -> Batch, whatever their length."""
    return pack_rows(encode_all(groups, tokenizer, 10**9, **label_options)[0])


def ids(text):
    return [ord(letter) for letter in text]


def test_encode_eos_only_where_it_ended():
    group = Group("ab", [Response("xy", place=1), Response("z", place=0, ended=False)])
    row = batching.encode(group, Letters(), index=5)
    assert row == Row([1, 97, 98], [[120, 121, 2], [122]], 5, [1.0, 0.0], [0, 1], [[-1.0], [1.0]]) and row.num_tokens == 7
    assert batching.encode(group, Letters(None)).prompt == [97, 98]
    panel = Group("ab", [Response("x", scores=[0.5, 0.1]), Response("y", scores=[0.9])])
    assert batching.encode(panel, Letters()).targets == [[-1.0], [1.0]]               # comparisons won and lost
    assert batching.encode(panel, Letters(), target="scores").targets == [[0.5, 0.1], [0.9]]
    none = Row([1, 97, 98], [[120, 2], [121, 2]])
    assert batching.encode(panel, Letters(), labels="label") == none and none.place == [] and none.index == 0      # no such judgement
    half = Group("ab", [Response("x", place=0), Response("y", place=1, scores=[0.5])])
    assert batching.encode(half, Letters(), target="scores").targets == [[], [0.5]]
    # what to read from the labels passes through pack
    assert torch.equal(pack([panel], Letters(), target="scores").targets, torch.tensor([[[0.5, 0.1], [0.9, 0.0]]]))


def test_encode_all_cuts_dialogues_from_the_left_and_drops_passages():
    # 10 positions; longest response "wxyz" + EOS = 5, so 5 are left for the prompt: BOS and its last four letters
    responses = lambda: [Response("wxyz"), Response("v")]
    groups = [Group("abcdefgh", responses(), truncatable=True),                 # cut
              Group("abcdefgh", responses()),                           # passage: dropped
              Group("abcd", responses()),                               # BOS + 4 = 5: fits exactly
              Group("abcd", [Response("123456789")], truncatable=True),         # 9 + EOS = 10: fills the context, dropped
              Group("abcd", [Response("12345678")], truncatable=True),          # 8 + EOS = 9: one position, too few for BOS and a letter
              Group("abcdefgh", [], truncatable=True),                          # no responses: 9 <= 10
              Group("abcdefghi", []), Group("abcdefghij", [])]          # 10 fits, 11 is dropped
    rows, reasons = encode_all(groups, Letters(), 10)
    assert [row.index for row in rows] == [0, 2, 4, 5, 6]               # the place in the data, whatever was dropped
    assert rows[0].prompt == [1, *ids("efgh")] and rows[0].responses == [[*ids("wxyz"), 2], [*ids("v"), 2]]
    assert rows[1].prompt == [1, *ids("abcd")] and rows[2].prompt == ids("d") and len(rows[3].prompt) == 9
    assert reasons == {"prompt cut from the left (kept)": 2, "prompt and response over 10 tokens (--max_length)": 2,
                       "response of 10 tokens (--max_length) or more": 1}
    assert len(rows) + sum(n for reason, n in reasons.items() if "kept" not in reason) == len(groups)
    assert encode_all(groups[:1], Letters(None), 10)[0][0].prompt == ids("defgh")       # no BOS to keep: five letters
    # room for 2 new tokens leaves 8 for a prompt: BOS and its last seven letters;  a passage of 10 is dropped
    assert [row.prompt for row in encode_all(groups[5:7], Letters(), 10, max_new_tokens=2)[0]] == [[1, *ids("bcdefgh")]]


def test_encode_all_at_random():
    draw, alphabet = random.Random(1), "abcdefghijklmnopqrstuvwxyz"
    word = lambda: "".join(draw.choices(alphabet, k=draw.randint(1, 15)))
    for bos in (1, None):
        groups = [Group(word(), [Response(word(), ended=draw.random() < 0.5) for _ in range(draw.randint(1, 4))], draw.random() < 0.5) for _ in range(300)]
        rows, reasons = encode_all(groups, Letters(bos), 16)
        assert len(rows) + sum(n for reason, n in reasons.items() if "kept" not in reason) == len(groups) and len(reasons) == 3
        cut = 0
        for row in rows:
            group, full = groups[row.index], Letters(bos).encode_prompt(groups[row.index].prompt)
            assert row.responses == [ids(r.text) + [2] * r.ended for r in group.responses]          # never cut
            assert 1 <= len(row.prompt) and len(row.prompt) + max(map(len, row.responses)) <= 16
            if row.prompt != full:
                cut += 1
                assert group.truncatable and len(row.prompt) + max(map(len, row.responses)) == 16           # no more than needed
                letters = row.prompt[1:] if row.prompt[0] == 1 else row.prompt
                assert full[len(full) - len(letters):] == letters
                assert row.prompt[0] == 1 or bos is None or len(row.prompt) == 1
        assert cut == reasons["prompt cut from the left (kept)"] > 0


def test_what_does_not_fit_is_counted_by_its_reason():
    groups = [Group("abcdef", [Response("xyz")]), Group("ab", [Response("x")])]
    assert pack(groups, Letters()).tokens.shape == (2, 11)                              # BOS + 6 + 3 + EOS
    for limit, reasons in ((11, {}), (10, {"prompt and response over 10 tokens (--max_length)": 1}),
                           # xyz + EOS fills the context, BOS + 2 + 1 + EOS makes 5
                           (4, {"response of 4 tokens (--max_length) or more": 1, "prompt and response over 4 tokens (--max_length)": 1})):
        rows, found = encode_all(groups, Letters(), limit)
        assert found == reasons and len(rows) == 2 - sum(reasons.values())
    for length, context, found in ((0, 64, 64), (32, 64, 32), (64, 64, 64)):
        assert context_limit(length, context) == found
    with pytest.raises(InputError, match="--max_length 65: the model's context is 64"):
        context_limit(65, 64)


def test_ahead_yields_the_plan():
    rows = random_rows([2, 1, 3, 4, 2])
    plan = micro_batches([row.num_tokens for row in rows], 40)
    found = list(prefetch(rows, plan, torch.device("cpu")))
    assert len(found) == len(plan) > 1
    for batch, part in zip(found, plan):
        expected = pack_rows([rows[i] for i in part])
        assert all(torch.equal(batch.tensors()[name], tensor) for name, tensor in expected.tensors().items()) and batch.lengths == expected.lengths
        assert sum(rows[i].num_tokens for i in part) <= 40 or len(part) == 1
    assert list(prefetch(rows, [], torch.device("cpu"))) == []
    assert all(batch.tokens.is_meta for batch in prefetch(rows, plan, torch.device("meta")))          # on the device that was asked for


def test_ahead_copies_the_next_batch_before_this_one_is_used(monkeypatch):
    """On CUDA, by the order in which copies and waits are asked for; streams and copies are stand-ins, so no GPU is needed."""
    log, device, rows = [], torch.device("cuda", 0), random_rows([2, 1, 3])

    class Stream:
        def __init__(self, name):
            self.name = name

        def record_event(self):
            log.append(f"{self.name}: copied")
            return f"event {log.count(f'{self.name}: copied')}"

        def wait_event(self, event):
            log.append(f"{self.name}: waits for {event}")

    @contextlib.contextmanager
    def on(stream):
        log.append(f"on {stream.name}")
        yield
        log.append("off")

    def note(name):
        def method(x, *arguments, **how):
            log.append((name, *(a.name if isinstance(a, Stream) else str(a) for a in arguments), *how.items()))
            return x
        return method

    expected = [pack_rows([row]) for row in rows]
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", {device: Stream("copying")}.get)
        patch.setattr(torch.cuda, "current_stream", {device: Stream("computing")}.get)
        patch.setattr(torch.cuda, "stream", on)
        for name in ("pin_memory", "to", "record_stream"):
            patch.setattr(torch.Tensor, name, note(name), raising=False)
        found = []
        for batch in prefetch(rows, [[0], [1], [2]], device):
            log.append("used")
            found.append(batch)
        assert list(prefetch(rows, [], device)) == []
    # twelve tensors a batch: pinned, then copied without waiting, while `copying` is the stream; a batch is used once its copy is waited for
    copy = ["on copying"] + [("pin_memory",)] * 12 + [("to", "cuda:0", ("non_blocking", True))] * 12 + ["copying: copied", "off"]
    use = lambda n: [f"computing: waits for event {n}"] + [("record_stream", "computing")] * 12 + ["used"]
    assert log == copy + copy + use(1) + copy + use(2) + use(3)
    for batch, part in zip(found, expected, strict=True):
        assert all(torch.equal(batch.tensors()[name], tensor) for name, tensor in part.tensors().items())


def test_apart_is_every_pair_once():
    """K = 4 makes 6 groups of two; their ranking losses have the same mean as the group's, and the same gradient in the scores."""
    group = Group("p", [Response(t, place=p) for t, p in zip("abcd", (2, 0, 3, 1))], extra={"id": 1})
    pairs = data.split_into_pairs([group, Group("q", [Response("e")])])                            # one response makes no pair
    assert [tuple(r.text for r in pair.responses) for pair in pairs] == list(combinations("abcd", 2))
    assert all(pair.prompt == "p" and pair.extra == {"id": 1} for pair in pairs)
    scores = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    together, apart = pack([group], Letters()), pack(pairs, Letters())
    index = torch.tensor(list(combinations(range(4), 2)))
    one = losses.ranking_loss(scores[None], together.place, together.valid)
    six = losses.ranking_loss(scores[index], apart.place, apart.valid)
    assert one.item() == pytest.approx(six.item(), rel=1e-12)
    assert torch.allclose(*(torch.autograd.grad(loss, scores)[0] for loss in (one, six)), rtol=1e-12)
    tied = data.split_into_pairs([Group("p", [Response(t, place=p) for t, p in zip("abc", (0, 0, 1))])])
    assert [len(set(batching.encode(pair, Letters()).place)) for pair in tied] == [1, 2, 2]      # a tie makes no pair
