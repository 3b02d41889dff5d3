"""Runs of the scripts in forked processes: torch is imported once, then each run has fresh processes, as torchrun would start them.

    python tests/launch.py < jobs          a JSON object a line: {"script", "flags", "processes", "fault", "kill"}  ->  a JSON line for each

fault: a name of FAULTS below, put into every process of the run.  kill: seconds after which all of its processes are killed, or see `strike`.
call: each process is killed at this call of its, see `killed_at`.
The answer: exit codes (negative: the signal), what was written to stdout and stderr, and the seconds. Nothing here computes, so that forking is safe.
"""
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch  # noqa: E402

import train_ppo  # noqa: E402
import train_rm  # noqa: E402
import train_sft  # noqa: E402
from nanorlhf import batching, losses, ppo, sample  # noqa: E402
from nanorlhf.io import files  # noqa: E402
from nanorlhf.run import cli, dist, run_folder  # noqa: E402
from nanorlhf.study import __main__ as study  # noqa: E402
from nanorlhf.study import evaluate  # noqa: E402

SCRIPTS = {"train_sft": train_sft, "train_rm": train_rm, "train_ppo": train_ppo, "sample": sample, "evaluate": evaluate, "study": study}
LEFT = 60                                        # seconds; a run that is left waiting for longer waits for ever


# ------------------------------------------------------------------------------------------- faults, as others have them

def mean_of_means():
    """Each micro-batch divides by its own count, and their mean is taken: small ones weigh too much."""
    def own_count(function, parts):
        def wrong(*arguments, count=None, **named):
            if count is None:
                *arguments, count = arguments
            found = function(*arguments, **named)
            return tuple(x / parts() for x in found) if isinstance(found, tuple) else found / parts()
        return wrong
    seen = {}

    def plans(rows, max_tokens, processes):
        found = batching_plans(rows, max_tokens, processes)
        seen["parts"] = sum(map(len, found))
        return found
    batching_plans = batching.plan_micro_batches
    for script in (train_sft, train_rm, train_ppo):
        script.plan_micro_batches = plans
    parts = lambda: seen["parts"]
    train_sft.sft_loss = own_count(losses.sft_loss, parts)
    losses.ranking_loss = own_count(losses.ranking_loss, parts)
    losses.classification_loss = own_count(losses.classification_loss, parts)
    losses.quantile_huber_loss = own_count(losses.quantile_huber_loss, parts)
    ppo.policy_loss, ppo.value_loss = own_count(ppo.policy_loss, parts), own_count(ppo.value_loss, parts)


def own_whitening():
    """Each process whitens the advantages of its own share of the rollout."""
    def wrong(x, mask):
        mine = torch.zeros(len(mask), dtype=torch.bool)
        mine[dist.rank()::dist.world_size()] = True
        own = x[mine][mask[mine]].double()
        white = (x.double() - own.mean()) / (own.var(unbiased=False) + 1e-8).sqrt()
        return torch.where(mask, white.to(x.dtype), 0.0)
    ppo.whiten = wrong


def averaged():
    """Gradients are averaged over the processes, as a distributed wrapper does, and nobody multiplies by their number."""
    add = dist.all_reduce_gradients

    def wrong(model):
        add(model)
        for p in model.parameters():
            if p.grad is not None:
                p.grad /= dist.world_size()
    dist.all_reduce_gradients = wrong


def same_shard():
    """Every process has the first one's share."""
    dist_rank = dist.rank
    for script in (train_sft, train_rm, train_ppo):
        script.plan_micro_batches = lambda *arguments: [batching.plan_micro_batches(*arguments)[0]] * dist.world_size()
    assert dist_rank() >= 0


def nan_loss():
    """The loss is NaN at the last process, in its calls of NAN_CALLS (those of the training: evaluation wants no gradient)."""
    def poisoned(function):
        calls = [0]

        def wrong(*arguments, **named):
            calls[0] += torch.is_grad_enabled()
            found = function(*arguments, **named)
            if not torch.is_grad_enabled() or calls[0] not in NAN_CALLS or dist.rank() < dist.world_size() - 1:
                return found
            return (found[0] * float("nan"), found[1]) if isinstance(found, tuple) else found * float("nan")
        return wrong
    train_sft.sft_loss, losses.ranking_loss, ppo.policy_loss = map(poisoned, (train_sft.sft_loss, losses.ranking_loss, ppo.policy_loss))


def full_disk():
    """After the first save the disk is filled by a file beside the run's folder: with its last bytes too."""
    save = run_folder.save

    def wrong(config, *arguments, **named):
        save(config, *arguments, **named)
        if dist.rank() == 0:
            with open(Path(config.out).with_name("filler"), "ab", buffering=0) as file:
                for size in (2**16, 2**10, 1):
                    with contextlib.suppress(OSError):
                        while True:
                            file.write(bytes(size))
    run_folder.save = wrong


NAN_CALLS = {2, 3, 5, 6, 7, 8, 9}
FAULTS = {f.__name__: f for f in (mean_of_means, own_whitening, averaged, same_shard, nan_loss, full_disk)}


# ------------------------------------------------------------------------------------------------------------------ runs

def killed_at(call):
    """SIGKILL instead of the process's n-th call that syncs, renames or removes a file."""
    left = [call]

    def counted(function):
        def wrapped(*arguments, **named):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*arguments, **named)
        return wrapped
    os.fsync, os.replace, os.unlink = map(counted, (os.fsync, os.replace, os.unlink))


def child(job, environment, errors):
    """One process of a run, from after the imports to its end."""
    os.environ.update(environment)
    for number, path in ((1, f"{errors}-printed"), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    torch.set_num_threads(1)
    code, setup = 1, dist.setup

    def joined(*arguments):
        device = setup(*arguments)
        open(f"{errors}-{os.environ.get('RANK', 0)}", "w").close()
        return device
    dist.setup = joined
    if "call" in job:
        killed_at(job["call"])
    try:
        if job.get("fault"):
            FAULTS[job["fault"]]()
        sys.argv = [job["script"]] + [word for key, value in job["flags"].items() for word in (f"--{key}", str(value))]
        module = SCRIPTS[job["script"]]
        cli.run_script(module.main, module.Config)
        code = 0
    except SystemExit as left:
        code = left.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(job):
    """-> (process ids, the file of their stderr, the store where they meet, which outlives them, as torchrun's does)"""
    size, errors, ids = job.get("processes", 1), tempfile.mktemp(), []
    for path in (errors, f"{errors}-printed"):
        open(path, "w").close()
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if size > 1 else None
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
              "TORCHELASTIC_RESTART_COUNT": "0"} if size > 1 else {}
    for rank in range(size):
        number = os.fork()
        if number == 0:
            os.setpgid(0, 0)                     # a terminal's Ctrl-C is not theirs
            child(job, {**shared, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {})}, errors)
        ids.append(number)
    return ids, errors, store


def ended(number):
    """Has this process ended? Its exit code is left for who asks."""
    return os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait(seconds, ids, condition=lambda: False):
    """Until the condition holds, all processes have ended, or the seconds are over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not all(map(ended, ids)) and not condition():
        time.sleep(0.0002)


def halves(out, began):
    """Temporary files that have been written since, in a run folder and in its model folder."""
    found = []
    for folder in (Path(out), Path(out) / "model"):
        for path in files.partial_files(folder):
            with contextlib.suppress(FileNotFoundError):
                found += [path] * (path.stat().st_mtime >= began)
    return found


def strike(job, ids, marks, began):
    """SIGKILL, unless the run has ended by then.  kill: seconds, or {"after": seconds, "half": true, "then": seconds, "who": rank}

    half: waits for a temporary file in the run's folder, then for `then` seconds;  who: that process alone, once all of them have joined; if the others have not
    ended by themselves within LEFT seconds, they are killed.  -> {during: was a temporary file there?, left: seconds that the others took}
    """
    kill = job["kill"] if isinstance(job["kill"], dict) else {"after": job["kill"]}
    out, who = job["flags"]["out"], kill.get("who")
    if who is not None:
        wait(LEFT, ids, lambda: all(map(os.path.exists, marks)))
    wait(kill["after"], ids)
    if kill.get("half"):
        wait(LEFT, ids, lambda: halves(out, began))
        wait(kill.get("then", 0), ids)
    said = {"during": bool(halves(out, began))}
    if not any(map(ended, ids)):
        for number in ids if who is None else [ids[who]]:
            os.kill(number, signal.SIGKILL)
    struck = time.monotonic()
    wait(LEFT, ids)
    said["left"] = time.monotonic() - struck
    for number in ids:
        if not ended(number):
            os.kill(number, signal.SIGKILL)
    return said


def run(job):
    began = time.time()
    ids, errors, _store = start(job)
    marks = [f"{errors}-{rank}" for rank in range(len(ids))]
    said = strike(job, ids, marks, began) if job.get("kill") is not None else {}
    codes = [os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in ids]
    printed, errors = Path(f"{errors}-printed"), Path(errors)
    said |= {"codes": codes, "stdout": printed.read_text("utf-8"), "stderr": errors.read_text("utf-8"), "seconds": time.time() - began}
    for path in (printed, errors, *map(Path, marks)):
        path.unlink(missing_ok=True)
    return said


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
