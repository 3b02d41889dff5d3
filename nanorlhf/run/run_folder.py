"""A run's folder. Process 0 alone reads and writes it; it is whole at every instant, and nothing in it is ever unpickled.

RUN/config.json                    every flag, the versions, the parent run
RUN/state-000120.safetensors       after 120 steps: weights, optimizer, and the few numbers that change; the newest KEEP stay
RUN/nonfinite-000057.safetensors   weights and rows of a step whose loss or gradient was not finite
RUN/SHA256SUMS                     of these files; RUN/model/ has its own
"""
import dataclasses
import json
import os
import re
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..io.files import (
    SUMS,
    file_damage,
    folder_damage,
    lock_folder,
    partial_files,
    read_checksums,
    replace_all,
)
from ..io.hub import read_json, save_tensors
from ..io.read import InputError, parse_json
from . import dist

KEEP = 2                   # states: if the newest is damaged, the one before is there


def states(out):
    """State files, newest first."""
    return sorted((path for path in Path(out).glob("state-*.safetensors") if re.fullmatch(r"state-\d+", path.stem)), key=_step, reverse=True)


def _step(path):
    return int(path.stem.removeprefix("state-"))


# ---------------------------------------------------------------------------------------------------------- the same run?

def resumable(config, script):
    """Is this a new run, or the same one again? Other flags than the run was started with are refused.  -> true where there is a state to resume"""
    return dist.on_rank_zero(lambda: _resumable(Path(config.out), dataclasses.asdict(config), script))


def _resumable(out, flags, script):
    if not (out / "config.json").exists() and not states(out):
        if out.exists() and (not out.is_dir() or {*out.iterdir()} - {*partial_files(out), out / SUMS}):      # halves, SUMS: killed in its first write
            raise InputError(f"--out {out}: exists and is not a run of ours; name another folder")
        return False
    before = _started_with(out)
    if not states(out) and before["script"] == script:
        if not partial_files(out) and any(name.startswith("state-") for name in read_checksums(out)):
            raise InputError(f"--out {out}: its states are gone, so it cannot go on; name another folder, or remove this one")
        return False                             # it never saved anything: nothing is lost by starting again with other flags
    if before["script"] != script:
        raise InputError(f"--out {out}: a run of {before['script']!s:.80}, not of {script}")
    old = before["flags"]
    other = [f"--{key} {old.get(key)!r:.80} is now {value!r}" for key, value in flags.items() if old.get(key) != value and key not in ("steps", "out")]
    if old["steps"] != flags["steps"]:
        if flags["schedule"] != "constant":
            other.append(f"--steps {old['steps']} is now {flags['steps']} (only with --schedule constant: the learning rate depends on it)")
        elif flags["steps"] < old["steps"]:
            other.append(f"--steps {old['steps']} is now {flags['steps']} (fewer)")
    if other:
        raise InputError(f"--out {out} was started with other flags: {'; '.join(other)}")
    return True


def _started_with(out):
    """{script, flags} of the run: from config.json, or where that is damaged, from a state."""
    said = []
    for path in [out / "config.json", *states(out)]:
        try:
            if wrong := file_damage(path):
                raise InputError(f"{out}: {wrong}")
            found = read_metadata(path) if path.suffix == ".safetensors" else read_json(path)
            if type(found.get("script")) is not str or type(found.get("flags")) is not dict or type(found["flags"].get("steps")) is not int:
                raise InputError(f"{path}: does not say which script made it, with which flags")
        except InputError as error:
            said.append(str(error))
            continue
        if said:
            print(f"  warning: {said[0]}; the flags are read from {path.name}")
        return found
    raise InputError(f"{said[0]}, and no state is whole; remove the folder to start again")


LOCKS = []                  # the lock on this process's run folder: it goes with the process, or to its next run


def _lock(out):
    """Of two runs in one folder each would take away the other's files."""
    while LOCKS:
        os.close(LOCKS.pop())
    try:
        LOCKS.append(lock_folder(out))
    except BlockingIOError:
        raise InputError(f"--out {out}: another process is at work there; wait for it, or stop it") from None


def write_config(config, script, parent):
    """Writes the run's config.json: from here on the folder is a run."""
    versions = {name: metadata.version(name) for name in ("torch", "tiktoken", "sentencepiece", "numpy", "safetensors")}

    def write():
        out, origin = Path(config.out), Path(parent) / "config.json"
        lineage = read_json(origin) if origin.exists() else {}
        values = {"script": script, "flags": dataclasses.asdict(config), "versions": versions, "parent": lineage if "flags" in lineage else None}
        try:
            out.mkdir(parents=True, exist_ok=True)
            _lock(out)
            replace_all(out, {"config.json": (json.dumps(values, indent=1) + "\n").encode()})
        except OSError as error:
            raise InputError(f"--out {out}: cannot be written ({error.strerror})") from None
    dist.on_rank_zero(write)


# ---------------------------------------------------------------------------------------------------------------- states

def save(config, script, model, optimizer, step, export, **numbers):
    """The model as `export()` writes it, then everything the next step depends on.

    step: finished steps;  numbers: what else changes (the KL coefficient)
    """
    dist.on_rank_zero(lambda: (export(), _save(config, script, model, optimizer, step, numbers)))


def _save(config, script, model, optimizer, step, numbers):
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach().cpu()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value.cpu()
    flags = {key: value for key, value in dataclasses.asdict(config).items() if key != "out"}
    about = {"script": script, "flags": flags, "step": step, "threads": torch.get_num_threads(), "processes": dist.world_size(), **numbers}
    earlier = [path for path in states(config.out) if _step(path) < step]
    stay = {path.name for path in earlier[: KEEP - 1]}                 # later ones are damaged, or the run would have gone on from there
    gone = [path.name for path in states(config.out) if path.name not in stay and _step(path) != step]
    replace_all(config.out, {f"state-{step:06}.safetensors": save_tensors(tensors, {"run": json.dumps(about)})}, gone)


def read_metadata(path):
    """What a state or a report says of itself.  -> dict"""
    try:
        with safe_open(path, framework="pt") as file:
            return parse_json((file.metadata() or {}).get("run", "").encode(), path)
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({' '.join(str(error)[:100].split())})") from None


def load(config, model, optimizer, fresh):
    """Fills the optimizer at every process, the model at process 0, from the newest state that is whole; dist.share(model) is next, as in a new run.

    fresh: the numbers of a new run  ->  those of this one
    """
    numbers = dist.on_rank_zero(lambda: _load(config, model, optimizer, {**fresh, "threads": 1, "processes": 1}))
    if numbers["moments"]:
        for parameter in model.parameters():
            if dist.rank() > 0:
                optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device if parameter.is_cuda else "cpu"),
                                              "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            dist.broadcast(optimizer.state[parameter].values())
    same = numbers["processes"] == dist.world_size()
    if same:
        torch.set_num_threads(numbers["threads"])                      # sums are split by threads: another number gives other last bits
    print(f"resuming at step {numbers['step']}" + ("" if same else f", to rounding: it had {numbers['processes']} processes, now {dist.world_size()}"))
    return {name: numbers[name] for name in fresh}


def _load(config, model, optimizer, wanted):
    out = Path(config.out)
    broken_model = folder_damage(out / "model")
    said = [f"{out / 'model'}: {broken_model}"] if broken_model and states(out) else []
    for path in states(out):
        if broken_model and _step(path) == config.steps:               # at the end there is no next save that writes the model again
            continue
        optimizer.state.clear()
        try:
            if wrong := file_damage(path):
                raise ValueError(wrong)
            numbers = _restore(path, model, optimizer, wanted)
        except torch.OutOfMemoryError:
            raise                                # nothing is wrong with the file
        except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
            said.append(f"{path}: damaged or of another model ({' '.join(str(error)[:100].split())})")
            continue
        if said:
            print(f"  warning: {'; '.join(said)}; going on from {path.name}")
        for old in [other for other in states(out) if _step(other) < _step(path)][KEEP - 1:]:
            old.unlink()                         # killed in its last save, before it went
        return numbers | {"moments": len(optimizer.state) > 0}
    raise InputError(f"{'; '.join(said) or f'{out}: no state here'}; remove the folder to start again")


@torch.no_grad()
def _restore(path, model, optimizer, wanted):
    """wanted: numbers as an example of those that must be there.  -> the numbers"""
    numbers, parameters = read_metadata(path), dict(model.named_parameters())
    for key, value in wanted.items():
        if type(numbers[key]) is not type(value) or not 0 <= numbers[key] < 2**31 or key in ("threads", "processes") and not 0 < numbers[key] < 2**16:
            raise ValueError(f"{key} is {numbers[key]!r:.40}")
    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
        if {key for key in keys if key.startswith("model.")} != {f"model.{name}" for name in parameters}:
            raise ValueError("its weights have other names")
        for name, parameter in parameters.items():
            state = {key: file.get_tensor(f"{key}.{name}") for key in ("model", "step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in keys}
            if len(state) not in (1, 4) or any(value.shape != parameter.shape for key, value in state.items() if key != "step"):
                raise ValueError(f"{name} has another shape, or half of its moments")
            parameter.copy_(state.pop("model"))
            if state:
                optimizer.state[parameter] = {k: v if k == "step" and not parameter.is_cuda else v.to(parameter.device) for k, v in state.items()}
    return numbers


# ------------------------------------------------------------------------------------------------- steps that are not finite



