"""Both papers, from an invented world to a page: ranking against classification rewards (A),
quantile rewards (B).

    python -m nanorlhf.study                     two seeds, about six minutes on two cores
    python -m nanorlhf.study --scale full        five seeds, a larger world, hours

The same command again goes on where it was. Stages run side by side, one thread each: small models
are faster that way.
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
from ..io.read import InputError, read_json
from ..run.cli import check_bounds, run_script
from ..run.log import header
from ..run.signals import EXIT_CODES, Preempted

MAX_WORKERS = 16             # by default; each takes 0.6 GiB
RSS_PER_GIB = 2 ** (30 if sys.platform == "darwin" else 20)     # ru_maxrss: bytes there, else KiB


@dataclass(frozen=True)
class Config:
    scale: Literal["smoke", "demo", "full"] = "demo"  # smoke tries the path in a minute, full hours
    out: str = ""            # the study's folder; default runs/study-SCALE; the same one goes on
    seeds: int = 0           # how many; 0: as the scale has it
    workers: int = 0         # stages at a time; 0: one per core


@dataclass(frozen=True)
class Stage:
    """`function` of stages.py for one seed; it starts when all of `after` are done."""
    name: str
    function: str
    seed: int
    cost: float              # seconds, roughly, for the time left
    after: tuple = ()
    arguments: tuple = ()    # which model or arm


def policy_stages(seed):
    """What one seed's reward models need: a world, a supervised policy, its samples judged."""
    at = f"seed{seed}/"
    return [
        Stage(at + "tales", "make_world", seed, 5),
        Stage(at + "sft", "sft", seed, 18, (at + "tales",)),
        Stage(at + "judged", "judge_samples", seed, 12, (at + "sft",)),
    ]


def reward_stages(seed):
    """One seed's reward models, PPO's arms, and what measures them."""
    from .stages import ARMS, REWARDS
    at = f"seed{seed}/"
    before = ("reader/run", at + "judged")
    stages = []
    for model in REWARDS:
        stages.append(Stage(f"{at}rm-{model}", "reward_model", seed, 18, before, (model,)))
    for mode, cost in (("together", 18), ("apart", 12)):
        stages.append(Stage(f"{at}rm-{mode}", "pair_mode", seed, cost, before, (mode,)))
    for arm, (reward, _) in ARMS.items():
        reward = "rm-classification" if reward == "raw" else reward
        needs = reward if reward.startswith("rm-") else "sft"
        stages.append(Stage(f"{at}ppo-{arm}", "run_ppo", seed, 18, (at + needs,), (arm,)))
    everything = tuple(stage.name for stage in stages)
    return stages + [Stage(at + "measure", "measure", seed, 10, everything)]


def plan(seeds):
    """Every stage of the study, in the order in which they are worth starting."""
    stages = [Stage("reader/run", "reader", 0, 60)]
    for seed in range(seeds):
        stages += policy_stages(seed)
    for seed in range(seeds):
        stages += reward_stages(seed)
    return stages


# -------------------------------------------------------------------------------------- workers

def run_stage(stage, folder, scale, log):
    """Runs a stage with its output in the file `log`.  -> what failed, or None"""
    from . import stages
    with (
        open(log, "a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            getattr(stages, stage.function)(folder, scale, stage.seed, *stage.arguments)
        except BaseException as error:
            traceback.print_exc()
            return f"{stage.name}: {type(error).__name__}: {error}; more in {log}"


def work(out, scale, seeds):
    """A worker: for each line of stdin, the name of a stage, it runs the stage and prints one JSON
    line. It ends when its parent does.
    """
    import torch

    from .stages import SCALES
    torch.set_num_threads(1)
    answers = sys.stdout                         # while a stage runs, sys.stdout is its log
    by_name = {stage.name: stage for stage in plan(int(seeds))}
    names = queue.Queue()

    def listen():
        for line in sys.stdin:
            names.put(line.strip())
        os._exit(0)      # the parent has gone or has no more work; files are whole at every instant

    threading.Thread(target=listen, daemon=True).start()
    while True:
        stage = by_name[names.get()]
        log = Path(out) / f"{stage.name}.log"
        began = time.time()
        log.parent.mkdir(parents=True, exist_ok=True)
        error = run_stage(stage, log.parent, SCALES[scale], log)
        answer = {
            "name": stage.name,
            "seconds": time.time() - began,
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / RSS_PER_GIB,
            "error": error,
        }
        print(json.dumps(answer), file=answers, flush=True)


class Workers:
    """Processes that run stages.

    `give` sends one the name of a stage; when it is done, (worker, dict) is in `answers`.
    """

    def __init__(self, n, out, scale, seeds):
        code = "import sys; from nanorlhf.study.__main__ import work; work(*sys.argv[1:])"
        command = [sys.executable, "-c", code, str(out), scale, str(seeds)]
        self.answers = queue.Queue()
        self.processes = []
        for i in range(n):
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                process_group=0,                 # Ctrl-C is the parent's
            )
            self.processes.append(process)
            threading.Thread(target=self._listen, args=(i, process), daemon=True).start()

    def _listen(self, i, process):
        for line in process.stdout:
            self.answers.put((i, json.loads(line)))
        error = f"a worker ended with code {process.wait()} (out of memory?)"
        self.answers.put((i, {"error": error}))

    def give(self, i, name):
        self.processes[i].stdin.write(name + "\n")
        self.processes[i].stdin.flush()

    def close(self):
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self.processes:
            process.wait()


class Progress:
    """The line that is printed after each stage."""

    def __init__(self, stages, workers):
        self.cost = {stage.name: stage.cost for stage in stages}
        self.workers = workers
        self.began = time.time()
        self.seconds = 0.0                       # that stages took in this start ...
        self.planned = 0.0                       # ... and what the plan says that they cost

    def report(self, name, seconds, done, left):
        """done: number of finished stages;  left: names of the stages that are not"""
        self.seconds += seconds
        self.planned += self.cost[name]
        cost = sum(self.cost[each] for each in left)
        minutes_left = cost * self.seconds / self.planned / self.workers / 60
        print(
            f"[{done}/{len(self.cost)}] {name:<34}{seconds:6.1f} s   "
            f"{(time.time() - self.began) / 60:5.1f} min so far, about {minutes_left:.1f} left",
            flush=True,
        )


def run_stages(stages, done, workers, out, record):
    """Runs every stage that is not in `done`, each as soon as those before it are done."""
    waiting = {stage.name: stage for stage in stages if stage.name not in done}
    idle = list(range(len(workers.processes)))
    running = {}                                 # worker -> name of its stage
    progress = Progress(stages, len(idle))
    while waiting or running:
        ready = [name for name, stage in waiting.items() if set(stage.after) <= done.keys()]
        for name in ready[: len(idle)]:
            del waiting[name]
            worker = idle.pop()
            running[worker] = name
            workers.give(worker, name)
        worker, answer = workers.answers.get()
        if answer["error"]:
            raise OSError(0, answer["error"], str(out))
        name = running.pop(worker)
        idle.append(worker)
        done[name] = {"seconds": answer["seconds"], "peak_gib": answer["peak_gib"]}
        record(done)
        progress.report(name, answer["seconds"], len(done), [*waiting, *running.values()])


# ---------------------------------------------------------------------------------------- study

@contextlib.contextmanager
def lock(out):
    """The folder is this process's within the block, however that ends: two studies in one folder
    would write over each other.
    """
    try:
        descriptor = lock_folder(out)
    except BlockingIOError:
        raise InputError(
            f"--out {out}: another study is at work there; wait for it, or stop it"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


def open_study(out, scale, sizes):
    """study.json of a folder, or that of a new study.  -> dict

    InputError: it is damaged, or the study was started with another scale or other sizes.
    """
    state = {"scale": scale, "sizes": sizes, "seconds": 0.0, "stages": {}}
    path = out / "study.json"
    if path.exists():
        state |= read_json(path)
    stages = state["stages"]
    seconds = state["seconds"]
    valid = isinstance(stages, dict) and all(isinstance(stage, dict) for stage in stages.values())
    if not valid or type(seconds) not in (int, float) or not 0 <= seconds < 1e12:
        raise InputError(f"{path}: damaged; name another --out")
    if state["scale"] != scale:
        other = " ".join(str(state["scale"]).split())
        raise InputError(
            f"--out {out}: holds a study of scale {other:.80}, not {scale}; name another folder"
        )
    if state["sizes"] != sizes:
        raise InputError(
            f"--out {out}: was started with other sizes of scale {scale} "
            f"({state['sizes']!r:.200}); name another folder"
        )
    return state


def study(config, out, seeds, state):
    """All stages that are not done, then the page."""
    stages = plan(seeds)
    began = time.time()
    seconds_before = state["seconds"]
    can_ask = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if can_ask else os.cpu_count()
    count = min(config.workers or min(cores, MAX_WORKERS), len(stages))
    header(
        f"study: both papers, scale {config.scale}",
        seeds=f"{seeds}",
        stages=f"{len(stages)}, {len(state['stages'])} done before",
        folder=f"{out}",
        workers=f"{count} processes of one thread",
    )

    def record(done):
        seconds = seconds_before + time.time() - began
        state.update(seeds=seeds, workers=count, seconds=seconds, stages=done)
        replace(out / "study.json", (json.dumps(state, indent=1) + "\n").encode())

    if any(stage.name not in state["stages"] for stage in stages):
        record(state["stages"])
        workers = Workers(count, out, config.scale, seeds)
        try:
            run_stages(stages, state["stages"], workers, out, record)
        finally:
            workers.close()
    from . import report
    print(report.write(out, seeds))


def on_signal(number, _):
    raise Preempted(number)


def main(config):
    check_bounds(config, seeds=(0, 1000), workers=(0, 1000))
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            "the page is drawn with matplotlib, which is missing: "
            'pip install -c constraints.txt -e ".[plot]"'
        )
    from .stages import SCALES
    scale = SCALES[config.scale]
    out = Path(os.path.abspath(config.out or f"runs/study-{config.scale}"))  # runs record the path
    if out.exists() and not (out / "study.json").exists():
        if any(path.suffix != ".tmp" for path in out.iterdir()):
            raise InputError(f"--out {out}: exists and is not a study; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    for name in EXIT_CODES:
        signal.signal(name, on_signal)
    sizes = json.loads(json.dumps(asdict(scale)))          # as JSON has them: lists for tuples
    with lock(out):
        study(config, out, config.seeds or scale.seeds, open_study(out, config.scale, sizes))


if __name__ == "__main__":
    run_script(main, Config)
