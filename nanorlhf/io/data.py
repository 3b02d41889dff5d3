"""Groups: a prompt with its responses. Readers for groups JSONL, FairytaleQA and Anthropic's HH; each says file and line of what it rejects.

    {"prompt": "...", "responses": [{"text": "...", "place": 0, "label": 1, "scores": [0.3, 0.7]}]}

place (0 is the best, equal places tie), label (1 good, 0 bad), scores (several judgements) and ended (false: cut off before
EOS) are optional; other keys are kept. Whitespace between prompt and response belongs to the response: spaces at a
prompt's end are moved to the front of each response, everything else is kept exactly.
"""
import codecs
import csv
import io
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from .read import MAX_FILE_BYTES, InputError, parse_json, read_bytes

TEMPLATE = "{passage}\nQuestion:"        # FairytaleQA's prompt
MAX_FLOAT32 = 3.4e38                         # of float32, in which the losses are computed
MAX_TRAILING_SPACES = 100                        # at a prompt's end: each of its responses gets them, so that a megabyte of them would become a terabyte
HELD_OUT = 10                            # a single file has no held-out part: every tenth distinct prompt becomes it


@dataclass
class Response:
    text: str
    place: float | None = None
    label: int | None = None
    scores: list[float] | None = None
    ended: bool = True
    extra: dict = field(default_factory=dict)


@dataclass
class Group:
    prompt: str
    responses: list[Response]
    truncatable: bool = False                    # may a prompt that is too long lose its beginning? a dialogue may, a passage may not
    extra: dict = field(default_factory=dict)


@dataclass
class Data:
    train: list[Group]
    held_out: list[Group]
    dropped: Counter                     # reason -> how many
    source: str                          # what was read, in words

    def train_texts(self) -> list[str]:
        return [group.prompt + response.text for group in self.train for response in group.responses]


# ------------------------------------------------------------------------------------------------------------ lines

def _text(path):
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 (byte {error.object[error.start]:#04x}); save it as UTF-8") from None


def _objects(path):
    """(line number, object) of every line of a JSONL file that is not blank."""
    found = 0
    for number, line in enumerate(io.BytesIO(read_bytes(path).removeprefix(codecs.BOM_UTF8)), 1):    # a list of all would take 8 bytes an empty line
        if line.strip():
            found += 1
            yield number, parse_json(line.strip(), f"{path}:{number}")
    if not found:
        raise InputError(f"{path}: the file is empty")


def _number(value):
    """A number that float32 holds: NaN, infinity and integers of 400 digits are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_FLOAT32


# ------------------------------------------------------------------------------------------------------ groups JSONL

def make_group(prompt, responses, truncatable=False, extra=None):
    """The whitespace rule, in the one place where groups are born."""
    bare = prompt.rstrip(" ")
    for response in responses:
        response.text = prompt[len(bare):] + response.text
    return Group(bare, responses, truncatable, extra or {})


def _parse_response(value, where):
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise InputError(f"{where}: each response needs a \"text\", found {str(value)[:60]!r}")
    rest = dict(value)
    text, place, label = rest.pop("text"), rest.pop("place", None), rest.pop("label", None)
    scores, ended = rest.pop("scores", None), rest.pop("ended", True)
    if place is not None and not _number(place):
        raise InputError(f"{where}: place {place!r:.60} is not a number")
    if label is not None and (label not in (0, 1) or isinstance(label, bool)):
        raise InputError(f"{where}: label {label!r:.60} is neither 1 (good) nor 0 (bad)")
    if scores is not None and not (isinstance(scores, list) and scores and all(map(_number, scores))):
        raise InputError(f"{where}: scores {str(scores)[:40]!r} is not a list of numbers")
    if not isinstance(ended, bool):
        raise InputError(f"{where}: ended {ended!r:.60} is neither true nor false")
    return Response(text, place, label, scores, ended, rest)


def read_groups(path):
    """Groups JSONL -> (groups, dropped). A file whose first line has `chosen` is read as HH."""
    groups, dropped = [], Counter()
    for number, value in _objects(path):
        if not groups and not dropped and "chosen" in value:
            return read_hh(path)
        where = f"{path}:{number}"
        if not isinstance(value.get("prompt"), str):
            raise InputError(f"{where}: no \"prompt\" (a string) among {str(sorted(value)[:6])[:200]}")
        if value["prompt"].endswith(" " * (MAX_TRAILING_SPACES + 1)):
            raise InputError(f"{where}: the prompt ends in more than {MAX_TRAILING_SPACES} spaces, which every response would begin with; remove them")
        if not isinstance(value.get("responses", []), list):
            raise InputError(f"{where}: \"responses\" is not a list")
        if not isinstance(value.get("cut", False), bool):
            raise InputError(f"{where}: cut {str(value['cut'])[:40]!r} is neither true nor false")
        responses = [_parse_response(response, where) for response in value.get("responses", [])]
        kept = [response for response in responses if response.text.strip()]
        dropped["empty response"] += len(responses) - len(kept)
        if responses and not kept:
            dropped["group without a response"] += 1
            continue
        extra = {key: item for key, item in value.items() if key not in ("prompt", "responses", "cut")}
        groups.append(make_group(value["prompt"], kept, value.get("cut", False), extra))
    return groups, dropped


def write_groups(groups):
    """Groups -> bytes of groups JSONL, what `read_groups` reads back."""
    lines = []
    for group in groups:
        responses = []
        for r in group.responses:
            known = {"text": r.text, "place": r.place, "label": r.label, "scores": r.scores, "ended": None if r.ended else False}
            responses.append({**{key: item for key, item in known.items() if item is not None}, **r.extra})
        lines.append({"prompt": group.prompt, "responses": responses, **({"cut": True} if group.truncatable else {}), **group.extra})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return text.encode("utf-8", "backslashreplace")              # half a surrogate pair, which UTF-8 lacks, becomes JSON's own \uXXXX


# -------------------------------------------------------------------------------------------------------- FairytaleQA

def _csv(path, *columns):
    """(line number, row) of a CSV file that must have these columns."""
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)     # else an unclosed quote swallows the rows after it
    try:
        names = list(reader.fieldnames or [])
        wrong = [column for column in columns if names.count(column) != 1]
        if wrong:
            raise InputError(f"{path}:1: {'two columns' if wrong[0] in names else 'no column'} {wrong[0]!r} (found {str(names or 'nothing')[:80]})")
        for row in reader:
            if None in row:                      # where a comma in a text is not quoted, the columns after it are others
                raise InputError(f"{path}:{reader.line_num}: {len(names) + len(row[None])} fields, {len(names)} columns; quote a text that has a comma")
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num + 1}: not CSV ({error}) in the record that begins here") from None


def read_fairytaleqa(folder, split):
    """FairytaleQA as published: all questions of one passage (one book, the same sections) are one group.  -> (groups, dropped)"""
    questions, stories = folder / "questions" / split, folder / "section-stories" / split
    files = sorted(questions.glob("*-questions.csv"))
    if not files:
        raise InputError(f"{questions}: no *-questions.csv here")
    groups, dropped = [], Counter()
    for path in files:
        story = stories / path.name.replace("-questions.csv", "-story.csv")
        sections, passages, length = {}, {}, 0
        for _, row in _csv(story, "section", "text"):
            sections.setdefault(str(row["section"]).strip(), []).append((row["text"] or "").strip())
        for number, row in _csv(path, "cor_section", "question"):
            names = [name.strip() for name in (row["cor_section"] or "").split(",") if name.strip()]
            if not names or not all(sections.get(name) and sections[name][0] for name in names):
                dropped["question about a section that the story lacks"] += 1
            elif any(len(sections[name]) > 1 for name in names):
                dropped["question about a section that the story has twice"] += 1
            elif not (row["question"] or "").strip():
                dropped["empty question"] += 1
            else:
                length += 0 if tuple(names) in passages else sum(len(sections[name][0]) for name in names)
                if length > MAX_FILE_BYTES:
                    raise InputError(f"{path}:{number}: its passages have more than {MAX_FILE_BYTES:,} letters, naming sections again and again")
                group = passages.setdefault(tuple(names), {})
                text = " " + " ".join(row["question"].split())
                dropped["question asked twice of one passage"] += text in group
                group.setdefault(text, Response(text, label=1, extra={"line": f"{path.name}:{number}"}))
        for names, responses in passages.items():
            prompt = TEMPLATE.format(passage="\n".join(sections[name][0] for name in names))
            groups.append(make_group(prompt, list(responses.values()), extra={"story": story.stem, "sections": list(names)}))
    return groups, dropped


# ----------------------------------------------------------------------------------------------------------------- HH

def read_hh(path):
    """Anthropic's pairs: the prompt is the dialogue up to and including the last `Assistant:`.  -> (groups, dropped)"""
    groups, dropped, mark = [], Counter(), "\n\nAssistant:"
    for number, value in _objects(path):
        for key in ("chosen", "rejected"):
            if not isinstance(value.get(key), str):
                raise InputError(f"{path}:{number}: no \"{key}\" (a string) among {str(sorted(value)[:6])[:200]}")
            if mark not in value[key]:
                raise InputError(f"{path}:{number}: \"{key}\" has no {mark!r}: {value[key][:60]!r}")
        end = value["chosen"].rindex(mark) + len(mark)
        prompt, chosen, rejected = value["chosen"][:end], value["chosen"][end:], value["rejected"][end:]
        if value["rejected"][:end] != prompt or mark in rejected:
            dropped["dialogues that part before the last answer"] += 1
        elif chosen == rejected:
            dropped["equal answers"] += 1
        elif not chosen.strip() or not rejected.strip():
            dropped["empty answer"] += 1
        else:
            pair = [Response(chosen, place=0, label=1), Response(rejected, place=1, label=0)]
            groups.append(make_group(prompt, pair, truncatable=True))
    return groups, dropped


# ------------------------------------------------------------------------------------------------------------- folders

def _one_of(folder, *names):
    return next((folder / name for name in names if (folder / name).exists()), None)


def _split(groups):
    """Every tenth distinct prompt is held out, with all of its lines: no passage on both sides."""
    index = {}
    for group in groups:
        index.setdefault(group.prompt, len(index))
    held = [index[group.prompt] % HELD_OUT == HELD_OUT - 1 for group in groups]
    return [g for g, out in zip(groups, held) if not out], [g for g, out in zip(groups, held) if out]


def load(path):
    """A groups file, or a folder of FairytaleQA, of HH (one part, or several in subfolders), or with train.jsonl and val.jsonl.  -> Data"""
    path = Path(path)
    if not (os.path.isfile(path) or os.path.isdir(path)):              # neither raises, whatever the name
        raise InputError(f"--data {path}: no such file or folder")
    dropped = Counter()

    def read(reader, *arguments):
        groups, reasons = reader(*arguments)
        dropped.update(reasons)
        return groups

    if path.is_file():
        train, held_out = _split(read(read_groups, path))
        source = f"{path}, every {HELD_OUT}th prompt held out"
    elif _one_of(path, "data-by-train-split", "questions"):
        folder = path / "data-by-train-split" if (path / "data-by-train-split").exists() else path
        train, held_out = read(read_fairytaleqa, folder, "train"), read(read_fairytaleqa, folder, "val")
        source = f"FairytaleQA in {path}"
    else:
        parts = [path] if _one_of(path, "train.jsonl", "train.jsonl.gz") else \
            [part for part in sorted(path.iterdir()) if part.is_dir() and _one_of(part, "train.jsonl", "train.jsonl.gz")]
        if not parts:
            raise InputError(f"--data {path}: neither FairytaleQA (questions/, section-stories/) nor train.jsonl[.gz], here or one folder down")
        train, held_out = [], []
        for part in parts:
            train += read(read_groups, _one_of(part, "train.jsonl", "train.jsonl.gz"))
            other = _one_of(part, "val.jsonl", "val.jsonl.gz", "test.jsonl", "test.jsonl.gz")
            held_out += read(read_groups, other) if other else []
        if not held_out:
            train, held_out = _split(train)
        source = ", ".join(str(part) for part in parts)
    if not train:
        raise InputError(f"--data {path}: no group left to train on ({dict(+dropped) or 'no groups'})")
    return Data(train, held_out, +dropped, source)


# -------------------------------------------------------------------------------------------- any loss on any labels

@dataclass
class Judgement:
    """What the three losses want of one group, a value a response; None where this response is left out of that loss."""
    place: list[float]
    label: list[int | None]
    targets: list[list[float]]           # +1 for each comparison won, -1 for each lost


def derive_labels(responses, labels="auto"):
    """Places, labels and targets from whichever kind of judgement a group carries ("auto": place, else label, else scores).

    places -> labels: the better half good, the worse half bad, a tie across the middle left out.
    labels -> places: every good over every bad.   scores -> places of their means.  None where a response lacks the kind asked for.
    """
    kinds = ("place", "label", "scores") if labels == "auto" else (labels,)
    kind = next((kind for kind in kinds if responses and all(getattr(r, kind) is not None for r in responses)), None)
    if kind is None:
        return None
    if kind == "label":
        label = [r.label for r in responses]
        place = [1.0 - y for y in label]
        return Judgement(place, label, [[2.0 * y - 1.0] for y in label])
    value = [r.place if kind == "place" else -math.fsum(r.scores) / len(r.scores) for r in responses]     # fsum: any order, the same mean
    ranks = {v: float(i) for i, v in enumerate(sorted(set(value)))}   # float32 would tie places that differ in the eighth digit
    place = [ranks[v] for v in value]
    won = [sum(mine < other for other in place) for mine in place]
    lost = [sum(mine > other for other in place) for mine in place]
    half, label = len(place) / 2, []
    for w, l in zip(won, lost):                                  # a response and its ties fill ranks l ... K - w - 1
        label.append(1 if len(place) - w <= half else 0 if l >= half else None)
    return Judgement(place, label, [[1.0] * w + [-1.0] * l for w, l in zip(won, lost)])


def keep_preferred(groups):
    """What a supervised policy learns from: not label 0, and where places tell responses apart, only the best of them.  -> (groups, how many left out)"""
    kept, left_out = [], 0
    for group in groups:
        best = min((r.place for r in group.responses if r.place is not None), default=None)
        responses = [r for r in group.responses if (r.label == 1 if r.label is not None else r.place in (None, best))]
        left_out += len(group.responses) - len(responses)
        if responses:
            kept.append(Group(group.prompt, responses, group.truncatable, group.extra))
    return kept, left_out


def split_into_pairs(groups):
    """C(K,2) groups of two out of each group: what paper A found to overfit, because the pairs of a prompt are then in different minibatches."""
    return [Group(group.prompt, list(pair), group.truncatable, group.extra) for group in groups for pair in combinations(group.responses, 2)]
