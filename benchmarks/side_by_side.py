"""What every benchmark shares: the same weights and texts for both sides, ours and the peer in turn, the check that the work is the same, the table.

A benchmark fills a `work_folder` and hands two functions to `measure`, each of which runs one side once, in a process of its own, and returns a `Side`.
"""
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Literal

import torch

from benchmarks import table
from benchmarks.table import HERE, THREADS, peak_gb, record
from nanorlhf import batching, gpt2
from nanorlhf.heads import Policy, RewardModel
from nanorlhf.io import data, hub
from nanorlhf.io.read import InputError
from nanorlhf.reward import TextReward
from nanorlhf.run.cli import check_bounds

ROOT = HERE.parent
SEED = 0
LR = 2e-5
RTOL = {"float32": 1e-4, "bfloat16": 3e-3}      # of the first step's loss; bfloat16 has three digits, and the two sides round in other places
LATER = {"float32": 1e-4, "bfloat16": 1e-2}     # of the later steps' losses: in bfloat16 AdamW makes much of a gradient that is mostly rounding
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
TINY = {"n_layer": 2, "n_embd": 64, "n_head": 4}


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of every benchmark."""
    peers: str = ""                              # folder with the peers' environments now/ and ppo/; without it ours alone is run, the table stays
    data: str = os.environ.get("NANORLHF_DATA", "")   # folder with FairytaleQAData/, hh-rlhf/ and tokenizers/ (GPT-2's two BPE files)
    runs: int = 3                                # runs of each side, in turn: ours, theirs, ours, theirs
    steps: int = 4                               # steps a run; the first warms up and is not timed
    dtype: Literal["float32", "bfloat16"] = "float32"   # of the forward on both sides; weights and optimizer are float32
    size: Literal["gpt2", "tiny"] = "gpt2"       # gpt2 is the 124M shape; tiny is for trying a benchmark out and never written to the table


@dataclasses.dataclass(frozen=True)
class Trainers(Options):
    """And one more where the peer is a trainer of trl."""
    peer: Literal["tuned", "default"] = "tuned"  # tuned: with all that makes it fast here; default: as installed, number format, AdamW and texts apart


@dataclasses.dataclass
class Side:
    """One run of one side."""
    seconds: list[float]                         # a step, the first among them
    losses: list[float]                          # a step; or other numbers that must be the same on both sides
    memory_gb: float                             # greatest resident memory up to the last step
    versions: dict[str, str]
    found: dict = dataclasses.field(default_factory=dict)    # all else that the run says, by name, a list each: mfu, padding, ratio_first ...


@dataclasses.dataclass
class Row:
    """What a line of the table says besides the figures."""
    work: str                                    # what is measured, in words
    against: str                                 # the peer, in words
    goal: float                                  # how many times faster ours should be
    unit: str                                    # what is counted: pairs, questions, tokens
    per_step: float | None                       # how many of them a step has; None: as many as the peer's batches have examples, on average
    extra: dict = dataclasses.field(default_factory=dict)    # other numbers worth keeping in results.json


def python_of(config, environment):
    """Checks the flags.  -> the interpreter of the peer's environment, or None where ours alone is run"""
    check_bounds(config, runs=1, steps=2)
    if not config.data or not Path(config.data).is_dir():
        raise InputError(f"--data {config.data or '(none)'}: no such folder; it (or NANORLHF_DATA) holds FairytaleQAData, hh-rlhf, tokenizers")
    if not config.peers:
        return None
    python = Path(config.peers).absolute() / environment / "bin" / "python"       # not resolved: a link out of its environment has no packages
    if not python.exists():
        raise InputError(f"--peers {config.peers}: no {environment}/bin/python there; benchmarks/README.md says how to make it")
    return python


@contextlib.contextmanager
def work_folder():
    """A temporary folder for weights, data and runs (some GB). It and a running side are gone afterwards, also after a SIGTERM."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with tempfile.TemporaryDirectory(prefix="nanorlhf-benchmark-") as folder:
            yield Path(folder)
    finally:
        signal.signal(signal.SIGTERM, before)


def save_policy(config, folder):
    """Random weights of config.size with the real tokenizer as a Hugging Face folder.  -> its tokenizer"""
    tok = hub.load_tokenizer(Path(config.data) / "tokenizers")
    shape = {} if config.size == "gpt2" else TINY | {"vocab_size": tok.vocab_size}
    torch.manual_seed(SEED)
    hub.save_policy(folder, Policy(gpt2.GPT2(dataclasses.replace(gpt2.SIZES["gpt2"], **shape))), tok)
    return tok


def save_scorer(init, folder):
    """The scorer that train_rm.py --init INIT --seed SEED starts from, head included, as a Hugging Face folder. The loss check sees that it is."""
    torch.manual_seed(SEED)
    trunk, tok, _ = hub.init_or_load(str(init), "", None, head=False)
    scorer = RewardModel(trunk)
    scorer.init_head()
    hub.save_reward_model(folder, TextReward(scorer, tok))


def choose(groups, tok, n):
    """n groups at random that fit the context whole and give the same tokens encoded apart, as ours, and as one text, as the peers.  -> (groups, rows)"""
    chosen, rows = [], []
    for i in batching.permutation(len(groups), SEED, 0):
        group = dataclasses.replace(groups[i], truncatable=False)
        found, _ = batching.encode_all([group], tok, gpt2.SIZES["gpt2"].context)
        texts = [tok.encode_prompt(group.prompt + response.text) for response in group.responses]
        if found and texts == [found[0].prompt + ids[:-1] for ids in found[0].responses]:      # the last is EOS
            chosen, rows = chosen + [group], rows + found
        if len(chosen) == n:
            return chosen, rows
    raise InputError(f"--steps: the data has {len(chosen)} suitable groups, {n} are needed")


def save_groups(groups, folder):
    """The data folder of our scripts: these groups to train on, and the first of them held out, since one is wanted."""
    folder.mkdir()
    for name, part in (("train", groups), ("val", groups[:1])):
        (folder / f"{name}.jsonl").write_bytes(data.write_groups(part))


def last_lines(path):
    return " | ".join(path.read_text(errors="replace").strip().splitlines()[-3:])[-600:]


def run_ours(script, flags, loss="loss"):
    """Our script as a user calls it; what it says of each step from its metrics.jsonl. Two flags are needed: out, a new folder, and steps.

    It is asked for one step more and ended in there: the evaluation and saving that follow a run are in no figure.
    """
    out, log, rows = Path(flags["out"]), Path(f"{flags['out']}.log"), []
    command = [sys.executable, str(ROOT / script)] + [f"--{name}={value}" for name, value in (flags | {"steps": flags["steps"] + 1}).items()]
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)})
    try:
        while len(rows) < flags["steps"]:
            if process.poll() is not None:
                raise InputError(f"{script} ended with {process.returncode} after {len(rows)} steps: {last_lines(log)}")
            time.sleep(0.05)
            lines = (out / "metrics.jsonl").read_text().split("\n")[:-1] if (out / "metrics.jsonl").exists() else []
            rows = [row for row in map(json.loads, lines) if "seconds" in row][: flags["steps"]]
        memory = peak_gb(process.pid)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(out, ignore_errors=True)
    found = {name: [row[name] for row in rows] for name in rows[0]}
    return Side(found["seconds"], found[loss], memory or found["memory_gb"][-1], {"torch": metadata.version("torch")}, found)


def run_peer(python, script, job, folder):
    """A stand-alone script of benchmarks/peers with one JSON file, in its own environment; the last line it prints is a Side as JSON."""
    path, log = folder / "job.json", folder / "peer.log"
    path.write_text(json.dumps({"threads": THREADS, **job}))
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": "", "TMPDIR": str(folder)}
    with open(log, "w") as errors:
        done = subprocess.run([str(python), str(HERE / "peers" / script), str(path)], stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder,
                              env=ENVIRONMENT | offline)
    try:
        return Side(**json.loads(done.stdout.strip().splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        raise InputError(f"peers/{script} ended with {done.returncode} and no result: {done.stdout[-200:]} {last_lines(log)}") from None


def same_work(ours, peer, rtol, later):
    """Refuses two sides whose losses differ: by more than rtol at the first step, by more than `later` after it.  -> the first step's relative difference

    Same weights, texts and loss give the same number at first, the same optimizer in the steps after it.
    """
    differences = [abs(a - b) / max(abs(a), abs(b), 1e-12) for a, b in zip(ours.losses, peer.losses, strict=True)]
    for step, (difference, allowed) in enumerate(zip(differences, [rtol] + [later] * len(differences))):
        if not difference <= allowed:                    # a NaN is refused, too
            raise InputError(f"not the same work: the loss of step {step + 1} is {ours.losses[step]:.7g} here and {peer.losses[step]:.7g} there "
                             f"(relative difference {difference:.2g}, allowed {allowed:.2g})")
    return differences[0]


def summary(name, sides):
    """Median of all timed steps of all runs; spread: the least and greatest of the runs' own medians."""
    medians, prefix = [median(side.seconds[1:]) for side in sides], "" if name == "ours" else f"{name}_"
    return {f"{name}_seconds": median(s for side in sides for s in side.seconds[1:]), f"{name}_spread": [min(medians), max(medians)],
            f"{name}_memory_gb": max(side.memory_gb for side in sides), f"{name}_losses": sides[0].losses[:8],
            **{f"{prefix}{ours}": median(x for side in sides for x in side.found[theirs][1:])
               for ours, theirs in (("share", "mfu"), ("padding", "padding")) if theirs in sides[0].found}}


def measure(config, row, ours, peer=None, rtol=None, later=None):
    """Runs ours() and peer() in turn, config.runs times each, checks, prints, and, at full size, writes results.json and the table.

    ours, peer: functions without arguments that give a Side; without a peer nothing is compared and nothing written. rtol, later: see same_work,
    by default those of the number format.  -> the row of results.json
    """
    sides, difference = {"ours": [], **({"peer": []} if peer else {})}, 0.0
    for run in range(config.runs):
        for name, found in sides.items():
            found.append({"ours": ours, "peer": peer}[name]())
            print(f"run {run + 1}/{config.runs}  {name}  {median(found[-1].seconds[1:]):.3f} s a step, losses {found[-1].losses[:8]}", flush=True)
        if peer:
            difference = max(difference, same_work(sides["ours"][-1], sides["peer"][-1], rtol or RTOL[config.dtype], later or LATER[config.dtype]))
    result = table.row(config, f"{row.work}, {config.dtype}", row.against, row.goal, **summary("ours", sides["ours"]), **(summary("peer", sides["peer"]) if peer else {}))
    result |= {"unit": row.unit, "per_second": row.per_step / result["ours_seconds"], **row.extra}
    if peer:
        words = {name: " ".join(f"{package} {version}" for package, version in found[0].versions.items()) for name, found in sides.items()}
        result |= {"versions": f"ours {words['ours']}, peer {words['peer']}", "loss_difference": difference,
                   "memory_ratio": result["ours_memory_gb"] / result["peer_memory_gb"],
                   **({"peer_share": result["share"] / result["ratio"]} if "share" in result else {})}       # of the same operations
        print(f"{result['work']}: {result['ratio']:.2f} times as fast as {row.against} (goal {row.goal:g})")
        if config.size == "gpt2":
            record(result)
    return result


def train_against_trl(config, work, row, groups, per_step, ours, peer):
    """A training script against a trainer, per_step groups a step, all chosen out of `groups`.

    ours: (script, its own flags);  peer: (its environment's python or None, script, model folder, group -> examples)
    """
    python, peer_script, model, examples = peer
    chosen, _ = choose(groups, hub.load_tokenizer(work / "policy"), config.steps * per_step)
    save_groups(chosen, work / "data")
    steps = [batching.batch_indices(len(chosen), per_step, step, SEED) for step in range(config.steps)]          # as our scripts take them
    batches = [[example for i in step for example in examples(chosen[i])] for step in steps]
    row = dataclasses.replace(row, against=f"{row.against}, {config.peer}", per_step=row.per_step or sum(map(len, batches)) / len(batches))
    flags = {"data": work / "data", "init": work / "policy", "out": work / "run", "steps": config.steps, "groups": per_step, "lr": LR, "warmup": 0,
             "schedule": "constant", "seed": SEED, "dtype": config.dtype, "device": "cpu", **ours[1]}
    job = {"batches": batches, "lr": LR, "dtype": config.dtype, "out": str(work / "peer"), "model": str(model), "peer": config.peer}
    return measure(config, row, lambda: run_ours(ours[0], flags), python and (lambda: run_peer(python, peer_script, job, work)))
