"""Losses by hand, at extremes, against closed-form optima; what stands behind a mask is garbage on purpose. Labels and statistics too."""
import math

import pytest
import torch
from garbage import NAN, assert_ignored, gradient, random

from nanorlhf.io.data import Response, derive_labels, read_hh
from nanorlhf.losses import (
    balanced_weights,
    classification_loss,
    quantile_huber_loss,
    quantile_levels,
    ranked_pairs,
    ranking_loss,
    sft_loss,
)
from nanorlhf.reward import REWARD_TRANSFORMS, parse_statistic, reduce_quantiles

LN2 = math.log(2)


def softplus(x):
    """log(1 + e^x) = - log sigmoid(-x), in Python's float64."""
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


# ------------------------------------------------------------------------------------------------------------------ sft

def test_sft_loss_is_a_mean_over_tokens():
    # 1 + 2 over the first response, 3 over the second: (1 + 2 + 3) / 3 tokens; a mean of the responses' means would be 2.25
    logprobs = torch.tensor([[-1.0, -2.0, NAN], [-3.0, 7.0, NAN]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert sft_loss(logprobs, mask).item() == 2.0
    assert sft_loss(logprobs, mask, count=12).item() == 0.5


def test_sft_gradient_is_minus_one_over_the_count():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    _, grad = gradient(lambda x: sft_loss(x, mask), torch.full((2, 3), -100.0))
    assert torch.equal(grad, -mask.float() / 3)


# -------------------------------------------------------------------------------------------------------------- ranking

def test_ranking_loss_by_hand():
    # margins of the six pairs: 1 three times, 2 twice, 3 once
    # (3 * 0.3132616875 + 2 * 0.1269280110 + 0.0485873516) / 6 = 0.2070380727
    loss = ranking_loss(torch.tensor([[3.0, 2, 1, 0]], dtype=torch.float64), torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 4, dtype=torch.bool))
    assert loss.item() == pytest.approx(0.2070380727, abs=1e-10)


def test_ranking_loss_follows_places_not_columns():
    # the same four in another order of columns
    loss = ranking_loss(torch.tensor([1.0, 3, 0, 2]), torch.tensor([2, 0, 3, 1]), torch.ones(4, dtype=torch.bool))
    assert loss.item() == pytest.approx(0.2070380727, abs=1e-7)


def test_ranking_means_over_pairs_then_over_groups():
    # group 1: place 0 beats two that tie, margin 1 twice       -> softplus(-1) = 0.3132616875
    # group 2: two responses, the better one is 2 below         -> softplus(2)  = 2.1269280110
    # group 3: all tie: no pair, it is not counted
    # a mean over all pairs at once would be 0.918
    scores = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, NAN], [5.0, -5.0, 0.0]])
    place = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, -9.0], [4.0, 4.0, 4.0]])
    valid = torch.tensor([[True] * 3, [True, True, False], [True] * 3])
    assert ranking_loss(scores, place, valid).item() == pytest.approx((softplus(-1) + softplus(2)) / 2, abs=1e-6)
    assert ranking_loss(scores, place, valid, count=8).item() == pytest.approx((softplus(-1) + softplus(2)) / 8, abs=1e-6)


def test_ranked_pairs():
    # 0 beats 1 and 2, which tie; 3 and 4 are not there, so the best and the worst place count for nothing
    valid = torch.tensor([True, True, True, False, False])
    pairs = ranked_pairs(torch.tensor([0.0, 1.0, 1.0, -1.0, 2.0]), valid)
    assert pairs.nonzero().tolist() == [[0, 1], [0, 2]]


def test_no_pair_at_all_is_zero():
    for place, valid in [([1.0, 1.0], [True, True]), ([0.0, 1.0], [True, False]), ([0.0, 1.0], [False, False])]:
        loss, grad = gradient(lambda s, place=place, valid=valid: ranking_loss(s, torch.tensor([place]), torch.tensor([valid])), torch.tensor([[3.0, NAN if not valid[1] else 1.0]]))
        assert loss.item() == 0 and (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranking_gradient_of_badly_wrong_pairs_does_not_die(dtype):
    # margin -100: loss 100, d/ds_better = -sigmoid(100) = -1.  log(sigmoid(d) + 1e-5) would have gradient 4e-39
    one = torch.ones(1, 2, dtype=torch.bool)
    loss, grad = gradient(lambda s: ranking_loss(s, torch.tensor([[0, 1]]), one), torch.tensor([[0.0, 100.0]], dtype=dtype))
    assert loss.item() == 100 and grad.tolist() == [[-1.0, 1.0]]
    # three pairs, all wrong: -1 per pair over 3 pairs; the middle one wins one and loses one
    loss, grad = gradient(lambda s: ranking_loss(s, torch.tensor([0, 1, 2]), torch.ones(3, dtype=torch.bool)), torch.tensor([0.0, 100, 200], dtype=dtype))
    assert loss.item() == pytest.approx(400 / 3) and grad.tolist() == pytest.approx([-2 / 3, 0, 2 / 3])
    # margin +100: nothing left to learn, and nothing that is not a number
    loss, grad = gradient(lambda s: ranking_loss(s, torch.tensor([[0, 1]]), one), torch.tensor([[100.0, 0.0]], dtype=dtype))
    assert 0 <= loss.item() < 1e-40 and grad.abs().max() < 1e-40


def test_ranking_ignores_what_is_not_valid():
    valid = torch.tensor([[True, True, True, False], [True, False, True, False]])
    place = torch.tensor([[0.0, 1, 2, NAN], [1, -7, 0, NAN]])
    assert_ignored(lambda s: ranking_loss(s, place, valid), random(2, 4), valid)


# ------------------------------------------------------------------------------------------------------- classification

def test_classification_loss_by_hand():
    # z = 0 good: -log(1/2) = ln 2;   z = ln 3 bad: -log(1 - 3/4) = ln 4;   mean 1.5 ln 2
    logits, label = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[1, 0]])
    assert classification_loss(logits, label, torch.ones(1, 2, dtype=torch.bool)).item() == pytest.approx(1.5 * LN2, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classification_at_extremes(dtype):
    # z = 100 good: 0;  z = -100 good: 100, gradient -1;  z = 100 bad: 100, gradient +1;  z = -100 bad: 0
    label = torch.tensor([1, 1, 0, 0])
    loss, grad = gradient(lambda z: classification_loss(z, label, torch.ones(4, dtype=torch.bool), count=1), torch.tensor([100.0, -100, 100, -100], dtype=dtype))
    assert loss.item() == pytest.approx(200, abs=1e-6) and grad.tolist() == pytest.approx([0, -1, 1, 0], abs=1e-30)


def test_classification_leaves_out_what_has_no_label():
    # label -1 (a middle tie) is left out by valid: the mean is over two
    logits, label = torch.tensor([0.0, 50.0, math.log(3)]), torch.tensor([1, -1, 0])
    assert classification_loss(logits, label, label >= 0).item() == pytest.approx(1.5 * LN2, abs=1e-6)


def test_balanced_weights():
    # one good and four bad: 5/2 and 5/8 each, in all 5, half of it the good one's; one kind alone: 1; no label (-1, 2) or not there: 0
    label = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 1, 1], [1, 0, -1, 0, 1], [1, 1, 0, 2, -1], [1, 1, 1, 1, 0]])
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 4 + [False], [True] * 5, [True] * 4 + [False]])
    expected = [[2.5, 0.625, 0.625, 0.625, 0.625], [1, 1, 1, 0, 0], [1.5, 0.75, 0, 0.75, 0], [0.75, 0.75, 1.5, 0, 0], [1, 1, 1, 1, 0]]
    assert balanced_weights(label, valid).tolist() == expected


def test_balanced_classification_is_the_mean_over_pairs():
    # good at z = ln 3: ln(4/3);  bad at 0 three times: ln 2, bad at ln 3: ln 4.   half the good's + half the mean of the bad
    # = mean over the four pairs (good, bad) of the mean of the two terms
    label, z = torch.tensor([[1, 0, 0, 0, 0]]), torch.tensor([[math.log(3), 0, 0, 0, math.log(3)]])
    valid = torch.ones(1, 5, dtype=torch.bool)
    loss = classification_loss(z, label, valid, balanced_weights(label, valid))
    assert loss.item() == pytest.approx(math.log(4 / 3) / 2 + (3 * LN2 + math.log(4)) / 4 / 2, abs=1e-6)


def test_classification_ignores_what_is_not_valid():
    valid = torch.tensor([[True, True, True, False], [True, False, True, False]])
    label = torch.tensor([[1.0, 0, 0, NAN], [1, NAN, 1, 5]])
    weight = torch.tensor([[1.0, 2, 0.5, NAN], [1, NAN, 1, 1e30]])
    assert_ignored(lambda z: classification_loss(z, label, valid, weight), random(2, 4), valid)


def test_the_reward_of_a_classifier_is_tanh():
    # 2 sigmoid(z) - 1 = tanh(z/2);  at ln 3: 2 * 3/4 - 1 = 1/2
    z = torch.tensor([0.0, math.log(3), -math.log(3), 100.0, -100.0])
    assert REWARD_TRANSFORMS["tanh_half"](z).tolist() == pytest.approx([0, 0.5, -0.5, 1, -1], abs=1e-6)
    assert REWARD_TRANSFORMS["identity"](z) is z


# ------------------------------------------------------------------------------------------------------------- quantiles

def test_quantile_levels():
    assert quantile_levels(10).tolist() == pytest.approx([0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95])
    assert quantile_levels(1).tolist() == [0.5]


def test_quantile_huber_by_hand():
    # q = 0, tau .25:  u = .5: .25 * .125 = .03125;  u = 2: .25 * (2 - 1/2) = .375;   mean .203125
    # q = 1, tau .75:  u = -.5: |.75 - 1| * .125 = .03125;  u = 1: .75 * .5 = .375;   mean .203125;   sum .40625
    q, z, tau = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 2.0]]), torch.tensor([0.25, 0.75])
    assert quantile_huber_loss(q, z, tau, 1.0).item() == 0.40625
    # kappa 0, |u|:  (.25 * .5 + .25 * 2) / 2 + (.25 * .5 + .75 * 1) / 2 = .3125 + .4375
    assert quantile_huber_loss(q, z, tau, 0.0).item() == 0.75
    # kappa 4, squares:  (.25 * .125 + .25 * 2) / 2 + (.25 * .125 + .75 * .5) / 2 = .265625 + .203125
    assert quantile_huber_loss(q, z, tau, 4.0).item() == 0.46875
    # kappa 1/2: u = .5: .125; u = 2: .5 * (2 - .25) = .875; u = 1: .5 * .75 = .375:   (.25 * .125 + .25 * .875 + .25 * .125 + .75 * .375) / 2
    assert quantile_huber_loss(q, z, tau, 0.5).item() == 0.28125


def test_quantile_loss_means_over_targets_then_over_responses():
    # the response above (.40625), one with the target .5 alone (.03125 + .03125), one with no target, which is not counted
    q = torch.tensor([[0.0, 1.0], [0.0, 1.0], [NAN, NAN]])
    z, has = torch.tensor([[0.5, 2.0], [0.5, NAN], [NAN, NAN]]), torch.tensor([[True, True], [True, False], [False, False]])
    tau = torch.tensor([0.25, 0.75])
    assert quantile_huber_loss(q, z, tau, 1.0, has).item() == (0.40625 + 0.0625) / 2
    assert quantile_huber_loss(q, z, tau, 1.0, has, count=8).item() == (0.40625 + 0.0625) / 8


def test_quantile_loss_at_extremes():
    # u = 100 and -100, tau .25:  .25 * 99.5 and .75 * 99.5;  the gradient in q is -tau kappa and (1 - tau) kappa
    for target, expected, slope in [(100.0, 0.25 * 99.5, -0.25), (-100.0, 0.75 * 99.5, 0.75)]:
        loss, grad = gradient(lambda q, target=target: quantile_huber_loss(q, torch.tensor([target]), torch.tensor([0.25]), 1.0), torch.zeros(1))
        assert loss.item() == expected and grad.tolist() == [slope]


@pytest.mark.parametrize("kappa", [0.0, 1.0])
def test_quantile_loss_ignores_what_is_no_target(kappa):
    has = torch.tensor([[[True, True, False], [False, False, False]], [[True, False, False], [True, True, True]]])
    levels, q, z = quantile_levels(4), random(2, 2, 4), random(2, 2, 3, seed=1)
    assert_ignored(lambda q: quantile_huber_loss(q, z.masked_fill(~has, NAN), levels, kappa, has), q, has.any(-1, keepdim=True).expand(q.shape))
    assert_ignored(lambda z: quantile_huber_loss(q, z, levels, kappa, has), z, has)


def optimum(targets, levels, kappa):
    """The quantiles (N,) that minimise the loss on targets (M,). It is convex and splits by quantile: bisection on the gradient's sign."""
    low, high = (torch.full((len(levels),), x, dtype=torch.float64) for x in (targets.min().item() - 1, targets.max().item() + 1))
    for _ in range(50):
        q = (low + high) / 2
        _, grad = gradient(lambda q: quantile_huber_loss(q, targets, levels, kappa), q)
        low, high = torch.where(grad < 0, q, low), torch.where(grad < 0, high, q)
    return (low + high) / 2


def test_kappa_zero_learns_quantiles():
    # pinball: the slope at q is #{z < q} / M - tau, which changes sign at the ceil(tau M)-th smallest target (tau M = 2.1 i + 1.05 is no integer)
    targets, levels = random(21), quantile_levels(10)
    expected = targets.sort().values[torch.ceil(levels * 21).long() - 1]
    assert torch.allclose(optimum(targets, levels, 0.0), expected, atol=1e-9)


def test_large_kappa_learns_expectiles():
    # squares: the expectile e solves  tau sum max(z - e, 0) = (1 - tau) sum max(e - z, 0);  at tau 1/2 it is the mean
    targets, levels = random(21), torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    found = optimum(targets, levels, 1e6)
    above, below = ((targets - found[:, None]).clamp(min=0).sum(-1), (found[:, None] - targets).clamp(min=0).sum(-1))
    assert torch.allclose(levels * above, (1 - levels) * below, atol=1e-9)
    assert found[1].item() == pytest.approx(targets.mean().item(), abs=1e-9)


def test_kappa_one_on_a_uniform_variable_covers_19_percent_where_it_says_5():
    # all errors are under 1, so squares:  tau (1 - e)^2 = (1 - tau) e^2,  e = sqrt(tau) / (sqrt(tau) + sqrt(1 - tau)) = .1866 at .05
    uniform = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    levels = torch.tensor([0.05, 0.95], dtype=torch.float64)
    assert optimum(uniform, levels, 1.0).tolist() == pytest.approx([0.18661, 0.81339], abs=1e-4)
    assert optimum(uniform, levels, 0.0).tolist() == pytest.approx([0.05, 0.95], abs=1e-3)


@pytest.mark.parametrize("good", [1, 3, 5, 8])
def test_kappa_one_on_labels(good):
    # targets +1 with probability p, else -1.  a = p tau pulls up, b = (1 - p)(1 - tau) pulls down; l = ln(a / b) = logit p + logit tau
    # l >= 0, q in [0, 1]:  the error to +1 is 1 - q <= 1, slope a (1 - q);  that to -1 is 1 + q >= 1, slope b;  so q = 1 - b / a = 1 - e^-l
    # l < 0 is the mirror image:  q = sign(l) (1 - e^-|l|)
    targets, p = torch.tensor([1.0] * good + [-1.0] * (10 - good), dtype=torch.float64), good / 10
    levels = quantile_levels(10)
    logit = math.log(p / (1 - p)) + torch.logit(levels)
    assert torch.allclose(optimum(targets, levels, 1.0), logit.sign() * (1 - torch.exp(-logit.abs())), atol=1e-9)


# -------------------------------------------------------------------------------------------- every loss, the same promises

PLACE, LABEL, VALID = torch.tensor([[0, 1, 2, 1], [1, 0, 0, 9], [2, 2, 2, 2]]), torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0]]), \
    torch.tensor([[True] * 4, [True, True, True, False], [True, True, False, False]])
TARGETS, TAU = random(3, 4, 2, seed=5), quantile_levels(3)
HAS = torch.stack([VALID, VALID & (LABEL == 1)], -1)                                      # (3,4,2): one or two targets
LOSSES = {   # name -> (shape of x, f(x, rows, count), the number of things averaged over in these rows)
    "sft": ((3, 4), lambda x, r, count: sft_loss(x, VALID[r], count), lambda r: VALID[r].sum()),
    "ranking": ((3, 4), lambda x, r, count: ranking_loss(x, PLACE[r], VALID[r], count), lambda r: ranked_pairs(PLACE[r], VALID[r]).any(-1).any(-1).sum()),
    "classification": ((3, 4), lambda x, r, count: classification_loss(x, LABEL[r], VALID[r], None, count), lambda r: VALID[r].sum()),
    "balanced": ((3, 4), lambda x, r, count: classification_loss(x, LABEL[r], VALID[r], balanced_weights(LABEL[r], VALID[r]), count), lambda r: VALID[r].sum()),
    "quantile": ((3, 4, 3), lambda x, r, count: quantile_huber_loss(x, TARGETS[r], TAU, 1.0, HAS[r], count), lambda r: HAS[r].any(-1).sum()),
}
ALL = torch.arange(3)


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_with_the_whole_count_are_the_whole(name):
    shape, f, number = LOSSES[name]
    x, parts = 3 * random(*shape), (ALL[:1], ALL[1:])
    whole, grad = gradient(lambda x: f(x, ALL, None), x)
    split, split_grad = gradient(lambda x: sum(f(x[r], r, int(number(ALL))) for r in parts), x)
    assert torch.allclose(split, whole, rtol=1e-12) and torch.allclose(split_grad, grad, rtol=1e-12)
    mean_of_means, _ = gradient(lambda x: sum(f(x[r], r, None) for r in parts) / 2, x)
    assert name == "ranking" or abs(mean_of_means - whole) > 1e-3      # ranking: one group with a pair in each part


@pytest.mark.parametrize("name", LOSSES)
def test_any_leading_shape(name):
    shape, f, number = LOSSES[name]
    x = random(*shape)
    whole = f(x, ALL, None)
    assert torch.allclose(f(x[:, None], ALL[:, None], None), whole, rtol=1e-12)                           # (3,1,4)
    alone = sum(f(x[b], b, int(number(ALL))) for b in ALL)                                                # (4): no leading axis
    assert torch.allclose(alone, whole, rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_or_better(name):
    shape, f, _ = LOSSES[name]
    x = 3 * random(*shape)
    low = x.bfloat16()
    assert f(low, ALL, None).dtype == torch.float32 and torch.equal(f(low, ALL, None), f(low.float(), ALL, None))
    precise, single = f(x, ALL, None), f(x.float(), ALL, None)
    assert precise.dtype == torch.float64 and single.dtype == torch.float32
    assert 0 < abs(precise - single.double()) < 1e-5                   # float64 has not passed through float32 on its way


def test_a_loss_has_the_precision_of_the_model_s_outputs():
    # float32 outputs beside float64 weights, targets and levels: float32
    one = torch.ones(1, 2, dtype=torch.float64)
    assert classification_loss(one.float(), one, one > 0, weight=one).dtype == torch.float32
    assert quantile_huber_loss(one.float(), one, one[0] / 2, 1.0).dtype == torch.float32


BOOL = torch.ones(1, 4, dtype=torch.bool)


@pytest.mark.parametrize("f, arguments", [
    (sft_loss, (BOOL.float(), BOOL)), (ranking_loss, (BOOL.float(), BOOL.float(), BOOL)), (classification_loss, (BOOL.float(), BOOL.float(), BOOL))])
def test_shapes_that_would_broadcast_are_refused(f, arguments):
    # one group beside three: the first i arguments have more, or fewer, than the others
    one, three = arguments, [x.expand(3, 4) for x in arguments]
    assert f(*one).shape == f(*three).shape == ()
    for i in range(1, len(one)):
        for first, rest in ((one, three), (three, one)):
            with pytest.raises(AssertionError):
                f(*first[:i], *rest[i:])


@pytest.mark.parametrize("quantiles, targets, levels", [((1, 2), (3, 5), 2), ((3, 2), (1, 5), 2), ((3, 2), (3, 5), 1), ((3, 1), (3, 5), 2)])
def test_quantiles_that_would_broadcast_are_refused(quantiles, targets, levels):
    # one response beside three; one level beside two
    with pytest.raises(AssertionError):
        quantile_huber_loss(torch.zeros(quantiles), torch.zeros(targets), quantile_levels(levels), 1.0)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_finite_differences(name):
    shape, f, _ = LOSSES[name]
    assert torch.autograd.gradcheck(lambda x: f(x, ALL, None), 3 * random(*shape).requires_grad_())


# --------------------------------------------------------------------------------------------- any loss on any labels

def judged(labels="auto", **kinds):
    """A judgement of responses that carry these kinds of labels, a value each."""
    keys = list(kinds)
    return derive_labels([Response("x", **dict(zip(keys, values))) for values in zip(*kinds.values())], labels)


def test_places_of_four():
    # better half good, worse half bad; a target per comparison won (+1) or lost (-1): 3, 2, 1, 0 wins
    found = judged(place=[2, 0, 3, 1])
    assert found.place == [2, 0, 3, 1] and found.label == [0, 1, 0, 1]
    assert found.targets == [[1, -1, -1], [1, 1, 1], [-1, -1, -1], [1, 1, -1]]


@pytest.mark.parametrize("place, label", [
    ([0, 1, 2], [1, None, 0]),                   # the middle of three is in neither half
    ([0, 1, 1, 2], [1, None, None, 0]),          # a tie across the middle is left out
    ([0, 0, 1, 1], [1, 1, 0, 0]),                # ties within a half are not
    ([0, 0, 0, 1], [None, None, None, 0]),       # three share ranks 0 .. 2, the middle lies within
    ([0, 1, 1, 1], [1, None, None, None]),
    ([5, 5, 5, 5], [None] * 4),
    ([0, 1], [1, 0]),
    ([0], [None]),
    ([0, 1, 2, 3, 4], [1, 1, None, 0, 0]),
    ([0, 1, 2, 2, 4], [1, 1, None, None, 0]),    # the tied pair holds ranks 2 and 3, the middle is 2
])
def test_places_to_labels(place, label):
    assert judged(place=place).label == label


def test_ties_make_no_target():
    assert judged(place=[0, 1, 1]).targets == [[1, 1], [-1], [-1]]
    assert judged(place=[3, 3]).targets == [[], []]


def test_labels_to_places_and_targets():
    # every good over every bad; labels stay as they are; +1, -1
    found = judged(label=[1, 0, 0])
    assert found.label == [1, 0, 0] and found.targets == [[1], [-1], [-1]]
    pairs = ranked_pairs(torch.tensor(found.place), torch.ones(3, dtype=torch.bool))
    assert pairs.nonzero().tolist() == [[0, 1], [0, 2]]


def test_scores_become_places_of_their_means():
    # means 1, 3, 2, 0: the highest mean is the best place
    found = judged(scores=[[0, 2], [3, 3], [2], [-1, 1]])
    assert sorted(range(4), key=lambda k: found.place[k]) == [1, 2, 0, 3]
    assert found.label == [0, 1, 1, 0] and found.targets == [[1, -1, -1], [1, 1, 1], [1, 1, -1], [-1, -1, -1]]


def test_equal_scores_tie_in_any_order():
    # 0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ in float64's last bit; a panel in another order is no better or worse
    found = judged(scores=[[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])
    assert found.place[0] == found.place[1] and found.label == [None, None] and found.targets == [[], []]
    # and what differs in the ninth digit differs still, as float32
    close = judged(scores=[[1.0], [1.00000001]])
    assert torch.tensor(close.place).diff().item() < 0 and close.label == [0, 1]


def test_hh_pairs(tmp_path):
    # chosen over rejected; chosen good, rejected bad; +1, -1
    (tmp_path / "train.jsonl").write_text('{"chosen": "\\n\\nHuman: hi\\n\\nAssistant: yes", "rejected": "\\n\\nHuman: hi\\n\\nAssistant: no"}\n')
    (group,), _ = read_hh(tmp_path / "train.jsonl")
    found = derive_labels(group.responses)
    assert [r.text for r in group.responses] == [" yes", " no"]
    assert (found.place, found.label, found.targets) == ([0, 1], [1, 0], [[1], [-1]])


def test_which_kind_of_label_is_read():
    # auto: place before label before scores, and only a kind that every response has
    both = dict(place=[1, 0], label=[1, 0], scores=[[0], [1]])
    assert judged(**both).label == [0, 1]
    assert judged("label", **both).label == [1, 0]
    assert judged("scores", **dict(both, scores=[[0], [9]])).label == [0, 1] and judged("scores", **dict(both, scores=[[9], [0]])).label == [1, 0]
    assert judged(place=[0, None], label=[0, 1]).label == [0, 1]
    assert judged(place=[0, None]) is None and judged("label", place=[0, 1]) is None and derive_labels([]) is None


# ------------------------------------------------------------------------------------------------------------ statistic

def test_statistics_of_unsorted_outputs():
    outputs = torch.tensor([[7.0, 3, 9, 1, 5, 0, 8, 2, 6, 4], [70.0, 30, 90, 10, 50, 0, 80, 20, 60, 40]])
    assert reduce_quantiles(outputs, "mean").tolist() == [4.5, 45]
    for i in range(10):
        assert reduce_quantiles(outputs, f"q{i}").tolist() == [i, 10 * i]
    # the lowest ceil(a N): .25 * 10 -> 3, mean of 0 1 2;  .3 * 10 is 3, not 4, whatever rounding says;  a tiny a is the lowest one
    for name, expected in [("cvar:0.25", 1.0), ("cvar:0.3", 1.0), ("cvar:0.31", 1.5), ("cvar:0.1", 0.0), ("cvar:0.001", 0.0), ("cvar:1", 4.5), ("cvar:.7", 3.0)]:
        assert reduce_quantiles(outputs, name).tolist() == pytest.approx([expected, 10 * expected]), name


def test_statistics_that_do_not_exist_are_refused():
    for name in ("mean", "q0", "q9"):
        assert parse_statistic(name, 10) == name
    assert parse_statistic("cvar:0.25", 10) == parse_statistic("cvar:.3", 10) == "cvar:0.3" and parse_statistic("cvar:1", 10) == "cvar:1"
    assert parse_statistic("mean", 1) == "mean"
    for name, outputs in [("q10", 10), ("q-1", 10), ("cvar:0", 10), ("cvar:1.1", 10), ("cvar:", 10), ("median", 10), ("q0", 1), ("cvar:0.5", 1)]:
        with pytest.raises(ValueError, match="--statistic"):
            parse_statistic(name, outputs)
