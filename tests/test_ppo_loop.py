"""What train_ppo.py hands on between its functions: temperature, gamma, lambda, epochs, losses.

A policy of width 8 over 7 tokens, in float64, draws real rollouts. The functions of the script are
called one by one, so that every number can be worked out by hand.
"""
import copy
from math import log

import pytest
import torch

import train_ppo
from nanorlhf import ppo
from nanorlhf.batching import Row, Stream, pack_rows
from nanorlhf.gpt2 import GPT2, GPT2Config
from nanorlhf.heads import Policy
from nanorlhf.run import dist, optim
from nanorlhf.run.log import Log

EOS = 6
CPU = torch.device("cpu")


class Tokens:
    """A tokenizer of single digits."""

    eos_id = EOS
    decode = staticmethod(lambda ids: "".join(map(str, ids)))


class Reward:
    """Half a point for each 1 in the response."""

    normalise = staticmethod(lambda raw: raw)

    def score_texts(self, prompts, responses, ended, normalised=True):
        return torch.tensor([[0.5 * text.count("1") for text in texts] for texts in responses])


class Minibatches:
    """Stands where NonFiniteGuard does; remembers which prompts each minibatch held."""

    def __init__(self):
        self.seen = []

    def all_finite(self, step, rows, *rest, **tensors):
        self.seen.append([row.index for row in rows])
        return True


def settings(**more):
    flags = dict(groups=8, k=2, max_new_tokens=4, epochs=1, minibatches=1, dtype="float64")
    return train_ppo.Config(data="", policy="", reward="", out="", **{**flags, **more})


def a_policy():
    """Weights large enough that a temperature matters; the value head is 0, as at the start."""
    policy = Policy(GPT2(GPT2Config(vocab_size=7, n_positions=16, n_embd=8, n_layer=1, n_head=2)))
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.7, generator=generator)
    return Policy(policy.trunk, value_head=True).double()


def setup_of(policy, config):
    reference = copy.deepcopy(policy).requires_grad_(False)
    return train_ppo.Setup(config, CPU, Tokens, policy, reference, Reward())


def a_rollout(policy, config):
    """The first rollout: policy and reference are still the same."""
    dist.setup("cpu", 0)
    setup = setup_of(policy, config)
    prompts = [Row([1 + i % 5, i % 3, 2], [], i) for i in range(config.groups)]
    rows = train_ppo.generate_responses(setup, prompts, Stream.ROLLOUT, 0, config.k)
    rollout = train_ppo.score_responses(setup, rows, [""] * len(rows), 0)
    train_ppo.compute_logprobs_and_values(setup, rollout)
    return rollout


def learn(policy, rollout, config, lr, step=0):
    """All the epochs on one rollout.  -> (numbers for the log, the minibatches)"""
    optimizer, minibatches = optim.adamw(policy, lr, train_ppo.ADAM_EPS), Minibatches()
    setup = setup_of(policy, config)
    numbers = train_ppo.update(setup, optimizer, minibatches, rollout, step, lr)
    return numbers, minibatches.seen


# ------------------------------------------------------------------------------ the rollout


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_one_temperature_for_policy_reference_and_update(temperature):
    # Before the first update there is one policy. Sampled, looked at and learnt from at the
    # same temperature, it is its own reference (KL 0), and its ratio to itself is 1.
    config, policy = settings(temperature=temperature), a_policy()
    rollout = a_rollout(policy, config)
    rewards = train_ppo.compute_advantages(rollout, config.kl_coef, config)
    assert train_ppo.rollout_stats(rollout, rewards, config.kl_coef)["kl"] == 0
    numbers, _ = learn(policy, rollout, config, 1e-3)
    assert numbers["ratio_first"] == 1


def test_a_temperature_near_zero_takes_the_likeliest_token():
    # At temperature .0001 the likeliest token has probability 1: samples of a prompt are all the
    # same, and every log-probability is log 1 = 0. At temperature 1 neither holds.
    for temperature, greedy in ((0.0001, True), (1.0, False)):
        rollout = a_rollout(a_policy(), settings(k=4, temperature=temperature))
        assert all(len(set(texts)) == 1 for texts in rollout.texts) == greedy
        assert (rollout.old_logprobs.abs().max() < 1e-6) == greedy


def test_a_response_that_did_not_end_pays_the_penalty():
    rollout = a_rollout(a_policy(), settings(eos_penalty=0.25, temperature=9.0))
    assert rollout.ended.any() and not rollout.ended.all()               # some of each
    for row, raw, scores in zip(rollout.rows, rollout.raw, rollout.scores):
        for ids, before, after in zip(row.responses, raw, scores):
            assert before == 0.5 * ids.count(1)
            assert after == before - (0 if ids[-1] == EOS else 0.25)


def test_rewards_returns_and_advantages_by_hand():
    # beta .5 and k1 = old - reference:
    #   k1  .2 -.4  .6   ->  r  -.1  .2  -.3 + score 1    = .7
    #   k1  .8 -.2       ->  r  -.4       .1 + score -.5  = -.4
    # gamma .9, lambda .5, gamma lambda .45; d = r + .9 V' - V, A = d + .45 A':
    #   V  .5  .1  .3    ->  d  -.51 .37 .4  ->  A  -.2625 .55 .4
    #   V -.2  .4        ->  d   .16 -.8     ->  A  -.2 -.8
    # G = A + V, not whitened.
    # The five A have mean -.0625; less the mean they are -.2 .6125 .4625 -.1375 -.7375, whose
    # squares .04 .37515625 .21390625 .01890625 .54390625 have mean .238375.
    mask = torch.tensor([[[True, True, True], [True, True, False]]])
    garbage = 9.0                                                        # behind the mask
    reference = torch.tensor([[[-1.0, -2.0, -3.0], [-0.5, -1.5, garbage]]])
    k1 = torch.tensor([[[0.2, -0.4, 0.6], [0.8, -0.2, garbage]]])
    values = torch.tensor([[[0.5, 0.1, 0.3], [-0.2, 0.4, garbage]]])
    scores = torch.tensor([[1.0, -0.5]])
    rollout = train_ppo.Rollout([], [], None, mask, scores, scores, scores)
    rollout.old_logprobs, rollout.ref_logprobs, rollout.values = reference + k1, reference, values
    rewards = train_ppo.compute_advantages(rollout, 0.5, settings(gamma=0.9, lam=0.5, kl_coef=7.0))
    close = lambda found, *rows: torch.allclose(found, torch.tensor([rows]), atol=1e-6)
    assert close(rewards, [-0.1, 0.2, 0.7], [-0.4, -0.4, 0])
    assert close(rollout.returns, [0.2375, 0.65, 0.7], [-0.4, -0.4, 0])
    centred = torch.tensor([[[-0.2, 0.6125, 0.4625], [-0.1375, -0.7375, 0]]])
    assert torch.allclose(rollout.advantages, centred / 0.238375**0.5, atol=1e-6)
    plain = settings(gamma=0.9, lam=0.5, whiten=False)
    train_ppo.compute_advantages(rollout, 0.5, plain)
    assert close(rollout.advantages, [-0.2625, 0.55, 0.4], [-0.2, -0.8, 0])


def test_a_bad_critic_is_told_once(tmp_path, capsys):
    # below 0 is worse than a constant; a new critic has CRITIC_STEPS rollouts before it is told
    log = Log(tmp_path, 0, 100, ())
    stats = {"ratio_first": 1, "kl": 0, "eos_rate": 1, "explained_variance": -0.1}
    first = train_ppo.CRITIC_STEPS
    told = []
    for step in (first - 1, first, first + 1, first + 30):
        train_ppo.warn_about(stats, settings(), step, log)
        told.append(capsys.readouterr().err.count("worse than a constant"))
    assert told == [0, 1, 0, 0]
    for step in (first, first + 1):                                      # the others at every step
        train_ppo.warn_about({**stats, "eos_rate": 0}, settings(), step, log)
        assert capsys.readouterr().err.count("no response ended") == 1


# ------------------------------------------------------------------------------- the update


def test_every_epoch_has_its_own_order():
    # 8 prompts in 2 minibatches, 3 epochs, 2 steps: six passes over all prompts. Of 8! orders
    # six at random would hardly meet; the same in every epoch, or every step, they do.
    config, policy = settings(epochs=3, minibatches=2, target_kl=0.0), a_policy()
    rollout = a_rollout(policy, config)
    train_ppo.compute_advantages(rollout, config.kl_coef, config)
    orders = []
    for step in range(2):
        _, seen = learn(policy, rollout, config, 0.0, step)
        assert [len(part) for part in seen] == [4] * 6
        orders += [tuple(one + two) for one, two in zip(seen[::2], seen[1::2])]
    assert all(sorted(each) == list(range(8)) for each in orders)        # every prompt once
    assert len(set(orders)) == 6


def test_the_loss_of_a_minibatch_by_hand():
    # 5 tokens in 2 responses. Every ratio is 1.3, every advantage 1, clip .1:
    #   policy loss = -min(1.3, 1.1) = -1.1, all clipped.
    # V = 0 (the head is new), V_old = 1, value clip .25, so the clipped V is .75; G = -.5:
    #   value loss = .5 max(.5^2, 1.25^2) = .78125, all clipped.
    # vf_coef .4: loss = -1.1 + .4 * .78125 = -.7875.
    # KL to the rollout's policy, k3 per token = 1.3 - 1 - log 1.3; a response has 5 / 2 tokens.
    config, policy = settings(clip=0.1, value_clip=0.25, vf_coef=0.4, temperature=2.0), a_policy()
    batch = pack_rows([Row([1, 2], [[3, 4, EOS], [5, EOS]])])
    now = policy(batch, 2.0).logprobs.detach()
    filled = lambda x: torch.full(now.shape, x, dtype=torch.float64)
    old = train_ppo.Targets(
        old_logprobs=now - log(1.3),
        advantages=filled(1.0),
        values=filled(1.0),
        returns=filled(-0.5),
    )
    loss, numbers, ratio = train_ppo.ppo_loss(setup_of(policy, config), batch, old, 5, 2)
    assert loss.item() == pytest.approx(-0.7875)
    assert ratio == pytest.approx(1.3)
    assert numbers == pytest.approx({
        "policy_loss": -1.1,
        "value_loss": 0.78125,
        "clip_fraction": 1.0,
        "value_clip_fraction": 1.0,
        "approx_kl": 2.5 * (0.3 - log(1.3)),
    })


def test_after_a_large_step_ratios_are_clipped():
    # The rollout's log-probabilities stay: in a second pass the ratio shows how far the first
    # step went. Taken anew in every pass they would give ratio 1, and nothing to clip.
    shares = []
    for epochs in (1, 2):
        config, policy = settings(epochs=epochs, temperature=1.5), a_policy()
        rollout = a_rollout(policy, config)
        train_ppo.compute_advantages(rollout, config.kl_coef, config)
        numbers, _ = learn(policy, rollout, config, 0.1)
        shares.append((numbers["clip_fraction"], numbers["approx_kl"]))
    assert shares[0] == (0, 0)                                           # before the first step
    assert shares[1][0] > 0.1 and shares[1][1] > 0.1


def test_the_critic_learns_by_vf_coef():
    # Its head starts at 0. Without a value loss it has no gradient, so it stays there.
    for vf_coef in (0.0, 0.5):
        config, policy = settings(epochs=8, vf_coef=vf_coef), a_policy()
        rollout = a_rollout(policy, config)
        train_ppo.compute_advantages(rollout, config.kl_coef, config)
        assert not rollout.values.any()                                  # the first V is 0
        learn(policy, rollout, config, 0.02)
        assert policy.value_head.weight.any() == (vf_coef > 0)
        values, mask = policy(pack_rows(rollout.rows)).values.detach(), rollout.response_mask
        error = lambda v, rollout=rollout, mask=mask: ppo.masked_mean((v - rollout.returns) ** 2, mask).item()
        assert (error(values) < 0.9 * error(rollout.values)) == (vf_coef > 0)
