"""Proximal policy optimisation on responses, as pure functions: KL, rewards, advantages, losses.

Shapes: everything is (...,R), aligned to the *predicted* token: logprobs[r], values[r] and
entropy[r] belong to response token r, read at the column before it; rewards[r] is what choosing
token r earned. `mask` is true on response tokens, EOS included, and every response is filled from
the left. What stands where the mask is false is ignored, NaN included. `count` is the number of
tokens averaged over: pass the whole minibatch's when the batch at hand is a part of it.
"""
import torch
from torch import Tensor

from .losses import masked, masked_mean


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k1 = logprob - ref_logprob.  E_policy[k1] = KL(policy || reference).

    One sample may be negative.  [Schulman, Approximating KL]
    """
    return logprobs.to(torch.promote_types(logprobs.dtype, torch.float32)) - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 = exp(-k1) - 1 + k1 >= 0.  Same expectation under the policy, never negative.

    Less variance than k1 where the two are near, more where the reference is much likelier than the
    policy somewhere. expm1, because exp(x) - 1 loses every digit where policy and reference nearly
    agree.  [Schulman, Approximating KL]
    """
    k1 = kl_k1(logprobs, ref_logprobs)
    return torch.expm1(-k1) + k1


def last_token(mask: Tensor) -> Tensor:
    """True on each response's last token; an empty response has none.  (...,R) -> (...,R) bool"""
    after = torch.cat([mask[..., 1:], torch.zeros_like(mask[..., :1])], -1)
    return mask & ~after


def shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """r_t = - beta (logprob_t - ref_logprob_t)  (+ score at the last response token)

    Their sum over a response is paper A's objective.  [paper A, 3.3]

    scores (...);  logprobs, ref_logprobs, mask (...,R);  kl_coef beta, reward per nat.
    ->  rewards (...,R), 0 behind the mask
    """
    assert scores.shape == mask.shape[:-1], (scores.shape, mask.shape)
    assert logprobs.shape == ref_logprobs.shape == mask.shape, (logprobs.shape, mask.shape)
    rewards = -kl_coef * masked(kl_k1(logprobs, ref_logprobs), mask)
    return rewards + masked(scores.unsqueeze(-1), last_token(mask))


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """d_t = r_t + gamma V_{t+1} - V_t ;  A_t = d_t + gamma lam A_{t+1} ;  G = A + V  [GAE, eq. 16]

    The value after a response's last token is 0: the episode is over, whether EOS came or the
    limit. rewards, values, mask (...,R)  ->  advantages A, returns G (...,R), both 0 behind the
    mask, neither carries gradient
    """
    assert rewards.shape == values.shape == mask.shape, (rewards.shape, values.shape, mask.shape)
    rewards = masked(rewards, mask).detach()
    values = masked(values, mask).detach()
    advantages = torch.zeros_like(rewards)
    advantage = torch.zeros_like(rewards[..., 0])
    value_after = torch.zeros_like(advantage)
    for t in reversed(range(mask.shape[-1])):
        delta = rewards[..., t] + gamma * value_after - values[..., t]
        advantage = delta + gamma * lam * advantage
        advantage = masked(advantage, mask[..., t])
        advantages[..., t] = advantage
        value_after = values[..., t]
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8), population variance over the true entries, 0 behind the mask.

    x: of the whole rollout, not of one process's share of it.
    """
    x = masked(x, mask)
    wide = x.double()
    count = mask.sum().clamp(min=1)
    mean = wide.sum() / count
    var = ((wide * wide).sum() / count - mean * mean).clamp(min=0)
    white = (wide - mean) / torch.sqrt(var + 1e-8)
    return masked(white.to(x.dtype), mask)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    count: int | None = None,
) -> tuple[Tensor, Tensor]:
    """L = - mean min( ratio A, clip(ratio, 1-eps, 1+eps) A ),   ratio = exp(logprob - old_logprob)

    [PPO, eq. 7]

    All (...,R).  ->  (loss, share of tokens where the clipped branch is the one taken)

    The difference is masked *before* exp: exp(garbage) is inf, and inf * 0 in the backward is NaN.
    For the same reason it ends at 80 where A >= 0: the clip takes such a ratio anyway. Where A < 0
    it is a real loss, and may be infinite.
    """
    shapes = (logprobs.shape, old_logprobs.shape, advantages.shape, mask.shape)
    assert len(set(shapes)) == 1, shapes
    advantages = masked(advantages, mask)
    log_ratio = kl_k1(masked(logprobs, mask), masked(old_logprobs, mask))
    ratio = torch.exp(torch.where(advantages < 0, log_ratio, log_ratio.clamp(max=80)))
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -masked_mean(torch.minimum(unclipped, clipped), mask, count)
    return loss, masked_mean(clipped < unclipped, mask, count)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float,
    count: int | None = None,
) -> tuple[Tensor, Tensor]:
    """L = mean 0.5 max( (V - G)^2, (clip(V, V_old - eps, V_old + eps) - G)^2 )

    All (...,R).  ->  (loss, share of tokens where the clipped branch is the one taken)
    [PPO2; GAE code of OpenAI]
    """
    shapes = (values.shape, old_values.shape, returns.shape, mask.shape)
    assert len(set(shapes)) == 1, shapes
    values = masked(values, mask)
    old_values = masked(old_values, mask)
    returns = masked(returns, mask)
    near = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    unclipped = (values - returns) ** 2
    clipped = (near - returns) ** 2
    loss = masked_mean(0.5 * torch.maximum(unclipped, clipped), mask, count)
    return loss, masked_mean(clipped > unclipped, mask, count)


def entropy(logits: Tensor) -> Tensor:
    """H = - sum_v p_v log p_v, Shannon entropy over the whole vocabulary, nats.  (...,V) -> (...)

    Logits of -inf (words cut away) count as p log p = 0.  [paper A, 4.2]
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logp = torch.log_softmax(logits, -1)
    return -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)


def adapt_kl_coef(kl_coef: float, kl: float, target: float, n: int, horizon: int) -> float:
    """beta <- beta (1 + clip(KL / target - 1, -.2, .2) n / horizon)  [Ziegler et al. 2019, 2.2]

    kl: nats per *response*, summed over its tokens;  n: responses of this step;  horizon:
    responses.
    ->  the new beta
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * n / horizon)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(G - V) / Var(G): 1 is a perfect critic, 0 a constant one, below 0 a worse one.

    ->  0 where G is constant
    """
    v = values[mask].double()
    g = returns[mask].double()
    variance = g.var(unbiased=False).item() if len(g) else 0.0
    return 1 - (g - v).var(unbiased=False).item() / variance if variance > 1e-12 else 0.0
