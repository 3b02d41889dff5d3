"""metrics.jsonl (one object a line), samples.jsonl (texts to look at), and the progress line."""
import json
import math
import sys
import time
from pathlib import Path

from ..io.files import replace


def to_json(value):
    """Floats as JSON allows them: NaN and infinity become null; seven digits are enough to plot and to compare."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def header(title, **lines):
    """What will happen, before it does: a line a subject, names as given."""
    print(f"{title}\n" + "".join(f"  {name:<10}{text}\n" for name, text in lines.items()), flush=True)


class Log:
    """Appends rows to OUT/metrics.jsonl and OUT/samples.jsonl. Rows at or after `start` belong to steps that are done again: they go.

    show: the names that the progress line has room for, the file has them all;  writes: false at all processes but one.
    """

    def __init__(self, out, start, steps, show, writes=True):
        self.start, self.steps, self.show, self.began, self.files, self.writes = start, steps, show, time.time(), {}, writes
        for name in ("metrics", "samples") if writes else ():
            path = Path(out) / f"{name}.jsonl"
            kept = [(line, step) for line, step in self._rows(path) if step < start and start]               # -1 is before the first step
            lost = set(range(start)) - {step for _, step in kept}
            if lost and name == "metrics":
                self.warn(f"{path}: nothing about {len(lost)} of the {start} steps before, the first of them step {min(lost)}")
            replace(path, b"".join(line for line, _ in kept))
            self.files[name] = open(path, "a", encoding="utf-8", errors="backslashreplace")      # half a surrogate pair becomes JSON's \uXXXX

    def _rows(self, path):
        """(line, step) of whole lines, as bytes: a killed process may have left half of one, and a text may hold U+2028, where str.splitlines cuts too."""
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for number, line in enumerate(lines, 1):
            if line.endswith(b"\n"):
                try:
                    yield line, int(json.loads(line)["step"])
                except (ValueError, KeyError, TypeError, RecursionError):
                    self.warn(f"{path}:{number}: damaged, left out ({line[:60]!r})")

    def _write(self, name, row):
        if self.writes:
            file = self.files[name]
            try:
                file.write(json.dumps({key: to_json(value) for key, value in row.items()}, ensure_ascii=False) + "\n")
                file.flush()
            except OSError as error:             # the disk is full: Python does not say which file
                raise OSError(error.errno, error.strerror, file.name) from None

    def step(self, step, **numbers):
        self._write("metrics", {"step": step, **numbers})
        left = (time.time() - self.began) / (step + 1 - self.start) * (self.steps - step - 1)
        shown = "  ".join(f"{key} {numbers[key]:.4g}" for key in self.show)
        print(f"step {step + 1}/{self.steps}  {shown}  left {left / 60:.1f} min", flush=True)

    def eval(self, step, **numbers):
        """A line of its own with eval_ names; `step` counts finished steps minus one, as in `step`."""
        self._write("metrics", {"step": step, **numbers})
        print("  ".join(["  held out:"] + [f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items()]), flush=True)

    def text(self, step, prompt, response, **more):
        """A text, in the file whole, on the terminal the prompt's end only."""
        self._write("samples", {"step": step, "prompt": prompt, "response": response, **more})
        numbers = "  ".join(f"{key} {value:.3g}" for key, value in more.items() if isinstance(value, float))
        print(f"  ...{prompt[-60:]!r} -> {response!r}  {numbers}", flush=True)

    def warn(self, message):
        if self.writes:
            print(f"  warning: {message}", file=sys.stderr, flush=True)
