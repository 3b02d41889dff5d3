"""Stage 3: PPO on a reward model or on a Python function. Rollout, advantages, clipped epochs: each a function below.

    python train_ppo.py --data FairytaleQAData --policy runs/sft --reward runs/rm --out runs/ppo --steps 100
    torchrun --nproc_per_node=8 train_ppo.py ...         the same on eight GPUs: same prompts a rollout, same minibatches, same update

Every process samples, scores and looks at its share of the prompts. The rollout (integers and a few numbers a token) is then known to all:
whitening, KL control and logs are of the whole, and minibatches are planned globally and dealt out.
"""
import copy
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nanorlhf import checkpoint, data, dist, generate, optim, ppo, runs, speed
from nanorlhf.batching import Row, ahead, context_limit, deal, encode_all, order, plans, take
from nanorlhf.config import InputError, check, run
from nanorlhf.heads import Policy
from nanorlhf.log import Log, header
from nanorlhf.reward import FunctionReward, is_function

SCRIPT = "train_ppo"
SCORE_CLIP = 10.0          # a normalised score beyond this is an outlier of the reward model
ADAM_EPS = 1e-5
CRITIC_STEPS = 20          # rollouts in which a critic that starts at 0 may be worse than a constant
EVAL_PROMPTS = 64          # held-out prompts, one response each, the same draws at every evaluation
SAMPLE_PROMPTS = 3         # of them, how many are shown

NUMBERS = ("policy_loss", "value_loss", "clip_fraction", "value_clip_fraction", "kl_rollout")
SHOWN = ("score", "kl", "entropy", "response_length", "eos_rate", "distinct",
         "ratio_first", "clip_fraction", "value_explained", "share", "seconds")   # on the progress line


@dataclass(frozen=True)
class Config:
    data: str                                       # prompts: FairytaleQA or HH folder, groups JSONL, or a folder with train.jsonl and val.jsonl
    policy: str                                     # supervised model: a run or a model folder; also the frozen reference
    reward: str                                     # reward model: a run or a folder; or path.py:function with (prompts, responses) -> scores
    out: str                                        # run folder; the same command again resumes
    statistic: str = "mean"                         # of a quantile model's outputs: mean, q0 .. q9, cvar:A (mean of the lowest A)
    steps: int = 100                                # rollouts
    groups: int = 16                                # prompts per rollout
    k: int = 4                                      # responses per prompt
    max_new: int = 48                               # response tokens at most, EOS included
    temperature: float = 1.0                        # of sampling, and of every log-probability
    kl_coef: float = 0.05                           # beta in r_t = -beta (logprob - ref_logprob)
    kl_target: float = 0.0                          # nats per response that beta is adapted to; 0: beta is fixed
    kl_horizon: int = 10000                         # responses over which beta adapts
    gamma: float = 1.0                              # discount a token
    lam: float = 0.95                               # lambda of GAE
    clip: float = 0.2                               # of the policy's ratio
    value_clip: float = 0.2                         # of the value's change
    vf_coef: float = 0.1                            # weight of the value loss
    detach_value: bool = False                      # true: no value gradient into the trunk
    epochs: int = 4                                 # passes over a rollout
    minibatches: int = 4                            # optimizer steps per pass; divides --groups
    target_kl: float = 0.0                          # KL per response to the rollout policy that ends the passes early; 0: never
    eos_penalty: float = 1.0                        # taken from the score of a response that did not end
    max_tokens: int = 8192                          # columns per micro-batch
    max_length: int = 0                             # positions of prompt + response; 0: the model's context
    lr: float = 1e-5                                # learning rate of AdamW
    warmup: int = 0                                 # rollouts until the learning rate is reached
    schedule: Literal["linear", "constant"] = "linear"   # of the learning rate; linear falls towards 0 at the last step
    seed: int = 0                                   # of prompts, draws and minibatches
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"   # of the forward; weights and optimizer stay float32 under bfloat16
    compile: bool = False                           # torch.compile the blocks, on CUDA with FlexAttention; the first steps then take minutes
    recompute: bool = False                         # activation checkpointing: less memory, a third more work
    device: str = "auto"                            # cpu, cuda, cuda:1; auto takes CUDA where there is one
    eval_every: int = 20                            # rollouts between evaluations
    save_every: int = 20                            # rollouts between saves


@dataclass
class Rollout:
    """G prompts, K responses each, R tokens at most; all tensors (G,K,R) or (G,K), on the CPU."""
    rows: list[Row]
    texts: list[list[str]]
    ended: torch.Tensor             # (G,K) bool: with EOS
    mask: torch.Tensor              # (G,K,R) bool
    raw: torch.Tensor               # (G,K) score before normalisation
    normalised: torch.Tensor        # (G,K) and clipped
    scores: torch.Tensor            # (G,K) less the penalty for not ending
    old_logprobs: torch.Tensor = None
    ref_logprobs: torch.Tensor = None
    values: torch.Tensor = None
    entropy: torch.Tensor = None
    advantages: torch.Tensor = None
    returns: torch.Tensor = None


@torch.no_grad()
def sample(policy, tok, reward, prompts, texts, config, purpose, step, k):
    """K responses a prompt, as text to the reward, its scores back; each process has its share of the prompts, all get the whole.

    prompts: rows;  texts: all prompts' texts by index  ->  Rollout
    """
    mine = deal([len(row.prompt) + k * config.max_new for row in prompts], dist.world())[dist.rank()]
    tokens, lengths, raw = torch.zeros(len(prompts), k, config.max_new, dtype=torch.long), torch.zeros(len(prompts), k, dtype=torch.long), torch.zeros(len(prompts), k)
    say = lambda ids: tok.decode(ids[:-1] if ids[-1] == tok.eos_id else ids)
    if mine:
        with dist.autocast(policy, config.dtype):
            found = generate.sample(policy.trunk, [prompts[i].prompt for i in mine], [prompts[i].index for i in mine], k, config.max_new, tok.eos_id,
                                    config.seed, purpose, step, config.temperature, max_tokens=config.max_tokens)
            raw[mine] = reward.score_texts([texts[prompts[i].index] for i in mine], [[say(ids) for ids in responses] for responses in found],
                                           [[ids[-1] == tok.eos_id for ids in responses] for responses in found], normalised=False)
        lengths[mine] = torch.tensor([[len(ids) for ids in responses] for responses in found])
        tokens[mine] = torch.tensor([[ids + [0] * (config.max_new - len(ids)) for ids in responses] for responses in found])
    for tensor in (tokens, lengths, raw):
        dist.add(tensor)                         # each entry was filled by one process
    if not torch.isfinite(raw).all():
        raise InputError(f"the reward model gave NaN or infinity at step {step}; look at its weights")
    rows = [Row(row.prompt, [ids[:n] for ids, n in zip(responses, ns)], row.index) for row, responses, ns in zip(prompts, tokens.tolist(), lengths.tolist())]
    ended = torch.tensor([[ids[-1] == tok.eos_id for ids in row.responses] for row in rows])
    normalised = reward.normalise(raw).clamp(-SCORE_CLIP, SCORE_CLIP)
    mask = torch.arange(lengths.max().item()) < lengths.unsqueeze(-1)
    return Rollout(rows, [[say(ids) for ids in row.responses] for row in rows], ended, mask, raw, normalised, normalised - config.eos_penalty * ~ended)


@torch.no_grad()
def look(policy, reference, rollout, config, device):
    """Log-probabilities, values and entropy of a rollout, by the forward that trains: with the same packing the first ratio is exactly 1."""
    shape = rollout.mask.shape
    rollout.old_logprobs, rollout.ref_logprobs, rollout.values, rollout.entropy = tensors = [torch.zeros(shape, dtype=torch.float64) for _ in range(4)]
    mine = plans([row.columns for row in rollout.rows], config.max_tokens, dist.world())[dist.rank()]
    for part, batch in zip(mine, ahead(rollout.rows, mine, device)):
        with dist.autocast(policy, config.dtype):
            logprobs, entropy, values = policy(batch, config.temperature, ppo.entropy)
            ref_logprobs = reference(batch, config.temperature).logprobs
        for tensor, found in zip(tensors, (logprobs, ref_logprobs, values, entropy)):
            tensor[part, :, : found.shape[-1]] = found.double().cpu()
    for tensor in tensors:
        dist.add(tensor)


def add_advantages(rollout, kl_coef, config):
    """Rewards a token, advantages by GAE, whitened over all response tokens of the rollout; returns stay as they are."""
    rewards = ppo.shape_rewards(rollout.scores, rollout.old_logprobs, rollout.ref_logprobs, rollout.mask, kl_coef)
    advantages, rollout.returns = ppo.gae(rewards, rollout.values, rollout.mask, config.gamma, config.lam)
    rollout.advantages = ppo.whiten(advantages, rollout.mask)
    return rewards


def losses_of(policy, batch, known, count, responses, config):
    """Of a micro-batch: the loss, its numbers for the log, and the ratio that is farthest from 1.

    known: a Rollout's tensor by name, for this batch;  count: tokens of the whole minibatch, responses: likewise
    """
    with dist.autocast(policy, config.dtype):
        now = policy(batch, config.temperature)
    old_logprobs = known("old_logprobs")
    policy_loss, clipped = ppo.policy_loss(now.logprobs, old_logprobs, known("advantages"), batch.mask, config.clip, count)
    value_loss, value_clipped = ppo.value_loss(now.values, known("values"), known("returns"), batch.mask, config.value_clip, count)
    kl = ppo.masked_mean(ppo.kl_k3(old_logprobs, now.logprobs.detach()), batch.mask, responses)                 # per response
    ratio = torch.exp(now.logprobs.detach() - old_logprobs)[batch.mask]
    numbers = dict(policy_loss=policy_loss.item(), value_loss=value_loss.item(), clip_fraction=clipped.item(), value_clip_fraction=value_clipped.item(), kl_rollout=kl.item())
    return policy_loss + config.vf_coef * value_loss, numbers, ratio[(ratio - 1).abs().argmax()].item()


def update(policy, optimizer, rollout, config, device, step, lr, finite):
    """Clipped PPO: epochs of fresh permutations, each cut into minibatches of whole groups.  -> mean numbers over the minibatches"""
    groups, size, seen, first_ratio = len(rollout.rows), len(rollout.rows) // config.minibatches, [], None
    for epoch in range(config.epochs):
        shuffled, kls = order(groups, config.seed, step * config.epochs + epoch, generate.MINIBATCH), []
        for start in range(0, groups, size):
            part = shuffled[start : start + size].tolist()
            rows, count = [rollout.rows[i] for i in part], int(rollout.mask[part].sum())       # tokens of the whole minibatch, on all processes
            parts, losses, mine, ratios = plans([row.columns for row in rows], config.max_tokens, dist.world()), [], Counter(), []
            for chosen, batch in zip(parts[dist.rank()], ahead(rows, parts[dist.rank()], device)):
                at, width = [part[i] for i in chosen], batch.mask.shape[-1]
                known = lambda name: getattr(rollout, name)[at, :, :width].to(device, torch.float64 if config.dtype == "float64" else torch.float32)
                loss, numbers, ratio = losses_of(policy, batch, known, count, len(part) * config.k, config)
                loss.backward()
                losses.append(loss.item())
                mine.update(numbers)
                ratios.append(ratio)
            dist.add_gradients(policy)
            norm = optim.gradient_norm(policy)
            losses, norms, told, ratios = zip(*dist.everyone([losses, norm.item(), mine, ratios]))
            numbers = {name: sum(numbers.get(name, 0.0) for numbers in told) for name in NUMBERS} | {"grad_norm": norms[0]}
            if first_ratio is None:              # before the first optimizer step the policy is the one that sampled: every ratio is 1
                first_ratio = max(sum(ratios, []), key=lambda ratio: abs(ratio - 1))
            if finite(step, rows, parts, losses, norms, **{name: getattr(rollout, name)[part] for name in ("old_logprobs", "advantages", "values", "returns")}):
                optim.update(policy, optimizer, lr, norm)
                seen.append(numbers)
                kls.append(numbers["kl_rollout"])
        if config.target_kl and kls and sum(kls) / len(kls) > config.target_kl:
            break
    means = {name: sum(numbers[name] for numbers in seen) / len(seen) if seen else float("nan") for name in (*NUMBERS, "grad_norm")}
    return {"ratio_first": first_ratio, **means, "updates": len(seen), "skipped": finite.skipped}


def describe(rollout, rewards, kl_coef):
    """What a rollout looks like, before it is learnt from. Per response: score, reward, kl, length; per token: entropy."""
    mask, responses = rollout.mask, rollout.scores.numel()
    k1 = ppo.kl_k1(rollout.old_logprobs, rollout.ref_logprobs)
    distinct = sum(len(set(texts)) for texts in rollout.texts)
    return {"score": rollout.raw.mean().item(), "score_normalised": rollout.normalised.mean().item(),
            "reward": ppo.masked_mean(rewards, mask, responses).item(), "kl": ppo.masked_mean(k1, mask, responses).item(),
            "kl_k3": ppo.masked_mean(ppo.kl_k3(rollout.old_logprobs, rollout.ref_logprobs), mask, responses).item(), "kl_coef": kl_coef,
            "entropy": ppo.masked_mean(rollout.entropy, mask).item(),
            "value_explained": ppo.explained_variance(rollout.values, rollout.returns, mask),
            "score_clipped": (rollout.normalised.abs() >= SCORE_CLIP).double().mean().item(), "response_length": mask.sum().item() / responses,
            "eos_rate": rollout.ended.double().mean().item(), "distinct": distinct / responses}


def operations(policy, reward, rollout, epochs):
    """What a step needs: sampling, one look of policy and reference each, the reward model, and forward and backward (twice it) in each epoch."""
    scored = 0 if isinstance(reward, FunctionReward) else speed.forward_operations(reward.model.trunk, rollout.rows, head=False)
    return (3 + 3 * epochs) * speed.forward_operations(policy, rollout.rows, head=True) + scored


def complain(numbers, config, step, log):
    """Says in words what is wrong when a number shows it."""
    far = abs(numbers["ratio_first"] - 1)
    if config.dtype != "bfloat16" and far > 1e-3:
        log.warn(f"a ratio of {numbers['ratio_first']:.5f} before the first update: sampling and training disagree about the policy")
    if numbers["kl"] < -1:
        log.warn(f"KL {numbers['kl']:.2f} below 0: log-probabilities do not belong to the sampled tokens, or too few samples")
    if numbers["eos_rate"] == 0:
        log.warn(f"no response ended within --max_new {config.max_new}: train the supervised policy longer, or allow more tokens")
    if numbers["value_explained"] < 0 and step >= CRITIC_STEPS:
        log.warn(f"value explained variance {numbers['value_explained']:.2f} below 0: the critic is worse than a constant; try a larger --vf_coef or --lr")


def evaluate(policy, reference, tok, reward, prompts, texts, config, device, step, log):
    """One response to each held-out prompt, with the same draws every time, and a few of them as text."""
    rollout = sample(policy, tok, reward, prompts, texts, config, generate.EVALUATION, 0, 1)
    look(policy, reference, rollout, config, device)
    numbers = describe(rollout, add_advantages(rollout, config.kl_coef, config), config.kl_coef)
    names = ("score", "score_normalised", "kl", "entropy", "response_length", "eos_rate")
    distinct = len({texts[0] for texts in rollout.texts}) / len(rollout.texts)
    log.evaluation(step, **{f"eval_{name}": numbers[name] for name in names}, eval_distinct=distinct)
    for row, (answer,), (score,) in list(zip(rollout.rows, rollout.texts, rollout.raw.tolist()))[:SAMPLE_PROMPTS]:
        log.sample(step, texts[row.index], answer, score=score)


def prompts_of(groups, tok, config, limit):
    """Distinct prompts that leave room for the response.  -> (rows without responses, all texts by index, what was dropped)"""
    distinct = {group.prompt: data.Group(group.prompt, [], group.cut) for group in groups}
    rows, reasons = encode_all(list(distinct.values()), tok, limit, config.max_new)
    return rows, list(distinct), reasons


def main(config):
    check(config, steps=(1, None), groups=(1, None), k=(1, None), max_new=(1, None), temperature=(1e-3, None), kl_coef=(0, None), kl_target=(0, None),
          kl_horizon=(config.groups * config.k, None), gamma=(0, 1), lam=(0, 1), clip=(0, None), value_clip=(0, None), vf_coef=(0, None), epochs=(1, None),
          minibatches=(1, None), target_kl=(0, None), eos_penalty=(0, None), max_tokens=(1, None), max_length=(0, None), lr=(0, 10),
          warmup=(0, None), seed=(0, 2**63 - 1), eval_every=(1, None), save_every=(1, None))
    if config.groups % config.minibatches:
        raise InputError(f"--minibatches {config.minibatches} does not divide --groups {config.groups}")
    device = dist.setup(config.device, config.seed)
    resuming = runs.resumable(config, SCRIPT)

    # policy with a critic on its trunk, its frozen reference, the reward, the prompts
    width = torch.float64 if config.dtype == "float64" else torch.float32
    trunk, tok = checkpoint.load_trunk(config.policy)
    reference = Policy(copy.deepcopy(trunk)).to(device, width).requires_grad_(False)
    policy = Policy(trunk, value_head=True, detach_value=config.detach_value).to(device, width)
    reward = FunctionReward(config.reward) if is_function(config.reward) else checkpoint.load_reward_model(config.reward)
    if is_function(config.reward):
        about = f"function {config.reward}, taken as it is"
    else:
        reward.use(config.statistic)
        reward.max_tokens = config.max_tokens
        reward.model.to(device, width).requires_grad_(False)
        about = f"{reward.model.trunk.family}, {config.statistic} of {reward.model.score.out_features} outputs, map {reward.map}, " + (
                f"less {reward.mean:.4f}, over {reward.std:.4f}" if reward.moments else "raw: it has no normalisation, as its run did not finish")
    for each in [trunk, reference.trunk] + ([] if is_function(config.reward) else [reward.model.trunk]):
        speed.tune(each, device, config.dtype, config.compile, config.recompute)
    optimizer, meter = optim.adamw(policy, config.lr, ADAM_EPS), speed.Meter(trunk, device, config.dtype, dist.world())
    found = data.load(config.data)
    limit = context_limit(config.max_length, trunk.config.context)
    if config.max_new >= limit:
        raise InputError(f"--max_new {config.max_new} leaves no room for a prompt in {limit} positions")
    prompts, texts, reasons = prompts_of(found.train, tok, config, limit)
    held_prompts, held_texts, _ = prompts_of(found.held_out, tok, config, limit)
    if not prompts:
        raise InputError(f"--data {config.data}: no prompt fits {limit} positions with --max_new {config.max_new} ({dict(reasons)})")
    reward.score_texts([texts[prompts[0].index]], [[" a"]], [[True]])         # a reward that fails should fail before anything is written

    header("train_ppo: proximal policy optimisation",
           policy=f"{trunk.family}, {sum(p.numel() for p in policy.parameters()):,} parameters, from {config.policy}; reference: the same, frozen",
           critic=f"a linear head on the policy's trunk, starting at 0, vf_coef {config.vf_coef}{', detached' if config.detach_value else ''}",
           reward=f"{about}; clipped at +-{SCORE_CLIP:g}, {config.eos_penalty} less without EOS",
           data=f"{found.source}: {len(prompts)} prompts, {min(len(held_prompts), EVAL_PROMPTS)} held out; dropped: {dict(+(found.dropped + reasons)) or 'nothing'}",
           step=f"{config.groups} prompts x {config.k} responses, {config.epochs} epochs x {config.minibatches} minibatches; {config.steps} steps",
           objective=f"score - beta KL, beta {config.kl_coef}{f' adapted to {config.kl_target} nats' if config.kl_target else ''}, gamma {config.gamma}, "
                     f"lambda {config.lam}, clip {config.clip}, temperature {config.temperature}",
           numbers=f"{config.dtype} on {device}, {dist.world()} process{'es' * (dist.world() > 1)} of {torch.get_num_threads()} threads, AdamW lr {config.lr} {config.schedule}, eps {ADAM_EPS}, "
                   f"gradient norm clipped at {optim.MAX_GRAD_NORM}, dropout 0", machine=meter)
    fresh = {"step": 0, "kl_coef": float(config.kl_coef), "skipped": 0, "in_a_row": 0}
    state = runs.load(config, policy, optimizer, fresh) if resuming else fresh
    dist.share(policy.parameters())
    first, kl_coef, finite = state["step"], state["kl_coef"], runs.Finite(config, SCRIPT, policy, state["skipped"], state["in_a_row"])
    runs.begin(config, SCRIPT, config.policy)           # again where it resumes: --steps may be more than before
    log = Log(config.out, first, config.steps, SHOWN, dist.rank() == 0)
    measure = lambda step: held_prompts and evaluate(policy, reference, tok, reward, held_prompts[:EVAL_PROMPTS], held_texts, config, device, step, log)
    if first == 0:
        measure(-1)

    stop = dist.Stop()
    for step in range(first, config.steps):
        began = time.time()
        chosen = [prompts[i] for i in take(len(prompts), config.groups, step, config.seed)]
        rollout = sample(policy, tok, reward, chosen, texts, config, generate.ROLLOUT, step, config.k)
        look(policy, reference, rollout, config, device)
        rewards = add_advantages(rollout, kl_coef, config)
        numbers = describe(rollout, rewards, kl_coef)
        lr = optim.learning_rate(config.lr, step, config.steps, config.schedule, config.warmup)
        numbers.update(update(policy, optimizer, rollout, config, device, step, lr, finite))
        if config.kl_target:
            kl_coef = ppo.adapt_kl_coef(kl_coef, numbers["kl"], config.kl_target, rollout.scores.numel(), config.kl_horizon)
        asked, memory = zip(*dist.everyone([stop.asked, speed.peak_memory(device)]))
        work = operations(trunk, reward, rollout, numbers["updates"] / config.minibatches)
        parts = plans([row.columns for row in rollout.rows], config.max_tokens, dist.world())
        log.step(step, **numbers, lr=lr, memory_gb=max(memory), **meter(rollout.rows, parts, work, time.time() - began))
        complain(numbers, config, step, log)

        done = step + 1 == config.steps
        if done or (step + 1) % config.eval_every == 0:
            measure(step)
        if done or any(asked) or (step + 1) % config.save_every == 0:
            runs.save(config, SCRIPT, policy, optimizer, step + 1, lambda: checkpoint.save_policy(Path(config.out) / "model", policy, tok),
                      kl_coef=kl_coef, **finite.numbers())
        if any(asked) and not done:
            raise dist.Stopped(max(asked))
    print(f"done: {Path(config.out) / 'model'}")


if __name__ == "__main__":
    run(main, Config)
