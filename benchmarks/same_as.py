"""Does the working tree do the same as a commit? Small jobs of all scripts, compared bit for bit.

    python benchmarks/same_as.py COMMIT [--jobs NAME,NAME] [--cache DIR]      in the repository

For a change that should change nothing: modules, flags and metrics may have other names. Every job
is run by the commit, in a temporary git worktree, and by the working tree, on one thread of the CPU
and on texts that are made up here. A job that builds on another one's run takes the commit's run in
both trees, so that a difference shows where it arises. Compared are metrics.jsonl without what
depends on the machine's speed, samples.jsonl, the weights and all other files of the model's
folder, and the states with their numbers. Where all of it is the same the exit code is 0, else 1.

A cache keeps what the commit made, so that the next comparison runs the working tree alone.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

# What has been renamed, OLD: NEW. The jobs below are written with the new names; a tree whose
# --help does not know the new name of a flag is given the old one.
FLAGS = {
    "max_new": "max_new_tokens",
    "kl_target": "kl_coef_target",
    "recompute": "activation_checkpointing",
    "other": "compare_with",
    "keep": "include_originals",
    "limit": "max_prompts",
}
METRICS = {
    "share": "mfu",
    "kl_rollout": "approx_kl",
    "value_explained": "explained_variance",
}
MACHINE = {"seconds", "tokens_per_second", "mfu", "memory_gb"}     # metrics that no two runs share

PROGRAMS = {
    "sft": ["train_sft.py"],
    "rm": ["train_rm.py"],
    "ppo": ["train_ppo.py"],
    "sample": ["-m", "nanorlhf.sample"],
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]


# ------------------------------------------------------------------------------------------- jobs

@dataclass
class Job:
    """One run of a program. {data} and {judge} in a flag's value are files, {NAME} a job's run."""
    program: str
    flags: dict
    stop: int = 0                        # the run is made twice: this many steps, then all of them
    processes: int = 1

    @property
    def inputs(self):
        """Names of the jobs whose runs this one needs."""
        found = re.findall(r"{(.*?)}", " ".join(map(str, self.flags.values())))
        return [name for name in found if name in JOBS]


def sft(init, **flags):
    shared = dict(data="{data}", init=init, steps=6, groups=6, max_tokens=64, lr=3e-3, warmup=2)
    return Job("sft", {**shared, "eval_every": 2, **flags})


def rm(loss, init="{sft-gpt2}", **flags):
    shared = dict(data="{data}", init=init, loss=loss, steps=4, groups=6, max_tokens=96, lr=1e-3)
    return Job("rm", {**shared, "warmup": 1, "eval_every": 2, **flags})


def ppo(policy, reward, stop=0, processes=1, **flags):
    shared = dict(data="{data}", policy=policy, reward=reward, steps=3, groups=6, k=3, lr=1e-3)
    sizes = dict(max_new_tokens=8, epochs=2, minibatches=2, max_tokens=64, eval_every=2)
    return Job("ppo", {**shared, **sizes, **flags}, stop, processes)


def sample(policy, **flags):
    return Job("sample", dict(policy=policy, max_new_tokens=8, **flags))


CONTROL = dict(kl_coef_target=0.05, kl_horizon=40)

JOBS = {
    "sft-gpt2": sft("gpt2-nano"),
    "sft-checkpointing": sft("gpt2-nano", activation_checkpointing=True, seed=1),
    "sft-llama": sft("llama-nano", max_length=14),
    "sft-float64": sft("gpt2-nano", dtype="float64", schedule="constant"),
    "rm-ranking": rm("ranking"),
    "rm-apart": rm("ranking", pairs="apart", labels="scores"),
    "rm-classification": rm("classification", labels="label", activation_checkpointing=True),
    "rm-bfloat16": rm("classification", "{sft-llama}", dtype="bfloat16"),
    "rm-label": rm("quantile", quantiles=5),
    "rm-scores": rm("quantile", quantile_target="scores", kappa=0, rank_coef=0.5),
    "rm-self-mean": rm("quantile", "{sft-llama}", quantile_target="self_mean", quantile_coef=0.5),
    "sample-judged": sample("{sft-gpt2}", data="{data}", judge="{judge}", k=3, top_p=0.9,
                            include_originals=True, max_prompts=6),
    "sample-prompt": sample("{sft-gpt2}", prompt="the old king", compare_with="{sft-llama}"),
    "ppo-model": ppo("{sft-gpt2}", "{rm-ranking}", temperature=0.7, gamma=0.95, lam=0.9, **CONTROL),
    "ppo-early-stop": ppo("{sft-gpt2}", "{rm-classification}", target_kl=1e-3, epochs=4),
    "ppo-cvar": ppo("{sft-gpt2}", "{rm-scores}", statistic="cvar:0.3", detach_value=True),
    "ppo-function": ppo("{sft-llama}", "{judge}", activation_checkpointing=True, eos_penalty=0.5),
    "ppo-resumed": ppo("{sft-llama}", "{rm-label}", 2, steps=4, schedule="constant", **CONTROL),
    "ppo-processes": ppo("{sft-gpt2}", "{rm-self-mean}", processes=2, lam=0.9),
}

JUDGE = '''
def score(prompts, responses):
    """Prefers short answers with many different letters."""
    return [len(set(text)) - 0.25 * len(text) + 0.125 * ("old" in prompt)
            for prompt, text in zip(prompts, responses)]
'''


def groups(count, seed):
    """Groups JSONL with 3 or 4 short responses a prompt, judged in every way, with ties."""
    draw = random.Random(seed)
    words = "the a old young king queen fox river sings sleeps runs home again very slowly".split()
    text = lambda least, most: " ".join(draw.choices(words, k=draw.randint(least, most)))
    lines = []
    for _ in range(count):
        places = [draw.randrange(4) for _ in range(draw.randint(3, 4))]
        responses = [{
            "text": f" {text(1, 6)}.",
            "place": place,
            "label": int(place < 2),
            "scores": [round(draw.gauss(-place, 1), 3) for _ in range(draw.randint(1, 3))],
            "ended": draw.random() < 0.9,
        } for place in places]
        cut = draw.random() < 0.5
        lines.append({"prompt": f"{text(3, 9)}:", "responses": responses, "cut": cut})
    return "".join(json.dumps(line) + "\n" for line in lines)


FILES = {
    "data/train.jsonl": groups(24, seed=0),
    "data/val.jsonl": groups(8, seed=1),
    "judge.py": JUDGE,
}


# ------------------------------------------------------------------------------------------- runs

class Failed(Exception):
    """A job ended with an error, which is the message."""


def python(tree, words):
    """Runs Python in a tree, with the tree's own modules.  -> what was printed"""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["nothing printed"]
        errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?(error|\w+Error):", line)]
        raise Failed(f"exit code {done.returncode}, {(errors or lines[-1:])[0]}")
    return done.stdout


@functools.cache
def known(tree, program):
    """The flags that a program of a tree has."""
    said = python(tree, [*PROGRAMS[program], "--help"])
    return set(re.findall(r"^  --(\w+)", said, re.MULTILINE))


def spelled(tree, program, name):
    """A flag as this tree calls it."""
    if name in known(tree, program):
        return name
    return next((old for old, new in FLAGS.items() if new == name), name)


def run(tree, job, out, places):
    """Runs a job in a tree, into the new folder `out`."""
    flags = dict(job.flags, out=out, device="cpu")
    if job.program == "sample":
        out.mkdir()
        flags["out"] = out / "samples.jsonl" if "data" in flags else ""
    launcher = [*TORCHRUN, f"--nproc_per_node={job.processes}"] if job.processes > 1 else []
    for steps in [job.stop, 0] if job.stop else [0]:
        chosen = flags | ({"steps": steps} if steps else {})
        words = [f"--{spelled(tree, job.program, name)}={str(value).format_map(places)}"
                 for name, value in chosen.items()]
        printed = python(tree, [*launcher, *PROGRAMS[job.program], *words])
    if not any(out.glob("*.jsonl")):     # a prompt's responses are printed alone
        for name, place in {**places, "out": out}.items():
            printed = printed.replace(str(place), name)
        (out / "printed.txt").write_text(printed)


def key(name, commit):
    """A name for what a commit makes of a job: another job, text or torch has another one."""
    inputs = [key(name, commit) for name in JOBS[name].inputs]
    about = [repr(JOBS[name]), FILES, torch.__version__, inputs]
    return f"{commit}-{name}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]}"


class Commit:
    """The runs of a commit, made when they are asked for and kept in the cache."""

    def __init__(self, commit, cache, work, files):
        self.commit, self.cache, self.work, self.files = commit, cache, work, files

    @functools.cached_property
    def tree(self):
        """The worktree; with everything in the cache none is made."""
        tree = self.work / "tree"
        git("worktree", "add", "--quiet", "--detach", tree, self.commit)
        return tree

    def places(self, job):
        """What the names in a job's flags stand for."""
        return self.files | {name: self.run(name) for name in job.inputs}

    def run(self, name):
        """The folder of a run."""
        kept = self.cache / key(name, self.commit)
        if not kept.exists():
            job, out = JOBS[name], self.cache / "unfinished"
            shutil.rmtree(out, ignore_errors=True)
            run(self.tree, job, out, self.places(job))
            out.rename(kept)
        return kept

    def close(self):
        if "tree" in vars(self):
            git("worktree", "remove", "--force", self.tree)


# ---------------------------------------------------------------------------------------- compare

@dataclass
class Found:
    """What a run has left, each value with a name."""
    weights: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    samples: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)


def rows(path):
    """The values in a JSONL file by name and line, metrics with their new names."""
    found = {}
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    for number, line in enumerate(filter(None, lines), 1):
        for name, value in json.loads(line).items():
            found[f"{METRICS.get(name, name)} of line {number}"] = value
    return {name: value for name, value in found.items() if name.split()[0] not in MACHINE}


def read(out):
    """A run's folder -> Found"""
    found = Found(metrics=rows(out / "metrics.jsonl"), samples=rows(out / "samples.jsonl"))
    for path in [out / "model" / "model.safetensors", *out.glob("state-*.safetensors")]:
        if path.exists():
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    found.weights[f"{name} of {path.name}"] = file.get_tensor(name)
                about = json.loads((file.metadata() or {}).get("run", "{}"))
            numbers = {name: value for name, value in about.items() if type(value) in (int, float)}
            found.metrics |= {f"{name} of {path.name}": value for name, value in numbers.items()}
    for path in [*out.glob("printed.txt"), *out.glob("model/*")]:
        if path.suffix != ".safetensors" and path.name != "SHA256SUMS":
            found.files[path.name] = path.read_bytes()
    return found


def distance(a, b):
    """0 where two values are the same bits, else their relative difference; infinite for texts."""
    if isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return float("inf")
        if torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)):
            return 0.0
        a, b = a.double(), b.double()
        size = ((a - b).abs().max() / torch.maximum(a.abs(), b.abs()).max()).item()
    elif type(a) is type(b) and a == b:
        return 0.0
    elif type(a) in (int, float) and type(b) in (int, float):
        size = abs(a - b) / max(abs(a), abs(b))
    else:
        return float("inf")
    return size if size > 0 else float("inf")                    # NaN, or 0 and -0


def differences(old, new):
    """-> a line for each kind of value that differs"""
    for kind in vars(old):
        a, b = vars(old)[kind], vars(new)[kind]
        sizes = {name: distance(a[name], b[name]) for name in a if name in b}
        sizes = {name: size for name, size in sizes.items() if size}
        if sizes:
            worst = max(sizes, key=sizes.get)
            size = f" by up to {sizes[worst]:.1e}" if sizes[worst] < float("inf") else ""
            yield f"{kind} differ{size} ({worst}; {len(sizes)} of {len(a)} differ)"
        missing, added = a.keys() - b.keys(), b.keys() - a.keys()
        for where, names in (("commit", missing), ("working tree", added)):
            if names:
                yield f"{kind} only in the {where}: {min(names)} ({len(names)} in all)"


def compare(name, commit, root, work):
    """Runs a job in both trees.  -> what differs, in words; empty where nothing does"""
    try:
        old = commit.run(name)
        places = commit.places(JOBS[name])
    except Failed as error:
        return f"fails in the commit: {error}"
    new = work / name
    try:
        run(root, JOBS[name], new, places)
        found = read(old)
        if not any(vars(found).values()):
            return "nothing to compare: the run has left nothing"
        return "; ".join(differences(found, read(new)))
    except Failed as error:
        return f"fails in the working tree: {error}"
    finally:
        shutil.rmtree(new, ignore_errors=True)


# ------------------------------------------------------------------------------------------- main

def git(*words):
    command = ["git", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what the working tree is compared with")
    parser.add_argument("--jobs", default=",".join(JOBS), help="names with commas  [%(default)s]")
    parser.add_argument("--cache", type=Path, help="folder for the commit's runs  [none]")
    found = parser.parse_args()
    found.jobs = found.jobs.split(",")
    for name in found.jobs:
        if name not in JOBS:
            parser.error(f"--jobs {name}: no such job, there are {', '.join(JOBS)}")
    return found


def main():
    asked = arguments()
    root = Path(git("rev-parse", "--show-toplevel"))
    sha = git("rev-parse", "--verify", f"{asked.commit}^{{commit}}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))      # the worktree goes all the same
    with tempfile.TemporaryDirectory(prefix="same-as-") as folder:
        work = Path(folder)
        for name, text in FILES.items():
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_text(text)
        cache = (asked.cache or work / "cache").absolute()
        cache.mkdir(parents=True, exist_ok=True)
        files = {"data": work / "data", "judge": f"{work / 'judge.py'}:score"}
        with contextlib.closing(Commit(sha, cache, work, files)) as commit:
            different = 0
            for name in asked.jobs:
                said = compare(name, commit, root, work)
                different += bool(said)
                print(f"{name:<20}{said or 'equal to the bit'}", flush=True)
    print(f"{len(asked.jobs) - different} of {len(asked.jobs)} jobs equal to the bit")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
