"""Stage 3: PPO on a reward model or on a Python function.

    python train_ppo.py --data FairytaleQAData --policy runs/sft --reward runs/rm --out runs/ppo
    torchrun --nproc_per_node=8 train_ppo.py ...

One step: generate, score, log-probabilities and values, advantages, update. In the first three each
process has its share of the prompts. The rollout (integers and a few numbers per token) is then
known to all of them: whitening, KL control and logs are of the whole, and minibatches are planned
globally and shared out. So rollouts, minibatches and update on eight GPUs are those on one.

G prompts per rollout, K responses per prompt, R response tokens at most. Three kinds of indices:
rollout_ids and minibatch_ids count the rollout's prompts 0 .. G-1, micro_ids the prompts of one
minibatch. local_ids are those of this process.
"""
import copy
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nanorlhf import ppo
from nanorlhf.batching import (
    Row,
    Stream,
    batch_indices,
    encode_all,
    partition,
    permutation,
    plan_micro_batches,
    prefetch,
)
from nanorlhf.generate import Sampling, generate, room
from nanorlhf.heads import Policy
from nanorlhf.io import data, hub
from nanorlhf.reward import FunctionReward, TextReward
from nanorlhf.run import dist, optim, precision, run_folder, speed
from nanorlhf.run.cli import InputError, check_bounds, context_limit, run_script
from nanorlhf.run.kernels import choose_kernels
from nanorlhf.run.log import header
from nanorlhf.run.training_run import TrainingRun, describe_dropped, describe_numbers

SCRIPT = "train_ppo"
SCORE_CLIP = 10.0          # a normalised score beyond this is an outlier of the reward model
ADAM_EPS = 1e-5
CRITIC_STEPS = 20          # rollouts in which a new critic may be worse than a constant
EVAL_PROMPTS = 64          # held-out prompts, one response each, the same draws at every evaluation
SAMPLE_PROMPTS = 3         # of them, how many are shown
EVAL_STATS = (
    "score", "score_normalised", "kl", "entropy", "response_length", "eos_rate", "distinct",
)
PROGRESS = (               # on the progress line
    "score", "kl", "entropy", "response_length", "eos_rate", "distinct",
    "ratio_first", "clip_fraction", "explained_variance", "mfu", "seconds",
)


@dataclass(frozen=True)
class Config:
    # prompts: FairytaleQA or HH folder, groups JSONL, or a folder with train.jsonl and val.jsonl
    data: str
    policy: str            # supervised model: a run or a model folder; also the frozen reference
    # reward model: a run or a folder; or path.py:function with (prompts, responses) -> scores
    reward: str
    out: str               # run folder; the same command again resumes
    # of a quantile model's outputs: mean, q0 .. q9, cvar:A (mean of the lowest share A)
    statistic: str = "mean"
    steps: int = 100       # rollouts
    groups: int = 16       # prompts per rollout
    k: int = 4             # responses per prompt
    max_new_tokens: int = 48   # response tokens at most, EOS included
    temperature: float = 1.0   # of sampling, and of every log-probability
    kl_coef: float = 0.05  # beta in r_t = -beta (logprob - ref_logprob)
    # KL to the reference, nats per response, that beta is adapted to; 0: beta is fixed
    kl_coef_target: float = 0.0
    kl_horizon: int = 10000    # responses over which beta adapts
    gamma: float = 1.0     # discount per token
    lam: float = 0.95      # lambda of GAE
    whiten: bool = True    # advantages to mean 0 and variance 1 over the rollout
    clip: float = 0.2      # of the policy's ratio
    value_clip: float = 0.2    # of the value's change
    vf_coef: float = 0.1   # weight of the value loss
    detach_value: bool = False     # true: no value gradient into the trunk
    epochs: int = 4        # passes over a rollout
    minibatches: int = 4   # optimizer steps per pass; divides --groups
    # KL to the rollout's policy, nats per response, that ends the passes early; 0: never
    target_kl: float = 0.0
    eos_penalty: float = 1.0   # taken from the score of a response that did not end
    max_tokens: int = 8192     # columns per micro-batch
    max_length: int = 0    # positions of prompt + response; 0: the model's context
    lr: float = 1e-5       # learning rate of AdamW
    warmup: int = 0        # rollouts until the learning rate is reached
    # of the learning rate; linear falls towards 0 at the last step
    schedule: Literal["linear", "constant"] = "linear"
    seed: int = 0          # of prompts, draws and minibatches
    # of the forward; under bfloat16 the weights that are trained stay float32
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    # torch.compile the blocks, on CUDA with FlexAttention; the first steps then take minutes
    compile: bool = False
    activation_checkpointing: bool = False     # less memory, a third more work
    device: str = "auto"   # cpu, cuda, cuda:1; auto takes CUDA where there is one
    eval_every: int = 20   # rollouts between evaluations
    save_every: int = 20   # rollouts between saves


@dataclass(frozen=True)
class Setup:
    """What stays the same during a run."""
    config: Config
    device: torch.device
    tokenizer: object
    policy: Policy                  # with a critic on its trunk; the one that is trained
    reference: Policy               # the supervised policy, frozen
    reward: TextReward | FunctionReward


@dataclass
class Rollout:
    """G prompts with K responses each; all tensors (G,K,R) or (G,K), on the CPU."""
    rows: list[Row]
    texts: list[list[str]]
    ended: Tensor                   # (G,K) bool: with EOS
    response_mask: Tensor           # (G,K,R) bool
    raw: Tensor                     # (G,K) score before normalisation
    normalised: Tensor              # (G,K) and clipped
    scores: Tensor                  # (G,K) less the penalty for not ending
    old_logprobs: Tensor = None     # (G,K,R) of the policy as this step begins
    ref_logprobs: Tensor = None     # (G,K,R)
    values: Tensor = None           # (G,K,R)
    entropy: Tensor = None          # (G,K,R)
    advantages: Tensor = None       # (G,K,R)
    returns: Tensor = None          # (G,K,R)

    def select(self, ids, R, device, dtype) -> "Targets":
        """What the losses of these prompts are computed from, (len(ids),K,R) each."""
        tensors = (self.old_logprobs, self.advantages, self.values, self.returns)
        return Targets(*(tensor[ids, :, :R].to(device, dtype) for tensor in tensors))


class Targets(NamedTuple):
    """Of a rollout or a part of it, all (...,K,R): constants while the policy learns."""
    old_logprobs: Tensor
    advantages: Tensor
    values: Tensor
    returns: Tensor


# ------------------------------------------------------------------------- generate

def local_prompts(prompts, k, config):
    """Indices of the prompts that this process generates and scores."""
    columns = room(prompts, k, config.max_new_tokens)
    return partition(columns, dist.world_size())[dist.rank()]


@torch.no_grad()
def generate_responses(setup, prompts, stream, step, k):
    """K responses per prompt; each process generates its share, all get the whole.

    prompts: rows without responses  ->  rows with responses
    """
    config = setup.config
    local_ids = local_prompts(prompts, k, config)
    sampling = Sampling(
        k, config.max_new_tokens, setup.tokenizer.eos_id, config.seed, stream,
        temperature=config.temperature, max_tokens=config.max_tokens,
    )
    with precision.autocast(setup.policy, config.dtype):
        local_responses = generate(
            setup.policy.trunk, [prompts[i] for i in local_ids], sampling, step
        )
    responses = dist.all_gather_by_index(len(prompts), local_ids, local_responses)
    return [Row(row.prompt, samples, row.index) for row, samples in zip(prompts, responses)]


# ---------------------------------------------------------------------------- score

@torch.no_grad()
def score_responses(setup, rows, prompt_texts, step):
    """Text to the reward, scores back: normalised, clipped, less the penalty for not ending.

    rows: as generated;  prompt_texts: all prompts' texts by row.index  ->  Rollout
    """
    config, reward, tokenizer = setup.config, setup.reward, setup.tokenizer
    texts, ended = [], []
    for row in rows:
        ended.append([ids[-1] == tokenizer.eos_id for ids in row.responses])
        texts.append(list(map(tokenizer.decode, row.responses)))       # EOS is no text
    local_ids = local_prompts(rows, len(texts[0]), config)
    local_scores = []
    if local_ids:
        local_scores = reward.score_texts(
            [prompt_texts[rows[i].index] for i in local_ids],
            [texts[i] for i in local_ids],
            [ended[i] for i in local_ids],
            normalised=False,
        ).tolist()
    raw = torch.tensor(dist.all_gather_by_index(len(rows), local_ids, local_scores))
    if not raw.isfinite().all():
        raise FloatingPointError(f"--reward {config.reward} gave NaN or infinity at step {step}")
    normalised = reward.normalise(raw).clamp(-SCORE_CLIP, SCORE_CLIP)
    ended = torch.tensor(ended)
    scores = normalised - config.eos_penalty * ~ended
    lengths = torch.tensor([[len(ids) for ids in row.responses] for row in rows])
    response_mask = torch.arange(lengths.max().item()) < lengths.unsqueeze(-1)
    return Rollout(rows, texts, ended, response_mask, raw, normalised, scores)


# ------------------------------------- log-probabilities and values, by policy and reference

@torch.no_grad()
def compute_logprobs_and_values(setup, rollout):
    """Log-probabilities, values and entropy of a rollout, by the forward that trains.

    Not by the one that sampled, which rounds otherwise: where rows are packed as in the update,
    the first ratio is exactly 1.
    """
    config = setup.config
    # log-probabilities of policy and reference, values, entropy
    tensors = torch.zeros(4, *rollout.response_mask.shape, dtype=torch.float64)
    plan = plan_micro_batches(rollout.rows, config.max_tokens, dist.world_size())[dist.rank()]
    for rollout_ids, batch in zip(plan, prefetch(rollout.rows, plan, setup.device)):
        with precision.autocast(setup.policy, config.dtype):
            new = setup.policy(batch, config.temperature, return_entropy=True)
            reference = setup.reference(batch, config.temperature)
        R = batch.response_mask.shape[-1]
        outputs = (new.logprobs, reference.logprobs, new.values, new.entropy)
        for tensor, output in zip(tensors, outputs):
            tensor[rollout_ids, :, :R] = output.double().cpu()
    dist.all_reduce(tensors)                     # each entry was filled by one process
    rollout.old_logprobs, rollout.ref_logprobs, rollout.values, rollout.entropy = tensors


# ----------------------------------------------------------------------- advantages

def compute_advantages(rollout, kl_coef, config):
    """Rewards per token, returns, and advantages by GAE, whitened over the whole rollout or not.

    -> rewards (G,K,R)
    """
    mask = rollout.response_mask
    rewards = ppo.shape_rewards(
        rollout.scores, rollout.old_logprobs, rollout.ref_logprobs, mask, kl_coef
    )
    advantages, rollout.returns = ppo.gae(
        rewards, rollout.values, mask, config.gamma, config.lam
    )
    rollout.advantages = ppo.whiten(advantages, mask) if config.whiten else advantages
    return rewards


# --------------------------------------------------------------------------- update

def ppo_loss(setup, batch, targets, num_tokens, num_responses):
    """The loss of a micro-batch, its numbers for the log, and the ratio that is farthest from 1.

    targets: of its prompts;  num_tokens, num_responses: of the whole minibatch, on all processes
    """
    config = setup.config
    with precision.autocast(setup.policy, config.dtype):
        new = setup.policy(batch, config.temperature)
    mask = batch.response_mask
    policy_loss, clip_fraction = ppo.policy_loss(
        new.logprobs, targets.old_logprobs, targets.advantages, mask,
        clip=config.clip, count=num_tokens,
    )
    value_loss, value_clip_fraction = ppo.value_loss(
        new.values, targets.values, targets.returns, mask,
        clip=config.value_clip, count=num_tokens,
    )
    new_logprobs = new.logprobs.detach()
    kl = ppo.kl_k3(targets.old_logprobs, new_logprobs)
    approx_kl = ppo.masked_mean(kl, mask, num_responses)
    ratio = torch.exp(new_logprobs - targets.old_logprobs)[mask]
    stats = {
        "policy_loss": policy_loss.item(),
        "value_loss": value_loss.item(),
        "clip_fraction": clip_fraction.item(),
        "value_clip_fraction": value_clip_fraction.item(),
        "approx_kl": approx_kl.item(),           # KL(rollout's policy || this one), per response
    }
    loss = policy_loss + config.vf_coef * value_loss
    return loss, stats, ratio[(ratio - 1).abs().argmax()].item()


def train_minibatch(setup, optimizer, guard, rollout, minibatch_ids, step, lr):
    """One optimizer step.  -> (numbers of the minibatch, farthest ratio, was the step taken?)"""
    config = setup.config
    rows = [rollout.rows[i] for i in minibatch_ids]
    num_tokens = int(rollout.response_mask[minibatch_ids].sum())
    num_responses = len(rows) * config.k
    dtype = precision.master_dtype(config.dtype)
    plan = plan_micro_batches(rows, config.max_tokens, dist.world_size())
    local_plan = plan[dist.rank()]
    micro_losses, ratios = [], []
    local_stats = Counter()                      # each micro-batch's part of a mean, so they add up
    for micro_ids, batch in zip(local_plan, prefetch(rows, local_plan, setup.device)):
        rollout_ids = [minibatch_ids[i] for i in micro_ids]
        R = batch.response_mask.shape[-1]
        targets = rollout.select(rollout_ids, R, setup.device, dtype)
        loss, stats, ratio = ppo_loss(setup, batch, targets, num_tokens, num_responses)
        loss.backward()
        micro_losses.append(loss.item())
        local_stats.update(stats)
        ratios.append(ratio)
    dist.all_reduce_gradients(setup.policy)      # a sum: each loss is divided by the whole's tokens
    grad_norm = optim.gradient_norm(setup.policy)

    local = [micro_losses, grad_norm.item(), local_stats, ratios]
    gathered_losses, norms, gathered_stats, gathered_ratios = zip(*dist.all_gather_object(local))
    stats = Counter()
    for process_stats in gathered_stats:
        stats.update(process_stats)
    stats["grad_norm"] = norms[0]
    farthest_ratio = max(sum(gathered_ratios, []), key=lambda ratio: abs(ratio - 1))
    # if any process has a loss or gradient that is not finite, none of them takes the step
    targets = rollout.select(minibatch_ids, None, "cpu", torch.float64)
    is_finite = guard.all_finite(step, rows, plan, gathered_losses, norms, **targets._asdict())
    if is_finite:
        optim.update(setup.policy, optimizer, lr, grad_norm)
    return stats, farthest_ratio, is_finite


def update(setup, optimizer, guard, rollout, step, lr):
    """Clipped PPO: epochs of fresh permutations, each cut into minibatches of whole groups.

    -> mean numbers over the minibatches
    """
    config = setup.config
    num_prompts = len(rollout.rows)
    minibatch_size = num_prompts // config.minibatches
    taken = []                                   # numbers of each minibatch whose step was taken
    ratio_first = None
    for epoch in range(config.epochs):
        pass_number = step * config.epochs + epoch
        order = permutation(num_prompts, config.seed, pass_number, Stream.MINIBATCH).tolist()
        epoch_kls = []
        for start in range(0, num_prompts, minibatch_size):
            minibatch_ids = order[start : start + minibatch_size]
            stats, ratio, is_finite = train_minibatch(
                setup, optimizer, guard, rollout, minibatch_ids, step, lr
            )
            if ratio_first is None:              # before the first step the policy is the rollout's
                ratio_first = ratio
            if is_finite:
                taken.append(stats)
                epoch_kls.append(stats["approx_kl"])
        if config.target_kl and epoch_kls and sum(epoch_kls) / len(epoch_kls) > config.target_kl:
            break
    means = {}
    for name in stats:                           # of the last minibatch: each has the same names
        means[name] = sum(each[name] for each in taken) / len(taken) if taken else float("nan")
    return {"ratio_first": ratio_first, **means, "updates": len(taken)}


# ------------------------------------------------------------------ what a step shows

def rollout_stats(rollout, rewards, kl_coef):
    """What a rollout looks like, before it is learnt from.

    Per response: score, reward, kl, length; per token: entropy.
    """
    mask = rollout.response_mask
    responses = rollout.scores.numel()
    old_logprobs, ref_logprobs = rollout.old_logprobs, rollout.ref_logprobs
    kl = ppo.masked_mean(ppo.kl_k1(old_logprobs, ref_logprobs), mask, responses)
    kl_k3 = ppo.masked_mean(ppo.kl_k3(old_logprobs, ref_logprobs), mask, responses)
    clipped = rollout.normalised.abs() >= SCORE_CLIP
    return {
        "score": rollout.raw.mean().item(),
        "score_normalised": rollout.normalised.mean().item(),
        "reward": ppo.masked_mean(rewards, mask, responses).item(),
        "kl": kl.item(),
        "kl_k3": kl_k3.item(),
        "kl_coef": kl_coef,
        "entropy": ppo.masked_mean(rollout.entropy, mask).item(),
        "explained_variance": ppo.explained_variance(rollout.values, rollout.returns, mask),
        "score_clipped": clipped.double().mean().item(),
        "response_length": mask.sum().item() / responses,
        "eos_rate": rollout.ended.double().mean().item(),
        "distinct": sum(len(set(texts)) for texts in rollout.texts) / responses,
    }


def step_flops(setup, rows, epochs):
    """Operations of a step.

    Sampling, one forward of policy and reference each, the reward's, and per epoch forward and
    backward (twice a forward).
    """
    forward = speed.forward_flops(setup.policy.trunk, rows, head=True)
    return (3 + 3 * epochs) * forward + setup.reward.forward_flops(rows)


def warn_about(stats, config, step, log):
    """Says in words what is wrong when a number shows it."""
    if config.dtype != "bfloat16" and abs(stats["ratio_first"] - 1) > 1e-3:
        log.warn(
            f"a ratio of {stats['ratio_first']:.5f} before the first update: "
            "two forwards of the same policy and rows disagree"
        )
    if stats["kl"] < -1:
        log.warn(
            f"KL {stats['kl']:.2f} below 0: "
            "log-probabilities do not belong to the sampled tokens, or too few samples"
        )
    if stats["eos_rate"] == 0:
        log.warn(
            f"no response ended within --max_new_tokens {config.max_new_tokens}: "
            "train the supervised policy longer, or allow more tokens"
        )
    if stats["explained_variance"] < 0 and step >= CRITIC_STEPS:
        log.warn(
            "explained variance below 0: the critic is worse than a constant; "
            "try a larger --vf_coef or --lr (said once)",
            once=True,
        )


def evaluate(setup, prompts, prompt_texts, step, log):
    """One response to each held-out prompt, with the same draws every time, and a few of them as
    text.
    """
    kl_coef = setup.config.kl_coef
    rows = generate_responses(setup, prompts[:EVAL_PROMPTS], Stream.EVALUATION, step=0, k=1)
    rollout = score_responses(setup, rows, prompt_texts, step)
    compute_logprobs_and_values(setup, rollout)
    stats = rollout_stats(rollout, compute_advantages(rollout, kl_coef, setup.config), kl_coef)
    texts = [text for (text,) in rollout.texts]
    stats["distinct"] = len(set(texts)) / len(texts)
    log.eval(step, **{f"eval_{name}": stats[name] for name in EVAL_STATS})
    for row, text, (score,) in list(zip(rows, texts, rollout.raw.tolist()))[:SAMPLE_PROMPTS]:
        log.text(step, prompt_texts[row.index], text, score=score)


# ------------------------------------------------------------------------------ main

def encode_prompts(groups, tokenizer, config, max_length):
    """Distinct prompts that leave room for the response.

    -> (rows without responses, all prompts' texts by index, what was dropped)
    """
    distinct = {group.prompt: data.Group(group.prompt, [], group.truncatable) for group in groups}
    prompts = list(distinct.values())
    rows, dropped = encode_all(prompts, tokenizer, max_length, config.max_new_tokens)
    return rows, list(distinct), dropped


def load_models(config, device):
    """The policy with a critic on its trunk, its frozen reference, and the reward."""
    trunk, tokenizer = hub.load_trunk(config.policy)
    reference = precision.freeze(Policy(copy.deepcopy(trunk)), device, config.dtype)
    policy = Policy(trunk, value_head=True, detach_value=config.detach_value)
    policy.to(device, precision.master_dtype(config.dtype))
    reward = hub.load_reward(config.reward, config.statistic, config.max_tokens)
    reward.to(device, config.dtype, config.compile)
    kernels = (device, config.dtype, config.compile, config.activation_checkpointing)
    choose_kernels(trunk, *kernels)
    choose_kernels(reference.trunk, *kernels)
    return Setup(config, device, tokenizer, policy, reference, reward)


def describe(setup, dataset, prompts, held_prompts, dropped, optimizer):
    """The header's lines."""
    config, trunk = setup.config, setup.policy.trunk
    adapted = f" adapted to {config.kl_coef_target} nats" if config.kl_coef_target else ""
    return {
        "policy": f"{speed.describe_model(trunk, setup.policy)}, from {config.policy}; "
                  f"reference: the same, frozen",
        "critic": f"a linear head on the policy's trunk, starting at 0, vf_coef {config.vf_coef}"
                  f"{', detached' if config.detach_value else ''}",
        "reward": f"{setup.reward.describe()}; clipped at +-{SCORE_CLIP:g}, "
                  f"{config.eos_penalty} less without EOS",
        "data": f"{dataset.source}: {len(prompts)} prompts, "
                f"{min(len(held_prompts), EVAL_PROMPTS)} held out; "
                f"dropped: {describe_dropped(dataset.dropped + dropped)}",
        "step": f"{config.groups} prompts x {config.k} responses, {config.epochs} epochs x "
                f"{config.minibatches} minibatches; {config.steps} steps",
        "objective": f"score - beta KL, beta {config.kl_coef}{adapted}, gamma {config.gamma}, "
                     f"lambda {config.lam}, clip {config.clip}, temperature {config.temperature}"
                     f"{'' if config.whiten else ', advantages not whitened'}",
        "numbers": describe_numbers(config, setup.device, optimizer),
    }


def main(config):
    check_bounds(
        config, temperature=1e-3, kl_horizon=config.groups * config.k, gamma=(0, 1), lam=(0, 1),
        epochs=1, minibatches=1,
    )
    if config.groups % config.minibatches:
        raise InputError(
            f"--minibatches {config.minibatches} does not divide --groups {config.groups}"
        )
    device = dist.setup(config.device, config.seed)
    resuming = run_folder.resumable(config, SCRIPT)

    # models, prompts, optimizer
    setup = load_models(config, device)
    policy, tokenizer = setup.policy, setup.tokenizer
    dataset = data.load(config.data)
    max_length = context_limit(config.max_length, policy.trunk.config.context)
    if config.max_new_tokens >= max_length:
        raise InputError(
            f"--max_new_tokens {config.max_new_tokens} leaves no room for a prompt "
            f"in {max_length} positions"
        )
    prompts, texts, dropped = encode_prompts(dataset.train, tokenizer, config, max_length)
    held_prompts, held_texts, _ = encode_prompts(dataset.held_out, tokenizer, config, max_length)
    if not prompts:
        raise InputError(
            f"--data {config.data}: no prompt fits {max_length} positions "
            f"with --max_new_tokens {config.max_new_tokens} ({dict(dropped)})"
        )
    # a reward that fails should fail before anything is written
    setup.reward.score_texts([texts[prompts[0].index]], [[" a"]], [[True]])
    optimizer = optim.adamw(policy, config.lr, ADAM_EPS)
    meter = speed.Meter(policy.trunk, device, config.dtype)
    lines = describe(setup, dataset, prompts, held_prompts, dropped, optimizer)
    header("train_ppo: proximal policy optimisation", **lines, machine=meter)
    run = TrainingRun(
        config, SCRIPT, policy, optimizer, config.policy, PROGRESS, resuming,
        kl_coef=float(config.kl_coef),
    )
    kl_coef = run.numbers["kl_coef"]
    if run.first_step == 0 and held_prompts:
        evaluate(setup, held_prompts, held_texts, -1, run.log)

    for step in range(run.first_step, config.steps):
        began = time.time()
        indices = batch_indices(len(prompts), config.groups, step, config.seed)
        step_prompts = [prompts[i] for i in indices]
        rows = generate_responses(setup, step_prompts, Stream.ROLLOUT, step, config.k)
        rollout = score_responses(setup, rows, texts, step)
        compute_logprobs_and_values(setup, rollout)
        rewards = compute_advantages(rollout, kl_coef, config)
        stats = rollout_stats(rollout, rewards, kl_coef)
        lr = optim.learning_rate(
            config.lr, step, config.steps, config.schedule, config.warmup
        )
        stats.update(update(setup, optimizer, run.guard, rollout, step, lr))
        if config.kl_coef_target:
            kl_coef = ppo.adapt_kl_coef(
                kl_coef, stats["kl"], config.kl_coef_target,
                n=config.groups * config.k, horizon=config.kl_horizon,
            )

        run.poll_signals()                       # SIGTERM or Ctrl-C: see save_or_stop below
        plan = plan_micro_batches(rows, config.max_tokens, dist.world_size())
        flops = step_flops(setup, rows, stats["updates"] / config.minibatches)
        speed_stats = meter(rows, plan, flops, time.time() - began)
        run.log_step(step, **stats, lr=lr, **speed_stats)
        warn_about(stats, config, step, run.log)
        if held_prompts and run.evaluates(step):
            evaluate(setup, held_prompts, held_texts, step, run.log)
        # saves where it is due; after a signal saves, then ends the run by an exception
        run.save_or_stop(
            step, lambda: hub.save_policy(run.model_folder, policy, tokenizer), kl_coef=kl_coef
        )
    print(f"done: {run.model_folder}")


if __name__ == "__main__":
    run_script(main, Config)
