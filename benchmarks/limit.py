"""How near a step comes to what the machine can do: its matrix product's operations a second, or, decoding, its memory's bytes a second.

    python -m benchmarks.limit --data DIR [--work sft|decode] [--dtype bfloat16]

Limit and step are measured in turn in this process, so that both see the same machine. Needs no peers; without data the ids are random.
"""
import os
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

import torch

import train_rm
from benchmarks import reward_fairytale, table
from benchmarks import side_by_side as bench
from nanorlhf import gpt2, heads, losses
from nanorlhf.batching import Row, Stream, micro_batches, prefetch
from nanorlhf.generate import Sampling, generate
from nanorlhf.io import hub
from nanorlhf.io.read import InputError
from nanorlhf.run import dist, kernels, optim, precision, speed
from nanorlhf.run.cli import check_bounds, run_script

NEW, NEVER = 24, -1                              # tokens of a sample; as EOS: no token is it
NAMES = {"rm": "the reward-model step", "sft": "the supervised step", "decode": "decoding"}
BYTES = 256 * 2**20                              # that are copied and read; no cache holds them
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Config:
    """The flags."""
    work: Literal["rm", "sft", "decode"] = "rm"   # whose step; train_ppo.py logs its own share
    data: str = os.environ.get("NANORLHF_DATA", "")   # folder with FairytaleQAData/ and tokenizers/; without it random ids of such lengths
    groups: int = 1                              # passages a step, four questions each
    rounds: int = 7                              # steps that are timed, the limit before and after each
    dtype: Literal["float32", "bfloat16"] = "float32"   # of the forward, and of the products
    size: Literal["gpt2", "tiny"] = "gpt2"       # gpt2 is the 124M shape; tiny is for trying this out and never written to the table


def usual_seconds(work, device, repeats=5):
    """The median of a few, after one that sets things up: the step beside it is a median too, and a shared machine has lucky moments."""
    found = []
    for _ in range(repeats + 1):
        began = speed.synchronised_time(device)
        work()
        found.append(speed.synchronised_time(device) - began)
    return median(found[1:])


def product_rate(device, dtype, width, squares, rows=(300, 2800)):
    """Operations a second of the fastest of several products, torch's or our scripts': squares, the model's own with so many columns.  -> (rate, shape)"""
    found = {}
    for m, k, n in [(n, n, n) for n in squares] + [(m, width, out * width) for m in rows for out in (3, 4)] + [(m, 4 * width, width) for m in rows]:
        a, b = torch.randn(m, k, device=device).to(DTYPES[dtype]), torch.randn(k, n, device=device).to(DTYPES[dtype])
        ways = [torch.mm] + [lambda x, y: kernels.onednn(x, y.t())] * (device.type == "cpu" and dtype == "float32" and torch.backends.mkldnn.is_available())
        for multiply in ways:
            found[2 * m * k * n / usual_seconds(lambda multiply=multiply, a=a, b=b: multiply(a, b), device)] = (m, k, n)
    return max(found), found[max(found)]


def bandwidth(device, size=BYTES):
    """Bytes a second, copied (read and written) or read, whichever is faster."""
    a, b = torch.ones(2, size // 4, device=device)
    return max(2 * size / usual_seconds(lambda: b.copy_(a), device), size / usual_seconds(lambda: a.sum(), device))


def random_rows(n, vocab, prompt=250, response=14, k=4):
    """Ids without a text, of FairytaleQA's lengths, ranked."""
    ids = lambda length: torch.randint(vocab, (length,)).tolist()
    return [Row(ids(prompt), [ids(response) for _ in range(k)], i, list(map(float, range(k)))) for i in range(n)]


def rows_of(config, vocab, n):
    if not config.data:
        return random_rows(n, vocab)
    if not Path(config.data).is_dir():
        raise InputError(f"--data {config.data}: no such folder; it (or NANORLHF_DATA) holds FairytaleQAData and tokenizers")
    return bench.choose(reward_fairytale.ranked(config.data), hub.load_tokenizer(Path(config.data) / "tokenizers"), n)[1]


def training(work, trunk, device, dtype, max_tokens=4096):
    """-> step(rows): one optimizer step of train_rm.py or train_sft.py; (operations, bytes that a matrix product does not hide, seconds in AdamW)"""
    head = work == "sft"
    model = heads.Policy(trunk) if head else heads.RewardModel(trunk)
    head or model.init_head()
    optimizer, how = optim.adamw(model.to(device), bench.LR), train_rm.Config(data="", init="", out="")

    def step(rows):
        plan, count = micro_batches([row.num_tokens for row in rows], max_tokens), train_rm.counts(rows, how)
        for batch in prefetch(rows, plan, device):
            with precision.autocast(model, dtype):
                output = model(batch)
            part = losses.sft_loss(output.logprobs, batch.response_mask, sum(len(response) for row in rows for response in row.responses)) if head \
                else train_rm.reward_loss(output, batch, count, how)
            part.backward()
            part.item()
        began = speed.synchronised_time(device)
        optim.update(model, optimizer, bench.LR, optim.gradient_norm(model))
        return 3 * speed.forward_flops(trunk, rows, head), 0, speed.synchronised_time(device) - began
    return step


def decoding(trunk, device, dtype, k=4, new=NEW):
    """-> step(rows): k samples of each prompt. It must compute the prompts, and read the weights, keys and values once a token of all samples."""
    trunk.to(device)

    def step(rows):
        with precision.autocast(trunk, dtype):
            generate(trunk, rows, Sampling(k, new, NEVER, 0, Stream.SAMPLE), 0)
        weights = sum(p.numel() for p in trunk.parameters()) - (trunk.wpe.weight.numel() if hasattr(trunk, "wpe") else 0)
        seen = sum((len(row.prompt) + k * (r + 1)) for row in rows for r in range(new - 1))
        read = DTYPES[dtype].itemsize * ((new - 1) * weights + 2 * len(trunk.blocks) * trunk.width * seen)
        return speed.forward_flops(trunk, [Row(row.prompt, [row.prompt[-1:]]) for row in rows], True), read, 0
    return step


def alternate(step, batches, device, rate, flow):
    """Limits and step in turn.  rate, flow: functions that measure operations and bytes a second  ->  a dict of numbers, medians over the batches"""
    step(batches[0])                             # warms up
    limits, found = [(*rate(), flow())], []
    for rows in batches:
        began = speed.synchronised_time(device)
        operations, read, adamw = step(rows)
        seconds = speed.synchronised_time(device) - began
        limits.append((*rate(), flow()))
        near = [sum(pair) / 2 for pair in zip(*((limit[0], limit[2]) for limit in limits[-2:]))]     # before and after
        bound = operations / near[0] + read / near[1]
        found.append({"seconds": seconds, "bound": bound, "share": bound / seconds, "columns": sum(row.num_tokens for row in rows), "operations": operations,
                      "adamw": adamw, "limit": near[0], "bandwidth": near[1]})
    return {name: median(one[name] for one in found) for name in found[0]} | {"shape": max(limits)[1], "spread": sorted(one["seconds"] for one in found)}


def written(config, work, against, goal, found, record, **more):
    """The row of results.json: seconds beside those that the limit allows."""
    row = table.row(config, work, against, goal, found["seconds"], found["bound"], share=found["share"], ours_spread=[found["spread"][0], found["spread"][-1]],
                    **{name: found[name] for name in ("columns", "operations", "limit", "bandwidth")}, **more)
    if record:
        table.record(row)
    return row


def main(config):
    check_bounds(config, rounds=1)
    device, tiny = dist.setup("cpu", bench.SEED), config.size == "tiny"
    torch.set_num_threads(table.THREADS)
    trunk = gpt2.GPT2(replace(gpt2.SIZES["gpt2"], **(bench.TINY if tiny else {})))
    kernels.choose_kernels(trunk, device, config.dtype)
    rows = rows_of(config, trunk.config.vocab_size, config.groups * config.rounds)
    step = decoding(trunk, device, config.dtype) if config.work == "decode" else training(config.work, trunk, device, config.dtype)
    found = alternate(step, [rows[i::config.rounds] for i in range(config.rounds)], device,
                      lambda: product_rate(device, config.dtype, trunk.width, (128, 256) if tiny else (512, 1024, 2048)),
                      lambda: bandwidth(device, BYTES // 64 if tiny else BYTES))
    numbers = sum(p.numel() for p in trunk.parameters())
    print(f"{NAMES[config.work]}, {numbers / 1e6:.0f} million parameters, {config.dtype}, {table.machine()}; medians of {config.rounds} rounds")
    for name, text in (("columns", f"{found['columns']:.0f}"), ("operations", f"{found['operations'] / 1e9:.1f} G"),
                       ("seconds", "{:.3f} ({:.3f} to {:.3f})".format(found["seconds"], found["spread"][0], found["spread"][-1])),
                       ("at the limit", f"{found['bound']:.3f} s"), ("GFLOP/s", f"{found['operations'] / found['seconds'] / 1e9:.0f}"),
                       ("limit", f"{found['limit'] / 1e9:.0f} GFLOP/s, best in a product {' x '.join(map(str, found['shape']))}"),
                       ("bandwidth", f"{found['bandwidth'] / 1e9:.1f} GB/s"),
                       ("AdamW", f"{found['adamw']:.3f} s; {32 * numbers / found['bandwidth']:.3f} s to read 20 and write 12 bytes a parameter")):
        print(f"  {name:<14}{text}")
    other = "".join(f", {text}" for text, differs in ((config.dtype, config.dtype != "float32"), (f"{config.groups} passages", config.groups > 1)) if differs)
    kind = "memory" if config.work == "decode" else "matrix-product"
    written(config, f"share of the {kind} limit in {NAMES[config.work]}{other}", "the limit's own time", 0.75, found, not tiny)
    print(f"share {found['share']:.2f}")


if __name__ == "__main__":
    run_script(main, Config)
