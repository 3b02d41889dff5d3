"""Full and read-only disks, damaged and missing files, processes that a real torchrun loses or stops: one line, and the same end after all.

    python -m pytest tests/crash/test_disks.py -s                  prints the table of damage and what the user saw
    python -m pytest tests/crash/test_disks.py -s -m slow          every script, every position
"""
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from alike import damaged, differences
from test_processes import flags_of, torchrun

from nanorlhf.io import files, hub
from nanorlhf.io.read import InputError
from nanorlhf.run import run_folder

ROOT = Path(__file__).resolve().parent.parent.parent
RUN = dict(steps=8, groups=4, save_every=2, eval_every=1, max_tokens=110)
SCRIPTS = ("sft", "ranking", "ppo")


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not shutil.which("mount") or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def lines(answer):
    """What a user has to read, without warnings about the model."""
    return [line for line in answer["stderr"].splitlines() if not line.startswith("  warning: ")]


def refused(answer, *says):
    """One line on stderr, exit code 2 everywhere."""
    said = lines(answer)
    assert set(answer["codes"]) == {2} and len(said) == 1 and said[0].startswith("error: ") and all(word in said[0] for word in says), answer
    return said[0]


def load(out, name="sft"):
    return (hub.load_reward_model if name == "ranking" else hub.load_policy)(out)


# --------------------------------------------------------------------------------------------------------- full, read-only

def some(cases, quick):
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in cases]


FULL = [(name, processes, what) for name in SCRIPTS for processes in (1, 2) for what in ("save", "log")]


@pytest.mark.parametrize("name, processes, what", some(FULL, [("sft", 1, "save"), ("sft", 2, "log")]))
def test_a_full_disk(name, processes, what, jobs, world, disk, tmp_path):
    """The second save finds no room; or there is none between two saves that are far apart, and the log has filled its last page."""
    more = dict(steps=6, save_every=1) if what == "save" else dict(steps=72, save_every=36, eval_every=100)
    script, flags = flags_of(world, name, disk / "run", **{**RUN, **more})
    said = refused(jobs(script, flags, processes=processes, fault="full_disk"), "No space left on device", str(disk / "run"))
    assert what == "save" or "metrics.jsonl" in said
    state, = run_folder.states(disk / "run")                   # the first save, as it was
    assert state.name == f"state-{more['save_every']:06}.safetensors" and damaged(disk / "run") == []
    load(disk / "run", name)
    refused(jobs(script, flags, processes=processes), "No space left on device", str(disk / "run"))
    assert run_folder.states(disk / "run") == [state] and damaged(disk / "run") == []
    (disk / "filler").unlink()
    jobs.well(script, flags, processes=processes)
    whole = jobs.well(script, {**flags, "out": tmp_path / "whole"}, processes=processes)
    assert differences(whole, disk / "run") == []


@pytest.mark.parametrize("name, processes", some([(name, processes) for name in SCRIPTS for processes in (1, 2)], [("sft", 1)]))
def test_a_read_only_disk(name, processes, jobs, world, disk, tmp_path):
    script, flags = flags_of(world, name, disk / "run", **RUN)
    assert jobs(script, flags, call=60)["codes"] == [-signal.SIGKILL] and run_folder.states(disk / "run")
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for out in (disk / "run", disk / "new"):
        refused(jobs(script, {**flags, "out": out}, processes=processes), f"--out {out}: cannot be written (Read-only file system)")
    assert {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()} == before
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    jobs.well(script, flags)
    assert differences(jobs.well(script, {**flags, "out": tmp_path / "whole"}), disk / "run") == []


# ----------------------------------------------------------------------------------------------------------------- damage

def flip(path, share, by=0x80):
    """Another byte at a share of the file's length."""
    raw = bytearray(path.read_bytes())
    raw[int(share * (len(raw) - 1))] ^= by
    path.write_bytes(raw)


DAMAGE = {
    "first byte": lambda path: flip(path, 0),
    "byte at a third": lambda path: flip(path, 1 / 3),
    "byte in the middle": lambda path: flip(path, 0.5),
    "bit in the middle": lambda path: flip(path, 0.5, by=1),
    "last byte": lambda path: flip(path, 1),
    "cut in the middle": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
}
LOGS = ("metrics.jsonl", "samples.jsonl")


@pytest.fixture(scope="module")
def ended(jobs, world, tmp_path_factory):
    """Of each script, a run that has ended, and one that was killed on its way, with two states and a model.

    -> a function of the name: (script, flags, folder of the one, of the other, the older state of the one, of the other)
    """
    found = {}

    def runs_of(name):
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            script, flags = flags_of(world, name, folder / "whole", **RUN)
            whole = jobs.well(script, flags)
            part = {**flags, "steps": 5, "out": folder / "part"}       # eight steps later: the schedule is constant
            found[name] = script, flags, whole, jobs.well(script, part)
            found[name] += tuple(run_folder.states(out)[1].name for out in (whole, part["out"]))
        return found[name]
    return runs_of


@pytest.fixture(scope="module")
def table():
    found = []
    yield found
    widths = [max(map(len, column)) for column in zip(*found)]
    print("\n" + "\n".join("   ".join(word.ljust(width) for word, width in zip(row, widths)).rstrip() for row in found))


def short(text, folder):
    return text.replace(f"{folder}/", "").replace(str(folder), "RUN")[:170]


def hit(jobs, case, of, out, name, target, how):
    """Damages one file, loads the model, gives the same command.  -> row of the table; fails unless it refuses or ends as the undisturbed run"""
    script, flags, whole = of[:3]
    path = out / target
    gone = run_folder.states(out)
    DAMAGE[how](path)
    loads = "loads"
    try:
        load(out, name)
    except InputError as error:
        loads = str(error)
        assert "\n" not in loads and (path.name in loads or path.name in ("config.json", files.SUMS)), loads
    log, listed = target in LOGS, path.parent.name == "model" and path.name != files.SUMS
    assert not listed or loads != "loads", (target, how)
    answer = jobs(script, {**flags, "out": out})
    assert "Traceback" not in answer["stderr"], answer
    said = next((line for line in answer["stdout"].splitlines() + answer["stderr"].splitlines() if path.name in line or "damaged" in line), "nothing")
    if answer["codes"] == [2]:
        assert path.name in refused(answer), (target, how)
        return case, target, how, loads, said, "refused"
    assert answer["codes"] == [0], answer
    load(out, name)
    wrong = differences(whole, out)
    spare = target == of[4 if case == "ended" else 5]                  # a state that nobody reads while the newest is whole
    if log:      # what is lost is lost. Nobody can notice a number that is another number; a line without its end is what any kill leaves
        assert set(wrong) <= {target} and (target == "samples.jsonl" or path.name in said or how in ("bit in the middle", "last byte")), (target, how, wrong, answer)
    elif case == "ended" and (spare or target == files.SUMS):          # no save follows that would mend them; what is used is whole
        assert all(of[4] in word or word.startswith(("states", files.SUMS)) for word in wrong), (target, how, wrong)
    else:
        unsaid = spare or path.name == files.SUMS or path in gone and how == "removed"
        assert wrong == [] and (unsaid or path.name in said), (target, how, wrong, answer)
    return case, target, how, loads, said, "the same end" + " but for that file" * bool(wrong)


@pytest.mark.parametrize("name, case, every", [pytest.param("sft", "on its way", False, id="quick")] + [
    pytest.param(name, case, True, marks=pytest.mark.slow) for name in SCRIPTS for case in ("on its way", "ended")])
def test_damage_to_each_file(name, case, every, jobs, ended, tmp_path, table):
    of = ended(name)
    start = of[2] if case == "ended" else of[3]
    targets = sorted(str(path.relative_to(start)) for path in start.rglob("*") if path.is_file())
    assert len(targets) >= 9
    failed = []
    for number, (target, how) in enumerate((target, how) for target in targets for how in (DAMAGE if every else ["byte in the middle"])):
        out = tmp_path / str(number)
        shutil.copytree(start, out)
        try:
            table.append((f"{name}, {case}", *(short(word, out) for word in hit(jobs, case, of, out, name, target, how)[1:])))
        except AssertionError as error:
            failed.append(f"{target}, {how}: {error}")
        shutil.rmtree(out)
    assert not failed, "\n".join(failed)


def test_both_states_damaged(jobs, ended, tmp_path):
    script, flags, start = (ended("sft")[i] for i in (0, 1, 3))
    out = shutil.copytree(start, tmp_path / "run")
    for path in run_folder.states(out):
        flip(path, 0.5)
    refused(jobs(script, {**flags, "out": out}), *(path.name for path in run_folder.states(out)), "remove the folder to start again")


# --------------------------------------------------------------------------------------------------------------- torchrun

LONG = dict(steps=60, save_every=5, eval_every=20, groups=8, max_tokens=64)


def launched(script, flags, *options):
    """torchrun as a terminal starts it, in a group of its own."""
    return subprocess.Popen(torchrun([str(ROOT / f"{script}.py")], flags, 2, *options), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)


def at_step(started, out, step):
    """Waits for the row of a step."""
    deadline = time.time() + 200
    while not (out / "metrics.jsonl").exists() or f'"step": {step}, "loss"' not in (out / "metrics.jsonl").read_text():
        assert started.poll() is None and time.time() < deadline, started.communicate()[1]
        time.sleep(0.005)


def worker(started, rank):
    for number in Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{number}/environ").read_text():
            return int(number)


@pytest.fixture(scope="module")
def undisturbed(jobs, world, tmp_path_factory):
    script, flags = flags_of(world, "sft", tmp_path_factory.mktemp("two") / "whole", **LONG)
    return script, flags, jobs.well(script, flags, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_starts_again_what_was_killed(rank, undisturbed, tmp_path):
    script, flags, whole = undisturbed
    out = tmp_path / "run"
    started = launched(script, {**flags, "out": out}, "--max-restarts=2")
    at_step(started, out, 12)
    os.kill(worker(started, rank), signal.SIGKILL)
    error = started.communicate(timeout=200)[1]
    assert started.returncode == 0, error
    assert differences(whole, out) == []


@pytest.mark.slow
@pytest.mark.parametrize("name, whom", [("SIGTERM", "torchrun"), ("SIGINT", "torchrun"), ("SIGINT", "everyone")])
def test_torchrun_is_stopped(name, whom, undisturbed, tmp_path):
    """As a cluster stops it, and as Ctrl-C does, which the terminal sends to the workers too."""
    script, flags, whole = undisturbed
    out = tmp_path / "run"
    started = launched(script, {**flags, "out": out})
    at_step(started, out, 12)
    (os.killpg if whom == "everyone" else os.kill)(started.pid, getattr(signal, name))
    error = started.communicate(timeout=200)[1]
    assert started.returncode != 0 and error.count("stopped; the same command goes on from the last save") == 1, error
    steps = [row for row in (out / "metrics.jsonl").read_text().splitlines() if '"loss"' in row and '"lr"' in row]
    assert run_folder.states(out)[0].name == f"state-{len(steps):06}.safetensors" and 13 <= len(steps) < LONG["steps"] and damaged(out) == []
    again = launched(script, {**flags, "out": out})
    assert again.communicate(timeout=200)[1] is not None and again.returncode == 0
    assert differences(whole, out) == []
