"""Tests of a copy of the code, each time in a process of its own, without importing torch again.

A server imports torch once and then forks: importing it takes longer than most tests. It has no
other thread, and imports nothing of this repository, so that a copy's code is all that a fork sees.
"""
import multiprocessing
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def pytest_in(folder, arguments, printed):
    """In the fork: pytest in this folder, with all that it prints in the file `printed`."""
    with open(printed, "wb", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))
    os.chdir(folder)
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]
    os.environ["PYTHONPATH"] = str(folder)                     # for the scripts that tests start
    sys.dont_write_bytecode = True
    here = [str(ROOT), str(ROOT / "tests"), ""]
    sys.path[:] = [str(folder), str(folder / "tests")] + [p for p in sys.path if p not in here]
    import pytest

    code = int(pytest.main(["-p", "no:cacheprovider", "-p", "no:xdist", *arguments]))
    from nanorlhf import __file__ as tested

    code = code if Path(tested).is_relative_to(folder) else 99
    sys.stdout.flush()
    os._exit(code)                                             # whatever a test has left running


def run(folder, arguments, seconds=300):
    """pytest in this folder.  -> (exit code, None where it took too long; what it printed)"""
    printed = folder / "printed.txt"
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "pytest"])         # at its start, which is once
    process = server.Process(target=pytest_in, args=(folder, arguments, printed))
    process.start()
    process.join(seconds)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    return code, printed.read_text(encoding="utf-8", errors="replace")
