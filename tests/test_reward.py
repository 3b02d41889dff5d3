"""Rewards of texts: a batch equals its texts one by one, BOS and EOS stand where they belong, normalisation happens once; functions."""
import math
import sys
import textwrap

import pytest
import torch

from nanorlhf import batching, metrics
from nanorlhf.gpt2 import GPT2, GPT2Config
from nanorlhf.heads import RewardModel
from nanorlhf.io import hub, tokenizer
from nanorlhf.io.read import InputError
from nanorlhf.llama import Llama, LlamaConfig
from nanorlhf.reward import (
    STD_FLOOR,
    FunctionReward,
    TextReward,
    all_statistics,
    cvar_count,
    deviation_within,
    is_function,
    parse_statistic,
    reduce_quantiles,
)

PROMPTS = ["the king said", "a fox and a crow met in the wood and spoke:", "who?"]
RESPONSES = [[" what is this", " glad", ""], [" a", " the queen met the king in the wood", " é 😀"], [" b", " b", " b c"]]
ENDED = [[True, False, True], [True, True, False], [True, False, True]]
FAMILIES = ["gpt2", "llama"]


def reward_model(family, outputs=1, context=96, **more):
    """Weights of a size that makes every token matter."""
    torch.manual_seed(0)
    texts = PROMPTS + [text for texts in RESPONSES for text in texts]
    if family == "gpt2":
        tok = tokenizer.train_bpe(texts, 270)
        trunk = GPT2(GPT2Config(vocab_size=tok.vocab_size, n_positions=context, n_embd=16, n_layer=2, n_head=2))
    else:
        tok = tokenizer.train_sentencepiece(texts * 2, 300)
        trunk = Llama(LlamaConfig(vocab_size=tok.vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                                  num_key_value_heads=2, max_position_embeddings=context))
    model = RewardModel(trunk, outputs)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.trunk.lm_head = None
    return TextReward(model.double(), tok, **more)


def seen_rows(model, *texts):
    """What the trunk gets of some texts, in integers."""
    rows, outputs = [], model.outputs
    model.outputs = lambda found: rows.extend(found) or outputs(found)
    try:
        model.score_texts(*texts)
    finally:
        del model.outputs
    return rows


# ----------------------------------------------------------------------------------------------------- text to numbers

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("outputs, name", [(1, "mean"), (4, "mean"), (4, "q0"), (4, "cvar:0.5")])
def test_a_batch_equals_its_texts_alone(family, outputs, name):
    model = reward_model(family, outputs)
    model.select(name)
    together = model.score_texts(PROMPTS, RESPONSES, ENDED)
    assert together.shape == (3, 3) and together.std() > 0.02
    for b, prompt in enumerate(PROMPTS):
        for k in range(3):
            alone = model.score_texts([prompt], [[RESPONSES[b][k]]], [[ENDED[b][k]]])
            assert together[b, k].item() == pytest.approx(alone.item(), abs=1e-6)
    backwards = model.score_texts(PROMPTS[::-1], [texts[::-1] for texts in RESPONSES[::-1]], [ends[::-1] for ends in ENDED[::-1]])
    assert torch.allclose(together, backwards.flip(0, 1), atol=1e-6)


@pytest.mark.parametrize("max_tokens", [1, 40, 10**6])
def test_micro_batches_keep_the_order(max_tokens):
    model = reward_model("llama", 2)
    rows = seen_rows(model, PROMPTS, RESPONSES, ENDED)
    whole, model.max_tokens = model.outputs(rows), max_tokens
    assert torch.allclose(model.outputs(rows), whole, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_bos_and_eos(family):
    model = reward_model(family)
    tok = model.tokenizer
    for row, prompt, texts, ends in zip(seen_rows(model, PROMPTS, RESPONSES, ENDED), PROMPTS, RESPONSES, ENDED):
        assert (row.prompt[0] == tok.bos_id) == (family == "llama") and tok.decode(row.prompt).strip() == prompt
        assert tok.bos_id not in row.prompt[1:] and tok.eos_id not in row.prompt
        for ids, text, ended in zip(row.responses, texts, ends):
            assert ids == tok.encode(text) + [tok.eos_id] * ended and tok.decode(ids) == text
            assert tok.eos_id not in ids[:-1] and tok.bos_id not in ids
    # so whether a response ended is part of what is scored: the third prompt has " b" once ended, once not
    scores = model.score_texts(PROMPTS, RESPONSES, ENDED)
    assert abs(scores[2, 0] - scores[2, 1]) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_that_are_too_long_lose_their_beginning(family):
    model = reward_model(family, context=24)
    tok, long = model.tokenizer, "the wood " * 12 + "the king said"
    prompts, texts, ends = [long, "who?"], [[" glad", " a"], [" b", " b"]], [[True, True], [False, False]]
    rows = seen_rows(model, prompts, texts, ends)                           # one row a response now
    assert model.num_truncated == 2 and len(rows) == 4                                # both responses of the first prompt; the second prompt fits
    whole, start = tok.encode_prompt(long), [tok.bos_id] if family == "llama" else []
    for row in rows[:2]:
        assert row.num_tokens == 24                                            # the response fits whole, nothing is wasted
        assert row.prompt == start + whole[len(whole) - len(row.prompt) + len(start):]
    assert [tok.decode(ids) for row in rows for ids in row.responses] == [" glad", " a", " b", " b"]
    # a score does not depend on its siblings: how much of the prompt is lost follows from the response alone
    together = model.score_texts(prompts, texts, ends)
    alone = [model.score_texts([long], [[text]], [[True]])[0, 0] for text in texts[0]]
    assert together.shape == (2, 2) and torch.allclose(together[0], torch.stack(alone), atol=1e-6)
    with pytest.raises(InputError, match="fills the reward model's 24 positions"):
        model.score_texts(["a"], [[" glad" * 40]], [[True]])


# ----------------------------------------------------------------------------------------------------- normalisation

def test_deviation_within_by_hand():
    # 1 3 about 2: 1 + 1; 10 10 16 about 12: 4 + 4 + 16; 7 about itself: 0. 6 scores less 3 prompts: 26 / 3
    scores = [torch.tensor(x) for x in ([1.0, 3], [10.0, 10, 16], [7.0])]
    assert deviation_within(scores) == pytest.approx((26 / 3) ** 0.5)
    assert deviation_within(scores[:2]) == deviation_within(scores)         # the prompt with one response is not counted
    # a prompt's level, which a ranking loss leaves free, is no part of it
    assert deviation_within([x + 100 * i for i, x in enumerate(scores)]) == pytest.approx((26 / 3) ** 0.5)
    assert math.isnan(deviation_within(scores[2:]))


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("outputs, reward_map", [(1, "identity"), (1, "tanh_half"), (4, "identity")])
def test_normalisation_is_applied_once(outputs, reward_map, within, tmp_path):
    model = reward_model("gpt2", outputs, transform=reward_map)
    raw = model.score_texts(PROMPTS, RESPONSES, ENDED)                      # before the fit: as it is
    assert torch.equal(raw, model.score_texts(PROMPTS, RESPONSES, ENDED, normalised=False))
    rows = seen_rows(model, PROMPTS, RESPONSES, ENDED)
    # 3 prompts of 3: within, the mean of their variances over K - 1 = 2
    deviation = (lambda x: x.double().var(-1).mean().sqrt().item()) if within else (lambda x: x.double().std(unbiased=False).item())
    assert model.fit_normalisation(list(model.outputs(rows)), within) == (pytest.approx(deviation(raw), rel=1e-5), within)
    assert model.mean == pytest.approx(raw.mean().item(), rel=1e-5)
    assert set(model.norm_stats) == set(all_statistics(outputs))
    hub.save_reward_model(tmp_path, model)
    loaded = hub.load_reward_model(tmp_path)
    loaded.model.double()
    for name in all_statistics(outputs):
        for found in (model, loaded):                                       # every statistic by a normalisation of its own, also after a save
            found.select(name)
            scores = found.score_texts(PROMPTS, RESPONSES, ENDED)
            plain = found.score_texts(PROMPTS, RESPONSES, ENDED, normalised=False)
            assert scores.mean().item() == pytest.approx(0, abs=1e-4) and torch.equal(scores, found.normalise(plain))
            assert deviation(scores) == pytest.approx(min(1, deviation(plain) / STD_FLOOR), abs=1e-4)
    if reward_map == "tanh_half":
        assert raw.abs().max() < 1
        z = model.outputs(rows)[..., 0]
        assert torch.allclose(raw, (2 * torch.sigmoid(z) - 1).float(), atol=1e-6)


def test_the_mean_is_of_responses_and_the_unit_is_within_prompts():
    # prompts 0 2 | 10 12 13 13 | 20: mean of seven 70 / 7 = 10, not (1 + 12 + 20) / 3;
    # within: (1 + 1) + (4 + 0 + 1 + 1) = 8 over 7 - 3; over the mix 100 + 64 + 0 + 4 + 9 + 9 + 100 = 286 over 7
    model = reward_model("gpt2")
    outputs = [torch.tensor(x, dtype=torch.float64)[:, None] for x in ([0, 2], [10, 12, 13, 13], [20])]
    assert model.fit_normalisation(outputs) == (pytest.approx(2**0.5), True)
    assert (model.mean, model.std) == (10, pytest.approx(2**0.5))
    assert model.fit_normalisation(outputs, within=False) == (pytest.approx((286 / 7) ** 0.5), False)
    assert (model.mean, model.std) == (10, pytest.approx((286 / 7) ** 0.5))
    # one response per prompt: 2 and 20 deviate by 9 from their mean, whatever was asked for
    assert model.fit_normalisation([outputs[0][1:], outputs[2]]) == (9, False)
    assert (model.mean, model.std) == (11, 9)


def test_a_model_at_chance_is_not_blown_up():
    # raw outputs 1 +- 1e-3: divided by their own deviation, sqrt(2e-6 / (2 - 1)), noise would become rewards of order 1
    model = reward_model("gpt2")
    outputs = torch.tensor([[1.001], [0.999]], dtype=torch.float64)
    assert model.fit_normalisation([outputs]) == (pytest.approx(1e-3 * 2**0.5), True)
    assert model.mean == pytest.approx(1) and model.std == STD_FLOOR
    assert model.normalise(outputs).abs().max() == pytest.approx(1e-2)
    assert model.describe().endswith("less 1.0000, over 0.1000 (the floor)")
    model.fit_normalisation([outputs * 1000])
    assert "floor" not in model.describe()


# -------------------------------------------------------------------------------------------------------- statistics

def test_statistics_list_every_statistic():
    assert all_statistics(1) == ["mean"]
    assert all_statistics(2) == ["mean", "q0", "q1", "cvar:0.5", "cvar:1"]
    for n in (2, 3, 7, 10):
        assert len(set(all_statistics(n))) == 1 + 2 * n and all(parse_statistic(name, n) == name for name in all_statistics(n))
        for share in ("0.01", ".1", "0.3", "0.33333", "0.7", "0.999", "1"):
            assert parse_statistic(f"cvar:{share}", n) in all_statistics(n)           # so each that is asked for has been fitted
    assert [cvar_count(share, 10) for share in (0.01, 0.1, 0.11, 0.3, 0.7, 1)] == [1, 1, 2, 3, 7, 10]


def test_use_reads_the_sorted_outputs():
    model = reward_model("gpt2", 4)
    outputs = torch.tensor([3.0, 1.0, 2.0, 6.0])
    for name, value in (("mean", 3.0), ("q0", 1.0), ("q3", 6.0), ("cvar:0.5", 1.5), ("cvar:0.6", 2.0), ("cvar:1", 3.0)):
        model.select(name)
        assert model.raw(outputs) == reduce_quantiles(outputs, model.statistic) == value
    for name in ("q4", "q-1", "cvar:0", "cvar:1.1", "cvar:nan", "best", "", "q1 "):
        with pytest.raises(InputError, match="--statistic"):
            model.select(name)
    assert model.statistic == "cvar:1"                                      # a refusal changes nothing


# ---------------------------------------------------------------------------------------------------------- functions

def function(tmp_path, body, name="f"):
    (tmp_path / "reward.py").write_text(body)
    return FunctionReward(f"{tmp_path / 'reward.py'}:{name}")


def test_a_function_gets_flat_lists(tmp_path):
    reward = function(tmp_path, "seen = []\ndef f(prompts, responses):\n    seen.append((prompts, responses))\n    return [10 * len(p) + len(r) for p, r in zip(prompts, responses)]\n")
    scores = reward.score_texts(["a", "bb"], [["x", "xy"], ["", "xyz"]], [[True, True], [False, True]])
    assert scores.tolist() == [[11, 12], [20, 23]] and scores.dtype == torch.float32
    assert reward.function.__globals__["seen"] == [(["a", "a", "bb", "bb"], ["x", "xy", "", "xyz"])]
    assert reward.normalise(scores) is scores                               # taken as it is
    assert torch.equal(scores, reward.score_texts(["a", "bb"], [["x", "xy"], ["", "xyz"]], [[True, True], [False, True]], normalised=False))


@pytest.mark.parametrize("returned, says", [("[1.0]", "returned 1 scores for 2"), ("[1.0] * 3", "returned 3 scores for 2"), ("[0, float('nan')]", "nan for the response 'y'"),
                                            ("[float('inf'), 0]", "inf for the response 'x'"), ("None", "TypeError"), ("3", "TypeError"), ("['a', 'b']", "ValueError"),
                                            ("1 / 0", "ZeroDivisionError"), ("exit(3)", "SystemExit")])
def test_a_function_that_is_wrong_is_named(returned, says, tmp_path):
    reward = function(tmp_path, f"def f(prompts, responses):\n    return {returned}\n")
    with pytest.raises(InputError) as error:
        reward.score_texts(["p"], [["x", "y"]], [[True, True]])
    assert says in str(error.value) and "reward.py:f" in str(error.value)


def test_tensors_and_generators_are_scores_too(tmp_path):
    for returned in ("torch.tensor([1.0, 2.0])", "torch.tensor([[1.0], [2.0]])", "(x for x in (1, 2))", "['1', '2']"):
        reward = function(tmp_path, f"import torch\ndef f(prompts, responses):\n    return {returned}\n")
        assert reward.score_texts(["p"], [["x", "y"]], [[True, True]]).tolist() == [[1, 2]]


def test_a_function_may_use_dataclasses_and_modules_beside_it(tmp_path):
    # `from __future__ import annotations` leaves a dataclass's types as text, which it looks up in sys.modules
    (tmp_path / "marks_beside.py").write_text("WORTH = 3.0\n")
    reward = function(tmp_path, textwrap.dedent("""
        from __future__ import annotations
        from dataclasses import dataclass
        from marks_beside import WORTH

        @dataclass
        class Mark:
            value: float

        def f(prompts, responses):
            return [Mark(WORTH + len(text)).value for text in responses]
    """))
    assert reward.score_texts(["p"], [["ab", "a"]], [[True, True]]).tolist() == [[5, 4]]


def test_a_function_may_normalise_itself(tmp_path):
    # a judge's 2 4 | 6 8 on its training mix: mean 5, within prompts (1 + 1 + 1 + 1) / (4 - 2), so 2**.5
    reward = function(tmp_path, textwrap.dedent("""
        import torch
        from nanorlhf.reward import deviation_within

        SCORES = [torch.tensor([2.0, 4.0]), torch.tensor([6.0, 8.0])]
        MEAN, DEVIATION = torch.cat(SCORES).mean().item(), deviation_within(SCORES)

        def f(prompts, responses):
            return [(len(text) - MEAN) / DEVIATION for text in responses]
    """))
    scores = reward.score_texts(["p"], [["12345", "123"]], [[True, True]])
    assert reward.normalise(scores)[0].tolist() == pytest.approx([0, -(2**0.5)])


def test_a_file_of_a_library_s_name_takes_no_library_s_place(tmp_path):
    (tmp_path / "json.py").write_text("def f(prompts, responses):\n    return [1.0 for _ in responses]\n")
    assert FunctionReward(f"{tmp_path / 'json.py'}:f").score_texts(["p"], [["a"]], [[True]]).tolist() == [[1]]
    assert sys.modules["json"].dumps([1]) == "[1]"


def test_what_is_a_function():
    assert is_function("reward.py:f") and is_function("/a b/c.d/reward.py:score_2")
    assert not any(map(is_function, ("runs/rm", "reward.py", "reward.py:", "reward.py:a.b", "runs/x.py:f/model", "reward:f")))


def test_at_chance_by_hand():
    # 100 throws of a coin: the share of heads deviates by sqrt(.25 / 100) = .05, so .40 to .60 is a coin's within 1.96 of them (.402, .598)
    assert metrics.at_chance(0.59, 100) and metrics.at_chance(0.41, 100) and metrics.at_chance(0.5, 0)
    assert not metrics.at_chance(0.61, 100) and not metrics.at_chance(0.39, 100)
    assert not metrics.at_chance(0.59, 1000)                               # the same share of more pairs is no coin's


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_head_starts_small_whatever_the_size_of_the_hidden_states(family):
    # hidden states behind a norm of weight w have rms |w|; std .2 / (rms sqrt(D)) over D of them: scores of deviation .2
    for size in (0.1, 7.0):
        model = reward_model(family).model
        torch.nn.init.constant_(model.trunk.final_norm.weight, size)
        if family == "gpt2":
            torch.nn.init.zeros_(model.trunk.ln_f.bias)
        batch = batching.pack_rows([batching.Row([5, 6, 7], [[8, 9], [10]])])
        found = []
        for _ in range(300):
            model.init_head()
            found.append(model(batch)[0, 0, 0].item())
        assert torch.tensor(found).std().item() == pytest.approx(0.2, rel=0.2)      # 300 draws: within 5 standard errors of .2 / sqrt(600)
