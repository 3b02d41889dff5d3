"""Is a run that was disturbed, in the end, the one that nobody disturbed? Bit for bit, but for the clock."""
import json

from nanorlhf.io import files
from nanorlhf.run import run_folder

MEASURED = {"seconds", "tokens_per_second", "mfu", "memory_gb"}


def timeless(path):
    """Rows of a metrics.jsonl without what a clock says."""
    return [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in path.read_bytes().splitlines()]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damaged(folder):
    """What is wrong anywhere below a folder: files that SHA256SUMS beside them contradicts, sums of what a kill interrupted, temporary files."""
    found = [f"{path} is left" for path in folder.rglob("*") if path in files.partial_files(path.parent)]
    for sums in folder.rglob(files.SUMS):
        for name, digests in files.read_checksums(sums.parent).items():
            found += [f"{sums.parent}: {files.file_damage(sums.parent / name)}"] * bool(files.file_damage(sums.parent / name))
            found += [f"{sums}: {len(digests)} digests of {name}"] * (len(digests) > 1)
    return found


def differences(whole, other):
    """Between an undisturbed run folder and another one.  -> list of words, empty where there are none"""
    found = damaged(other)
    found += ["model/"] * (content(whole / "model") != content(other / "model"))
    states = [{path.name: path.read_bytes() for path in run_folder.states(out)} for out in (whole, other)]
    found += [f"states {[*states[1]]}, not {[*states[0]]}"] * (states[0].keys() != states[1].keys())
    found += [name for name in states[0].keys() & states[1].keys() if states[0][name] != states[1][name]]
    found += ["metrics.jsonl"] * (timeless(whole / "metrics.jsonl") != timeless(other / "metrics.jsonl"))
    found += ["samples.jsonl"] * ((whole / "samples.jsonl").read_bytes() != (other / "samples.jsonl").read_bytes())
    found += [files.SUMS] * (files.read_checksums(whole).keys() != files.read_checksums(other).keys())
    return found
