"""SIGKILL at random instants, again and again: what the same command makes of it in the end is what an undisturbed run makes.

    python -m pytest tests/crash/test_kills.py -s                  six kills
    python -m pytest tests/crash/test_kills.py -s -m slow          two hundred, with the table of where they hit (minutes)

Instants are drawn over the time that an undisturbed run takes. Some kills wait until a temporary file is there, and strike at once or a little
later, so that all of a save is hit. With two processes some kill one alone: the other has to end by itself, soon, with one line.
"""
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from alike import damaged, differences, timeless
from launch import LEFT
from test_processes import flags_of

from nanorlhf.run import run_folder
from nanorlhf.study import stages

ROOT = Path(__file__).resolve().parent.parent.parent
RUN = dict(steps=8, groups=4, save_every=2, eval_every=3, schedule="linear", max_tokens=110)
SLOW, QUICK = 27, 2                      # kills of each script and number of processes; of the study and number of workers 20
STUDY = 20
COLUMNS = ("kills", "one alone", "before the first save", "with a temporary file", "after the end", "starts", "runs", "seconds")


@pytest.fixture(scope="module")
def table():
    """Rows fill up as the tests go; printed after the last."""
    found = {}
    yield found
    found["together"] = sum(found.values(), Counter())
    print("\n" + "".join(f"{name:>23}" for name in ("", *COLUMNS)))
    for name, row in found.items():
        print(f"{name:>23}" + "".join(f"{row[column]:23.0f}" for column in COLUMNS))


# ---------------------------------------------------------------------------------------------------------------- scripts

def a_kill(draws, seconds, processes):
    """When, and who: uniformly over a whole run, or in a save, there at once or as far into it as chance has it."""
    kill = {"after": draws.uniform(0, seconds)}
    if draws.random() < 0.5:
        kill |= {"half": True, "then": draws.choice([0, 0.001, 0.02]) * draws.random()}
    if processes > 1 and draws.random() < 0.4:
        kill["who"] = draws.randrange(processes)
    return kill


def killed_until_done(jobs, script, flags, processes, draws, seconds, most, row):
    """One run, killed at most so many times."""
    while True:
        kill = a_kill(draws, seconds, processes) if row["kills"] < most else None
        answer = jobs(script, flags, processes=processes, **({"kill": kill} if kill else {}))
        row["starts"] += 1
        assert "Traceback" not in answer["stderr"], (kill, answer)
        if -signal.SIGKILL not in answer["codes"]:       # whoever was to be killed had ended
            row["after the end"] += kill is not None
            assert answer["codes"] == [0] * processes, (kill, answer)
            return
        alone, saved = "who" in kill, run_folder.states(flags["out"])
        row.update({"kills": 1, "one alone": alone, "before the first save": not saved, "with a temporary file": answer["during"]})
        if alone:
            other, = (code for rank, code in enumerate(answer["codes"]) if rank != kill["who"])
            said = [line for line in answer["stderr"].splitlines() if "warning:" not in line]
            done = saved and saved[0].name == f"state-{flags['steps']:06}.safetensors" and other == 0 and not said       # there was nothing left to wait for
            assert done or other == 2 and len(said) == 1 and "lost another process" in said[0] and answer["left"] < LEFT / 2, (kill, answer)


def kills(jobs, world, folder, name, processes, most, table):
    """Run after run, until there were enough kills; each ends as the undisturbed one."""
    script, flags = flags_of(world, name, folder / "whole", **RUN)
    undisturbed = jobs(script, flags, processes=processes)
    assert undisturbed["codes"] == [0] * processes, undisturbed
    draws, row, began = random.Random(f"{name}{processes}"), table.setdefault(f"{name}, {processes}", Counter()), time.time()
    while row["kills"] < most:
        out = folder / f"killed-{row['runs']}"
        killed_until_done(jobs, script, {**flags, "out": out}, processes, draws, undisturbed["seconds"], most, row)
        row["runs"] += 1
        assert differences(folder / "whole", out) == []
    row["seconds"] += time.time() - began


@pytest.mark.parametrize("name, processes", [("sft", 1), ("ranking", 2)])
def test_a_few_kills(name, processes, jobs, world, tmp_path, table):
    kills(jobs, world, tmp_path, name, processes, QUICK, table)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ["sft", "ranking", "ppo"])
def test_kills(name, processes, jobs, world, tmp_path, table):
    kills(jobs, world, tmp_path, name, processes, SLOW, table)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "ranking", "ppo"])
def test_killed_at_every_call(name, jobs, world, tmp_path):
    """Not by chance: before each call that syncs, renames or removes a file, from the first to the last of a run."""
    script, flags = flags_of(world, name, tmp_path / "whole", **{**RUN, "steps": 3, "save_every": 1})
    whole, call, wrong = jobs.well(script, flags), 0, {}
    while True:
        out = tmp_path / f"killed-{call}"
        answer = jobs(script, {**flags, "out": out}, call=call)
        if answer["codes"] == [0]:
            break
        assert answer["codes"] == [-signal.SIGKILL], answer
        again = jobs(script, {**flags, "out": out})
        wrong[call] = [again] if again["codes"] != [0] else differences(whole, out)
        call += 1
    print(f"\n{name}: killed before each of {call} calls")
    assert call > 50 and {call: found for call, found in wrong.items() if found} == {}


# ------------------------------------------------------------------------------------------------------------------ study

def start(out, workers):
    return subprocess.Popen([sys.executable, "-m", "nanorlhf.study", "--scale=smoke", f"--workers={workers}", f"--out={out}"], cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def halves(out, began):
    """Temporary files anywhere in the study, written since."""
    found = []
    for folder, _, names in os.walk(out):
        for name in names:
            path = Path(folder) / name
            try:
                found += [path] * ((path.suffix == ".tmp" or name.startswith(".tmp")) and path.stat().st_mtime >= began)
            except FileNotFoundError:
                pass
    return found


def workers_of(process):
    """Processes that the study has started and that have not ended."""
    try:
        return [int(number) for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def alive(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait(condition, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.0005)


def strike(started, out, draws, row):
    """Waits, then kills the parent, or it and its workers at once, or one worker.  -> was anybody killed?"""
    began, after, who = time.time(), draws.choice([draws.uniform(0, 8), draws.uniform(6, 14)]), draws.choice(["parent", "all", "worker"])
    in_a_save = draws.random() < 0.6
    wait(lambda: started.poll() is not None or time.time() > began + after and (not in_a_save or halves(out, began)), 600)
    if started.poll() is not None:
        return False
    workers = workers_of(started)
    row["with a temporary file"] += bool(halves(out, began))
    alone = who == "worker" and len(workers) > 0
    for number in [draws.choice(workers)] if alone else [started.pid] + workers * (who == "all"):
        os.kill(number, signal.SIGKILL)
    error = started.communicate(timeout=60)[1]
    if alone:
        assert started.returncode == 2 and error.startswith("error: ") and error.count("\n") == 1 and "a worker ended with code -9" in error, error
    else:
        assert started.returncode == -signal.SIGKILL and not error, error
    wait(lambda: not any(map(alive, workers)))           # they end by themselves
    row.update({"kills": 1, "one alone": alone, "before the first save": not list(out.rglob("state-*.safetensors"))})
    return True


def study_differences(whole, other):
    """All artefacts, byte for byte: what runs have saved, what was written, what was found. The clock is in the logs, in study.json and on the page."""
    clock = lambda path: path.suffix == ".log" or path.name in ("study.json", "metrics.jsonl") or path.parent.name == "page"
    one, two = ({path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file() and not clock(path)} for out in (whole, other))
    rows = [{path.relative_to(out): timeless(path) for path in out.rglob("metrics.jsonl")} for out in (whole, other)]
    assert len([path for path in one if path.parent.name == "model"]) >= 5 * (2 + len(stages.REWARDS) + 2 + len(stages.ARMS)) and rows[0]
    return [str(path) for path in sorted(one.keys() | two.keys()) if one.get(path) != two.get(path)] + \
        [f"{path} rows" for path in rows[0] if rows[0][path] != rows[1].get(path)] + damaged(other)


@pytest.fixture(scope="module")
def whole_study(tmp_path_factory):
    """An undisturbed study. It has made room for the others: runs record where they lie, so all lie at one place in turn."""
    folder = tmp_path_factory.mktemp("study")
    started = start(folder / "study", 2)
    assert not started.communicate()[1] and started.returncode == 0
    (folder / "study").rename(folder / "whole")
    return folder / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_kills_of_the_study(workers, whole_study, table):
    draws, row, began = random.Random(workers), table.setdefault(f"study, {workers}", Counter()), time.time()
    while row["kills"] < STUDY:
        out = whole_study.parent / "study"
        again = True
        while again:
            started = start(out, workers)
            row["starts"] += 1
            again = row["kills"] < STUDY and strike(started, out, draws, row)
        row["after the end"] += row["kills"] < STUDY
        assert not started.communicate()[1] and started.returncode == 0
        row["runs"] += 1
        assert study_differences(whole_study, out) == []
        out.rename(whole_study.parent / f"killed-{workers}-{row['runs']}")
    row["seconds"] += time.time() - began
