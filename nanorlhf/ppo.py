"""Proximal policy optimisation on responses, as pure functions: KL, rewards, advantages, clipped losses.

Shapes: everything is (...,R), aligned to the *predicted* token: logprobs[r], values[r] and entropy[r] belong to response
token r, read at the column before it; rewards[r] is what choosing token r earned. `mask` is true on response tokens, EOS
included, and every response is filled from the left. What stands where the mask is false is ignored, NaN included.
`count` is the number of tokens averaged over: pass the whole minibatch's when the batch at hand is a part of it.
"""
import torch


def _masked(x, mask):
    """x in float32 or better, zeros behind the mask. torch.where, not a product: 0 * NaN is NaN, in value and gradient."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(mask, x, torch.zeros_like(x))


def masked_mean(x, mask, count=None):
    """Mean of x over the true entries of mask, or their sum over `count`.  (...,R), (...,R) -> scalar"""
    return _masked(x, mask).sum() / (mask.sum().clamp(min=1) if count is None else count)


def kl_k1(logprobs, ref_logprobs):
    """k1 = logprob - ref_logprob.  E_policy[k1] = KL(policy || reference); one sample may be negative.   [Schulman, Approximating KL]"""
    return logprobs.to(torch.promote_types(logprobs.dtype, torch.float32)) - ref_logprobs


def kl_k3(logprobs, ref_logprobs):
    """k3 = exp(-k1) - 1 + k1 >= 0.  Same expectation under the policy, never negative.                  [Schulman, Approximating KL]

    Less variance than k1 where the two are near, more where the reference is much likelier than the policy somewhere.
    expm1, because exp(x) - 1 loses every digit where policy and reference nearly agree.
    """
    k1 = kl_k1(logprobs, ref_logprobs)
    return torch.expm1(-k1) + k1


def last_token(mask):
    """True on each response's last token.  (...,R) bool -> (...,R) bool; an empty response has none."""
    after = torch.cat([mask[..., 1:], torch.zeros_like(mask[..., :1])], -1)
    return mask & ~after


def shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """r_t = - beta (logprob_t - ref_logprob_t)  (+ score at the last response token); the sum is paper A's objective.  [paper A, 3.3]

    scores (...);  logprobs, ref_logprobs, mask (...,R);  kl_coef beta, reward a nat.  ->  rewards (...,R), 0 behind the mask
    """
    assert scores.shape == mask.shape[:-1] and logprobs.shape == ref_logprobs.shape == mask.shape, (scores.shape, mask.shape)
    rewards = -kl_coef * _masked(kl_k1(logprobs, ref_logprobs), mask)
    return rewards + _masked(scores.unsqueeze(-1), last_token(mask))


def gae(rewards, values, mask, gamma, lam):
    """d_t = r_t + gamma V_{t+1} - V_t ;   A_t = d_t + gamma lam A_{t+1} ;   returns G = A + V         [GAE, eq. 16]

    The value after a response's last token is 0: the episode is over, whether EOS came or the limit did.
    rewards, values, mask (...,R)  ->  advantages, returns (...,R), both 0 behind the mask, neither carries gradient
    """
    assert rewards.shape == values.shape == mask.shape, (rewards.shape, values.shape, mask.shape)
    rewards, values = _masked(rewards, mask).detach(), _masked(values, mask).detach()
    advantages = torch.zeros_like(rewards)
    advantage = value_after = torch.zeros_like(rewards[..., 0])
    for t in reversed(range(mask.shape[-1])):
        delta = rewards[..., t] + gamma * value_after - values[..., t]
        advantage = torch.where(mask[..., t], delta + gamma * lam * advantage, torch.zeros_like(delta))
        advantages[..., t], value_after = advantage, values[..., t]
    return advantages, advantages + values


def masked_sums(x, mask):
    """(count, sum, sum of squares) over the true entries, float64: three numbers that processes add up.  -> (3,)"""
    inside = _masked(x, mask).double()
    return torch.stack([mask.sum(), inside.sum(), (inside * inside).sum()])


_moments = masked_sums   # whiten has an argument of that name


def whiten(x, mask, moments=None):
    """(x - mean) / sqrt(var + 1e-8), population variance over the true entries, 0 behind the mask.

    moments: of the whole rollout on all processes (`moments` above, added up); default: of x itself.
    """
    count, total, squares = _moments(x, mask) if moments is None else moments
    mean = total / count.clamp(min=1)
    var = (squares / count.clamp(min=1) - mean * mean).clamp(min=0)
    inside = _masked(x, mask)
    return _masked(((inside.double() - mean) / torch.sqrt(var + 1e-8)).to(inside.dtype), mask)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip, count=None):
    """L = - mean min( ratio A, clip(ratio, 1-eps, 1+eps) A ),   ratio = exp(logprob - old_logprob)     [PPO, eq. 7]

    All (...,R).  ->  (loss, share of tokens where the clipped branch is the one taken)

    The difference is masked *before* exp: exp(garbage) is inf, and inf * 0 in the backward is NaN. For the same reason
    it ends at 80 where A >= 0: the clip takes such a ratio anyway. Where A < 0 it is a real loss, and may be infinite.
    """
    assert logprobs.shape == old_logprobs.shape == advantages.shape == mask.shape, (logprobs.shape, mask.shape)
    advantages = _masked(advantages, mask)
    log_ratio = kl_k1(_masked(logprobs, mask), _masked(old_logprobs, mask))
    ratio = torch.exp(torch.where(advantages < 0, log_ratio, log_ratio.clamp(max=80)))
    free, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -masked_mean(torch.minimum(free, clipped), mask, count), masked_mean(clipped < free, mask, count)


def value_loss(values, old_values, returns, mask, clip, count=None):
    """L = mean 0.5 max( (V - G)^2, (clip(V, V_old - eps, V_old + eps) - G)^2 )                       [PPO2; GAE code of OpenAI]

    All (...,R).  ->  (loss, share of tokens where the clipped branch is the one taken)
    """
    assert values.shape == old_values.shape == returns.shape == mask.shape, (values.shape, mask.shape)
    values, old_values, returns = _masked(values, mask), _masked(old_values, mask), _masked(returns, mask)
    near = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    free, clipped = (values - returns) ** 2, (near - returns) ** 2
    return masked_mean(0.5 * torch.maximum(free, clipped), mask, count), masked_mean(clipped > free, mask, count)


def entropy(logits):
    """H = - sum_v p_v log p_v, Shannon entropy over the whole vocabulary, nats.  (...,V) -> (...)       [paper A, 4.2]

    Logits of -inf (words cut away) count as p log p = 0.
    """
    logp = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    return -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)


def adapt_kl_coef(kl_coef, kl, target, n, horizon):
    """beta <- beta (1 + clip(KL / target - 1, -.2, .2) n / horizon)                                    [Ziegler et al. 2019, 2.2]

    kl: nats a *response*, summed over its tokens;  n: responses seen in this step;  horizon: responses.  -> the new beta
    """
    return kl_coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * n / horizon)


def explained_variance(values, returns, mask):
    """1 - Var(G - V) / Var(G): 1 is a perfect critic, 0 a constant one, below 0 worse than a constant.  -> float (0 where G is constant)"""
    v, g = values[mask].double(), returns[mask].double()
    spread = g.var(unbiased=False).item() if len(g) else 0.0
    return 1 - (g - v).var(unbiased=False).item() / spread if spread > 1e-12 else 0.0
