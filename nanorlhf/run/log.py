"""metrics.jsonl (one object per line), samples.jsonl (texts to look at), and the progress line."""
import json
import math
import sys
import time
from pathlib import Path

from ..io.files import replace


def to_json(value):
    """Floats as JSON allows them: NaN and infinity become null.

    Seven digits are enough to plot and to compare.
    """
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def header(title, **lines):
    """What will happen, before it does: one line per subject, names as given."""
    print(title)
    for name, text in lines.items():
        print(f"  {name:<10}{text}")
    print(flush=True)


class Log:
    """Appends rows to OUT/metrics.jsonl and OUT/samples.jsonl, and prints.

    Rows at or after `start` belong to steps that are done again: they are removed.
    progress_keys: the names on the progress line; the file has all of them
    is_main: one process alone writes
    """

    def __init__(self, out, start, steps, progress_keys, is_main=True):
        self.start = start
        self.steps = steps
        self.progress_keys = progress_keys
        self.is_main = is_main
        self.began = time.time()
        self.warned = set()
        self.files = {}
        if is_main:
            for name in ("metrics", "samples"):
                self._open(name, Path(out, f"{name}.jsonl"))

    def _open(self, name, path):
        kept_lines = []
        missing = set(range(self.start))
        # A killed process may have left half of a line; and a text may hold U+2028, at which
        # str.splitlines would cut too.
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                continue
            try:
                step = int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError, RecursionError):
                self.warn(f"{path}:{number}: damaged, left out ({line[:60]!r})")
                continue
            if step < self.start and self.start:           # -1 is before the first step
                kept_lines.append(line)
                missing.discard(step)
        if missing and name == "metrics":
            self.warn(
                f"{path}: nothing about {len(missing)} of the {self.start} steps before, "
                f"the first of them step {min(missing)}"
            )
        replace(path, b"".join(kept_lines))
        # half a surrogate pair becomes JSON's \uXXXX
        self.files[name] = open(path, "a", encoding="utf-8", errors="backslashreplace")

    def _write(self, name, **row):
        if self.is_main:
            values = {key: to_json(value) for key, value in row.items()}
            file = self.files[name]
            try:
                file.write(json.dumps(values, ensure_ascii=False) + "\n")
                file.flush()
            except OSError as error:             # the disk is full: Python does not name the file
                error.filename = file.name
                raise

    def step(self, step, **numbers):
        self._write("metrics", step=step, **numbers)
        seconds_per_step = (time.time() - self.began) / (step + 1 - self.start)
        minutes = seconds_per_step * (self.steps - step - 1) / 60
        progress = "  ".join(f"{key} {numbers[key]:.4g}" for key in self.progress_keys)
        print(f"step {step + 1}/{self.steps}  {progress}  left {minutes:.1f} min", flush=True)

    def eval(self, step, **numbers):
        """A row of its own with eval_ names; `step` is finished steps minus one, as in `step`."""
        self._write("metrics", step=step, **numbers)
        line = "  held out:"
        for key, value in numbers.items():
            shown = f"{value:.4f}" if isinstance(value, float) else value
            line += f"  {key} {shown}"
        print(line, flush=True)

    def text(self, step, prompt, response, **numbers):
        """A prompt and a response: whole in the file; the terminal shows the prompt's end only."""
        self._write("samples", step=step, prompt=prompt, response=response, **numbers)
        shown = [f"{key} {value:.3g}" for key, value in numbers.items() if isinstance(value, float)]
        print(f"  ...{prompt[-60:]!r} -> {response!r}  {'  '.join(shown)}", flush=True)

    def warn(self, message, once=False):
        """once: not again in this process."""
        if self.is_main and not (once and message in self.warned):
            print(f"  warning: {message}", file=sys.stderr, flush=True)
            self.warned.add(message)
