"""The whole study on small models, `python -m nanorlhf.study`, beside the time it took before.

    python -m benchmarks.study [--before SECONDS]
"""
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

from benchmarks import side_by_side as bench
from benchmarks import table
from nanorlhf.io.read import InputError
from nanorlhf.run.cli import check_bounds, run_script


@dataclass(frozen=True)
class Config:
    """The flags."""
    before: float = 374.0                        # seconds that the same command took then; the default is what was recorded on our machine
    scale: Literal["smoke", "demo"] = "demo"     # smoke tries this out and is never written to the table


def main(config):
    check_bounds(config, before=1e-3)
    with bench.work_folder() as work:            # fresh: a study that is there would go on
        began = time.perf_counter()
        with open(work / "log", "w") as log:
            done = subprocess.run([sys.executable, "-m", "nanorlhf.study", "--scale", config.scale, "--out", str(work / "study")], stdout=log, stderr=log,
                                  cwd=bench.ROOT)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise InputError(f"nanorlhf.study ended with {done.returncode}: {bench.last_lines(work / 'log')}")
    row = table.row(config, f"the study, scale {config.scale}", "this study before the speed work, on this machine", 2, seconds, config.before)
    print(f"{row['work']}: {seconds:.0f} s, {row['ratio']:.2f} times as fast as before (goal 2)")
    if config.scale == "demo":
        table.record(row)
    return row


if __name__ == "__main__":
    run_script(main, Config)
