"""PPO is PPO: in a world of 4 words and 2 tokens the policy reaches the optimum that can be enumerated."""
import itertools

import pytest
import torch

import train_ppo
from nanorlhf import gpt2
from nanorlhf.batching import Row, Stream, pack_rows
from nanorlhf.heads import Policy
from nanorlhf.run import dist, nonfinite, optim

WORDS, EOS = 4, 5                      # tokens 0 .. 3; EOS is never drawn because the responses are 2 tokens long and its logit is low
SCORES = {pair: score for pair, score in zip(itertools.product(range(WORDS), repeat=2),
                                             [1.0, -0.5, 0.2, 0.0, 0.3, 0.9, -1.0, 0.4, -0.2, 0.1, 0.6, -0.7, 0.5, -0.3, 0.8, 0.0])}
BETA = 0.5


class Tokens:
    """A tokenizer of single characters, and a reward of a pair of them."""
    eos_id = EOS
    decode = staticmethod(lambda ids: "".join(map(str, ids)))


class Reward:
    def score_texts(self, prompts, responses, ended, normalised=True):
        return torch.tensor([[SCORES[tuple(map(int, text))] for text in texts] for texts in responses])

    def normalise(self, raw):
        return raw


class World(gpt2.GPT2):
    """A small GPT-2 over 4 words: the other ids of its vocabulary, EOS among them, are never drawn."""

    def logits(self, hidden):
        return super().logits(hidden)[..., :WORDS]


def table(trunk):
    """Probability of each of the 16 responses, by enumeration."""
    pairs = list(itertools.product(range(WORDS), repeat=2))
    row = Row([4], [list(pair) for pair in pairs])
    with torch.no_grad():
        return Policy(trunk)(pack_rows([row])).logprobs[0].sum(-1).double().exp()      # (16,)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("k", [1, 4])
def test_policy_reaches_the_enumerable_optimum(k, seed):
    # The maximum of E[score] - beta KL(pi || ref) is  pi*(y) = ref(y) exp(score(y) / beta) / Z  (Lagrange; a softmax).
    device = dist.setup("cpu", seed)
    config = train_ppo.Config(data="", policy="", reward="", out="", k=k, groups=128 // k, max_new_tokens=2, kl_coef=BETA, epochs=2, minibatches=2,
                              eos_penalty=0.0, lam=1.0, vf_coef=0.5, lr=3e-3, seed=seed)
    trunk = World(gpt2.GPT2Config(vocab_size=6, n_positions=4, n_embd=16, n_layer=1, n_head=2))
    with torch.no_grad():                # a reference that is not uniform, so that ref in the formula matters
        trunk.wte.weight.normal_(std=0.1)
    policy, reference = Policy(trunk, value_head=True), Policy(train_ppo.copy.deepcopy(trunk)).requires_grad_(False)
    ref = table(reference.trunk)
    best = ref * torch.tensor(list(SCORES.values()), dtype=torch.float64).div(BETA).exp()
    best = best / best.sum()
    optimizer = optim.adamw(policy, config.lr, train_ppo.ADAM_EPS)
    guard = nonfinite.NonFiniteGuard(config, "train_ppo", policy)
    setup = train_ppo.Setup(config, device, Tokens, policy, reference, Reward())
    steps = 60
    for step in range(steps):
        prompts = [Row([4], [], index) for index in range(config.groups)]
        rows = train_ppo.generate_responses(setup, prompts, Stream.ROLLOUT, step, k)
        rollout = train_ppo.score_responses(setup, rows, [""] * config.groups, step)
        train_ppo.compute_logprobs_and_values(setup, rollout)
        train_ppo.compute_advantages(rollout, config.kl_coef, config)
        train_ppo.update(setup, optimizer, guard, rollout, step, optim.learning_rate(config.lr, step, steps, "linear"))
    found = table(policy.trunk)
    kl = lambda p, q: (p * (p / q).log()).sum().item()
    assert found.sum() == pytest.approx(1, abs=1e-6)
    print(f'k {k} seed {seed}: KL to the optimum {kl(ref, best):.3f} before, {kl(found, best):.4f} after')
    assert kl(ref, best) > 0.3           # there was something to learn
    assert kl(found, best) < 0.05
