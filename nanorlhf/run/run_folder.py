"""A run's folder. Process 0 alone reads and writes it; it is whole at every instant, and nothing in
it is ever unpickled.

RUN/config.json                    every flag, digests of what they name, the versions, the parent
                                   run
RUN/state-000120.safetensors       after 120 steps: weights, optimizer, and the few numbers that
                                   change; the newest KEEP remain
RUN/nonfinite-000057.safetensors   weights and rows of a step whose loss or gradient was not finite
RUN/SHA256SUMS                     of these files; RUN/model/ has its own
"""
import functools
import json
import os
import re
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path

import torch

from ..io.files import (
    SUMS,
    content_digest,
    file_damage,
    folder_damage,
    lock_folder,
    open_tensors,
    partial_files,
    read_checksums,
    replace_all,
    save_tensors,
)
from ..io.read import InputError, parse_json, read_json
from ..reward import is_function
from . import dist

KEEP = 2                   # states: if the newest is damaged, the one before is there
LIBRARIES = ("torch", "tiktoken", "sentencepiece", "numpy", "safetensors")
INPUTS = ("data", "init", "policy", "reward", "tokenizer")   # flags that name what a run reads
# of a folder that --data names, what io.data reads
DATA_FILES = (
    "train.jsonl*", "val.jsonl*", "test.jsonl*",
    "*/train.jsonl*", "*/val.jsonl*", "*/test.jsonl*",
    "questions/*/*.csv", "section-stories/*/*.csv", "data-by-train-split/*/*/*.csv",
)
ROUNDING = ("device", "max_tokens")    # flags that change the last bits of a sum
MAY_CHANGE = ("out", "steps", "eval_every", "save_every", *ROUNDING)


def states(out):
    """State files, newest first."""
    paths = Path(out).glob("state-*.safetensors")
    named = [path for path in paths if re.fullmatch(r"state-\d+", path.stem)]
    return sorted(named, key=_step, reverse=True)


def _step(path):
    return int(path.stem.removeprefix("state-"))


def read_metadata(path):
    """The metadata of a state or of a report.  -> dict"""
    with open_tensors(path) as file:
        return parse_json((file.metadata() or {}).get("run", "").encode(), path)


# -------------------------------------------------------------------------------- the same run?

@functools.cache
def input_digests(config):
    """{flag: digest} of each flag that names a file or a folder.

    Of a run or model folder that has SHA256SUMS, this file counts: a parent that has trained on is
    another one. After the digest of a reward's file stands the function's name.
    """
    digests = {}
    for flag in INPUTS:
        path, function = getattr(config, flag, ""), ""
        if is_function(path):
            path, _, function = path.rpartition(":")
        if not os.path.exists(path):             # a size's name, or a mistake that is said later
            continue
        if flag == "data":
            digest = content_digest(path, DATA_FILES)
        else:
            folder = Path(path)
            if (folder / "model" / "config.json").exists():
                folder = folder / "model"
            sums = folder / SUMS
            digest = content_digest(sums if sums.exists() else folder)
        digests[flag] = f"{digest}:{function}" if function else digest
    return digests


def resumable(config, script):
    """Is this a new run, or the same one again?  -> true where there is a state to resume

    Refused where flags or inputs are not those that the run was started with, but for MAY_CHANGE.
    """
    return dist.on_rank_zero(lambda: _resumable(config, script))


def _resumable(config, script):
    """By what the folder holds:

    neither config.json nor a state
        no other file, but for what a kill in the first write left     new
        other files                                                    refused
    a run of another script                                            refused
    no state
        SHA256SUMS lists one: somebody has removed it                  refused
        nothing was saved: a start with other flags loses nothing      new
    a state
        of the same flags and inputs                                   resumed
        --steps has grown, under a constant schedule                   resumed
        of other flags or inputs                                       refused
    """
    # before any of them is loaded, and anew: another run of this process may have written them
    input_digests.cache_clear()
    input_digests(config)
    out = Path(config.out)
    if not states(out) and not (out / "config.json").exists():
        expected = {*partial_files(out), out / SUMS}
        if out.exists() and not (out.is_dir() and {*out.iterdir()} <= expected):
            raise InputError(f"--out {out}: exists and is not a run of ours; name another folder")
        return False
    before = _read_config(out)
    if before["script"] != script:
        raise InputError(f"--out {out}: a run of {before['script']!s:.80}, not of {script}")
    if not states(out):
        had_states = any(name.startswith("state-") for name in read_checksums(out))
        if had_states and not partial_files(out):          # these: killed in its first save
            raise InputError(
                f"--out {out}: its states are gone, so it cannot go on; "
                "name another folder, or remove this one"
            )
        return False
    changes = _changed_flags(before["flags"], before["inputs"], config)
    if changes:
        raise InputError(
            f"--out {out} was started with other flags or inputs: {'; '.join(changes)}; "
            "name another folder"
        )
    return True


def _changed_flags(old, old_digests, config):
    """-> words for each flag that must not change and has, itself or in what it names"""
    digests = input_digests(config)
    changes = []
    for field in fields(config):
        key = field.name
        value = getattr(config, key)
        before = old.get(key, field.default)     # an older version lacked the flag
        is_same = before == value
        if key in digests and key in old_digests:
            is_same = digests[key] == old_digests[key]     # wherever it lies
        if key not in MAY_CHANGE and not is_same:
            what = f"{before!r:.80} is now {value!r}"
            if before == value:
                what = f"{value!r} has other content now"
            changes.append(f"--{key} {what}")
    steps = f"--steps {old['steps']} is now {config.steps}"
    if config.schedule != "constant" and config.steps != old["steps"]:
        changes.append(f"{steps} (only with --schedule constant: the learning rate depends on it)")
    elif config.steps < old["steps"]:
        changes.append(f"{steps} (fewer)")
    return changes


def _read_config(out):
    """{script, flags, inputs} of the run: from config.json, or where that is damaged, a state."""
    problems = []
    for path in [out / "config.json", *states(out)]:
        try:
            if problem := file_damage(path):
                raise InputError(f"{out}: {problem}")
            values = read_json(path) if path.suffix == ".json" else read_metadata(path)
            values = {"inputs": {}} | values     # a state and older versions' runs have none
            match values:
                case {
                    "script": str(), "flags": {"steps": int(steps)}, "inputs": dict()
                } if type(steps) is int:
                    if problems:
                        print(f"  warning: {problems[0]}; the flags are read from {path.name}")
                    return values
            raise InputError(f"{path}: does not say which script made it, with which flags")
        except InputError as error:
            problems.append(str(error))
    raise InputError(f"{problems[0]}, and no state is whole; remove the folder to start again")


# The lock on this process's run folder, until the process ends or begins its next run: of two runs
# in one folder each would remove the other's files.
LOCKS = []


def write_config(config, script, parent):
    """Locks the folder and writes the run's config.json: from here on the folder is a run."""
    def write():
        out = Path(config.out)
        parent_config = Path(parent) / "config.json"
        lineage = read_json(parent_config) if parent_config.exists() else {}
        values = {
            "script": script,
            "flags": asdict(config),
            "inputs": input_digests(config),
            "versions": {name: version(name) for name in LIBRARIES},
            "parent": lineage if "flags" in lineage else None
        }
        try:
            out.mkdir(parents=True, exist_ok=True)
            while LOCKS:
                os.close(LOCKS.pop())
            LOCKS.append(lock_folder(out))
            replace_all(out, {"config.json": (json.dumps(values, indent=1) + "\n").encode()})
        except BlockingIOError:
            raise InputError(
                f"--out {out}: another process is at work there; wait for it, or stop it"
            ) from None
        except OSError as error:
            raise InputError(f"--out {out}: cannot be written ({error.strerror})") from None
    dist.on_rank_zero(write)


# -------------------------------------------------------------------------------------- states

def save(config, script, model, optimizer, step, export, **numbers):
    """The model as `export()` writes it, then everything that the next step depends on.

    step: finished steps;  numbers: what else changes (the KL coefficient)
    Adam's state is written by hand, one tensor per parameter and moment, by the parameter's name:
    optimizer.state_dict() numbers the parameters, and would not fit a safetensors file.
    """
    def write():
        export()
        tensors = {}
        for name, parameter in model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach().cpu()
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value.cpu()
        flags = asdict(config)
        del flags["out"]                         # a run's folder may be moved
        metadata = {
            "script": script,
            "flags": flags,
            "step": step,
            "threads": torch.get_num_threads(),
            "processes": dist.world_size(),
            **numbers
        }
        file = f"state-{step:06}.safetensors"
        old = states(config.out)
        # later ones are damaged, or the run would have gone on from there
        keep = [path for path in old if _step(path) < step][: KEEP - 1]
        remove = [path.name for path in old if path not in keep and path.name != file]
        content = save_tensors(tensors, {"run": json.dumps(metadata)})
        replace_all(config.out, {file: content}, remove)
    dist.on_rank_zero(write)


def load(config, model, optimizer, initial):
    """Resumes from the newest state that is whole.

    Fills the optimizer at every process, and the model at process 0: dist.broadcast follows, as in
    a new run.
    initial: the numbers of a new run  ->  those of this one
    """
    numbers = dist.on_rank_zero(lambda: _load(config, model, optimizer, initial))
    if numbers["has_moments"]:
        for parameter in model.parameters():
            if dist.rank() > 0:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter)
                }
            dist.broadcast(optimizer.state[parameter].values())
    # sums are split by processes and by threads: another number of them gives other last bits
    to_the_bit = numbers["processes"] == dist.world_size()
    if to_the_bit:
        torch.set_num_threads(numbers["threads"])
    for flag in ROUNDING:
        to_the_bit &= numbers["flags"].get(flag) == getattr(config, flag, None)
    print(f"resuming at step {numbers['step']}")
    if not to_the_bit:
        print(f"from step {numbers['step']} on equal to rounding, not to the bit")
    return {name: numbers[name] for name in initial}


def _load(config, model, optimizer, initial):
    out = Path(config.out)
    paths = states(out)
    problems = []
    model_damage = folder_damage(out / "model") if paths else None
    if model_damage:
        problems.append(f"{out / 'model'}: {model_damage}")
    for i, path in enumerate(paths):
        if model_damage and _step(path) == config.steps:
            continue                             # no save would follow that writes the model again
        optimizer.state.clear()
        try:
            if problem := file_damage(path):
                raise ValueError(problem)
            numbers = _restore(path, model, optimizer, initial)
        except torch.OutOfMemoryError:
            raise                                # nothing is wrong with the file
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error)[:100].split())
            problems.append(f"{path}: damaged or of another model ({reason})")
            continue
        if problems:
            print(f"  warning: {'; '.join(problems)}; going on from {path.name}")
        # A kill in the last save may have left older states, and no save follows that removes them.
        for older in paths[i + KEEP:]:
            older.unlink()
        return numbers | {"has_moments": bool(optimizer.state)}
    problem = "; ".join(problems) or f"{out}: no state here"
    raise InputError(f"{problem}; remove the folder to start again")


@torch.no_grad()
def _restore(path, model, optimizer, initial):
    """initial: an example of each number that must be there  ->  the numbers"""
    numbers = read_metadata(path)
    counts = {"threads": 1, "processes": 1}
    for key, example in (initial | counts).items():
        number = numbers[key]
        low, high = (1, 2**16) if key in counts else (0, 2**31)
        if type(number) is not type(example) or not low <= number < high:
            raise ValueError(f"{key} is {number!r:.40}")
    if type(numbers["flags"]) is not dict:
        raise ValueError(f"flags are {numbers['flags']!r:.40}")
    parameters = dict(model.named_parameters())
    with open_tensors(path) as file:
        keys = set(file.keys())
        weights = {key for key in keys if key.startswith("model.")}
        if weights != {f"model.{name}" for name in parameters}:
            raise ValueError("its weights have other names")
        for name, parameter in parameters.items():
            state = {}
            shapes = {parameter.shape}
            for key in ("model", "step", "exp_avg", "exp_avg_sq"):
                if f"{key}.{name}" in keys:
                    state[key] = file.get_tensor(f"{key}.{name}").to(parameter.device)
                    if key != "step":
                        shapes.add(state[key].shape)
            if len(state) not in (1, 4) or len(shapes) > 1:
                raise ValueError(f"{name} has another shape, or half of its moments")
            parameter.copy_(state.pop("model"))
            if state:
                optimizer.state[parameter] = state
    return numbers
