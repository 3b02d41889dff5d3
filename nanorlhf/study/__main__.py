"""Both papers, from an invented world to a page: ranking against classification rewards (A), quantile rewards (B).

    python -m nanorlhf.study                     two seeds, about six minutes on two cores
    python -m nanorlhf.study --scale full        five seeds, a larger world, hours

The same command again goes on where it was. Stages run side by side, one thread each: small models are faster that way.
"""
import contextlib
import importlib.util
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ..io.files import lock_folder, replace
from ..io.hub import read_json
from ..io.read import InputError
from ..run.cli import check_bounds, run_script
from ..run.log import header
from ..run.signals import EXIT_CODES, Preempted


@dataclass(frozen=True)
class Config:
    scale: Literal["smoke", "demo", "full"] = "demo"   # how much: smoke tries the path in a minute, full takes hours
    out: str = ""                                   # the study's folder; default runs/study-SCALE; the same one again goes on
    seeds: int = 0                                  # how many; 0: as the scale has it
    workers: int = 0                                # stages at a time; 0: one a core


@dataclass(frozen=True)
class Stage:
    """`function` of stages.py for one seed; it starts when all of `after` are done. cost: seconds, roughly, for the time left."""
    name: str
    function: str
    seed: int
    cost: float
    after: tuple = ()
    what: tuple = ()                     # which model or arm


def plan(seeds):
    """Every stage of the study, in the order in which they are worth starting."""
    from .stages import ARMS, REWARDS
    found = [Stage("reader/run", "reader", 0, 60)]
    for seed in range(seeds):
        name = lambda stage, seed=seed: f"seed{seed}/{stage}"
        found += [Stage(name("tales"), "tales", seed, 5), Stage(name("sft"), "sft", seed, 18, (name("tales"),)), Stage(name("judged"), "judged", seed, 12, (name("sft"),))]
    for seed in range(seeds):
        name = lambda stage, seed=seed: f"seed{seed}/{stage}"
        models = [Stage(name(f"rm-{model}"), "reward_model", seed, 18, ("reader/run", name("judged")), (model,)) for model in REWARDS]
        modes = [Stage(name(f"rm-{mode}"), "pairs_mode", seed, cost, ("reader/run", name("judged")), (mode,)) for mode, cost in (("together", 18), ("apart", 12))]
        arms = []
        for arm in ARMS:
            reward = ARMS[arm][0].replace("raw", "rm-classification")
            arms.append(Stage(name(f"ppo-{arm}"), "actor", seed, 18, (name(reward) if reward.startswith("rm-") else name("sft"),), (arm,)))
        everything = tuple(stage.name for stage in models + modes + arms)
        found += models + modes + arms + [Stage(name("measure"), "measure", seed, 10, everything)]
    return found


# -------------------------------------------------------------------------------------------------------------- workers

def work(out, scale, seeds):
    """A worker: reads names of stages, one a line, runs each with its output in a log file, answers one JSON line. It ends when its parent does."""
    import torch

    from . import stages
    torch.set_num_threads(1)
    out, scale, answers = Path(out), stages.SCALES[scale], sys.stdout
    known, asked = {stage.name: stage for stage in plan(int(seeds))}, queue.Queue()

    def listen():
        for line in sys.stdin:
            asked.put(line.strip())
        os._exit(0)                              # the parent has gone or has no more work; what was written is whole at every instant

    threading.Thread(target=listen, daemon=True).start()
    while True:
        stage = known[asked.get()]
        folder, began, error = out / Path(stage.name).parent, time.time(), None
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"{Path(stage.name).name}.log"
        with open(log, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                getattr(stages, stage.function)(folder, scale, stage.seed, *stage.what)
            except BaseException as problem:
                traceback.print_exc()
                error = f"{stage.name}: {type(problem).__name__}: {problem}; more in {log}"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
        print(json.dumps({"name": stage.name, "seconds": time.time() - began, "peak_gib": peak, "error": error}), file=answers, flush=True)


class Workers:
    """Processes that run stages. `give` sends one the name of a stage; `answers` is where it says that it is done, as (worker, dict)."""

    def __init__(self, n, out, scale, seeds):
        code = "import sys; from nanorlhf.study.__main__ import work; work(*sys.argv[1:])"
        threads = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.answers = queue.Queue()
        command = [sys.executable, "-c", code, str(out), scale, str(seeds)]
        self.processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=threads, process_group=0)     # Ctrl-C is the parent's
                          for _ in range(n)]
        for i, process in enumerate(self.processes):
            threading.Thread(target=self._listen, args=(i, process), daemon=True).start()

    def _listen(self, i, process):
        for line in process.stdout:
            self.answers.put((i, json.loads(line)))
        self.answers.put((i, {"error": f"a worker ended with code {process.wait()} (out of memory?)"}))

    def give(self, i, name):
        self.processes[i].stdin.write(name + "\n")
        self.processes[i].stdin.flush()

    def close(self):
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self.processes:
            process.wait()


def carry_out(stages, done, workers, out, record):
    """Runs every stage that is not in `done`, each as soon as those before it are."""
    waiting, idle, running = [stage for stage in stages if stage.name not in done], list(range(len(workers.processes))), {}
    cost, began, spent, planned = {stage.name: stage.cost for stage in stages}, time.time(), 0.0, 0.0
    while waiting or running:
        while idle and (ready := next((stage for stage in waiting if set(stage.after) <= done.keys()), None)):
            waiting.remove(ready)
            running[idle[-1]] = ready.name
            workers.give(idle.pop(), ready.name)
        i, answer = workers.answers.get()
        if answer["error"]:
            raise OSError(0, answer["error"], str(out))
        name = running.pop(i)
        idle.append(i)
        done[name] = {key: answer[key] for key in ("seconds", "peak_gib")}
        record(done)
        spent, planned = spent + answer["seconds"], planned + cost[name]
        left = (sum(cost[stage.name] for stage in waiting) + sum(map(cost.get, running.values()))) * spent / planned / len(workers.processes)
        print(f"[{len(done)}/{len(stages)}] {name:<34}{answer['seconds']:6.1f} s   {(time.time() - began) / 60:5.1f} min so far, about {left / 60:.1f} left", flush=True)


@contextlib.contextmanager
def alone(out):
    """The folder is this process's until it leaves, however it ends: two studies in one folder would write over each other."""
    try:
        folder = lock_folder(out)
    except BlockingIOError:
        raise InputError(f"--out {out}: another study is at work there; wait for it, or stop it") from None
    try:
        yield
    finally:
        os.close(folder)


def opened(out, name, sizes):
    """study.json of a folder, or that of a new study; what was started otherwise is refused.  -> dict"""
    state, path = {"scale": name, "sizes": sizes, "seconds": 0.0, "stages": {}}, out / "study.json"
    if path.exists():
        state |= read_json(path)
    known = isinstance(state["stages"], dict) and all(isinstance(stage, dict) for stage in state["stages"].values())
    if not known or type(state["seconds"]) not in (int, float) or not 0 <= state["seconds"] < 1e12:
        raise InputError(f"{path}: damaged; name another --out")
    if state["scale"] != name:
        raise InputError(f"--out {out}: holds a study of scale {' '.join(str(state['scale']).split()):.80}, not {name}; name another folder")
    if state["sizes"] != sizes:
        raise InputError(f"--out {out}: was started with other sizes of scale {name} ({state['sizes']!r:.200}); name another folder")
    return state


def study(config, out, seeds, state):
    """All stages that are not done, then the page."""
    stages, began, before = plan(seeds), time.time(), state["seconds"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = min(config.workers or min(cores, 16), len(stages))         # 0.6 GiB each
    header(f"study: both papers, scale {config.scale}", seeds=f"{seeds}", stages=f"{len(stages)}, {len(state['stages'])} done before", folder=f"{out}",
           workers=f"{count} processes of one thread")

    def record(done):
        state.update(seeds=seeds, workers=count, seconds=before + time.time() - began, stages=done)
        replace(out / "study.json", (json.dumps(state, indent=1) + "\n").encode())

    if any(stage.name not in state["stages"] for stage in stages):
        record(state["stages"])
        workers = Workers(count, out, config.scale, seeds)
        try:
            carry_out(stages, state["stages"], workers, out, record)
        finally:
            workers.close()
    from . import report
    print(report.write(out, seeds))


def leave(number, _):
    raise Preempted(number)


def main(config):
    check_bounds(config, seeds=(0, 1000), workers=(0, 1000))
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError('the page is drawn with matplotlib, which is missing: pip install -c constraints.txt -e ".[plot]"')
    from .stages import SCALES
    scale, out = SCALES[config.scale], Path(os.path.abspath(config.out or f"runs/study-{config.scale}"))        # runs record where they lie
    if out.exists() and not (out / "study.json").exists() and any(other.suffix != ".tmp" for other in out.iterdir()):
        raise InputError(f"--out {out}: exists and is not a study; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    for name in EXIT_CODES:
        signal.signal(name, leave)
    with alone(out):
        study(config, out, config.seeds or scale.seeds, opened(out, config.scale, json.loads(json.dumps(asdict(scale)))))


if __name__ == "__main__":
    run_script(main, Config)
