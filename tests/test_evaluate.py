"""What is measured, against numbers by hand, closed forms and judges whose faults are known; the command line on tiny files."""
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nanorlhf.gpt2 import GPT2, GPT2Config
from nanorlhf.heads import RewardModel
from nanorlhf.io import data, hub, tokenizer
from nanorlhf.io.read import InputError
from nanorlhf.losses import quantile_huber_loss, quantile_levels, ranking_loss
from nanorlhf.reward import TextReward
from nanorlhf.run.cli import parse
from nanorlhf.study import evaluate
from nanorlhf.study.evaluate import (
    calibration,
    constant_quantiles,
    coverage,
    crossing,
    distinct,
    js,
    kl_gaussian,
    kl_histogram,
    kl_kde,
    kl_table,
    label_against_closed_form,
    label_auc,
    label_optimum,
    matched,
    measure,
    pair_accuracy,
    per_quantile,
    pinball,
    sign_test,
    spearman,
    spread_analysis,
    wilson,
    win_rate,
    within_deviation,
)

LEVELS = quantile_levels(10).numpy()


class Judge:
    def __init__(self, compare):
        self.compare = compare


# ------------------------------------------------------------------------------------------------------------ win rate

def test_wilson_by_hand():
    # 8 of 10, z = 2:  z^2/n = .4;  middle .8 + .2 = 1.0;  half = sqrt(.4 * (.16 + .1)) = .322490;  both over 1.4
    assert wilson(8, 10, z=2) == pytest.approx(((1 - 0.3224903) / 1.4, (1 + 0.3224903) / 1.4), abs=1e-7)
    # none of 10: 0 and z^2 / (n + z^2) = 3.8416 / 13.8416; it does not collapse to a point
    assert wilson(0, 10) == pytest.approx((0, 0.2775402), abs=1e-7) and wilson(10, 10) == pytest.approx((1 - 0.2775402, 1), abs=1e-7)
    assert wilson(0, 0) == (0, 1)


def test_sign_test_by_enumeration():
    # every sequence of n fair coins is one of 2^n: count those at least as lopsided
    for n in range(9):
        for wins in range(n + 1):
            extreme = sum(abs(2 * bin(coins).count("1") - n) >= abs(2 * wins - n) for coins in range(2**n))
            assert sign_test(wins, n - wins) == pytest.approx(extreme / 2**n, abs=1e-12)


def test_sign_test_of_many():
    # normal approximation with continuity: z = (50,500 - 50,000 - .5) / sqrt(100,000 / 4) = 3.1591;  p = erfc(z / sqrt 2)
    assert sign_test(50_500, 49_500) == pytest.approx(math.erfc(499.5 / math.sqrt(25_000) / math.sqrt(2)), rel=1e-3)
    assert sign_test(100_000, 0) == 0 and sign_test(50_000, 50_000) == pytest.approx(1)       # 2^-99,999 is no float


def test_a_judge_for_the_first_place_gives_half():
    found = win_rate(Judge(lambda prompt, x, y: 1), ["p"] * 40, ["a"] * 40, ["b"] * 40)
    assert (found["share"], found["disagreed"], found["ties"], found["p"]) == (0.5, 1.0, 40, 1.0)
    assert math.isnan(found["decided"]) and (found["decided_low"], found["decided_high"], found["paper"]) == (0, 1, 0)


def test_an_oracle_gives_all():
    found = win_rate(Judge(lambda prompt, x, y: (len(x) > len(y)) - (len(x) < len(y))), ["p"] * 6, ["long"] * 6, ["x"] * 6)
    assert (found["share"], found["disagreed"], found["wins"], found["paper"]) == (1.0, 0.0, 6, 1.0)
    assert found["p"] == pytest.approx(2 / 2**6) and found["share_low"] == wilson(6, 6)[0]
    back = win_rate(Judge(lambda prompt, x, y: (len(x) > len(y)) - (len(x) < len(y))), ["p"] * 6, ["x"] * 6, ["long"] * 6)
    assert (back["share"], back["losses"]) == (0.0, 6)


def test_what_two_orders_make_of_each_answer():
    # (a first, b first):  win (1,-1), loss (-1,1), tie (0,0), contradiction (1,1) and (-1,-1), one-sided (1,0): a tie, no contradiction, None twice: skipped
    answers = {"p0": (1, -1), "p1": (-1, 1), "p2": (0, 0), "p3": (1, 1), "p4": (-1, -1), "p5": (1, 0), "p6": (None, 1), "p7": (1, None), "p8": (1, -1)}
    found = win_rate(Judge(lambda prompt, x, y: answers[prompt][x == "b"]), list(answers), ["a"] * 9, ["b"] * 9)
    assert [found[key] for key in ("n", "wins", "ties", "losses", "skipped", "disagreed")] == [7, 2, 4, 1, 2, 2 / 7]
    assert (found["share"], found["decided"], found["paper"], found["p"]) == (4 / 7, 2 / 3, 2 / 7, 1.0)
    assert [found[f"{k}_{e}"] for k in ("share", "decided", "paper") for e in ("low", "high")] == [*wilson(4, 7), *wilson(2, 3), *wilson(2, 7)]
    json.dumps(found)


def test_a_noisy_judge():
    # right with probability .8 in each order: win .64, loss .04, contradiction .32;  share .64 + .16 = .8, decided .64 / .68 = .941
    rng, n = np.random.default_rng(0), 4000
    found = win_rate(Judge(lambda prompt, x, y: (1 if x == "a" else -1) * (1 if rng.random() < 0.8 else -1)), ["p"] * n, ["a"] * n, ["b"] * n)
    # four standard errors: sqrt(.64 + .32 / 4 - .64) / sqrt(n) = .0045 for the share, sqrt(.32 * .68 / n) = .0074 for the contradictions
    assert found["share"] == pytest.approx(0.8, abs=0.018) and found["disagreed"] == pytest.approx(0.32, abs=0.03)
    assert found["decided"] == pytest.approx(0.64 / 0.68, abs=0.02) and found["share_low"] < 0.8 < found["share_high"] and found["p"] < 1e-9


def test_distinct():
    # 2 different of 3; 2 + 2 + 3 words
    assert distinct(["a b", "a b", "c d e"]) == {"n": 3, "distinct": 2 / 3, "words": 7 / 3}


# ------------------------------------------------------------------------------------------------- scores against places

def test_pair_accuracy_by_hand():
    # group 1: (0,1) right, (0,2) right, 1 and 2 tie in place: no pair.  group 2: equal scores, half.  group 3: wrong
    scores, places = [[3.0, 2.0, 1.0], [5.0, 5.0], [0.0, 9.0]], [[0, 1, 1], [1, 0], [0, 1]]
    assert pair_accuracy(scores, places) == {"accuracy": 2.5 / 4, "n": 4}
    assert pair_accuracy([np.array(s) for s in scores][::-1], places[::-1]) == {"accuracy": 2.5 / 4, "n": 4}
    empty = pair_accuracy([[1.0, 2.0]], [[0, 0]])
    assert math.isnan(empty["accuracy"]) and empty["n"] == 0


def test_auc_is_across_groups():
    # good 3 and 1, bad 2 and 1 (the 99 has no label): 3>2, 3>1, 1<2, 1=1 -> 2.5 / 4
    assert label_auc([[3.0, 2.0, 99.0], [1.0, 1.0]], [[1, 0, None], [1, 0]]) == 2.5 / 4


def test_calibration_by_hand():
    # margins better - worse: +1, -1, 0, +3  ->  confidence .731, .731, .5, .953;  right 1, 0, 1/2, 1; bins of width .125
    s1, s3 = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-3))
    found = calibration([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [0.0, 3.0]], [[0, 1], [0, 1], [0, 1], [1, 0]], bins=4)
    table = [(row["low"], row["high"], row["n"], pytest.approx(row["predicted"]), row["observed"]) for row in found["bins"]]
    assert table == [(0.5, 0.625, 1, 0.5, 0.5), (0.625, 0.75, 2, s1, 0.5), (0.875, 1.0, 1, s3, 1.0)]
    assert found["ece"] == pytest.approx((2 * (s1 - 0.5) + (1 - s3)) / 4)
    assert found["brier"] == pytest.approx(((1 - s1) ** 2 + s1**2 + 0.25 + (1 - s3) ** 2) / 4)
    loss = ranking_loss(torch.tensor([[1.0, 0], [0, 1], [2, 2], [3, 0]]), torch.tensor([[0, 1]] * 4), torch.ones(4, 2, dtype=torch.bool))
    assert found["log_loss"] == pytest.approx(loss.item()) and found["n"] == 4


def test_calibration_of_a_true_and_of_a_loud_model():
    rng, n = np.random.default_rng(0), 20_000
    scores = rng.normal(size=(n, 2))
    first = rng.random(n) < 1 / (1 + np.exp(scores[:, 1] - scores[:, 0]))           # P(0 beats 1) is the sigmoid of the margin
    places = [[0, 1] if won else [1, 0] for won in first]
    # about 2,000 pairs a bin: standard error .01, mean |error| .8 of it.  Three times the scores: E|sigmoid(3m) - sigmoid(m)| over |m|, m ~ N(0, 2), is .185
    assert calibration(scores, places)["ece"] < 0.02
    m = np.abs(rng.normal(0, math.sqrt(2), 100_000))
    assert calibration(3 * scores, places)["ece"] == pytest.approx((1 / (1 + np.exp(-3 * m)) - 1 / (1 + np.exp(-m))).mean(), abs=0.02)
    assert calibration(3 * scores, places)["log_loss"] > calibration(scores, places)["log_loss"]


# ------------------------------------------------------------------------------------- how far apart chosen and rejected are

def normal(n, mean=0.0, deviation=1.0, seed=0):
    return np.random.default_rng(seed).normal(mean, deviation, n)


def test_kl_gaussian_is_exact_in_the_moments_and_has_a_direction():
    # mean 1, variance 1 against mean 3, variance 4:  log 2 + (1 + 4) / 8 - 1/2 = .818147;  reversed:  -log 2 + (4 + 4) / 2 - 1/2 = 2.806853
    p, q = [0.0, 2.0], [1.0, 5.0]
    assert kl_gaussian(p, q) == pytest.approx(math.log(2) + 5 / 8 - 0.5) and kl_gaussian(q, p) == pytest.approx(-math.log(2) + 4 - 0.5)


def test_estimates_of_known_divergences():
    # N(1,1) against N(0,1.5^2): KL = log 1.5 + (1 + 1) / 4.5 - .5 = .34991; reversed: -log 1.5 + (2.25 + 1) / 2 - .5 = .71953
    # n = 20,000: standard errors under .01; kernels widen the variances by 2 %
    p, q = normal(20_000, 1), normal(20_000, 0, 1.5, seed=1)
    for estimate in (kl_gaussian, kl_kde):
        assert estimate(p, q) == pytest.approx(0.34991, rel=0.1) and estimate(q, p) == pytest.approx(0.71953, rel=0.1), estimate
    # ten bins cannot see more than the KL of the bins' own probabilities, .63 of the .72
    ends = np.linspace(min(p.min(), q.min()), max(p.max(), q.max()), 11)
    a, b = (np.diff([math.erf((e - mean) / math.sqrt(2) / deviation) for e in ends]) / 2 + 1e-6 for mean, deviation in ((1, 1), (0, 1.5)))
    assert kl_histogram(p, q) == pytest.approx((a * np.log(a / b)).sum(), rel=0.1) and kl_histogram(q, p) == pytest.approx((b * np.log(b / a)).sum(), rel=0.1)
    # JS by a fine sum over the true densities
    x = np.linspace(-10, 10, 20_001)
    a, b = np.exp(-((x - 1) ** 2) / 2), np.exp(-(x**2) / 4.5) / 1.5
    a, b = a / a.sum(), b / b.sum()
    true = (np.nansum(a * np.log(2 * a / (a + b))) + np.nansum(b * np.log(2 * b / (a + b)))) / 2
    assert js(p, q) == pytest.approx(true, rel=0.1) and js(q, p) == pytest.approx(js(p, q))
    assert js(p - 100, q) == pytest.approx(math.log(2), abs=1e-3)                  # its bound, where nothing overlaps


def test_the_histogram_with_a_tiny_floor_measures_the_sample_size():
    # N(sqrt .3, 1) against N(0, 1): KL = .3 / 2 = .15.  n = 250 a side: the difference of means has standard error sqrt(2 / 250) = .089, and
    # KL = d^2 / 2 has d * .089 = .049: three of them.  Bias: kernels -.014, ten half-counted bins about + (10 - 1) / 2 * 2 / 250 = .036
    found = kl_table(normal(250, math.sqrt(0.3), seed=2), normal(250, seed=3))
    for name, bias in (("gaussian", 0), ("kde", -0.014), ("histogram", 0.036)):
        assert found[name] == pytest.approx(0.15 + bias, abs=0.15), name
    # a tail bin that q lacks costs 1/250 log(.004 / 1e-10) = .07 a response: a dozen of them are 5 times the truth
    assert found["histogram_raw"] > 5 * 0.15
    # the same two distributions, 70 a side: about 4.5; 100,000 a side: the truth again
    few = np.mean([kl_histogram(normal(70, math.sqrt(0.3), seed=s), normal(70, seed=100 + s), 50, 1e-10) for s in range(30)])
    many = kl_histogram(normal(100_000, math.sqrt(0.3)), normal(100_000, seed=1), 50, 1e-10)
    assert few == pytest.approx(4.5, abs=1) and many == pytest.approx(0.15, abs=0.03)


def test_a_smoothed_histogram_by_hand():
    # bins [0, 1), [1, 2];  counts p (1, 3), q (3, 1), half a count each: shares 1.5/5, 3.5/5 and mirrored -> KL = .4 log(3.5 / 1.5)
    assert kl_histogram([0.0, 1.5, 1.6, 2.0], [0.0, 0.1, 0.2, 2.0], bins=2) == pytest.approx(0.4 * math.log(3.5 / 1.5))


def test_level_and_scale_of_a_reward_do_not_count():
    p, q = normal(300, 0.5), normal(200, seed=1)
    here, there = kl_table(p, q), kl_table(1000 * p - 7, 1000 * q - 7)
    for name in ("gaussian", "kde", "histogram", "histogram_raw", "js"):
        assert there[name] == pytest.approx(here[name], rel=1e-6), name
    assert there["settings"]["bandwidth_chosen"] == pytest.approx(1000 * here["settings"]["bandwidth_chosen"])
    assert here["settings"]["bandwidth_chosen"] == pytest.approx(p.std(ddof=1) * 300**-0.2)
    assert (here["n_chosen"], here["n_rejected"]) == (300, 200)
    with pytest.raises(InputError, match="do not differ"):
        kl_table([1.0, 1.0], q)


# --------------------------------------------------------------------------------------------- what the quantiles say

def test_coverage_by_hand_with_ties():
    # response 1: opinions 0 1 1 2;  response 2: opinion 1 alone, which weighs as much as those four.  Outputs [1, 3] and, out of order, [2, 1]
    # q0 = 1, 1:  below (1/4 + 0) / 2 = .125;  at most (3/4 + 1) / 2 = .875.   q1 = 3, 2: below = at most = 1
    found = coverage([[1.0, 3.0], [2.0, 1.0]], [[0, 1, 1, 2], [1]], [0.9, 0.95])
    rows = found["quantiles"]
    assert [(r["below"], r["at_most"], r["ok"]) for r in rows] == [(0.125, 0.875, True), (1.0, 1.0, True)]
    assert [r["gap"] for r in rows] == pytest.approx([0.025, 0.05]) and found["gap"] == pytest.approx(0.0375)
    assert found["crossing"] == 0.5 == crossing([[1.0, 3.0], [2.0, 1.0]]) and found["ok"]
    assert not coverage([[1.0, 3.0], [2.0, 1.0]], [[0, 1, 1, 2], [1]], [0.07, 0.5])["ok"]
    # pinball at .9 and .95, sorted: response 1, q0 = 1: (.1 * 1 + 0 + 0 + .9 * 1) / 4 = .25; q1 = 3: .05 (3 + 2 + 2 + 1) / 4 = .1
    # response 2: q0 = 1: 0; q1 = 2: .05 -> ((.25 + .1) + (0 + .05)) / 4 = .1
    assert found["pinball"] == pytest.approx(0.1)


def test_pinball_is_the_loss():
    rng = np.random.default_rng(0)
    q, z = rng.normal(size=(7, 10)), rng.normal(size=(7, 5))
    loss = quantile_huber_loss(torch.tensor(q), torch.tensor(z), quantile_levels(10), 0)             # summed over quantiles
    assert pinball(q, z, LEVELS) == pytest.approx(loss.item() / 10)


def test_the_constant_is_the_best_constant():
    # responses weigh 1/2 each: cumulative weight 1/6, 2/6, 3/6 of 1 2 3, then 1 at 10: tau .3 -> 2, .5 -> 3, .55 -> 10
    assert constant_quantiles([[1, 2, 3], [10]], [0.1, 0.3, 0.5, 0.55]).tolist() == [1, 2, 3, 10]
    rng = np.random.default_rng(0)
    opinions = [rng.normal(rng.normal(), 1, rng.integers(1, 6)) for _ in range(40)]
    best, every = constant_quantiles(opinions, LEVELS), np.sort(np.concatenate(opinions))
    for i, tau in enumerate(LEVELS):                 # the pinball loss is piecewise linear: its minimum is at an opinion
        losses = [pinball(np.full((40, 1), z), opinions, [tau]) for z in every]
        assert pinball(np.full((40, 1), best[i]), opinions, [tau]) == pytest.approx(min(losses))


def test_a_model_covers_as_its_constant_does_and_loses_less():
    # opinions of response i: N(m_i, .5^2) with m_i ~ N(0, 1).  True quantiles m_i + .5 Phi^-1(tau), the constant's: those of N(0, 1.25)
    # mean pinball of a normal is proportional to its deviation: the ratio is .5 / sqrt(1.25) = .447
    rng, n = np.random.default_rng(0), 1500
    z = np.sort(rng.normal(size=200_000))[(LEVELS * 200_000).astype(int)]                             # Phi^-1(tau)
    mean = rng.normal(size=(n, 1))
    opinions = mean + 0.5 * rng.normal(size=(n, 10))
    training = rng.normal(size=(n, 1)) + 0.5 * rng.normal(size=(n, 10))
    found = coverage(mean + 0.5 * z, opinions, LEVELS, training)
    assert found["ok"] and found["constant"]["ok"] and found["pinball"] / found["constant"]["pinball"] == pytest.approx(0.5 / math.sqrt(1.25), rel=0.05)
    assert not coverage(mean + 1.5 * z, opinions, LEVELS)["ok"] and not coverage(mean + 0.5 * z + 0.3, opinions, LEVELS)["ok"]
    json.dumps(found)


def test_within_deviation():
    # 0 and 2 deviate by 1, 5 and 5 by 0
    assert within_deviation([[0.0, 2.0], [5.0, 5.0]]) == 0.5


@pytest.mark.parametrize("kappa", [0.5, 1.0, 1.5, 3.0])
def test_label_optimum_by_brute_force(kappa):
    # step .005 on [-1, 1]: the best of the grid is at most a step from the minimum of a convex function
    grid = torch.linspace(-1, 1, 401, dtype=torch.float64)
    for tau in (0.05, 0.25, 0.45, 0.75, 0.95):
        won, lost = ([quantile_huber_loss(q.view(1, 1), torch.tensor([[sign]], dtype=torch.float64), torch.tensor([tau]), kappa).item() for q in grid] for sign in (1, -1))
        for p in (0.0, 0.03, 0.2, 0.5, 0.62, 0.9, 1.0):
            best = grid[np.argmin(p * np.array(won) + (1 - p) * np.array(lost))].item()
            assert label_optimum(p, tau, kappa).item() == pytest.approx(best, abs=0.0051), (p, tau)


def test_label_optimum_by_hand():
    # p = 1/2: r = tau / (1 - tau).  tau .75: r = 3, q = 2/3;  tau .25: r = 1/3, q = -2/3;  tau 1/2: 0
    assert label_optimum(0.5, np.array([0.75, 0.25, 0.5])).tolist() == pytest.approx([2 / 3, -2 / 3, 0])
    assert label_optimum(np.array([[0.5], [0.9]]), LEVELS).shape == (2, 10)


def test_a_model_at_the_closed_form():
    # two kinds of responses that win 1/4 and 3/4: two bins, each at its own optimum, outputs shuffled; then off by .1 throughout
    outputs = np.concatenate([np.tile(label_optimum(0.25, LEVELS)[::-1], (40, 1)), np.tile(label_optimum(0.75, LEVELS), (40, 1))])
    won = np.tile([1, 0, 0, 0], 10).tolist() + np.tile([0, 1, 1, 1], 10).tolist()
    found = label_against_closed_form(outputs, won, LEVELS, bins=2)
    assert [(row["n"], row["won"]) for row in found["bins"]] == [(40, 0.25), (40, 0.75)] and found["max_deviation"] < 1e-12
    off = label_against_closed_form(outputs + 0.1, won, LEVELS, bins=2)
    assert off["mean_deviation"] == pytest.approx(0.1) and off["max_deviation"] == pytest.approx(0.1)
    assert label_against_closed_form(outputs, won, LEVELS, bins=2, kappa=0.5)["max_deviation"] > 0.1
    json.dumps(found)


def test_per_quantile_by_hand():
    # sorted, chosen first: (0, 4) against (1, 2), given unsorted.  q0: 0 < 1 wrong; q1: 4 > 2 right; mean 2 > 1.5 right
    # second group: (5, 5) against (6, 7): wrong throughout.  AUC of q1: good 4, 5, bad 2, 7: 4>2, 5>2 of 4
    found = per_quantile([[[4.0, 0.0], [2.0, 1.0]], [[7.0, 6.0], [5.0, 5.0]]], [[0, 1], [1, 0]])
    assert [row["accuracy"] for row in found["quantiles"]] == [0.0, 0.5] and found["mean"]["accuracy"] == 0.5
    # AUC of q0: good 0, 5, bad 1, 6: 5>1 of 4;  of the mean: good 2, 5, bad 1.5, 6.5: two of 4
    assert [row["auc"] for row in found["quantiles"]] == [0.25, 0.5] and found["mean"]["auc"] == 0.5


def test_spearman_by_hand():
    # ranks 1 2.5 2.5 4 and 1 3 2 4: centred -1.5 0 0 1.5 and -1.5 .5 -.5 1.5; product 4.5 over sqrt(4.5 * 5)
    assert spearman([1, 2, 2, 3], [10, 30, 20, 1000]) == pytest.approx(4.5 / math.sqrt(22.5))
    assert spearman([1, 2, 3], [-1, -8, -9]) == pytest.approx(-1) and math.isnan(spearman([1, 2], [3, 3]))


def test_spread_analysis():
    # pair g: the better one spreads by g + 1, the other by g + 3, as the judges do.  The narrow five pairs are right, the wide five wrong:
    # mean spreads 2 .. 6 and 7 .. 11
    outputs = [[[level, level + g + 1], [8.0 + g, 5.0]] for g, level in enumerate([9.0] * 5 + [0.0] * 5)]
    opinions = [[[0, g + 1], [7, 10 + g, 7, 10 + g]] for g in range(10)]
    found = spread_analysis(outputs[::-1], opinions[::-1], [[0, 1]] * 10, bins=2)
    assert found["deciles"] == [{"spread": 4.0, "accuracy": 1.0, "n": 5}, {"spread": 9.0, "accuracy": 0.0, "n": 5}]
    assert found["spearman"] == pytest.approx(1.0)
    # opinions that are all equal disagree by exactly nothing: .1 + .1 + .1 must not rank above .5 + .5
    assert math.isnan(spread_analysis(outputs, [[[0.1] * 3, [0.5] * 2]] * 10, [[0, 1]] * 10)["spearman"])
    assert spread_analysis(outputs, None, [[0, 1]] * 10)["spearman"] is None
    assert spread_analysis(outputs, None, [[0, 0]] * 10)["deciles"] == []


# ------------------------------------------------------------------------------------------------------ the command line

def write(path, *groups):
    path.write_text("".join(json.dumps({"prompt": prompt, "responses": responses}) + "\n" for prompt, responses in groups), encoding="utf-8")
    return str(path)


def cli(**flags):
    evaluate.main(parse(evaluate.Config, [word for name, value in flags.items() for word in (f"--{name}", str(value))]))


@pytest.fixture
def files(tmp_path):
    texts = lambda *said: [{"text": text} for text in said]
    a = write(tmp_path / "a.jsonl", *((f"p{i}", texts(" long answer", " x")) for i in range(6)), ("only a", texts(" y")))
    b = write(tmp_path / "b.jsonl", *((f"p{i}", [{"text": " an expert, not a sample", "label": 1}, {"text": " short", "label": 0}, {"text": " z", "label": 0}])
                                      for i in reversed(range(6))))
    (tmp_path / "judge.py").write_text("def length(prompts, responses):\n    return [len(text) for text in responses]\n", encoding="utf-8")
    return {"a": a, "b": b, "judge": f"{tmp_path / 'judge.py'}:length"}


def test_matched(files):
    prompts, a, b, alone, dropped = matched(files["a"], files["b"])
    assert prompts == [f"p{i}" for i in range(6)] and set(a) == {" long answer"} and set(b) == {" short"} and alone == 1 and not dropped
    prompts, a, b, *_ = matched(files["a"], files["b"], k=5)
    assert prompts[:3] == ["p0", "p0", "p1"] and a[:2] == [" long answer", " x"] and b[:2] == [" short", " z"] and len(a) == len(b) == 12


def test_compare_files(files, capsys):
    cli(**files)
    said = capsys.readouterr().out
    # six wins of six: Wilson from 6 / (6 + 3.8416) = 61.0 %;  p = 2 / 2^6 = .03125
    assert "6 pairs" in said and "1 prompts are in one file only" in said and "wins 6  ties 0  losses 0" in said and "in 0.0%" in said
    assert said.count("100.0%   95 % [61.0%, 100.0%]") == 3 and "p = 0.0313" in said and "a: 6 texts, 16.7% distinct, 2.0 words" in said
    cli(**files, k=2)                                # " x" ties with " z": six wins, six ties
    assert "wins 6  ties 6  losses 0" in capsys.readouterr().out


@pytest.mark.parametrize("change, says", [
    ({"a": "nowhere.jsonl"}, "nowhere.jsonl: no such file"), ({"a": ""}, "--a is missing"), ({"judge": "nobody"}, "--judge nobody"), ({"judge": "no.py:f"}, "no file no.py"),
    ({"reward": "r"}, "either"), ({"k": 0}, "--k 0"), ({"a": "", "b": "", "judge": ""}, "either"), ({"judge": "reference"}, "--reference is missing"),
    ({"a": "", "b": "", "judge": "", "data": "x"}, "--reward is missing"), ({"a": "", "b": "", "judge": "", "data": "x", "reward": "nowhere"}, "nowhere: no such folder"),
])
def test_wrong_flags(change, says, files):
    with pytest.raises(InputError) as error:
        cli(**{**files, **change})
    assert says in str(error.value) and "\n" not in str(error.value)


def test_no_common_prompt(files, tmp_path):
    with pytest.raises(InputError, match="no prompt"):
        cli(**{**files, "b": write(tmp_path / "c.jsonl", ("other", [{"text": " q"}]))})


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory):
    """40 groups of two, three or four responses with places by length, and three opinions each that say the opposite: a tenth is held out."""
    folder, rng = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(0)
    groups = []
    for i in range(40):
        lengths = rng.permutation(np.arange(1, 9))[: 2 + i % 3]
        groups.append((f"p{i}", [{"text": " ab" * int(n), "place": float(-n), "scores": (rng.normal(size=3) - n).tolist()} for n in lengths]))
    return write(folder / "ranked.jsonl", *groups)


def reward_folder(folder, outputs, texts=("p0 ab ab",)):
    torch.manual_seed(0)
    tok = tokenizer.train_bpe(list(texts), 260)
    model = RewardModel(GPT2(GPT2Config(vocab_size=tok.vocab_size, n_positions=64, n_embd=8, n_layer=1, n_head=1)), outputs)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.trunk.lm_head = None
    hub.save_reward_model(folder / "model", TextReward(model, tok))
    return hub.load_reward_model(folder / "model")


@pytest.mark.parametrize("outputs, target", [(1, "label"), (10, "label"), (10, "scores")])
def test_measure_reward(outputs, target, reward_file, tmp_path, capsys):
    reward = reward_folder(tmp_path, outputs)
    flags = {"loss": "quantile", "labels": "place", "quantile_target": target, "kappa": 0.5}
    (tmp_path / "config.json").write_text(json.dumps({"flags": flags}), encoding="utf-8")
    cli(reward=tmp_path, data=reward_file, device="cpu")
    said = capsys.readouterr().out
    assert "trained with --loss quantile --labels place" in said and "4 held-out groups" in said
    assert ("quantiles" in said, "pinball" in said, "max_deviation" in said) == (outputs > 1, target == "scores", outputs > 1 and target == "label")
    # accuracy by the text interface, pair by pair; K is 2, 3 or 4
    held, right = data.load(reward_file).held_out, []
    for group in held:
        scores = reward.score_texts([group.prompt], [[r.text for r in group.responses]], [[True] * len(group.responses)], normalised=False)[0].tolist()
        right += [(scores[i] > scores[j]) for i, x in enumerate(group.responses) for j, y in enumerate(group.responses) if x.place < y.place]
    assert f"{'accuracy':<20}{np.mean(right):.4g}\n" in said and f"  {'n':<20}{len(right)}\n" in said
    cli(reward=tmp_path / "model", data=reward_file, device="cpu")
    assert "does not tell" in capsys.readouterr().out


def test_measure_takes_each_part_from_its_place():
    # outputs that know everything: q sorted around the place's value; chosen is the better half
    rng = np.random.default_rng(0)
    places = [rng.permutation(4).tolist() for _ in range(30)]
    rows = [data.derive_labels([data.Response("", place=p) for p in place]) for place in places]
    outputs = [np.array([[-p - 0.1, -p + 0.1] for p in place]) + rng.normal(0, 0.01, (4, 2)) for place in places]
    opinions = [[[-p, -p + 0.2] for p in place] for place in places]
    found = measure(outputs, rows, kappa=1.0, opinions=opinions, training=[z for group in opinions for z in group])
    assert found["accuracy"] == found["auc"] == 1 and found["n"] == 6 * 30 and (found["kl"]["n_chosen"], found["kl"]["n_rejected"]) == (60, 60)
    means = {y: [m for group, row in zip(outputs, rows) for m, label in zip(group.mean(-1), row.label) if label == y] for y in (1, 0)}
    assert found["kl"]["gaussian"] == pytest.approx(kl_gaussian(means[1], means[0]), rel=1e-9) and found["quantiles"]["within_deviation"] == pytest.approx(0.1, abs=0.01)
    # places 0 .. 3 win 3, 2, 1, 0 of three comparisons
    label = measure(outputs, rows, kappa=1.0)["quantiles"]["label"]["bins"]
    assert label[0]["won"] == 0 and label[-1]["won"] == 1 and sum(row["n"] for row in label) == 120
    assert found["quantiles"]["coverage"]["pinball"] < found["quantiles"]["coverage"]["constant"]["pinball"] / 4
    assert "label" not in measure(outputs, rows)["quantiles"] and "quantiles" not in measure([group[:, :1] for group in outputs], rows)
    json.dumps(found)


def test_nothing_to_tell_apart(tmp_path):
    reward_folder(tmp_path, 1)
    path = write(tmp_path / "flat.jsonl", *((f"p{i}", [{"text": " ab", "place": 0}, {"text": " ab ab", "place": 0}]) for i in range(20)))
    with pytest.raises(InputError, match="none of 2 held-out groups"):
        cli(reward=tmp_path / "model", data=path, device="cpu")


def test_a_mistake_ends_in_one_line(files):
    said = subprocess.run([sys.executable, "-m", "nanorlhf.study.evaluate", "--a", "nowhere.jsonl", "--b", files["b"], "--judge", files["judge"]],
                          capture_output=True, text=True, cwd=Path(evaluate.__file__).parents[2])
    assert said.returncode == 2 and said.stderr == "error: nowhere.jsonl: no such file\n" and said.stdout == ""
