"""Stage 1: a supervised policy.

    python train_sft.py --data FairytaleQAData --init SmolLM2-135M --out runs/sft --steps 200
    torchrun --nproc_per_node=8 train_sft.py ...

All responses of a prompt are one row; the loss is on response tokens and EOS alone. On eight GPUs
the groups per step and the update are the same as on one.
"""
import time
from dataclasses import dataclass
from typing import Literal

import torch

from nanorlhf.batching import (
    Stream,
    batch_indices,
    encode_all,
    plan_micro_batches,
    prefetch,
)
from nanorlhf.generate import Sampling, generate
from nanorlhf.heads import Policy
from nanorlhf.io import data, hub
from nanorlhf.losses import sft_loss
from nanorlhf.run import dist, optim, precision, run_folder, speed
from nanorlhf.run.cli import InputError, check_bounds, context_limit, run_script
from nanorlhf.run.kernels import choose_kernels
from nanorlhf.run.log import header
from nanorlhf.run.training_run import TrainingRun, describe_run

SCRIPT = "train_sft"
PROGRESS = ("loss", "grad_norm", "tokens_per_second", "mfu", "seconds")       # on the progress line
EVAL_GROUPS = 100          # held-out groups that eval_loss is measured on
SAMPLE_PROMPTS = 3         # held-out prompts whose continuations are shown
SAMPLE_TOKENS = 48


@dataclass(frozen=True)
class Config:
    # FairytaleQA or HH folder, groups JSONL, or a folder with train.jsonl and val.jsonl
    data: str
    # model folder, or a size for random weights: gpt2 ... llama-7b ... gpt2-nano, llama-nano
    init: str
    out: str               # run folder; the same command again resumes
    tokenizer: str = ""    # folder of a tokenizer, for random weights of a real size
    steps: int = 200       # optimizer steps
    groups: int = 8        # groups (prompts with all their responses) per optimizer step
    max_tokens: int = 4096     # columns per micro-batch
    max_length: int = 0    # positions of prompt + longest response; 0: the model's context
    lr: float = 5e-5       # learning rate of AdamW
    warmup: int = 10       # steps until the learning rate is reached
    # of the learning rate; linear falls towards 0 at the last step
    schedule: Literal["linear", "constant"] = "linear"
    seed: int = 0          # of weights, order and samples
    # of the forward; under bfloat16 the weights that are trained stay float32
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    # torch.compile the blocks, on CUDA with FlexAttention; the first steps then take minutes
    compile: bool = False
    activation_checkpointing: bool = False     # less memory, a third more work
    device: str = "auto"   # cpu, cuda, cuda:1; auto takes CUDA where there is one
    eval_every: int = 50   # steps between evaluations
    save_every: int = 50   # steps between saves


@torch.no_grad()
def evaluate(policy, rows, config, device):
    """Mean loss per response token over held-out rows, EOS included."""
    num_tokens = sum(row.num_response_tokens for row in rows)
    plan = plan_micro_batches(rows, config.max_tokens, dist.world_size())
    loss = 0.0
    for batch in prefetch(rows, plan[dist.rank()], device):
        with precision.autocast(policy, config.dtype):
            loss += sft_loss(policy(batch).logprobs, batch.response_mask, num_tokens).item()
    return sum(dist.all_gather_object(loss))


def show(policy, tokenizer, rows, groups, step, config, log):
    """Continuations of a few held-out prompts that leave room for one, at temperature 1."""
    context = policy.trunk.config.context
    rows = [row for row in rows if len(row.prompt) + SAMPLE_TOKENS <= context][:SAMPLE_PROMPTS]
    sampling = Sampling(1, SAMPLE_TOKENS, tokenizer.eos_id, config.seed, Stream.EVALUATION)
    with precision.autocast(policy, config.dtype):
        responses = generate(policy.trunk, rows, sampling, step)
    for row, (ids,) in zip(rows, responses):
        log.text(step, groups[row.index].prompt, tokenizer.decode(ids))


def main(config):
    check_bounds(config)
    device = dist.setup(config.device, config.seed)
    resuming = run_folder.resumable(config, SCRIPT)

    # data
    dataset = data.load(config.data)
    trunk, tokenizer, source = hub.init_or_load(config.init, config.tokenizer, dataset.train_texts)
    max_length = context_limit(config.max_length, trunk.config.context)
    preferred, num_bad = data.keep_preferred(dataset.train)
    rows, dropped = encode_all(preferred, tokenizer, max_length)
    dropped = dataset.dropped + dropped
    dropped["response labelled bad, or not the best placed"] += num_bad
    if not rows:
        raise InputError(f"--data {config.data}: no group left to train on ({dict(+dropped)})")
    held_out, _ = data.keep_preferred(dataset.held_out)
    held_rows = encode_all(held_out, tokenizer, max_length)[0][:EVAL_GROUPS]

    # model and optimizer
    policy = Policy(trunk).to(device, precision.master_dtype(config.dtype))
    choose_kernels(trunk, device, config.dtype, config.compile, config.activation_checkpointing)
    optimizer = optim.adamw(policy, config.lr)
    meter = speed.Meter(trunk, device, config.dtype)
    num_responses = sum(len(row.responses) for row in rows)
    header(
        "train_sft: a supervised policy",
        model=f"{speed.describe_model(trunk, policy)}, {source}, context {trunk.config.context}",
        data=f"{dataset.source}: {len(rows)} groups, {num_responses} responses to train on, "
             f"{len(held_rows)} groups held out",
        **describe_run(config, rows, dropped, device, optimizer, meter),
        loss="mean over response tokens and EOS of the whole step",
    )
    run = TrainingRun(config, SCRIPT, policy, optimizer, config.init, PROGRESS, resuming)
    if run.first_step == 0 and held_rows:
        run.log.eval(-1, eval_loss=evaluate(policy, held_rows, config, device))

    for step in range(run.first_step, config.steps):
        began = time.time()
        step_rows = [rows[i] for i in batch_indices(len(rows), config.groups, step, config.seed)]
        plan = plan_micro_batches(step_rows, config.max_tokens, dist.world_size())
        # of the whole step, on all processes: no mean of means
        num_tokens = sum(row.num_response_tokens for row in step_rows)

        micro_losses = []
        for batch in prefetch(step_rows, plan[dist.rank()], device):
            with precision.autocast(policy, config.dtype):
                loss = sft_loss(policy(batch).logprobs, batch.response_mask, num_tokens)
            loss.backward()
            micro_losses.append(loss.item())
        dist.all_reduce_gradients(policy)
        grad_norm = optim.gradient_norm(policy)

        # per process
        gathered_losses, norms = zip(*dist.all_gather_object([micro_losses, grad_norm.item()]))
        lr = optim.learning_rate(config.lr, step, config.steps, config.schedule, config.warmup)
        if run.guard.all_finite(step, step_rows, plan, gathered_losses, norms):
            optim.update(policy, optimizer, lr, grad_norm)

        run.poll_signals()                       # SIGTERM or Ctrl-C: see save_or_stop below
        # the backward is two forwards' work
        flops = 3 * speed.forward_flops(trunk, step_rows, head=True)
        run.log_step(
            step, loss=sum(map(sum, gathered_losses)), lr=lr, grad_norm=norms[0],
            **meter(step_rows, plan, flops, time.time() - began),
        )
        if held_rows and run.evaluates(step):
            run.log.eval(step, eval_loss=evaluate(policy, held_rows, config, device))
            show(policy, tokenizer, held_rows, held_out, step, config, run.log)
        # saves where it is due; after a signal saves, then ends the run by an exception
        run.save_or_stop(step, lambda: hub.save_policy(run.model_folder, policy, tokenizer))
    print(f"done: {run.model_folder}")


if __name__ == "__main__":
    run_script(main, Config)
