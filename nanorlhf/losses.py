"""The losses of the supervised model and of the three reward models, as pure functions.

Shapes: B groups (any leading shape), K responses per group, R tokens per response, N quantiles, M
target values. Every function computes in float32 or better, ignores whatever stands where a mask is
false (NaN included), and returns  sum / count.  `count` is what is averaged over; pass the count of
the whole optimizer step (all micro-batches, all processes) when the batch at hand is only a part of
it: a mean of means is another loss.
"""
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x where mask, zeros elsewhere; float32 or better.

    bfloat16 has three digits, too few for a difference of log-probabilities.
    torch.where, not a product: 0 * NaN is NaN, in the value and in the gradient.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(mask, x, torch.zeros_like(x))


def masked_mean(x: Tensor, mask: Tensor, count: int | None = None) -> Tensor:
    """Sum of x where mask, over count (default: the number of true entries; 0 / 0 is 0)."""
    return masked(x, mask).sum() / (mask.sum().clamp(min=1) if count is None else count)


def sft_loss(logprobs: Tensor, mask: Tensor, count: int | None = None) -> Tensor:
    """L = - mean over response tokens of log p(token | prompt, tokens before)  [paper A, 2]

    logprobs (...,R) nats;  mask (...,R) bool;  count: tokens, default mask.sum().
    ->  scalar, nats per token
    """
    assert logprobs.shape == mask.shape, (logprobs.shape, mask.shape)
    return -masked_mean(logprobs, mask, count)


def ranked_pairs(place: Tensor, valid: Tensor) -> Tensor:
    """pairs[..., i, j]: is response i placed before (better than) j? Ties make no pair.

    place, valid (...,K)  ->  (...,K,K) bool
    """
    better = place.unsqueeze(-1) < place.unsqueeze(-2)
    return better & valid.unsqueeze(-1) & valid.unsqueeze(-2)


def ranking_loss(
    scores: Tensor, place: Tensor, valid: Tensor, count: int | None = None
) -> Tensor:
    """L = - mean over pairs (i better than j) of log sigmoid(s_i - s_j), then mean over groups

    The Bradley-Terry likelihood of the ranking.              [paper A, 3.1; InstructGPT, eq. 1]

    scores (...,K) s;  place (...,K), 0 is the best, equal places tie;  valid (...,K) bool;
    count: groups with at least one pair.  ->  scalar, nats per pair

    logsigmoid keeps its gradient on badly wrong pairs, where log(sigmoid(d) + 1e-5) loses it.
    """
    assert scores.shape == place.shape == valid.shape, (scores.shape, place.shape, valid.shape)
    scores = masked(scores, valid)
    pairs = ranked_pairs(place, valid)
    margin = scores.unsqueeze(-1) - scores.unsqueeze(-2)
    per_pair = masked(-logsigmoid(margin), pairs)
    pairs_in_group = pairs.sum((-1, -2))
    per_group = per_pair.sum((-1, -2)) / pairs_in_group.clamp(min=1)
    return masked_mean(per_group, pairs_in_group > 0, count)


def balanced_weights(label: Tensor, valid: Tensor) -> Tensor:
    """Good and bad weigh the same within a group; a group's weights sum to its labelled responses.

    label (...,K), 1 good, 0 bad, another counts as none;  valid (...,K) bool  ->  (...,K)
    The paper's expectation is over pairs (y, y'), so four samples beside one expert response must
    not weigh four times. A group with one kind only has weight 1 throughout.
    """
    good = valid & (label == 1)
    bad = valid & (label == 0)
    n_good = good.sum(-1, keepdim=True)
    n_bad = bad.sum(-1, keepdim=True)
    n = n_good + n_bad
    weight_good = n / (2 * n_good.clamp(min=1))
    weight_bad = n / (2 * n_bad.clamp(min=1))
    weight = torch.where(good, weight_good, weight_bad)
    both = (n_good > 0) & (n_bad > 0)
    return torch.where(both, weight, torch.ones_like(weight)) * (good | bad)


def classification_loss(
    logits: Tensor,
    label: Tensor,
    valid: Tensor,
    weight: Tensor | None = None,
    count: int | None = None,
) -> Tensor:
    """L = - mean [ y log sigmoid(z) + (1 - y) log sigmoid(-z) ]  [paper A, 3.2]

    logits (...,K) z;  label (...,K) y in {0, 1};  valid (...,K) bool, true where there is a label;
    weight (...,K), default 1;  count: responses, default valid.sum().
    ->  scalar, nats per response.  The reward is then tanh(z/2) in (-1, 1).
    """
    assert logits.shape == label.shape == valid.shape, (logits.shape, label.shape, valid.shape)
    z = masked(logits, valid)
    per_response = -torch.where(label == 1, logsigmoid(z), logsigmoid(-z))
    if weight is not None:
        per_response = per_response * masked(weight.to(z.dtype), valid)
    return masked_mean(per_response, valid, count)


def quantile_levels(n: int) -> Tensor:
    """tau_i = (i + 1/2) / n, the midpoints of n equal slices: .05, .15 ... .95 for n = 10.

    ->  (N,) float64                                                              [QR-DQN, lemma 2]
    """
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def quantile_huber_loss(
    quantiles: Tensor,
    targets: Tensor,
    levels: Tensor,
    kappa: float,
    target_mask: Tensor | None = None,
    count: int | None = None,
) -> Tensor:
    """L = sum_i mean_j | tau_i - 1{z_j < q_i} | H(z_j - q_i),  mean over responses
    H(u) = u^2 / 2 where |u| <= kappa, else kappa (|u| - kappa / 2)
    kappa = 0: H(u) = |u|, the pinball loss                        [paper B, 3.2; QR-DQN, eq. 9-10]

    quantiles (...,N) q;  targets (...,M) z;  levels (N,) tau;  target_mask (...,M) bool;
    count: responses with at least one target.  ->  scalar

    Where errors stay under kappa the loss is squared: its optimum is an expectile, not a quantile.
    """
    assert quantiles.shape[:-1] == targets.shape[:-1], (quantiles.shape, targets.shape)
    assert quantiles.shape[-1] == len(levels), (quantiles.shape, levels.shape)
    if target_mask is None:
        target_mask = torch.ones_like(targets, dtype=torch.bool)
    has_target = target_mask.any(-1)
    q = masked(quantiles, has_target.unsqueeze(-1)).unsqueeze(-1)                       # (...,N,1)
    z = masked(targets.to(q.dtype), target_mask).unsqueeze(-2)                          # (...,1,M)
    u = z - q                                                                           # (...,N,M)
    tau = levels.to(q).unsqueeze(-1)                                                    # (N,1)
    huber = u.abs()
    if kappa > 0:
        huber = torch.where(huber <= kappa, u * u / 2, kappa * (huber - kappa / 2))
    per_target = (tau - (u < 0).to(q.dtype)).abs() * huber * target_mask.unsqueeze(-2)
    num_targets = target_mask.sum(-1, keepdim=True).clamp(min=1)
    per_response = per_target.sum(-1).div(num_targets).sum(-1)
    return masked_mean(per_response, has_target, count)
