"""Groups: a prompt with its responses, read from groups JSONL, FairytaleQA and Anthropic's HH.

    {"prompt": "...", "responses": [{"text": "...", "place": 0, "label": 1, "scores": [0.3, 0.7]}]}

place (0 is the best, equal places tie), label (1 good, 0 bad), scores (several judgements) and
ended (false: cut off before EOS) are optional; other keys are kept. Whitespace between prompt and
response belongs to the response: spaces at a prompt's end are moved to the front of each response,
everything else is kept exactly. Errors name the file and the line of what is rejected.
"""
import codecs
import csv
import io
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from .read import MAX_FILE_BYTES, InputError, parse_json, read_bytes

TEMPLATE = "{passage}\nQuestion:"        # FairytaleQA's prompt
MAX_FLOAT32 = 3.4e38                     # the losses are computed in float32
# At a prompt's end. Each of its responses gets them, so a megabyte of them would become a terabyte.
MAX_TRAILING_SPACES = 100
HELD_OUT_EVERY = 10                      # data without a held-out part: every tenth distinct prompt


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
    # may a prompt that is too long lose its beginning? a dialogue may, a passage may not
    truncatable: bool = False
    extra: dict = field(default_factory=dict)


@dataclass
class Data:
    train: list[Group]
    held_out: list[Group]
    dropped: Counter                     # reason -> how many
    source: str                          # what was read, in words

    def train_texts(self) -> list[str]:
        return [group.prompt + r.text for group in self.train for r in group.responses]


# --------------------------------------------------------------------------------------- lines

def _read_json_lines(path):
    """(line number, object) of every line of a JSONL file that is not blank."""
    empty = True
    # a list of all lines would take 8 bytes for each empty one
    lines = io.BytesIO(read_bytes(path).removeprefix(codecs.BOM_UTF8))
    for number, line in enumerate(lines, 1):
        if line.strip():
            empty = False
            yield number, parse_json(line.strip(), f"{path}:{number}")
    if empty:
        raise InputError(f"{path}: the file is empty")


def _is_number(value):
    """A number that float32 holds: NaN, infinity and integers of 400 digits are none."""
    return type(value) in (int, float) and abs(value) <= MAX_FLOAT32


# -------------------------------------------------------------------------------- groups JSONL

def make_group(prompt, responses, truncatable=False, extra=None):
    """A Group by the whitespace rule: every reader makes its groups here."""
    stripped = prompt.rstrip(" ")
    for response in responses:
        response.text = prompt[len(stripped):] + response.text
    return Group(stripped, responses, truncatable, extra or {})


def _parse_response(value, where):
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise InputError(f"{where}: each response needs a \"text\", found {str(value)[:60]!r}")
    known = {}
    for key in ("text", "place", "label", "scores", "ended"):
        if key in value:
            known[key] = value.pop(key)
    response = Response(**known, extra=value)    # the keys that are left
    place, label, scores, ended = response.place, response.label, response.scores, response.ended
    if place is not None and not _is_number(place):
        raise InputError(f"{where}: place {place!r:.60} is not a number")
    if label is not None and (label not in (0, 1) or isinstance(label, bool)):
        raise InputError(f"{where}: label {label!r:.60} is neither 1 (good) nor 0 (bad)")
    if scores is not None:
        if not (isinstance(scores, list) and scores and all(map(_is_number, scores))):
            raise InputError(f"{where}: scores {str(scores)[:40]!r} is not a list of numbers")
    if not isinstance(ended, bool):
        raise InputError(f"{where}: ended {ended!r:.60} is neither true nor false")
    return response


def read_groups(path):
    """Groups JSONL -> (groups, dropped). A file whose first line has `chosen` is read as HH."""
    groups = []
    dropped = Counter()
    for number, value in _read_json_lines(path):
        if not groups and not dropped and "chosen" in value:
            return read_hh(path)
        where = f"{path}:{number}"
        extra = dict(value)
        prompt = extra.pop("prompt", None)
        responses = extra.pop("responses", [])
        truncatable = extra.pop("cut", False)
        if not isinstance(prompt, str):
            raise InputError(f"{where}: no \"prompt\" (a string) among {_keys(value)}")
        if prompt.endswith(" " * (MAX_TRAILING_SPACES + 1)):
            raise InputError(
                f"{where}: the prompt ends in more than {MAX_TRAILING_SPACES} spaces, "
                "which every response would begin with; remove them"
            )
        if not isinstance(responses, list):
            raise InputError(f"{where}: \"responses\" is not a list")
        if not isinstance(truncatable, bool):
            raise InputError(f"{where}: cut {str(truncatable)[:40]!r} is neither true nor false")
        parsed = [_parse_response(response, where) for response in responses]
        kept = [response for response in parsed if response.text.strip()]
        dropped["empty response"] += len(parsed) - len(kept)
        if parsed and not kept:
            dropped["group without a response"] += 1
        else:
            groups.append(make_group(prompt, kept, truncatable, extra))
    return groups, dropped


def _keys(value):
    return str(sorted(value)[:6])[:200]


def write_groups(groups):
    """Groups -> bytes of groups JSONL, what `read_groups` reads back."""
    lines = []
    for group in groups:
        line = {"prompt": group.prompt, "responses": []}
        for response in group.responses:
            known = {key: value for key, value in vars(response).items() if value is not None}
            extra = known.pop("extra")
            if response.ended:
                del known["ended"]
            line["responses"].append(known | extra)
        if group.truncatable:
            line["cut"] = True
        lines.append(json.dumps(line | group.extra, ensure_ascii=False) + "\n")
    # half a surrogate pair, which UTF-8 lacks, becomes JSON's own \uXXXX
    return "".join(lines).encode("utf-8", "backslashreplace")


# --------------------------------------------------------------------------------- FairytaleQA

def _read_csv(path, *columns):
    """(line number, row) of a CSV file that must have these columns."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}:{line}: not UTF-8 (byte {error.object[error.start]:#04x}); save it as UTF-8"
        ) from None
    # strict: else an unclosed quote swallows the rows after it
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = reader.fieldnames or []
        for column in columns:
            if names.count(column) != 1:
                count = "two columns" if column in names else "no column"
                raise InputError(
                    f"{path}:1: {count} {column!r} (found {str(names or 'nothing')[:80]})"
                )
        for row in reader:
            if None in row:                      # after an unquoted comma the columns are others
                raise InputError(
                    f"{path}:{reader.line_num}: {len(names) + len(row[None])} fields, "
                    f"{len(names)} columns; quote a text that has a comma"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(
            f"{path}:{reader.line_num + 1}: not CSV ({error}) in the record that begins here"
        ) from None


def read_fairytaleqa(folder, split):
    """FairytaleQA as published: all questions about the same sections of a book are one group.

    -> (groups, dropped)
    """
    questions = folder / "questions" / split
    files = sorted(questions.glob("*-questions.csv"))
    if not files:
        raise InputError(f"{questions}: no *-questions.csv here")
    groups = []
    dropped = Counter()
    for path in files:
        story_name = path.name.replace("-questions.csv", "-story.csv")
        groups += _read_book(path, folder / "section-stories" / split / story_name, dropped)
    return groups, dropped


def _read_book(path, story, dropped):
    """The groups of one book: a CSV file of questions and one of the story's sections."""
    sections = {}                                # name -> text
    repeated = set()
    for _, row in _read_csv(story, "section", "text"):
        name = str(row["section"]).strip()
        if name in sections:
            repeated.add(name)
        sections.setdefault(name, (row["text"] or "").strip())
    passages = {}                                # section names -> question -> Response
    length = 0
    for number, row in _read_csv(path, "cor_section", "question"):
        parts = (row["cor_section"] or "").split(",")
        names = tuple(part.strip() for part in parts if part.strip())
        question = " ".join((row["question"] or "").split())
        if not names or not all(map(sections.get, names)):
            dropped["question about a section that the story lacks"] += 1
        elif not repeated.isdisjoint(names):
            dropped["question about a section that the story has twice"] += 1
        elif not question:
            dropped["empty question"] += 1
        else:
            if names not in passages:
                length += sum(len(sections[name]) for name in names)
            if length > MAX_FILE_BYTES:
                raise InputError(
                    f"{path}:{number}: its passages have more than {MAX_FILE_BYTES:,} letters, "
                    "naming sections again and again"
                )
            responses = passages.setdefault(names, {})
            dropped["question asked twice of one passage"] += question in responses
            extra = {"line": f"{path.name}:{number}"}
            responses.setdefault(question, Response(" " + question, label=1, extra=extra))
    groups = []
    for names, responses in passages.items():
        prompt = TEMPLATE.format(passage="\n".join(sections[name] for name in names))
        extra = {"story": story.stem, "sections": list(names)}
        groups.append(make_group(prompt, list(responses.values()), extra=extra))
    return groups


# ------------------------------------------------------------------------------------------ HH

def read_hh(path):
    """Anthropic's pairs: the prompt is the dialogue up to and including the last `Assistant:`.

    -> (groups, dropped)
    """
    groups = []
    dropped = Counter()
    mark = "\n\nAssistant:"
    for number, value in _read_json_lines(path):
        for key in ("chosen", "rejected"):
            text = value.get(key)
            if not isinstance(text, str):
                raise InputError(f"{path}:{number}: no \"{key}\" (a string) among {_keys(value)}")
            if mark not in text:
                raise InputError(f"{path}:{number}: \"{key}\" has no {mark!r}: {text[:60]!r}")
        start, _, chosen = value["chosen"].rpartition(mark)
        prompt = start + mark
        rejected = value["rejected"].removeprefix(prompt)
        if not value["rejected"].startswith(prompt) or mark in rejected:
            dropped["dialogues that part before the last answer"] += 1
        elif chosen == rejected:
            dropped["equal answers"] += 1
        elif not chosen.strip() or not rejected.strip():
            dropped["empty answer"] += 1
        else:
            pair = [Response(chosen, place=0, label=1), Response(rejected, place=1, label=0)]
            groups.append(make_group(prompt, pair, truncatable=True))
    return groups, dropped


# ------------------------------------------------------------------------------------- folders

def _first_existing(folder, *names):
    """The first of these JSONL files that the folder has, gzipped or not, or None."""
    for name in names:
        for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
            if path.exists():
                return path


def _split(groups):
    """Every tenth distinct prompt is held out, with all of its lines: no passage is on both sides.

    -> (train, held_out)
    """
    train = []
    held_out = []
    index = {}
    for group in groups:
        number = index.setdefault(group.prompt, len(index)) + 1
        part = train if number % HELD_OUT_EVERY else held_out
        part.append(group)
    return train, held_out


def load(path):
    """A groups file, or a folder of FairytaleQA, of HH (one part, or several in subfolders), or
    with train.jsonl and val.jsonl.  -> Data
    """
    path = Path(path)
    if not (os.path.isfile(path) or os.path.isdir(path)):    # neither raises, whatever the name
        raise InputError(f"--data {path}: no such file or folder")
    dropped = Counter()

    def read(reader, *arguments):
        groups, reasons = reader(*arguments)
        dropped.update(reasons)
        return groups

    published = path / "data-by-train-split"     # where FairytaleQA has its folders
    if path.is_file():
        train, held_out = _split(read(read_groups, path))
        source = f"{path}, every {HELD_OUT_EVERY}th prompt held out"
    elif published.exists() or (path / "questions").exists():
        folder = published if published.exists() else path
        train = read(read_fairytaleqa, folder, "train")
        held_out = read(read_fairytaleqa, folder, "val")
        source = f"FairytaleQA in {path}"
    else:
        parts = [path]
        if not _first_existing(path, "train"):
            parts = [part for part in sorted(path.iterdir()) if _first_existing(part, "train")]
        if not parts:
            raise InputError(
                f"--data {path}: neither FairytaleQA (questions/, section-stories/) "
                "nor train.jsonl[.gz], here or one folder down"
            )
        train = []
        held_out = []
        for part in parts:
            train += read(read_groups, _first_existing(part, "train"))
            if held_out_path := _first_existing(part, "val", "test"):
                held_out += read(read_groups, held_out_path)
        if not held_out:
            train, held_out = _split(train)
        source = ", ".join(map(str, parts))
    if not train:
        raise InputError(
            f"--data {path}: no group left to train on ({dict(+dropped) or 'no groups'})"
        )
    return Data(train, held_out, +dropped, source)


# -------------------------------------------------------------------- any loss from any labels

class Judgement(NamedTuple):
    """What the three losses need of one group, a value per response; None: not in that loss."""
    place: list[float]
    label: list[int | None]
    targets: list[list[float]]           # +1 for each comparison won, -1 for each lost


def derive_labels(responses, labels="auto"):
    """Places, labels and targets from the kind of judgement that a group carries.

    labels: "place", "label", "scores", or "auto", the first of these that every response has
    places -> labels: the better half good, the worse half bad, a tie across the middle left out
    labels -> places: every good over every bad.   scores -> places of their means
    -> Judgement, or None where a response lacks the kind asked for
    """
    for kind in ("place", "label", "scores") if labels == "auto" else (labels,):
        values = [getattr(response, kind) for response in responses]
        if values and None not in values:
            break
    else:
        return None
    if kind == "label":
        return Judgement([1.0 - y for y in values], values, [[2.0 * y - 1.0] for y in values])
    if kind == "scores":                         # fsum: the same mean in any order
        values = [-math.fsum(scores) / len(scores) for scores in values]
    # float32 would tie places that differ in the eighth digit
    ranks = {value: float(rank) for rank, value in enumerate(sorted(set(values)))}
    place = [ranks[value] for value in values]
    half = len(place) / 2
    label = []
    targets = []
    for own in place:
        won = sum(own < other for other in place)
        lost = sum(own > other for other in place)
        targets.append([1.0] * won + [-1.0] * lost)
        # a response and its ties fill the ranks lost ... K - won - 1
        if len(place) - won <= half:
            label.append(1)
        elif lost >= half:
            label.append(0)
        else:
            label.append(None)
    return Judgement(place, label, targets)


def keep_preferred(groups):
    """What a supervised policy learns from: no label 0, and only the best where places tell.

    -> (groups, how many responses are left out)
    """
    kept = []
    left_out = 0
    for group in groups:
        places = [r.place for r in group.responses if r.place is not None]
        best = min(places, default=None)
        responses = [
            r for r in group.responses
            if r.label == 1 or (r.label is None and r.place in (None, best))
        ]
        left_out += len(group.responses) - len(responses)
        if responses:
            kept.append(replace(group, responses=responses))
    return kept, left_out


def split_into_pairs(groups):
    """C(K,2) groups of two from each group: what paper A found to overfit, because the pairs of a
    prompt are then in different minibatches.
    """
    return [
        replace(group, responses=list(pair))
        for group in groups for pair in combinations(group.responses, 2)
    ]
