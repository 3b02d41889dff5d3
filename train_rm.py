"""Stage 2: a reward model, by ranking, classification or quantile regression.

    python train_rm.py --data ranked.jsonl --init runs/sft --loss ranking --out runs/rm --steps 200
    torchrun --nproc_per_node=8 train_rm.py ...

Any loss trains on any labels. On eight GPUs the groups per step and the update are the same as on
one.
"""
import time
from dataclasses import dataclass
from typing import Literal

import torch

from nanorlhf import losses, metrics
from nanorlhf.batching import (
    batch_indices,
    encode_all,
    permutation,
    plan_micro_batches,
    prefetch,
)
from nanorlhf.heads import RewardModel
from nanorlhf.io import data, hub
from nanorlhf.reward import STD_FLOOR, TextReward
from nanorlhf.run import dist, optim, precision, run_folder, speed
from nanorlhf.run.cli import InputError, check_bounds, context_limit, run_script
from nanorlhf.run.kernels import choose_kernels
from nanorlhf.run.log import header
from nanorlhf.run.training_run import TrainingRun, describe_run

SCRIPT = "train_rm"
PROGRESS = ("loss", "grad_norm", "tokens_per_second", "mfu", "seconds")       # on the progress line
EVAL_GROUPS = 250          # held-out groups that accuracy is measured on
SAMPLE_GROUPS = 2          # held-out groups whose responses are shown with their scores
FIT_GROUPS = 500           # training groups that the normalisation is fitted on


@dataclass(frozen=True)
class Config:
    # HH or FairytaleQA folder, groups JSONL, or a folder with train.jsonl and val.jsonl
    data: str
    # model folder or run (of a reward model the trunk; the head is new), or a size for random
    # weights: gpt2 ... llama-7b ... gpt2-nano, llama-nano
    init: str
    out: str               # run folder; the same command again resumes
    loss: Literal["ranking", "classification", "quantile"] = "ranking"     # what is minimised
    # which judgement of a group to use; auto: place, else label, else scores
    labels: Literal["auto", "place", "label", "scores"] = "auto"
    # apart: each pair of a group becomes a group of its own (overfits, says paper A)
    pairs: Literal["together", "apart"] = "together"
    quantiles: int = 10    # outputs of a quantile model
    # what is regressed: +1/-1 per comparison, the scores, or the best response's own mean
    quantile_target: Literal["label", "scores", "self_mean"] = "label"
    kappa: float = 1.0     # Huber threshold; 0 is the pinball loss, whose optimum is a quantile
    rank_coef: float = 1.0     # weight of the ranking loss of the means in the quantile model
    quantile_coef: float = 1.0     # weight of the quantile loss
    tokenizer: str = ""    # folder of a tokenizer, for random weights of a real size
    steps: int = 200       # optimizer steps
    groups: int = 8        # groups per optimizer step
    max_tokens: int = 4096     # columns per micro-batch
    max_length: int = 0    # positions of prompt + longest response; 0: the model's context
    lr: float = 2e-5       # learning rate of AdamW
    warmup: int = 10       # steps until the learning rate is reached
    # of the learning rate; linear falls towards 0 at the last step
    schedule: Literal["linear", "constant"] = "linear"
    seed: int = 0          # of weights and order
    # of the forward; under bfloat16 the weights that are trained stay float32
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    # torch.compile the blocks, on CUDA with FlexAttention; the first steps then take minutes
    compile: bool = False
    activation_checkpointing: bool = False     # less memory, a third more work
    device: str = "auto"   # cpu, cuda, cuda:1; auto takes CUDA where there is one
    eval_every: int = 50   # steps between evaluations
    save_every: int = 50   # steps between saves


def usable(rows, config):
    """The groups that say anything to this loss."""
    if config.loss == "classification":
        return [row for row in rows if any(label is not None for label in row.label)]
    ranked = [len(set(row.place)) > 1 for row in rows]
    if config.loss == "quantile" and config.quantile_target != "self_mean" and config.quantile_coef:
        return [row for row, has_pair in zip(rows, ranked) if has_pair or any(row.targets)]
    return [row for row, has_pair in zip(rows, ranked) if has_pair]


def counts(rows, config):
    """What the losses average over, in the whole optimizer step.

    A mean of means would weigh small micro-batches more.
    """
    ranked = labelled = targets = 0
    for row in rows:
        ranked += len(set(row.place)) > 1
        labelled += sum(label is not None for label in row.label)
        if config.quantile_target == "self_mean":
            targets += sum(place == min(row.place) for place in row.place)
        else:
            targets += sum(bool(values) for values in row.targets)
    return {"ranked": ranked, "labelled": labelled, "targets": targets}


def reward_loss(outputs, batch, count, config):
    """The loss that --loss names.  outputs (B,K,N) raw, batch, count of `counts`  ->  scalar"""
    scores = outputs.mean(-1)                    # (B,K); N = 1: the scalar itself
    if config.loss == "classification":
        labelled = batch.valid & (batch.label >= 0)
        weight = losses.balanced_weights(batch.label, labelled)
        num_labelled = max(count["labelled"], 1)
        return losses.classification_loss(scores, batch.label, labelled, weight, num_labelled)
    ranking = losses.ranking_loss(scores, batch.place, batch.valid, max(count["ranked"], 1))
    if config.loss == "ranking":
        return ranking
    targets, target_mask = batch.targets, batch.target_mask
    if config.quantile_target == "self_mean":    # its only zero is N equal quantiles
        best_place = torch.where(batch.valid, batch.place, torch.inf).amin(-1, keepdim=True)
        target_mask = (batch.valid & (batch.place == best_place)).unsqueeze(-1)
        targets = scores.detach().unsqueeze(-1)
    levels = losses.quantile_levels(outputs.shape[-1])
    num_targets = max(count["targets"], 1)
    quantile = losses.quantile_huber_loss(
        outputs, targets, levels, config.kappa, target_mask, num_targets
    )
    return config.rank_coef * ranking + config.quantile_coef * quantile


@torch.no_grad()
def compute_outputs(model, rows, config, device):
    """Raw outputs (K,N) of each row, and the loss over all of them; each process has its share."""
    plan = plan_micro_batches(rows, config.max_tokens, dist.world_size())[dist.rank()]
    count = counts(rows, config)
    local_ids, local_outputs = [], []
    local_loss = 0.0
    for indices, batch in zip(plan, prefetch(rows, plan, device)):
        with precision.autocast(model, config.dtype):
            outputs = model(batch)
        local_loss += reward_loss(outputs, batch, count, config).item()
        for i, output in zip(indices, outputs):
            local_ids.append(i)
            local_outputs.append(output[: len(rows[i].responses)].tolist())
    outputs = dist.all_gather_by_index(len(rows), local_ids, local_outputs)
    dtype = precision.master_dtype(config.dtype)
    loss = sum(dist.all_gather_object(local_loss))
    return [torch.tensor(output, dtype=dtype) for output in outputs], loss


def evaluate(model, rows, config, device):
    """Loss, accuracy within groups, AUC across groups, and how often quantiles cross.

    -> (numbers by name, raw outputs (K,N) of each row)
    """
    outputs, loss = compute_outputs(model, rows, config, device)
    scores = [output.mean(-1).tolist() for output in outputs]
    labelled_scores, labels = [], []
    for row, row_scores in zip(rows, scores):
        for score, label in zip(row_scores, row.label):
            if label is not None:
                labelled_scores.append(score)
                labels.append(label == 1)
    numbers = {"eval_loss": loss, **metrics.pair_accuracy(rows, scores)}
    labels = torch.tensor(labels, dtype=torch.bool)
    numbers["eval_auc"] = metrics.auc(torch.tensor(labelled_scores), labels)
    crossing = torch.cat(outputs).diff(dim=-1).lt(0).float()     # quantile i + 1 below quantile i
    if crossing.numel():
        numbers["eval_crossing"] = crossing.mean().item()
    return numbers, outputs


def show(rows, outputs, groups, step, log):
    """A few held-out groups, best first as the model has it, with the true place."""
    for row, output in list(zip(rows, outputs))[:SAMPLE_GROUPS]:
        group = groups[row.index]
        scored = zip(output.mean(-1).tolist(), row.place, group.responses)
        for score, place, response in sorted(scored, key=lambda triple: -triple[0]):
            log.text(step, group.prompt, response.text, score=score, place=place)


def fit_normalisation(reward, rows, config, device):
    """The reward of an average training response becomes 0, the deviation within prompts 1."""
    order = permutation(len(rows), config.seed, 0)[:FIT_GROUPS]
    outputs, _ = compute_outputs(reward.model, [rows[i] for i in order], config, device)
    deviation, within = reward.fit_normalisation(outputs)
    kind = "within prompts" if within else "over the mix, as no prompt has two responses,"
    warning = ""
    if deviation < STD_FLOOR:
        warning = (
            f" (under the floor {STD_FLOOR}: "
            f"rewards will deviate by {deviation / STD_FLOOR:.2f}, not by 1)"
        )
    print(
        f"normalised over the training mix: raw mean {reward.mean:.4f}, "
        f"deviation {kind} {deviation:.4f}{warning}"
    )


def warn_at_chance(accuracy, pairs, log):
    if metrics.at_chance(accuracy, pairs):
        log.warn(f"at chance: {accuracy:.3f} of {pairs} held-out pairs could be a coin's")


def describe_loss(config):
    if config.loss == "ranking":
        words = f"-log sigmoid of every pair's margin, pairs {config.pairs}"
    elif config.loss == "classification":
        words = "BCE, good and bad equal within a group"
    else:
        words = (
            f"{config.rank_coef} ranking of means + {config.quantile_coef} quantile Huber, "
            f"kappa {config.kappa}, target {config.quantile_target}"
        )
    return f"{words}; labels {config.labels}"


def load_rows(dataset, tokenizer, max_length, config):
    """-> (training rows, held-out rows, what was dropped).  InputError: nothing is left"""
    train = data.split_into_pairs(dataset.train) if config.pairs == "apart" else dataset.train
    options = {"labels": config.labels, "target": config.quantile_target}
    encoded, dropped = encode_all(train, tokenizer, max_length, **options)
    rows = usable(encoded, config)
    held_encoded, _ = encode_all(dataset.held_out, tokenizer, max_length, **options)
    held_rows = usable(held_encoded, config)[:EVAL_GROUPS]
    dropped = dataset.dropped + dropped
    unusable = len(encoded) - len(rows)
    dropped["nothing to learn from (no judgement of the wanted kind, or all equal)"] += unusable
    if not rows:
        raise InputError(
            f"--data {config.data}: no group left to train on with --loss {config.loss} "
            f"--labels {config.labels} ({dict(+dropped)})"
        )
    if config.loss == "quantile" and config.quantile_coef and not counts(rows, config)["targets"]:
        raise InputError(
            f"--quantile_target {config.quantile_target}: "
            f"no response of --data {config.data} has any"
        )
    return rows, held_rows, dropped


def main(config):
    check_bounds(config, quantiles=(2, 1000))
    device = dist.setup(config.device, config.seed)
    resuming = run_folder.resumable(config, SCRIPT)

    # data
    dataset = data.load(config.data)
    trunk, tokenizer, source = hub.init_or_load(
        config.init, config.tokenizer, dataset.train_texts, head=False
    )
    max_length = context_limit(config.max_length, trunk.config.context)
    rows, held_rows, dropped = load_rows(dataset, tokenizer, max_length, config)

    # model and optimizer
    model = RewardModel(trunk, config.quantiles if config.loss == "quantile" else 1)
    model.init_head()
    model.to(device, precision.master_dtype(config.dtype))
    choose_kernels(trunk, device, config.dtype, config.compile, config.activation_checkpointing)
    optimizer = optim.adamw(model, config.lr)
    meter = speed.Meter(trunk, device, config.dtype)
    transform = "tanh_half" if config.loss == "classification" else "identity"
    reward = TextReward(model, tokenizer, transform, max_length=max_length)
    header(
        f"train_rm: a reward model by {config.loss}",
        model=f"{speed.describe_model(trunk, model)}, {model.score.out_features} outputs, {source}",
        data=f"{dataset.source}: {len(rows)} groups, {counts(rows, config)['ranked']} with a pair, "
             f"{len(held_rows)} groups held out",
        **describe_run(config, rows, dropped, device, optimizer, meter),
        loss=describe_loss(config),
    )
    run = TrainingRun(config, SCRIPT, model, optimizer, config.init, PROGRESS, resuming)
    if run.first_step == 0 and held_rows:
        run.log.eval(-1, **evaluate(model, held_rows, config, device)[0])

    for step in range(run.first_step, config.steps):
        began = time.time()
        step_rows = [rows[i] for i in batch_indices(len(rows), config.groups, step, config.seed)]
        plan = plan_micro_batches(step_rows, config.max_tokens, dist.world_size())
        count = counts(step_rows, config)        # of all processes: no mean of means

        micro_losses = []
        for batch in prefetch(step_rows, plan[dist.rank()], device):
            with precision.autocast(model, config.dtype):
                outputs = model(batch)
            loss = reward_loss(outputs, batch, count, config)
            loss.backward()
            micro_losses.append(loss.item())
        dist.all_reduce_gradients(model)
        grad_norm = optim.gradient_norm(model)

        # per process
        gathered_losses, norms = zip(*dist.all_gather_object([micro_losses, grad_norm.item()]))
        lr = optim.learning_rate(config.lr, step, config.steps, config.schedule, config.warmup)
        if run.guard.all_finite(step, step_rows, plan, gathered_losses, norms):
            optim.update(model, optimizer, lr, grad_norm)

        run.poll_signals()                       # SIGTERM or Ctrl-C: see save_or_stop below
        # the backward is two forwards' work
        flops = 3 * speed.forward_flops(trunk, step_rows, head=False)
        run.log_step(
            step, loss=sum(map(sum, gathered_losses)), lr=lr, grad_norm=norms[0],
            **meter(step_rows, plan, flops, time.time() - began),
        )
        if held_rows and run.evaluates(step):
            numbers, outputs = evaluate(model, held_rows, config, device)
            run.log.eval(step, **numbers)
            show(held_rows, outputs, dataset.held_out, step, run.log)
        if run.is_last(step):
            fit_normalisation(reward, rows, config, device)
            if held_rows:
                warn_at_chance(numbers["eval_accuracy"], numbers["eval_pairs"], run.log)
        # saves where it is due; after a signal saves, then ends the run by an exception
        run.save_or_stop(step, lambda: hub.save_reward_model(run.model_folder, reward))
    print(f"done: {run.model_folder}")


if __name__ == "__main__":
    run_script(main, Config)
