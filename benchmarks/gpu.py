"""On one CUDA GPU, bfloat16, compiled, FlexAttention: the share of the matrix-product limit (MFU) in training, of the memory's in sampling.

    python -m benchmarks.gpu
"""
import gc
from dataclasses import dataclass, replace

import torch

from benchmarks import limit, table
from nanorlhf import gpt2, llama
from nanorlhf.attention import FLEX_BLOCK
from nanorlhf.batching import micro_batches, pack_rows
from nanorlhf.heads import Policy
from nanorlhf.io.read import InputError
from nanorlhf.losses import sft_loss
from nanorlhf.run import dist, kernels, precision, speed
from nanorlhf.run.cli import check_bounds, run_script

BYTES_EACH = 16                                  # a parameter's weight, gradient and two moments in float32
ROWS = {"prompt": 384, "response": 96, "k": 4}   # of a training step


@dataclass(frozen=True)
class Config:
    """The flags."""
    groups: int = 32                             # prompts a training step, four responses each
    max_tokens: int = 16384                      # columns a micro-batch
    samples: int = 64                            # samples in decoding, four a prompt
    rounds: int = 5                              # steps that are timed, the limit before and after each


def fitting(config, free, share=0.7):
    """A model's shape with as many of its layers as `share` of the free bytes holds with gradients and moments; the rest is for activations."""
    sizes = [sum(p.numel() for p in llama.Llama(replace(config, num_hidden_layers=n)).parameters()) for n in (1, 2)]
    layers = int((free * share / BYTES_EACH - 2 * sizes[0] + sizes[1]) // (sizes[1] - sizes[0]))
    return replace(config, num_hidden_layers=max(1, min(config.num_hidden_layers, layers)))


def limits(device, dtype, width, squares=(4096, 8192, 16384)):
    """The two functions that limit.alternate wants."""
    return lambda: limit.product_rate(device, dtype, width, squares, (2800, 16384)), lambda: limit.bandwidth(device)


def train(work, trunk, device, config, dtype="bfloat16", compile=True, **shapes):
    """Numbers of train_rm.py's or train_sft.py's step."""
    kernels.choose_kernels(trunk.to(device), device, dtype, compile)
    rows = limit.random_rows(config.groups, trunk.config.vocab_size, **{**ROWS, **shapes})
    plan = micro_batches([row.num_tokens for row in rows], config.max_tokens)
    sizes = [sum(rows[i].num_tokens for i in part) for part in plan]
    step = limit.training(work, trunk, device, dtype, config.max_tokens)
    return limit.alternate(step, [rows] * config.rounds, device, *limits(device, dtype, trunk.width, **({} if compile else {"squares": (64,)}))) | {
        "padding": 1 - sum(sizes) / sum(size + (-size % FLEX_BLOCK if trunk.flex else 0) for size in sizes)}


def flex_or_dense(trunk, rows, device, dtype="bfloat16", repeats=3):
    """Loss, gradients, seconds and memory of one forward and backward over the rows, with FlexAttention and with dense masks.

    -> (flex, dense, relative difference of losses, of gradients); on a CPU, where FlexAttention has no backward, the forward alone
    """
    policy, batch, found = Policy(trunk).to(device), pack_rows(rows).to(device), {}
    for name in ("flex", "dense"):
        trunk.flex = name == "flex"

        def work():
            policy.zero_grad()
            with precision.autocast(policy, dtype), torch.set_grad_enabled(device.type == "cuda"):
                loss = sft_loss(policy(batch).logprobs, batch.response_mask)
            if loss.requires_grad:
                loss.backward()
            return loss.item()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = limit.usual_seconds(work, device, repeats)
        found[name] = {"seconds": seconds, "memory": speed.peak_memory(device), "loss": work(), "gradient": [p.grad.float().cpu() for p in policy.parameters() if p.grad is not None]}
    flex, dense = found["flex"], found["dense"]
    norm = lambda tensors: sum(t.double().pow(2).sum().item() for t in tensors) ** 0.5
    apart = norm([a - b for a, b in zip(flex["gradient"], dense["gradient"])]) / (norm(dense["gradient"]) or 1)
    return flex, dense, abs(flex["loss"] - dense["loss"]) / dense["loss"], apart


def main(config):
    check_bounds(config, samples=4, rounds=1)
    if not torch.cuda.is_available():
        raise InputError("benchmarks.gpu needs a CUDA GPU, and there is none here")
    device = dist.setup("cuda", 0)
    name = torch.cuda.get_device_name(device)
    large = lambda: gpt2.GPT2(gpt2.SIZES["gpt2-large"])
    shape = fitting(llama.SIZES["llama-7b"], torch.cuda.mem_get_info(device)[0])
    shown = lambda row: print(f"{row['work']}: {row['ratio']:.2f} (goal {row['goal']:g}), {row['ours_seconds']:.4f} s", flush=True)

    def clear():
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()
        torch.cuda.reset_peak_memory_stats(device)

    for model, make in (("GPT-2 large", large), (f"{shape.num_hidden_layers} layers of LLaMA 7B", lambda: llama.Llama(shape))):
        for work in ("sft", "rm"):
            clear()
            found = train(work, make(), device, config)
            shown(limit.written(config, f"MFU of {limit.NAMES[work]}, {model}, bfloat16", f"{name}'s matrix product", 0.45, found, True, machine=name,
                                padding=found["padding"], ours_memory_gb=speed.peak_memory(device)))
    clear()
    trunk = large().to(device)
    rows = limit.random_rows(config.samples // 4, trunk.config.vocab_size)
    found = limit.alternate(limit.decoding(trunk, device, "bfloat16", new=128), [rows] * config.rounds, device, *limits(device, "bfloat16", trunk.width))
    shown(limit.written(config, f"share of the memory limit in decoding, GPT-2 large, {config.samples} samples, bfloat16", f"{name}'s memory", 0.6, found, True,
                        machine=name))
    clear()
    trunk = large()
    kernels.choose_kernels(trunk, device, "bfloat16", True)
    flex, dense, *apart = flex_or_dense(trunk, limit.random_rows(config.groups // 4 or 1, trunk.config.vocab_size, **ROWS), device)
    print(f"FlexAttention beside dense masks: losses differ by {apart[0]:.2g}, gradients by {apart[1]:.2g} of themselves")
    if not (apart[0] < 3e-3 and apart[1] < 5e-2):
        raise InputError("not the same work: FlexAttention's loss or gradients are not the dense masks'")
    result = table.row(config, "FlexAttention, forward and backward, GPT-2 large, bfloat16", "dense masks, a row at a time", 1, flex["seconds"],
                       dense["seconds"], machine=name, ours_memory_gb=flex["memory"], peer_memory_gb=dense["memory"], loss_difference=apart[0], gradient_difference=apart[1])
    table.record(result)
    shown(result)


if __name__ == "__main__":
    run_script(main, Config)
