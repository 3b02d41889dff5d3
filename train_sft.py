"""Stage 1: a supervised policy. All responses of a prompt are one row; the loss is on response tokens and EOS alone.

    python train_sft.py --data FairytaleQAData --init SmolLM2-135M --out runs/sft --steps 200
    torchrun --nproc_per_node=8 train_sft.py ...          the same on eight GPUs: same groups a step, same update
"""
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nanorlhf import checkpoint, data, dist, generate, optim, runs, speed
from nanorlhf.batching import ahead, context_limit, encode_all, plans, take
from nanorlhf.config import InputError, check, run
from nanorlhf.heads import Policy
from nanorlhf.log import Log, header
from nanorlhf.losses import sft_loss

SCRIPT = "train_sft"
EVAL_GROUPS = 100          # held-out groups that eval_loss is measured on
SAMPLE_PROMPTS = 3         # held-out prompts whose continuations are shown
SAMPLE_TOKENS = 48


@dataclass(frozen=True)
class Config:
    data: str                                       # FairytaleQA or HH folder, groups JSONL, or a folder with train.jsonl and val.jsonl
    init: str                                       # model folder, or a size for random weights: gpt2 ... llama-7b ... gpt2-nano, llama-nano
    out: str                                        # run folder; the same command again resumes
    tokenizer: str = ""                             # folder of a tokenizer, for random weights of a real size
    steps: int = 200                                # optimizer steps
    groups: int = 8                                 # groups (prompts with all their responses) per optimizer step
    max_tokens: int = 4096                          # columns per micro-batch
    max_length: int = 0                             # positions of prompt + longest response; 0: the model's context
    lr: float = 5e-5                                # learning rate of AdamW
    warmup: int = 10                                # steps until the learning rate is reached
    schedule: Literal["linear", "constant"] = "linear"   # of the learning rate; linear falls towards 0 at the last step
    seed: int = 0                                   # of weights, order and samples
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"   # of the forward; weights and optimizer stay float32 under bfloat16
    compile: bool = False                           # torch.compile the blocks, on CUDA with FlexAttention; the first steps then take minutes
    recompute: bool = False                         # activation checkpointing: less memory, a third more work
    device: str = "auto"                            # cpu, cuda, cuda:1; auto takes CUDA where there is one
    eval_every: int = 50                            # steps between evaluations
    save_every: int = 50                            # steps between saves


@torch.no_grad()
def evaluate(policy, rows, config, device):
    """Mean loss per response token over held-out rows, EOS included."""
    count = sum(len(response) for row in rows for response in row.responses)
    total = 0.0
    for batch in ahead(rows, plans([row.columns for row in rows], config.max_tokens, dist.world())[dist.rank()], device):
        with dist.autocast(policy, config.dtype):
            total += sft_loss(policy(batch).logprobs, batch.mask, count).item()
    return sum(dist.everyone(total))


def show(policy, tok, rows, prompts, step, config, log):
    """Continuations of a few held-out prompts at temperature 1, of those that leave room for one."""
    rows = [row for row in rows if len(row.prompt) + SAMPLE_TOKENS <= policy.trunk.config.context][:SAMPLE_PROMPTS]
    with dist.autocast(policy, config.dtype):
        found = generate.sample(policy.trunk, [row.prompt for row in rows], [row.index for row in rows], 1, SAMPLE_TOKENS, tok.eos_id,
                                config.seed, generate.EVALUATION, step)
    for row, (ids,) in zip(rows, found):
        log.sample(step, prompts[row.index], tok.decode(ids))


def main(config):
    check(config, steps=(1, None), groups=(1, None), max_tokens=(1, None), max_length=(0, None), lr=(0, 10), warmup=(0, None),
          seed=(0, 2**63 - 1), eval_every=(1, None), save_every=(1, None))
    device = dist.setup(config.device, config.seed)
    resuming = runs.resumable(config, SCRIPT)

    # data, model, optimizer
    found = data.load(config.data)
    texts = lambda: [group.prompt + response.text for group in found.train for response in group.responses]
    trunk, tok, source = checkpoint.start(config.init, config.tokenizer, texts)
    limit = context_limit(config.max_length, trunk.config.context)
    train, bad = data.good_responses(found.train)
    rows, reasons = encode_all(train, tok, limit)
    reasons["response labelled bad, or not the best placed"] += bad
    held_out = data.good_responses(found.held_out)[0]
    held_rows = encode_all(held_out, tok, limit)[0][:EVAL_GROUPS]
    if not rows:
        raise InputError(f"--data {config.data}: no group left to train on ({dict(+(found.dropped + reasons))})")
    policy = Policy(trunk).to(device, torch.float64 if config.dtype == "float64" else torch.float32)
    speed.tune(trunk, device, config.dtype, config.compile, config.recompute)
    optimizer, meter = optim.adamw(policy, config.lr), speed.Meter(trunk, device, config.dtype, dist.world())

    header("train_sft: a supervised policy",
           model=f"{trunk.family}, {sum(p.numel() for p in policy.parameters()):,} parameters, {source}, context {trunk.config.context}",
           data=f"{found.source}: {len(rows)} groups, {sum(len(r.responses) for r in rows)} responses to train on, {len(held_rows)} groups held out",
           dropped=f"{dict(+(found.dropped + reasons)) or 'nothing'}",
           step=f"{config.groups} groups, about {config.groups * sum(r.columns for r in rows) // len(rows)} columns; {config.steps} steps = "
                f"{config.steps * config.groups / len(rows):.2f} epochs",
           numbers=f"{config.dtype} on {device}, {dist.world()} process{'es' * (dist.world() > 1)} of {torch.get_num_threads()} threads, "
                   f"AdamW lr {config.lr} {config.schedule}, warmup {config.warmup}, gradient norm clipped at {optim.MAX_GRAD_NORM}, dropout 0",
           machine=meter, loss="mean over response tokens and EOS of the whole step")
    fresh = {"step": 0, "skipped": 0, "in_a_row": 0}
    state = runs.load(config, policy, optimizer, fresh) if resuming else fresh
    dist.share(policy.parameters())
    first, finite = state["step"], runs.Finite(config, SCRIPT, policy, state["skipped"], state["in_a_row"])
    runs.begin(config, SCRIPT, config.init)           # again where it resumes: --steps may be more than before
    log = Log(config.out, first, config.steps, ("loss", "grad_norm", "tokens_per_second", "share", "seconds"), dist.rank() == 0)
    if first == 0 and held_rows:
        log.evaluation(-1, eval_loss=evaluate(policy, held_rows, config, device))

    stop = dist.Stop()
    for step in range(first, config.steps):
        began = time.time()
        chosen = [rows[i] for i in take(len(rows), config.groups, step, config.seed)]
        parts = plans([row.columns for row in chosen], config.max_tokens, dist.world())
        count = sum(len(response) for row in chosen for response in row.responses)     # of the whole step, on all processes: no mean of means
        losses = []
        for batch in ahead(chosen, parts[dist.rank()], device):
            with dist.autocast(policy, config.dtype):
                loss = sft_loss(policy(batch).logprobs, batch.mask, count)
            loss.backward()
            losses.append(loss.item())
        dist.add_gradients(policy)
        norm = optim.gradient_norm(policy)
        losses, norms, asked, memory = zip(*dist.everyone([losses, norm.item(), stop.asked, speed.peak_memory(device)]))
        lr = optim.learning_rate(config.lr, step, config.steps, config.schedule, config.warmup)
        if finite(step, chosen, parts, losses, norms):
            optim.update(policy, optimizer, lr, norm)
        log.step(step, loss=sum(map(sum, losses)), lr=lr, grad_norm=norms[0], skipped=finite.skipped, memory_gb=max(memory),
                 **meter(chosen, parts, 3 * speed.forward_operations(trunk, chosen, head=True), time.time() - began))

        done = step + 1 == config.steps
        if held_rows and (done or (step + 1) % config.eval_every == 0):
            log.evaluation(step, eval_loss=evaluate(policy, held_rows, config, device))
            show(policy, tok, held_rows, [group.prompt for group in held_out], step, config, log)
        if done or any(asked) or (step + 1) % config.save_every == 0:
            runs.save(config, SCRIPT, policy, optimizer, step + 1, lambda: checkpoint.save_policy(Path(config.out) / "model", policy, tok), **finite.numbers())
        if any(asked) and not done:
            raise dist.Stopped(max(asked))
    print(f"done: {Path(config.out) / 'model'}")


if __name__ == "__main__":
    run(main, Config)
