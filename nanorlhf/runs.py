"""A run's folder: what resuming needs. safetensors only: nothing is ever unpickled.

RUN/config.json         every flag, the versions, the parent run
RUN/state.safetensors   weights, optimizer, step and the few numbers of a run, in one file, so that one rename makes it new
"""
import dataclasses
import json
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised

from .checkpoint import read_json
from .config import InputError
from .log import replace


def resumable(config, script):
    """Is this a new run, or the same one again? Other flags than the run was started with are refused.  -> true where there is a state to resume"""
    out, flags = Path(config.out), dataclasses.asdict(config)
    path = out / "config.json"
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(other.suffix != ".tmp" for other in out.iterdir())):      # .tmp: killed in its first write
            raise InputError(f"--out {out}: exists and is not a run of ours; name another folder")
        return False
    before, resumable = read_json(path), (out / "state.safetensors").exists()
    if not resumable and before.get("script") == script:
        return False                             # it never saved anything: nothing is lost by starting again with other flags
    if before.get("script") != script:
        raise InputError(f"--out {out}: a run of {before.get('script')}, not of {script}")
    old = before.get("flags", {})
    other = [f"--{key} {old.get(key)!r} is now {value!r}" for key, value in flags.items() if old.get(key) != value and key != "steps"]
    if old.get("steps") != flags["steps"]:
        if flags["schedule"] != "constant":
            other.append(f"--steps {old.get('steps')} is now {flags['steps']} (only with --schedule constant: the learning rate depends on it)")
        elif flags["steps"] < old.get("steps", 0):
            other.append(f"--steps {old.get('steps')} is now {flags['steps']} (fewer)")
    if other:
        raise InputError(f"--out {out} was started with other flags: {'; '.join(other)}")
    return resumable


def begin(config, script, parent):
    """Writes the run's config.json: from here on the folder is a run."""
    out = Path(config.out)
    versions = {name: metadata.version(name) for name in ("torch", "tiktoken", "sentencepiece", "numpy", "safetensors")}
    parent = read_json(Path(parent) / "config.json") if (Path(parent) / "config.json").exists() else None
    values = {"script": script, "flags": dataclasses.asdict(config), "versions": versions,
              "parent": parent if parent and "flags" in parent else None}
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace(out / "config.json", (json.dumps(values, indent=1) + "\n").encode())
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from None


def save(out, model, optimizer, step, **numbers):
    """Everything the next step depends on. step: finished steps; numbers: what else changes (the KL coefficient)."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach().cpu()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value.cpu()
    about = json.dumps({"step": step, "threads": torch.get_num_threads(), **numbers})
    replace(Path(out) / "state.safetensors", serialised({name: t.contiguous() for name, t in tensors.items()}, {"run": about}))


@torch.no_grad()
def load(out, model, optimizer):
    """Fills model and optimizer.  -> the numbers of save, `step` among them"""
    path = Path(out) / "state.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            numbers, keys, parameters = json.loads(file.metadata()["run"]), set(file.keys()), dict(model.named_parameters())
            if {key for key in keys if key.startswith("model.")} != {f"model.{name}" for name in parameters}:
                raise ValueError("its weights have other names")
            if not isinstance(numbers["step"], int):
                raise ValueError(f"step is {numbers['step']!r}")
            for name, parameter in parameters.items():
                state = {key: file.get_tensor(f"{key}.{name}") for key in ("model", "step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in keys}
                if len(state) not in (1, 4) or any(value.shape != parameter.shape for key, value in state.items() if key != "step"):
                    raise ValueError(f"{name} has another shape, or half of its moments")
                parameter.copy_(state.pop("model"))
                if state:
                    optimizer.state[parameter] = {k: v if k == "step" and not parameter.is_cuda else v.to(parameter.device) for k, v in state.items()}
        torch.set_num_threads(numbers["threads"])                      # sums are split by threads: another number gives other last bits
    except (SafetensorError, OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged or of another model ({str(error)[:100]}); remove it to start again") from None
    return numbers
