"""PPO's formulas: directions pinned by exact enumeration, values by hand, garbage behind the mask on purpose."""
import math

import pytest
import torch
from garbage import GARBAGE, NAN, assert_ignored, gradient, random

from nanorlhf import ppo


def uneven(*lengths, width):
    """A mask with these response lengths."""
    return torch.arange(width) < torch.tensor(lengths)[:, None]


# ------------------------------------------------------------------------------------------------------------------- KL

def two_distributions():
    """Log-probabilities of ten outcomes under a policy and a reference."""
    return torch.log_softmax(random(10), -1), torch.log_softmax(random(10, seed=1), -1)


def test_kl_estimates_by_enumeration():
    # the expectation under the policy, summed over all ten outcomes, is KL(policy || reference) and not the other one
    policy, reference = two_distributions()
    categorical = lambda logprobs: torch.distributions.Categorical(logits=logprobs)
    kl = torch.distributions.kl_divergence(categorical(policy), categorical(reference)).item()
    reverse = torch.distributions.kl_divergence(categorical(reference), categorical(policy)).item()
    expectation = lambda values: (policy.exp() * values).sum().item()
    assert kl > 0 and abs(kl - reverse) > 0.05
    assert expectation(ppo.kl_k1(policy, reference)) == pytest.approx(kl, abs=1e-12)
    assert expectation(ppo.kl_k3(policy, reference)) == pytest.approx(kl, abs=1e-12)


def test_k3_is_never_negative_and_varies_less_where_the_two_are_near():
    variance = lambda p, x: ((p * x * x).sum() - (p * x).sum() ** 2).item()
    far = two_distributions()
    near = far[0], torch.log_softmax(far[0] + 0.1 * random(10, seed=1), -1)
    for policy, reference in (near, far):
        k1, k3 = ppo.kl_k1(policy, reference), ppo.kl_k3(policy, reference)
        assert k1.min() < 0 <= k3.min()
        assert (variance(policy.exp(), k3) < variance(policy.exp(), k1)) == (reference is near[1])


def test_k3_keeps_its_digits_where_policy_and_reference_nearly_agree():
    # k1 = 1e-3: k3 = k1^2/2 - k1^3/6 = 4.99833e-7; exp(-k1) - 1 + k1 in float32 is wrong by about 6e-8, a tenth
    k3 = ppo.kl_k3(torch.tensor([1e-3]), torch.tensor([0.0]))
    assert k3.item() == pytest.approx(4.99833e-7, rel=1e-3)
    assert ppo.kl_k3(torch.tensor([-5.0]), torch.tensor([-5.0])).item() == 0


def test_kl_at_extremes():
    # k1 = 100: exp(-100) - 1 + 100 = 99;   k1 = -80: e^80 - 81
    k3 = ppo.kl_k3(torch.tensor([0.0, -80.0]), torch.tensor([-100.0, 0.0]))
    assert k3[0].item() == 99 and k3[1].item() == pytest.approx(math.exp(80), rel=1e-5)


# -------------------------------------------------------------------------------------------------------------- rewards

def test_last_token():
    mask = uneven(3, 1, 0, 4, width=4)
    assert ppo.last_token(mask).tolist() == [[False, False, True, False], [True, False, False, False], [False] * 4, [False, False, False, True]]


def test_shape_rewards_by_hand():
    # k1 = [.5, -1, 0], beta .1: [-.05, .1, 0], and the score 2 at the last of three tokens
    logprobs, reference = torch.tensor([[-1.0, -2, -3, NAN]]), torch.tensor([[-1.5, -1, -3, 5]])
    rewards = ppo.shape_rewards(torch.tensor([2.0]), logprobs, reference, uneven(3, width=4), 0.1)
    assert rewards[0].tolist() == pytest.approx([-0.05, 0.1, 2, 0], abs=1e-7)


def test_rewards_add_up_to_the_objective():
    # paper A: the sum over a response is  score - beta * log(policy(y|x) / reference(y|x))
    mask = uneven(5, 1, 3, 2, width=5).view(2, 2, 5)
    logprobs, reference, scores = -random(2, 2, 5).abs(), -random(2, 2, 5, seed=1).abs(), random(2, 2, seed=2)
    garbage = [x.masked_fill(~mask, NAN) for x in (logprobs, reference)]
    rewards = ppo.shape_rewards(scores, *garbage, mask, 0.3)
    ratio = ((logprobs - reference) * mask).sum(-1)
    assert torch.allclose(rewards.sum(-1), scores - 0.3 * ratio, atol=1e-12)
    assert (rewards[~mask] == 0).all()


def test_the_score_sits_on_the_last_token_alone():
    mask, zero = uneven(5, 1, 3, 0, width=5), torch.zeros(4, 5)
    rewards = ppo.shape_rewards(torch.tensor([1.0, 2, 3, NAN]), zero, zero, mask, 0.1)            # an empty response has no score
    assert rewards.tolist() == [[0, 0, 0, 0, 1], [2, 0, 0, 0, 0], [0, 0, 3, 0, 0], [0] * 5]


# ------------------------------------------------------------------------------------------------------------------ GAE

def test_gae_by_hand():
    # gamma 1, lambda 1/2, value after the last token 0;  delta = [0 + 2 - 1, 0 + 3 - 2, 1 + 0 - 3] = [1, 1, -2]
    # A_2 = -2;  A_1 = 1 - 2/2 = 0;  A_0 = 1 + 0/2 = 1;   returns = A + V = [2, 2, 1]
    rewards, values = torch.tensor([[0.0, 0, 1, 50]]), torch.tensor([[1.0, 2, 3, 70]])
    advantages, returns = ppo.gae(rewards, values, uneven(3, width=4), 1.0, 0.5)
    assert advantages.tolist() == [[1, 0, -2, 0]] and returns.tolist() == [[2, 2, 1, 0]]


def test_gae_of_a_single_column():
    assert [x.tolist() for x in ppo.gae(torch.tensor([[2.0]]), torch.tensor([[0.5]]), torch.tensor([[True]]), 0.9, 0.8)] == [[[1.5]], [[2.0]]]


def test_gae_is_the_sum_of_discounted_deltas():
    # A_t = sum over l of (gamma lam)^l delta_{t+l},  delta_t = r_t + gamma V_{t+1} - V_t,  V after the end 0
    lengths, gamma, lam = [7, 1, 4, 0], 0.9, 0.8
    mask = uneven(*lengths, width=7)
    rewards, values = random(4, 7), random(4, 7, seed=1)
    advantages, returns = ppo.gae(rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, NAN), mask, gamma, lam)
    for b, n in enumerate(lengths):
        r, v = rewards[b, :n].tolist(), values[b, :n].tolist() + [0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(7):
            expected = sum((gamma * lam) ** step * delta[t + step] for step in range(n - t)) if t < n else 0.0
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(expected + v[t] if t < n else 0.0, abs=1e-12)


def test_gamma_and_lambda_one_give_the_rewards_to_come():
    mask = uneven(5, 3, width=5)
    rewards, values = random(2, 5) * mask, 10 * random(2, 5, seed=1)
    _, returns = ppo.gae(rewards, values, mask, 1.0, 1.0)
    to_come = rewards.flip(-1).cumsum(-1).flip(-1)
    assert torch.allclose(returns, to_come * mask, atol=1e-12)          # whatever the critic says


@pytest.mark.parametrize("garbage", GARBAGE)
def test_the_value_after_the_last_token_is_zero(garbage):
    # one step TD (lambda 0): the last advantage is r - V = 1 - 3, whatever stands one column further
    advantages, returns = ppo.gae(torch.tensor([0.0, 1.0, garbage]), torch.tensor([2.0, 3.0, garbage]), torch.tensor([True, True, False]), 1.0, 0.0)
    assert advantages.tolist() == [1, -2, 0] and returns.tolist() == [3, 1, 0]


def test_gae_carries_no_gradient():
    values = torch.ones(2, 3, requires_grad=True)
    advantages, returns = ppo.gae(values * 2, values, uneven(3, 2, width=3), 1.0, 0.95)
    assert not advantages.requires_grad and not returns.requires_grad


# -------------------------------------------------------------------------------------------------------------- whitening

def test_whiten_by_hand():
    # 1, 2, 3: mean 2, population variance 2/3 (a sample's would be 1):  -1 / sqrt(2/3) = -1.2247449
    white = ppo.whiten(torch.tensor([[1.0, 2, NAN], [3, NAN, NAN]]), uneven(2, 1, width=3))
    assert white.flatten().tolist() == pytest.approx([-1.2247449, 0, 0, 1.2247449, 0, 0], abs=1e-6)


def test_whiten_mean_zero_variance_one():
    mask = uneven(5, 2, 0, 4, width=5)
    white = ppo.whiten(1000 + 3 * random(4, 5), mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-10) and white[mask].var(unbiased=False).item() == pytest.approx(1, abs=1e-8)
    assert (white[~mask] == 0).all()


def test_whiten_keeps_the_digits_of_large_numbers():
    # 2^23 and 2^23 + 1: mean 2^23 + 1/2, which float32 does not hold; deviation 1/2
    assert ppo.whiten(torch.tensor([2.0**23, 2**23 + 1]), torch.tensor([True, True])).tolist() == [-1, 1]


def test_whiten_of_a_deviation_as_small_as_its_epsilon():
    # +-1e-4: variance 1e-8, so 1e-4 / sqrt(1e-8 + 1e-8) = 1 / sqrt 2
    white = ppo.whiten(torch.tensor([1e-4, -1e-4], dtype=torch.float64), torch.tensor([True, True]))
    assert white.tolist() == pytest.approx([0.5**0.5, -0.5**0.5], rel=1e-9)


def test_whiten_what_does_not_vary():
    # float32 holds 1e3 + 0.1 inexactly, and a variance is not to go below 0;  no token at all is no error either
    assert ppo.whiten(torch.full((2, 3), 1000.1), torch.ones(2, 3, dtype=torch.bool)).abs().max() < 1e-3
    assert (ppo.whiten(torch.full((2, 3), NAN), torch.zeros(2, 3, dtype=torch.bool)) == 0).all()
    assert ppo.whiten(torch.tensor([7.0, NAN]), torch.tensor([True, False])).tolist() == [0, 0]          # one token is its own mean
    # float64: rounding leaves the mean of these squares 4e-6 below the squared mean, whose root would be NaN
    assert ppo.whiten(torch.full((3,), 100000.1, dtype=torch.float64), torch.ones(3, dtype=torch.bool)).abs().max() < 1e-3


# ---------------------------------------------------------------------------------------------------------- policy loss

@pytest.mark.parametrize("advantage, ratio, loss, slope, clipped", [
    # loss = -min(ratio A, clip(ratio, .8, 1.2) A);  d ratio / d logprob = ratio, so the free branch has slope -A ratio
    (+2.0, 1.5, -2.4, 0.0, 1.0),         # good and already likelier: enough
    (+2.0, 0.5, -1.0, -1.0, 0.0),        # good and less likely: pull up
    (-2.0, 1.5, +3.0, +3.0, 0.0),        # bad and likelier: push down
    (-2.0, 0.5, +1.6, 0.0, 1.0),         # bad and already less likely: enough
    (+2.0, 1.1, -2.2, -2.2, 0.0),        # inside on both sides
    (-2.0, 0.9, +1.8, +1.8, 0.0),
    (+2.0, 1.0, -2.0, -2.0, 0.0),        # ratio one: the gradient of -A logprob
    (-2.0, 1.0, +2.0, +2.0, 0.0),
    (0.0, 1.5, 0.0, 0.0, 0.0),
])
def test_policy_loss_by_case(advantage, ratio, loss, slope, clipped):
    old, mask, shares = torch.tensor([-1.0, NAN], dtype=torch.float64), torch.tensor([True, False]), []

    def f(logprobs):
        value, share = ppo.policy_loss(logprobs, old, torch.tensor([advantage, NAN], dtype=torch.float64), mask, 0.2)
        shares.append(share.item())
        return value

    value, grad = gradient(f, torch.tensor([-1 + math.log(ratio), NAN], dtype=torch.float64))
    assert value.item() == pytest.approx(loss, abs=1e-12) and grad.tolist() == pytest.approx([slope, 0], abs=1e-12) and shares == [clipped]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_policy_loss_at_extremes(dtype):
    # ratio e^100 is infinity in float32; where it is clipped away, A >= 0, nothing of it may be left in the gradient
    # -min(e^100, 1.2) = -1.2;   A = 0: 0;   -min(e^-100, .8) = -e^-100;   A = -1: -min(-e^-100, -.8) = .8
    old = torch.tensor([-100.0, -100, 0, 0], dtype=dtype)
    advantages, mask = torch.tensor([1.0, 0, 1, -1], dtype=dtype), torch.ones(4, dtype=torch.bool)
    value, grad = gradient(lambda x: ppo.policy_loss(x, old, advantages, mask, 0.2, count=1)[0], torch.tensor([0.0, 0, -100, -100], dtype=dtype))
    assert value.item() == pytest.approx(-1.2 + 0.8) and grad.abs().max() < 1e-40
    # A = -1/2 and a ratio of e^100: e^100 / 2, infinite in float32
    value, _ = ppo.policy_loss(old[2:3] + 100, old[2:3], torch.tensor([-0.5], dtype=dtype), mask[:1], 0.2)
    assert value.item() == (math.inf if dtype == torch.float32 else pytest.approx(math.exp(100) / 2))


def test_policy_loss_gradient_at_ratio_one_is_the_policy_gradient():
    mask, logprobs, advantages = uneven(4, 2, width=4), random(2, 4), random(2, 4, seed=1)
    _, grad = gradient(lambda x: ppo.policy_loss(x, logprobs, advantages, mask, 0.2)[0], logprobs)
    assert torch.allclose(grad, -advantages * mask / 6, atol=1e-15)


# ----------------------------------------------------------------------------------------------------------- value loss

@pytest.mark.parametrize("value, target, loss, slope, clipped", [
    # V_old = 0, eps = .2;  0.5 max((V - G)^2, (clip(V) - G)^2);  the larger of the two, so that leaving V_old is never rewarded
    (0.1, 1.0, 0.405, -0.9, 0.0),        # inside
    (0.5, 1.0, 0.32, 0.0, 1.0),          # nearer to the target, but beyond the clip: (.2 - 1)^2 / 2
    (1.0, 0.0, 0.5, 1.0, 0.0),           # further off: the free error counts
    (-0.5, -1.0, 0.32, 0.0, 1.0),        # the same on the other side
    (-1.0, 0.0, 0.5, -1.0, 0.0),
])
def test_value_loss_by_case(value, target, loss, slope, clipped):
    mask, shares = torch.tensor([True, False]), []
    pad = lambda x: torch.tensor([x, NAN], dtype=torch.float64)

    def f(values):
        found, share = ppo.value_loss(values, pad(0.0), pad(target), mask, 0.2)
        shares.append(share.item())
        return found

    found, grad = gradient(f, pad(value))
    assert found.item() == pytest.approx(loss, abs=1e-12) and grad.tolist() == pytest.approx([slope, 0], abs=1e-12) and shares == [clipped]


def test_value_loss_at_extremes():
    mask = torch.ones(2, dtype=torch.bool)
    found, grad = gradient(lambda v: ppo.value_loss(v, torch.tensor([100.0, 0]), torch.tensor([0.0, -100]), mask, 0.2, count=1)[0], torch.tensor([100.0, 100]))
    assert found.item() == 100**2 / 2 + 200**2 / 2 and grad.tolist() == [100, 200]


# -------------------------------------------------------------------------------------------------------------- entropy

def test_entropy_by_enumeration():
    # 1/2, 1/4, 1/4:  .5 ln 2 + 2 * .25 ln 4 = 1.5 ln 2;  ten equal outcomes: ln 10;  one outcome alone: 0
    assert ppo.entropy(torch.tensor([0.5, 0.25, 0.25]).log()).item() == pytest.approx(1.5 * math.log(2), abs=1e-6)
    assert ppo.entropy(torch.zeros(10)).item() == pytest.approx(math.log(10), abs=1e-6)
    p = torch.softmax(random(10), -1)
    assert ppo.entropy(random(10)).item() == pytest.approx(-sum(x * math.log(x) for x in p.tolist()), abs=1e-12)
    # two tokens, three words: a number a token;  1.5 ln 2 as above and ln 3
    assert ppo.entropy(torch.tensor([[0.5, 0.25, 0.25], [1, 1, 1]]).log()).tolist() == pytest.approx([1.5 * math.log(2), math.log(3)], abs=1e-6)


def test_entropy_at_extremes():
    # a word that is cut away, or one at -100, adds nothing, and no NaN to the gradient
    for logits, expected in [([0.0, -float("inf"), 0.0], math.log(2)), ([100.0, -100.0, 0.0], 0.0), ([0.0, -float("inf"), -float("inf")], 0.0)]:
        value, grad = gradient(ppo.entropy, torch.tensor(logits))
        assert value.item() == pytest.approx(expected, abs=1e-6) and grad.isfinite().all()


def test_padding_never_enters_an_entropy():
    # two tokens of ln 10, one of ln 2: their mean, over three and not over six; nor does a pad count as -1 or 0
    mean = (2 * math.log(10) + math.log(2)) / 3
    found = torch.tensor([[math.log(10), math.log(10), NAN], [math.log(2), -1.0, 7.0]])
    assert ppo.masked_mean(found, uneven(2, 1, width=3)).item() == pytest.approx(mean, abs=1e-6)
    assert ppo.masked_mean(found, uneven(2, 1, width=3), count=6).item() == pytest.approx(mean / 2, abs=1e-6)
    assert ppo.masked_mean(found, uneven(0, 0, width=3)).item() == 0


# ------------------------------------------------------------------------------------------- adaptive KL, explained variance

@pytest.mark.parametrize("kl, expected", [
    # target 6, 100 responses of a horizon of 1000: the step is a tenth of clip(KL / target - 1, -.2, .2)
    (6.0, 1.0), (6.6, 1.01), (5.4, 0.99), (60.0, 1.02), (0.0, 0.98), (-3.0, 0.98)])
def test_adaptive_kl(kl, expected):
    # too far from the reference: beta grows
    assert ppo.adapt_kl_coef(0.5, kl, target=6.0, n=100, horizon=1000) == pytest.approx(0.5 * expected)


def test_adaptive_kl_counts_responses():
    # twice the responses in a step, or half the horizon: twice the change
    assert ppo.adapt_kl_coef(1.0, 100.0, 1.0, 200, 1000) == ppo.adapt_kl_coef(1.0, 100.0, 1.0, 100, 500) == pytest.approx(1.04)


@pytest.mark.filterwarnings("error")                                     # no token at all is no occasion for one
def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 2, 3, NAN], [4, NAN, NAN, NAN]]), uneven(3, 1, width=4)
    constant, wrong = torch.full_like(returns, 9).masked_fill(~mask, NAN), 5 - returns
    assert ppo.explained_variance(returns, returns, mask) == 1
    assert ppo.explained_variance(constant, returns, mask) == pytest.approx(0)
    # V = 5 - G: G - V = 2 G - 5, four times the variance of G:  1 - 4 = -3
    assert ppo.explained_variance(wrong, returns, mask) == pytest.approx(-3)
    assert ppo.explained_variance(wrong / 1000, returns / 1000, mask) == pytest.approx(-3, rel=1e-4)      # small returns are no constant
    assert ppo.explained_variance(returns, constant, mask) == 0 and ppo.explained_variance(returns, returns, torch.zeros_like(mask)) == 0
    # V = G / 2 leaves half of G, a quarter of its variance 14/9, which is summed in float64;  the other way round V - G has all of V's: 1 - 1
    returns, mask = torch.tensor([1.0, 2, 4]), torch.ones(3, dtype=torch.bool)
    assert ppo.explained_variance(returns / 2, returns, mask) == pytest.approx(0.75, abs=1e-12)
    assert ppo.explained_variance(returns, returns / 2, mask) == pytest.approx(0, abs=1e-12)
    assert type(ppo.explained_variance(returns / 2, returns, mask)) is float            # for json


def test_explained_variance_of_returns_that_hardly_vary():
    # 0 and x: variance x^2 / 4, which is 1.44e-12 or 0.81e-12; under 1e-12 it is a constant, which even a perfect critic has not explained
    returns, mask = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([True, True])
    assert [ppo.explained_variance(x * returns, x * returns, mask) for x in (2.4e-6, 1.8e-6)] == [1, 0]


# --------------------------------------------------------------------------------------- every function, the same promises

MASK = uneven(4, 1, 3, width=4)
A, B, C = random(3, 4, seed=1), random(3, 4, seed=2), random(3, 4, seed=3)
LOSSES = {
    "masked_mean": lambda x, r, count: ppo.masked_mean(x, MASK[r], count),
    "policy": lambda x, r, count: ppo.policy_loss(x, A[r].to(x), B[r].to(x), MASK[r], 0.2, count)[0],
    "policy, the rest garbage": lambda x, r, count: ppo.policy_loss(x, *(y[r].masked_fill(~MASK[r], NAN) for y in (A, B)), MASK[r], 0.2, count)[0],
    "value": lambda x, r, count: ppo.value_loss(x, A[r].to(x), C[r].to(x), MASK[r], 0.2, count)[0],
    "value, the rest garbage": lambda x, r, count: ppo.value_loss(x, *(y[r].masked_fill(~MASK[r], NAN) for y in (A, C)), MASK[r], 0.2, count)[0],
    "rewards": lambda x, r, count: ppo.shape_rewards(A[r, 0].to(x), x, B[r].to(x), MASK[r], 0.1).pow(2).sum(),
    "whiten": lambda x, r, count: ppo.whiten(x, MASK[r]).pow(3).sum(),
}
REDUCED = ["masked_mean", "policy", "value"]
ALL = torch.arange(3)


@pytest.mark.parametrize("name", LOSSES)
def test_what_stands_behind_the_mask_is_ignored(name):
    assert_ignored(lambda x: LOSSES[name](x, ALL, None), random(3, 4), MASK)


@pytest.mark.parametrize("name", REDUCED)
def test_micro_batches_with_the_whole_count_are_the_whole(name):
    f, x, parts = LOSSES[name], random(3, 4), (ALL[:1], ALL[1:])
    whole, grad = gradient(lambda x: f(x, ALL, None), x)
    split, split_grad = gradient(lambda x: sum(f(x[r], r, MASK.sum()) for r in parts), x)
    assert torch.allclose(split, whole, rtol=1e-12) and torch.allclose(split_grad, grad, rtol=1e-12)
    one_by_one, _ = gradient(lambda x: sum(f(x[r], r, None) for r in ALL.split(1)) / 3, x)
    assert abs(one_by_one - whole) > 1e-3                                # 4, 1 and 3 tokens: a mean of means is another loss


@pytest.mark.parametrize("name", REDUCED)
def test_the_shares_that_are_clipped_are_counted_alike(name):
    if name == "masked_mean":
        return
    f = (lambda r, *count: ppo.policy_loss(A[r], B[r], C[r], MASK[r], 0.2, *count)[1]) if name == "policy" else \
        (lambda r, *count: ppo.value_loss(A[r], B[r], C[r], MASK[r], 0.2, *count)[1])
    whole = f(ALL)
    assert 0 < whole < 1 and sum(f(r, MASK.sum()) for r in ALL.split(1)).item() == pytest.approx(whole.item())


def test_any_leading_shape():
    # (R), (3,R), (1,3,1,R): the same numbers
    shapes = [lambda x: x, lambda x: x[None, :, None]]
    gae = [ppo.gae(*map(view, (A, B, MASK)), 0.9, 0.8) for view in shapes]
    rewards = [ppo.shape_rewards(*map(view, (A[:, 0:1].squeeze(-1),)), *map(view, (B, C, MASK)), 0.1) for view in shapes[:1]]
    rewards.append(ppo.shape_rewards(A[:, 0][None, :, None], *map(shapes[1], (B, C, MASK)), 0.1))
    white = [ppo.whiten(view(A), view(MASK)) for view in shapes]
    for pair in [(gae[0][0], gae[1][0]), (gae[0][1], gae[1][1]), rewards, white]:
        assert torch.equal(pair[0], pair[1][0, :, 0])
    for name in REDUCED:
        x = random(3, 4)
        whole = LOSSES[name](x, ALL, None)
        assert torch.allclose(LOSSES[name](x[:, None], ALL[:, None], None), whole, rtol=1e-12)
        assert torch.allclose(sum(LOSSES[name](x[b], b, 8) for b in ALL), whole, rtol=1e-12)          # (R) alone
    one = ppo.gae(A[2], B[2], MASK[2], 0.9, 0.8)
    assert torch.equal(one[0], gae[0][0][2]) and torch.equal(one[1], gae[0][1][2])


def test_float32_or_better():
    functions = {
        "k1": lambda a, b, c: ppo.kl_k1(a, b), "k3": lambda a, b, c: ppo.kl_k3(a, b), "mean": lambda a, b, c: ppo.masked_mean(a, MASK),
        "rewards": lambda a, b, c: ppo.shape_rewards(a[:, 0], b, c, MASK, 0.1), "advantages": lambda a, b, c: ppo.gae(a, b, MASK, 0.9, 0.8)[0],
        "returns": lambda a, b, c: ppo.gae(a, b, MASK, 0.9, 0.8)[1], "whiten": lambda a, b, c: ppo.whiten(a, MASK), "entropy": lambda a, b, c: ppo.entropy(a),
        "policy": lambda a, b, c: ppo.policy_loss(a, b, c, MASK, 0.2)[0], "value": lambda a, b, c: ppo.value_loss(a, b, c, MASK, 0.2)[0]}
    for name, f in functions.items():
        for dtype in (torch.bfloat16, torch.float16):
            low = [x.to(dtype) for x in (A, B, C)]
            assert f(*low).dtype == torch.float32 and torch.equal(f(*low), f(*(x.float() for x in low))), name
        single, double = f(A.float(), B.float(), C.float()), f(A, B, C)
        assert single.dtype == torch.float32 and double.dtype == torch.float64, name
        assert 0 < (single.double() - double).abs().max() < 1e-5, name   # float64 has not passed through float32 on its way


SHAPED = {   # name -> (f, how many arguments of the mask's shape come before it)
    "gae": (lambda *x: ppo.gae(*x, 0.9, 0.8), 2), "policy": (lambda *x: ppo.policy_loss(*x, 0.2), 3), "value": (lambda *x: ppo.value_loss(*x, 0.2), 3),
    "rewards": (lambda *x: ppo.shape_rewards(torch.zeros(x[-1].shape[:-1]), *x, 0.1), 2)}


@pytest.mark.parametrize("name", SHAPED)
def test_shapes_that_would_broadcast_are_refused(name):
    # one response beside three: the first i arguments have more, or fewer, than the others
    f, n = SHAPED[name]
    one, three = ([torch.zeros(b, 4)] * n + [torch.ones(b, 4, dtype=torch.bool)] for b in (1, 3))
    assert len(f(*one)) and len(f(*three))
    for i in range(1, n + 1):
        for first, rest in ((one, three), (three, one)):
            with pytest.raises(AssertionError):
                f(*first[:i], *rest[i:])


@pytest.mark.parametrize("scores, responses", [(1, 3), (3, 1)])
def test_scores_that_would_broadcast_are_refused(scores, responses):
    with pytest.raises(AssertionError):
        ppo.shape_rewards(torch.zeros(scores), *[torch.zeros(responses, 4)] * 2, torch.ones(responses, 4, dtype=torch.bool), 0.1)


@pytest.mark.parametrize("name", REDUCED)
def test_gradients_by_finite_differences(name):
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, ALL, None), random(3, 4).requires_grad_())
