"""Stage 2: a reward model, by ranking, classification or quantile regression. Any loss trains on any labels.

    python train_rm.py --data ranked.jsonl --init runs/sft --loss ranking --out runs/rm --steps 200
    torchrun --nproc_per_node=8 train_rm.py ...          the same on eight GPUs: same groups a step, same update
"""
import time
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import torch

from nanorlhf import checkpoint, data, dist, losses, optim, runs, speed
from nanorlhf.batching import ahead, context_limit, encode_all, order, plans, take
from nanorlhf.config import InputError, check, run
from nanorlhf.heads import Scorer
from nanorlhf.log import Log, header
from nanorlhf.reward import STD_FLOOR, RewardModel

SCRIPT = "train_rm"
EVAL_GROUPS = 250          # held-out groups that accuracy is measured on
SAMPLE_GROUPS = 2          # held-out groups whose responses are shown with their scores
FIT_GROUPS = 500           # training groups that the normalisation is fitted on


@dataclass(frozen=True)
class Config:
    data: str                                       # HH or FairytaleQA folder, groups JSONL, or a folder with train.jsonl and val.jsonl
    init: str                                       # model folder or run, or a size for random weights: gpt2 ... llama-7b ... gpt2-nano, llama-nano
    out: str                                        # run folder; the same command again resumes
    loss: Literal["ranking", "classification", "quantile"] = "ranking"   # what is minimised
    labels: Literal["auto", "place", "label", "scores"] = "auto"   # which judgement of a group to use; auto: place, else label, else scores
    pairs: Literal["together", "apart"] = "together"   # apart: each pair of a group becomes a group of its own (overfits, says paper A)
    quantiles: int = 10                             # outputs of a quantile model
    quantile_target: Literal["label", "scores", "self_mean"] = "label"   # what is regressed: +1/-1 a comparison, the scores, or the chosen's own mean
    kappa: float = 1.0                              # Huber threshold; 0 is the pinball loss, whose optimum is a quantile
    rank_coef: float = 1.0                          # weight of the ranking loss of the means in the quantile model
    quantile_coef: float = 1.0                      # weight of the quantile loss
    tokenizer: str = ""                             # folder of a tokenizer, for random weights of a real size
    steps: int = 200                                # optimizer steps
    groups: int = 8                                 # groups per optimizer step
    max_tokens: int = 4096                          # columns per micro-batch
    max_length: int = 0                             # positions of prompt + longest response; 0: the model's context
    lr: float = 2e-5                                # learning rate of AdamW
    warmup: int = 10                                # steps until the learning rate is reached
    schedule: Literal["linear", "constant"] = "linear"   # of the learning rate; linear falls towards 0 at the last step
    seed: int = 0                                   # of weights and order
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"   # of the forward; weights and optimizer stay float32 under bfloat16
    compile: bool = False                           # torch.compile the blocks, on CUDA with FlexAttention; the first steps then take minutes
    recompute: bool = False                         # activation checkpointing: less memory, a third more work
    device: str = "auto"                            # cpu, cuda, cuda:1; auto takes CUDA where there is one
    eval_every: int = 50                            # steps between evaluations
    save_every: int = 50                            # steps between saves


def usable(rows, config):
    """Does this group say anything to this loss?"""
    if config.loss == "classification":
        return [row for row in rows if any(y is not None for y in row.label)]
    regressed = config.loss == "quantile" and config.quantile_target != "self_mean" and config.quantile_coef
    return [row for row in rows if len(set(row.place)) > 1 or regressed and any(row.targets)]


def counts(rows, config):
    """What the losses average over, in the whole optimizer step: a mean of means would weigh small micro-batches more."""
    return Counter(ranked=sum(len(set(row.place)) > 1 for row in rows),
                   labelled=sum(y is not None for row in rows for y in row.label),
                   targets=sum(place == min(row.place) for row in rows for place in row.place) if config.quantile_target == "self_mean"
                   else sum(bool(targets) for row in rows for targets in row.targets))


def reward_loss(outputs, batch, count, config):
    """The loss that --loss names.  outputs (B,K,N) raw, batch, count of `counts`  ->  scalar"""
    mean = outputs.mean(-1)                                                             # (B,K); N = 1: the scalar itself
    if config.loss == "classification":
        labelled = batch.valid & (batch.label >= 0)
        return losses.classification_loss(mean, batch.label, labelled, losses.balanced_weights(batch.label, labelled), max(count["labelled"], 1))
    ranking = losses.ranking_loss(mean, batch.place, batch.valid, max(count["ranked"], 1))
    if config.loss == "ranking":
        return ranking
    targets, target_mask = batch.targets, batch.target_mask
    if config.quantile_target == "self_mean":      # the chosen response's own mean: its only zero is N equal quantiles
        best = torch.where(batch.valid, batch.place, torch.inf).amin(-1, keepdim=True)
        targets, target_mask = mean.detach().unsqueeze(-1), (batch.valid & (batch.place == best)).unsqueeze(-1)
    levels = losses.quantile_levels(outputs.shape[-1])
    quantile = losses.quantile_huber_loss(outputs, targets, levels, config.kappa, target_mask, max(count["targets"], 1))
    return config.rank_coef * ranking + config.quantile_coef * quantile


@torch.no_grad()
def outputs_of(model, rows, config, device):
    """Raw outputs (K,N) of each row, and the loss over all of them, the work shared among the processes."""
    mine, count, found, total = plans([row.columns for row in rows], config.max_tokens, dist.world())[dist.rank()], counts(rows, config), [], 0.0
    for part, batch in zip(mine, ahead(rows, mine, device)):
        with dist.autocast(model, config.dtype):
            outputs = model(batch)
        total += reward_loss(outputs, batch, count, config).item()
        found += [[i, outputs[b, : len(rows[i].responses)].tolist()] for b, i in enumerate(part)]
    told, totals = zip(*dist.everyone([found, total]))
    wide = torch.float64 if config.dtype == "float64" else torch.float32
    return [torch.tensor(outputs, dtype=wide) for _, outputs in sorted(pair for pairs in told for pair in pairs)], sum(totals)


def at_chance(accuracy, pairs):
    """Could a fair coin do this? 1.96 standard deviations of its share of heads, as if the pairs were independent."""
    return abs(accuracy - 0.5) <= 1.96 * (0.25 / max(pairs, 1)) ** 0.5


def auc(scores, labels):
    """Chance that a good response of any prompt outscores a bad one of any prompt, ties half.  (n,), (n,) bool -> float"""
    good, bad = scores[labels], scores[~labels].sort().values
    below = torch.searchsorted(bad, good) + torch.searchsorted(bad, good, right=True)       # twice: bad ones below, and half of those that tie
    return below.double().mean().item() / (2 * len(bad)) if len(good) and len(bad) else float("nan")


def evaluate(model, rows, config, device):
    """Loss; accuracy over all pairs of unequal place within a group; AUC over labels across groups; how often quantiles cross.

    -> (numbers by name, raw outputs (K,N) of each row)
    """
    outputs, loss = outputs_of(model, rows, config, device)
    right = pairs = longer = 0.0
    for row, output in zip(rows, outputs):
        score = output.mean(-1).tolist()
        for i, j in combinations(range(len(score)), 2):
            if row.place[i] != row.place[j]:
                best, worst = (i, j) if row.place[i] < row.place[j] else (j, i)
                right += (score[best] > score[worst]) + 0.5 * (score[best] == score[worst])
                longer += (len(row.responses[best]) > len(row.responses[worst])) + 0.5 * (len(row.responses[best]) == len(row.responses[worst]))
                pairs += 1
    labelled = [(score, y) for row, output in zip(rows, outputs) for score, y in zip(output.mean(-1).tolist(), row.label) if y is not None]
    scores, labels = torch.tensor([s for s, _ in labelled]), torch.tensor([y == 1 for _, y in labelled])
    crossing = torch.cat(outputs).diff(dim=-1).lt(0).float()
    numbers = {"eval_loss": loss, "eval_accuracy": right / max(pairs, 1), "eval_pairs": int(pairs), "eval_auc": auc(scores, labels),
               "eval_accuracy_of_longer": longer / max(pairs, 1), **({"eval_crossing": crossing.mean().item()} if crossing.numel() else {})}
    return numbers, outputs


def show(rows, outputs, groups, step, log):
    """A few held-out groups with what the model says of each response, best first, and the true place."""
    for row, output in list(zip(rows, outputs))[:SAMPLE_GROUPS]:
        said = zip(output.mean(-1).tolist(), row.place, groups[row.index].responses)
        for score, place, response in sorted(said, key=lambda triple: -triple[0]):
            log.sample(step, groups[row.index].prompt, response.text, score=score, place=place)


def main(config):
    check(config, steps=(1, None), groups=(1, None), max_tokens=(1, None), max_length=(0, None), lr=(0, 10), warmup=(0, None), seed=(0, 2**63 - 1),
          eval_every=(1, None), save_every=(1, None), quantiles=(2, 1000), kappa=(0, None), rank_coef=(0, None), quantile_coef=(0, None))
    device = dist.setup(config.device, config.seed)
    resuming = runs.resumable(config, SCRIPT)

    # data, model, optimizer
    found = data.load(config.data)
    train = data.apart(found.train) if config.pairs == "apart" else found.train
    texts = lambda: [group.prompt + response.text for group in found.train for response in group.responses]
    trunk, tok, source = checkpoint.start(config.init, config.tokenizer, texts, head=False)
    limit, how = context_limit(config.max_length, trunk.config.context), {"labels": config.labels, "target": config.quantile_target}
    encoded, reasons = encode_all(train, tok, limit, **how)
    rows = usable(encoded, config)
    held_rows = usable(encode_all(found.held_out, tok, limit, **how)[0], config)[:EVAL_GROUPS]
    reasons["nothing to learn from (no judgement of the wanted kind, or all equal)"] += len(encoded) - len(rows)
    if not rows:
        raise InputError(f"--data {config.data}: no group left to train on with --loss {config.loss} --labels {config.labels} ({dict(+(found.dropped + reasons))})")
    if config.loss == "quantile" and config.quantile_coef and not counts(rows, config)["targets"]:
        raise InputError(f"--quantile_target {config.quantile_target}: no response of --data {config.data} has any")
    scorer = Scorer(trunk, config.quantiles if config.loss == "quantile" else 1)
    scorer.draw_head()
    scorer = scorer.to(device, torch.float64 if config.dtype == "float64" else torch.float32)
    speed.tune(trunk, device, config.dtype, config.compile, config.recompute)
    optimizer, meter = optim.adamw(scorer, config.lr), speed.Meter(trunk, device, config.dtype, dist.world())
    reward_model = RewardModel(scorer, tok, "tanh_half" if config.loss == "classification" else "identity", max_length=limit)

    header(f"train_rm: a reward model by {config.loss}",
           model=f"{trunk.family}, {sum(p.numel() for p in scorer.parameters()):,} parameters, {scorer.score.out_features} outputs, {source}",
           data=f"{found.source}: {len(rows)} groups, {counts(rows, config)['ranked']} with a pair, {len(held_rows)} groups held out",
           dropped=f"{dict(+(found.dropped + reasons)) or 'nothing'}",
           step=f"{config.groups} groups, about {config.groups * sum(r.columns for r in rows) // len(rows)} columns; {config.steps} steps = "
                f"{config.steps * config.groups / len(rows):.2f} epochs",
           numbers=f"{config.dtype} on {device}, {dist.world()} process{'es' * (dist.world() > 1)} of {torch.get_num_threads()} threads, "
                   f"AdamW lr {config.lr} {config.schedule}, warmup {config.warmup}, gradient norm clipped at {optim.MAX_GRAD_NORM}, dropout 0",
           machine=meter, loss={"ranking": f"-log sigmoid of every pair's margin, pairs {config.pairs}", "classification": "BCE, good and bad equal within a group",
                 "quantile": f"{config.rank_coef} ranking of means + {config.quantile_coef} quantile Huber, kappa {config.kappa}, target "
                             f"{config.quantile_target}"}[config.loss] + f"; labels {config.labels}")
    fresh = {"step": 0, "skipped": 0, "in_a_row": 0}
    state = runs.load(config, scorer, optimizer, fresh) if resuming else fresh
    dist.share(scorer.parameters())
    first, finite = state["step"], runs.Finite(config, SCRIPT, scorer, state["skipped"], state["in_a_row"])
    runs.begin(config, SCRIPT, config.init)           # again where it resumes: --steps may be more than before
    log = Log(config.out, first, config.steps, ("loss", "grad_norm", "tokens_per_second", "share", "seconds"), dist.rank() == 0)
    if first == 0 and held_rows:
        log.evaluation(-1, **evaluate(scorer, held_rows, config, device)[0])

    stop = dist.Stop()
    for step in range(first, config.steps):
        began = time.time()
        chosen = [rows[i] for i in take(len(rows), config.groups, step, config.seed)]
        parts, count, losses = plans([row.columns for row in chosen], config.max_tokens, dist.world()), counts(chosen, config), []
        for batch in ahead(chosen, parts[dist.rank()], device):
            with dist.autocast(scorer, config.dtype):
                outputs = scorer(batch)
            loss = reward_loss(outputs, batch, count, config)
            loss.backward()
            losses.append(loss.item())
        dist.add_gradients(scorer)
        norm = optim.gradient_norm(scorer)
        losses, norms, asked, memory = zip(*dist.everyone([losses, norm.item(), stop.asked, speed.peak_memory(device)]))
        lr = optim.learning_rate(config.lr, step, config.steps, config.schedule, config.warmup)
        if finite(step, chosen, parts, losses, norms):
            optim.update(scorer, optimizer, lr, norm)
        log.step(step, loss=sum(map(sum, losses)), lr=lr, grad_norm=norms[0], skipped=finite.skipped, memory_gb=max(memory),
                 **meter(chosen, parts, 3 * speed.forward_operations(trunk, chosen, head=False), time.time() - began))

        done = step + 1 == config.steps
        if held_rows and (done or (step + 1) % config.eval_every == 0):
            numbers, outputs = evaluate(scorer, held_rows, config, device)
            log.evaluation(step, **numbers)
            show(held_rows, outputs, found.held_out, step, log)
        if done:
            spread = reward_model.fit(torch.cat(outputs_of(scorer, [rows[i] for i in order(len(rows), config.seed, 0)[:FIT_GROUPS]], config, device)[0]))
            print(f"normalised over the training mix: raw mean {reward_model.mean:.4f}, raw deviation {spread:.4f}"
                  + (f" (under the floor {STD_FLOOR}: rewards will deviate by {spread / STD_FLOOR:.2f}, not by 1)" if spread < STD_FLOOR else ""))
            if held_rows and at_chance(numbers["eval_accuracy"], numbers["eval_pairs"]):
                log.warn(f"at chance: {numbers['eval_accuracy']:.3f} of {numbers['eval_pairs']} held-out pairs could be a coin's")
        if done or any(asked) or (step + 1) % config.save_every == 0:
            runs.save(config, SCRIPT, scorer, optimizer, step + 1,
                      lambda: checkpoint.save_reward_model(Path(config.out) / "model", reward_model), **finite.numbers())
        if any(asked) and not done:
            raise dist.Stopped(max(asked))
    print(f"done: {Path(config.out) / 'model'}")


if __name__ == "__main__":
    run(main, Config)
