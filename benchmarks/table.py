"""results.json, one flat object a row, and the table in README.md that is written from it: no figure of it is typed by hand."""
import dataclasses
import datetime
import json
import os
import re
import sys
from importlib import metadata
from pathlib import Path

from nanorlhf.io.read import InputError

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "results.json", HERE / "README.md"
BEGIN, END = "<!-- results: written by the benchmarks from results.json -->", "<!-- end of results -->"
THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count())      # of both sides
HEAD = ("work", "against", "ratio", "goal", "ours, s", "against, s", "ours, a second", "share of limit: ours, peer", "padding: ours, peer",
        "memory, GB: ours, peer")


def peak_gb(pid="self", which="VmHWM"):
    """Most memory that a process ever held (VmRSS: holds now), its own alone: ru_maxrss has its parent's too. 0 without /proc or process."""
    try:
        return int(re.search(rf"{which}:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) / 2**20
    except (OSError, TypeError):
        return 0.0


def machine():
    """Processor, cores and threads; on another system than Linux what Python knows."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    return f"{found[1].strip() if found else sys.platform}, {os.cpu_count()} cores, {THREADS} thread{'s' * (THREADS > 1)} a side"


def command(config):
    """The command line: folders left open, defaults left out."""
    words = [f"--{field.name} DIR" if field.name in ("peers", "data") else f"--{field.name} {getattr(config, field.name)}"
             for field in dataclasses.fields(config) if getattr(config, field.name) != field.default or field.name == "data"]
    return " ".join([f"python -m benchmarks.{Path(sys.argv[0]).stem}", *words])


def row(config, work, against, goal, ours_seconds, peer_seconds=None, **more):
    """A row of results.json. ratio: how many times the seconds of what is compared with; a limit's seconds make it a share of that limit."""
    return {"work": work, "against": against, "ours_seconds": ours_seconds, "peer_seconds": peer_seconds,
            "ratio": peer_seconds and peer_seconds / ours_seconds, "goal": goal, "machine": machine(), "versions": f"torch {metadata.version('torch')}",
            "date": datetime.date.today().isoformat(), "command": command(config), **more}


def record(result, results=None, readme=None):
    """Puts a row into results.json, in the place of an older one of the same work, and writes the table between README's two markers anew."""
    results, readme = results or RESULTS, readme or README
    rows = json.loads(results.read_text()) if results.exists() else {}
    rows[f"{result['work']}, against {result['against']}"] = result
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"{readme}: the table's markers are gone; put them back: {BEGIN} and {END}")
    results.write_text(json.dumps(rows, indent=1) + "\n")
    readme.write_text(f"{before}{BEGIN}\n{table(rows.values())}\n{END}{after}", encoding="utf-8")


def table(rows):
    """Markdown, a line a row, and below it what the figures were taken on."""
    lines, taken = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"], {}
    for row in rows:
        seconds = lambda side, row=row: f"{row[f'{side}_seconds']:.3g}" + (" ({:.3g} to {:.3g})".format(*row[f"{side}_spread"]) if f"{side}_spread" in row else "")
        both = lambda form, *names, row=row: ", ".join(form.format(row[name]) for name in names if row.get(name) is not None)
        cells = (row["work"], row["against"], f"**{row['ratio']:.3g}**", f"{row['goal']:g}", seconds("ours"), seconds("peer"),
                 f"{row['per_second']:.3g} {row['unit']}" if "per_second" in row else "", both("{:.2f}", "share", "peer_share"),
                 both("{:.0%}", "padding", "peer_padding"), both("{:.1f}", "ours_memory_gb", "peer_memory_gb"))
        lines.append(f"| {' | '.join(cells)} |")
        taken.setdefault(f"{row['machine']}; {row['versions']}", []).append(row)
    for about, group in taken.items():
        lines += ["", f"Taken {min(r['date'] for r in group)} to {max(r['date'] for r in group)} on {about}: {'; '.join(r['work'] for r in group)}."]
    return "\n".join(lines)
