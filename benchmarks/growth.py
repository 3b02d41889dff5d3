"""How cost grows with K, prompt length and model size: a supervised step on K responses of one prompt, ours in one row, plain transformers in K rows.

    python -m benchmarks.growth --peers DIR

Writes growth.json and growth.png. A point is a process of its own, so that its peak memory is its own. Tokens are counted once for all sides - the prompt
and its K responses, our row's columns - so that tokens a second speak of the same work.
"""
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch.nn.functional import cross_entropy

from benchmarks.table import HERE, THREADS, machine, peak_gb
from nanorlhf.io.read import InputError
from nanorlhf.run import kernels
from nanorlhf.run.cli import check_bounds, run_script

BASE = {"k": 4, "prompt": 256, "new": 32, "layers": 4, "width": 256}       # where the other two grow; new: tokens of a response
SWEEPS = {"responses a prompt (K)": [{"k": k} for k in (1, 2, 4, 8, 16)], "tokens of the prompt": [{"prompt": n} for n in (64, 128, 256, 512, 1024)],
          "million parameters": [{"layers": n, "width": d} for n, d in ((2, 128), (4, 256), (6, 384), (8, 512), (12, 768))]}    # the last is GPT-2's 124M
POSITIONS = 2048                                 # room for the longest prompt
MOST_SECONDS, MOST_GB = 60, 8                    # a peer whose first step needs more is left out
SIDES = {"ours": ("ours: one row", "#1b6ca8", "o"), "peer": ("transformers: K rows", "#d1603d", "s"),
         "lean": ("transformers: K rows, logits of responses alone", "#e0a458", "^")}


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""
    peers: str = ""                              # folder with the peer's environment now/; without it ours alone
    out: str = str(HERE)                         # folder for growth.json and growth.png
    runs: int = 3                                # steps a point, after one that warms up; their median counts
    point: str = ""                              # one side of one point as JSON: how this program calls itself


def side_of(name, point, prompt, responses):
    """-> (model, a function that gives the loss). Ours is one row, the peer's are K; "lean" projects responses alone, as ours does"""
    shape = {"vocab_size": 50257, "n_positions": POSITIONS, "n_embd": point["width"], "n_layer": point["layers"], "n_head": point["width"] // 64}
    if name == "ours":
        from nanorlhf import gpt2, losses
        from nanorlhf.batching import Row, pack_rows
        from nanorlhf.heads import Policy
        from nanorlhf.run import (  # here, because the peer's environment runs this file too
            dist,
        )
        model = Policy(gpt2.GPT2(gpt2.GPT2Config(**shape)))
        kernels.choose_kernels(model.trunk, dist.setup("cpu", 0), "float32")     # as our scripts do

        def loss():
            batch = pack_rows([Row(prompt, responses)])
            return losses.sft_loss(model(batch).logprobs, batch.response_mask)
    else:
        from transformers import GPT2Config, GPT2LMHeadModel
        model = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).train()

        def loss():
            rows, n = torch.tensor([prompt + response for response in responses]), len(responses[0])
            if name == "lean":
                return cross_entropy(model(input_ids=rows[:, :-1], logits_to_keep=n).logits.flatten(0, 1), rows[:, -n:].flatten())
            return model(input_ids=rows, labels=torch.where(torch.arange(rows.shape[1]) < len(prompt), -100, rows)).loss
    with torch.no_grad():                            # every parameter by the order of the published names, so that all losses are one number
        torch.manual_seed(0)
        for key, parameter in sorted((re.sub(r"^(trunk|transformer)\.", "", key), p) for key, p in model.named_parameters()):
            parameter.normal_(mean=float(".ln_" in f".{key}" and key.endswith("weight")), std=0.05)
    return model, loss


def steps(model, loss, n):
    """n times forward, backward, AdamW.  -> yields (seconds, loss) of each"""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    for _ in range(n):
        began = time.perf_counter()
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield time.perf_counter() - began, value.item()


def step_figures(side, point, runs):
    """One side of one point.  -> figures, or {} for a peer over the limits; memory is what is needed beyond the libraries, loaded by a tiny model's step"""
    generator = torch.Generator().manual_seed(0)
    prompt, *responses = (torch.randint(50257, (n,), generator=generator).tolist() for n in [point["prompt"]] + [point["new"]] * point["k"])
    list(steps(*side_of(side, {"layers": 1, "width": 64}, prompt[:1], [prompt[:1]]), 1))
    before, found = peak_gb(which="VmRSS"), []
    model, loss = side_of(side, point, prompt, responses)
    for timed in steps(model, loss, 1 + runs):
        found.append(timed)
        if side != "ours" and (found[0][0] > MOST_SECONDS or peak_gb() > MOST_GB):
            return {}
    seconds, tokens = median(seconds for seconds, _ in found[1:]), point["prompt"] + point["k"] * point["new"]
    return {"loss": found[0][1], "seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds, "memory_gb": peak_gb() - before,
            "parameters": sum(p.numel() for p in model.parameters())}


def in_process(python, side, point, config):
    job = json.dumps({"side": side, "point": point, "runs": config.runs})
    done = subprocess.run([str(python), str(HERE / "growth.py"), "--point", job], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise InputError(f"{side}, {point}: ended with {done.returncode}: {' | '.join(done.stderr.strip().splitlines()[-2:])[-400:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(python, config):
    """Every point once on each side, where sweeps meet once for all.  -> sweep -> list of {"x", "ours", "peer", "lean"}; a {} was left out"""
    known, sweeps = {}, {}
    for name, changes in SWEEPS.items():
        for change in changes:
            key = json.dumps(point := BASE | change)
            if key not in known:
                known[key] = found = {side: in_process(sys.executable if side == "ours" else python, side, point, config)
                                      for side in SIDES if side == "ours" or python}
                print(point, {side: f"{one['tokens_per_second']:.0f} tokens/s, {one['memory_gb']:.2f} GB" if one else "left out"
                              for side, one in found.items()}, flush=True)
                losses = [one["loss"] for one in found.values() if one]
                if max(losses) - min(losses) > 1e-4 * min(losses):
                    raise InputError(f"not the same work at {point}: losses {losses}")
            x = next(iter(change.values())) if len(change) == 1 else known[key]["ours"]["parameters"] / 1e6
            sweeps.setdefault(name, []).append({"x": x, **known[key]})
    return sweeps


def draw(sweeps, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, panels = pyplot.subplots(2, len(sweeps), figsize=(10.5, 5.8), sharex="col", layout="constrained")
    for column, (name, points) in zip(panels.T, sweeps.items()):
        for panel, key, label in zip(column, ("tokens_per_second", "memory_gb"), ("tokens a second", "peak memory, GB")):
            for side, (words, color, marker) in SIDES.items():
                shown = [point for point in points if point.get(side)]
                panel.plot([p["x"] for p in shown], [p[side][key] for p in shown], color=color, marker=marker, markersize=4, label=words)
            panel.set(xscale="log", yscale="log", ylabel=label)
            panel.yaxis.set_major_formatter("{x:g}")
            panel.grid(alpha=0.3, which="both", linewidth=0.5)
        ticks = [point["x"] for point in points]
        column[1].set_xticks(ticks, [f"{x:.0f}" for x in ticks])
        column[1].xaxis.minorticks_off()
        column[1].set_xlabel(name)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(SIDES), fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)


def main(config):
    check_bounds(config, runs=1)
    if config.point:
        print(json.dumps(step_figures(**json.loads(config.point))))
        return
    python, out = config.peers and Path(config.peers).absolute() / "now" / "bin" / "python", Path(config.out)
    if python and not python.exists():
        raise InputError(f"--peers {config.peers}: no now/bin/python there; benchmarks/README.md says how to make it")
    sweeps = measure(python, config)
    out.mkdir(parents=True, exist_ok=True)
    (out / "growth.json").write_text(json.dumps({"machine": machine(), "runs": config.runs, "base": BASE, "sweeps": sweeps}, indent=1) + "\n")
    draw(sweeps, out / "growth.png")


if __name__ == "__main__":
    run_script(main, Config)
