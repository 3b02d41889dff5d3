"""Readers: every row is used or counted as dropped, and whatever is wrong with a file is one line that names the place."""
import csv
import gzip
import json
import math
import os
from collections import Counter
from pathlib import Path

import pytest
from hostile import Letters, hh

from nanorlhf.batching import encode_all, pack_rows
from nanorlhf.io import data
from nanorlhf.io.data import (
    Group,
    Response,
    derive_labels,
    load,
    make_group,
    read_groups,
    read_hh,
    write_groups,
)
from nanorlhf.io.read import InputError

DATA = Path(os.environ.get("NANORLHF_DATA", "/nonexistent"))
FAIRYTALES = DATA / "FairytaleQAData" / "data-by-train-split"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="set NANORLHF_DATA to the data folder")


def write(path, content):
    """A text, bytes, or objects as JSONL; gzipped where the name says so."""
    if isinstance(content, list):
        content = "".join(json.dumps(value) + "\n" for value in content)
    raw = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.name.endswith(".gz") else raw)
    return path


def refused(call, *words):
    """One line that names the file (and line) and says these words."""
    with pytest.raises(InputError) as error:
        call()
    message = str(error.value)
    assert len(message.splitlines()) == 1 and all(word in message for word in words), message
    assert len(message) < 500, message
    return message


# ------------------------------------------------------------------------------------------------------ the real files

def csv_rows(path):
    """Another reading of a published file: its records, the header left out."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [row for row in csv.reader(file) if row][1:]


@needs_data
@pytest.mark.parametrize("split, questions, books", [("train", 8548, 232), ("val", 1025, 23)])
def test_fairytaleqa_counts(split, questions, books):
    """8,548 and 1,025 questions, as its paper says: all of them used or dropped, about 2.5 a passage, no passage twice."""
    groups, dropped = data.read_fairytaleqa(FAIRYTALES, split)
    files = sorted((FAIRYTALES / "questions" / split).glob("*.csv"))
    used = sum(len(group.responses) for group in groups)
    assert len(files) == books and sum(len(csv_rows(file)) for file in files) == questions == used + sum(dropped.values())
    assert 2.4 < used / len(groups) < 2.6
    assert len({(group.extra["story"], tuple(group.extra["sections"])) for group in groups}) == len(groups)
    for group in groups:
        assert group.prompt.endswith("\nQuestion:") and not group.truncatable and len({r.text for r in group.responses}) == len(group.responses)
        for r in group.responses:
            assert r.text.startswith(" ") and "\n" not in r.text and r.text[1:].strip() == r.text[1:] and (r.label, r.ended, r.place) == (1, True, None)


@needs_data
def test_fairytaleqa_passages():
    found = load(DATA / "FairytaleQAData")
    assert sum(len(g.responses) for g in found.train + found.held_out) + sum(found.dropped.values()) == 8548 + 1025
    assert not {g.extra["story"] for g in found.train} & {g.extra["story"] for g in found.held_out}      # split by book
    by_passage = {(g.extra["story"], tuple(g.extra["sections"])): g for g in found.held_out}
    church = ("Then the giant flung the stone from him, full of rage, said that the\nchurch should never be finished, and with that he disappeared. Since\n"
              "then something has always been missing from the church.")
    others = ("Others say that the giant and his wife rushed down into the crypt in\ntheir rage, and each seizing a column were about to tear down the\n"
              "church, when they were turned into stone, and may be seen to this day\nstanding beside the columns they had grasped.")
    one = by_passage["finn-the-giant-and-the-minister-of-lund-story", ("5",)]
    assert one.prompt == church + "\nQuestion:"
    assert [r.text for r in one.responses] == [" How did the saint feel when the giant left?", " Why was the giant angry at the saint?"]
    two = by_passage["finn-the-giant-and-the-minister-of-lund-story", ("5", "6")]                         # two sections, in the order named
    assert two.prompt == church + "\n" + others + "\nQuestion:" and [r.text for r in two.responses] == [" What will happen to the church after the giant leaves?"]
    assert one.responses[0].extra == {"line": "finn-the-giant-and-the-minister-of-lund-questions.csv:8"}  # where a reader can look it up
    assert load(FAIRYTALES).train == found.train                                                          # the inner folder will do


HH_FILES = [("helpful-base/train", 1800), ("helpful-base/test", 250), ("harmless-base/train", 1800), ("harmless-base/test", 250),
            ("helpful-online/train", 1137), ("helpful-rejection-sampled/train", 2749)]


@needs_data
@pytest.mark.parametrize("name, lines", HH_FILES)
def test_hh_counts(name, lines):
    path = DATA / "hh-rlhf" / f"{name}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        raw = [json.loads(line) for line in file]
    groups, dropped = read_groups(path)                                          # recognised by its first line
    assert len(raw) == lines == len(groups) + sum(dropped.values()) and len(groups) > 0.98 * lines
    whole = Counter((pair["chosen"], pair["rejected"]) for pair in raw)
    for group in groups:
        chosen, rejected = group.responses
        assert group.truncatable and group.prompt.endswith("\n\nAssistant:") and group.prompt.startswith("\n\nHuman:")
        assert whole[group.prompt + chosen.text, group.prompt + rejected.text]   # nothing lost, nothing added, in this order
        assert "\n\nAssistant:" not in chosen.text + rejected.text and chosen.text != rejected.text
        assert (chosen.place, chosen.label, rejected.place, rejected.label) == (0, 1, 1, 0)


@needs_data
def test_hh_several_parts_are_one_set():
    found = load(DATA / "hh-rlhf")
    train, held_out = sum(n for name, n in HH_FILES if "train" in name), sum(n for name, n in HH_FILES if "test" in name)
    assert len(found.train) + len(found.held_out) + sum(found.dropped.values()) == train + held_out
    assert 490 < len(found.held_out) <= held_out == 500                          # the published test files, not a split of ours
    one = load(DATA / "hh-rlhf" / "helpful-base")
    assert len(one.train) + len(one.held_out) + sum(one.dropped.values()) == 2050
    assert one.train[0].responses[0].text.startswith(" To be honest, I don’t know anything about that.")


@needs_data
def test_qgeval():
    """140 passages of 3 to 15 questions (two have fewer than 5); three opinions each; `place` is the order of their means, equal means tie."""
    found = load(DATA / "qgeval" / "train.jsonl")
    groups = found.train + found.held_out
    assert (len(found.train), len(found.held_out), found.dropped) == (126, 14, {})
    assert sum(len(g.responses) for g in groups) == (DATA / "qgeval" / "train.jsonl").read_text(encoding="utf-8").count('{"text": ')
    assert all(3 <= len(group.responses) <= 15 and group.prompt.endswith("\nQuestion:") for group in groups)
    for group in groups:
        assert all(len(r.scores) == 3 for r in group.responses)
        for a in group.responses:
            for b in group.responses:
                if sum(a.scores) > sum(b.scores) + 1e-3:
                    assert a.place < b.place
        by_place, by_scores = derive_labels(group.responses), derive_labels(group.responses, "scores")
        assert min(by_place.place) == 0 and sum(map(len, by_place.targets)) == sum(p != q for p in by_place.place for q in by_place.place)
        assert by_scores.place == sorted_ranks([-math.fsum(r.scores) for r in group.responses])


def sorted_ranks(values):
    return [sorted(set(values)).index(v) for v in values]


# --------------------------------------------------------------------------------------------------- groups JSONL

LINES = [
    {"prompt": "One", "responses": [{"text": " a", "place": 0, "label": 1, "scores": [0.3, 0.7], "who": "expert"}, {"text": " b", "place": 1.5, "label": 0, "scores": [0]}], "id": 7},
    {"prompt": "Two", "responses": [{"text": " c", "ended": False}], "source": {"book": "x", "pages": [1, 2]}},
    {"prompt": "Three", "responses": []},
    {"prompt": "Four", "cut": True},
    {"prompt": "Fünf 日本 😀", "responses": [{"text": "\nun thé\u2028\x85 \"q\"", "place": -2}]},
]


def test_groups_round_trip(tmp_path):
    groups, dropped = read_groups(write(tmp_path / "a.jsonl", LINES))
    assert len(groups) == 5 and not +dropped
    assert groups[0] == Group("One", [Response(" a", 0, 1, [0.3, 0.7], True, {"who": "expert"}), Response(" b", 1.5, 0, [0])], False, {"id": 7})
    assert groups[1] == Group("Two", [Response(" c", ended=False)], False, {"source": {"book": "x", "pages": [1, 2]}})
    assert groups[2] == Group("Three", []) and groups[3] == Group("Four", [], truncatable=True)
    assert groups[4].responses[0].text == LINES[4]["responses"][0]["text"]              # U+2028 and U+0085 end no line
    raw = write_groups(groups)
    assert read_groups(write(tmp_path / "b.jsonl", raw))[0] == groups == read_groups(write(tmp_path / "b.jsonl.gz", raw))[0]
    assert raw.count(b"\n") == 5 and "日本 😀".encode() in raw and write_groups(read_groups(tmp_path / "b.jsonl")[0]) == raw
    assert [json.loads(line) for line in raw.decode().split("\n") if line] == [{"responses": [], **line} for line in LINES]


def test_half_a_surrogate_pair_survives(tmp_path):
    """JSON may hold half of a pair, which UTF-8 cannot: it is written as JSON's escape, not as a traceback."""
    path = write(tmp_path / "a.jsonl", '{"prompt": "p\\ud83d", "responses": [{"text": "\\ude00x"}]}\n')
    groups, _ = read_groups(path)
    assert groups[0].prompt == "p\ud83d" and read_groups(write(tmp_path / "b.jsonl", write_groups(groups)))[0] == groups


def test_other_line_ends_and_a_bom(tmp_path):
    line = '{"prompt": "p", "responses": [{"text": " a"}]}'
    expected = [Group("p", [Response(" a")])]
    for content in (line, line + "\r\n", "\ufeff" + line + "\n", "\n  \n" + line + "\n\n"):
        assert read_groups(write(tmp_path / "a.jsonl", content))[0] == expected


def test_whitespace_belongs_to_the_response(tmp_path):
    """Spaces at a prompt's end move to the front of each response; the text of prompt + response is what it was."""
    responses = lambda: [Response("a"), Response(" b "), Response("\nc")]
    for prompt, bare, first in (("p  ", "p", ["  a", "   b ", "  \nc"]), ("p", "p", ["a", " b ", "\nc"]), ("p\n", "p\n", ["a", " b ", "\nc"]),
                                ("p\n ", "p\n", [" a", "  b ", " \nc"]), ("  ", "", ["  a", "   b ", "  \nc"]), ("p\t", "p\t", ["a", " b ", "\nc"])):
        group = make_group(prompt, responses())
        assert group.prompt == bare and [r.text for r in group.responses] == first
        assert [group.prompt + r.text for r in group.responses] == [prompt + r.text for r in responses()]
    groups, _ = read_groups(write(tmp_path / "a.jsonl", [{"prompt": "Q: ", "responses": [{"text": "a"}]}]))
    assert groups == [Group("Q:", [Response(" a")])]
    assert read_hh(write(tmp_path / "b.jsonl", [hh("q", " yes", " no")]))[0][0].responses[0].text == " yes"


def test_empty_responses_are_counted(tmp_path):
    lines = [{"prompt": "p", "responses": [{"text": "a"}, {"text": " \n"}, {"text": ""}]}, {"prompt": "q", "responses": [{"text": ""}]}, {"prompt": "r"}]
    groups, dropped = read_groups(write(tmp_path / "a.jsonl", lines))
    assert [group.prompt for group in groups] == ["p", "r"]                             # one without responses is a prompt, for PPO
    assert dropped == {"empty response": 3, "group without a response": 1}
    assert sum(len(group.responses) for group in groups) + dropped["empty response"] == 4 and len(groups) + dropped["group without a response"] == 3


def test_hh_drops_are_counted(tmp_path):
    other = {"chosen": hh("q", " a", "")["chosen"], "rejected": hh("another", "", " b")["rejected"]}
    longer = {"chosen": hh("q", " a", "")["chosen"], "rejected": hh("q", "", " b\n\nHuman: and?\n\nAssistant: c")["rejected"]}
    turns = hh("q\n\nAssistant: first\n\nHuman: more", " a", " b")
    groups, dropped = read_hh(write(tmp_path / "a.jsonl", [hh("q", " a", " b"), hh("q", " a", " a"), hh("q", " a", " "), hh("q", "", " b"), other, longer, turns]))
    assert dropped == {"equal answers": 1, "empty answer": 2, "dialogues that part before the last answer": 2} and len(groups) == 2
    assert groups[1].prompt == "\n\nHuman: q\n\nAssistant: first\n\nHuman: more\n\nAssistant:"     # up to and including the last one


# -------------------------------------------------------------------------------------------------------------- folders

def test_held_out_is_by_distinct_prompt(tmp_path):
    """Every tenth distinct prompt, with all of its lines: prompts 9 and 19 of 25, each of them twice or three times."""
    order = [i for i in range(25)] + [i for i in reversed(range(25))] + [9]
    lines = [{"prompt": f"p{i}", "responses": [{"text": f" {n}"}]} for n, i in enumerate(order)]
    found = load(write(tmp_path / "a.jsonl", lines))
    assert Counter(group.prompt for group in found.held_out) == {"p9": 3, "p19": 2}
    assert len(found.train) == 51 - 5 and not {g.prompt for g in found.train} & {g.prompt for g in found.held_out}
    few = load(write(tmp_path / "b.jsonl", lines[:9]))
    assert (len(few.train), few.held_out) == (9, []) and "b.jsonl" in few.source


def test_folders(tmp_path):
    line = lambda text: {"prompt": text, "responses": [{"text": " x"}]}
    for held_out in ("val.jsonl", "test.jsonl.gz"):
        folder = tmp_path / held_out.replace(".", "_")
        write(folder / "train.jsonl", [line("a"), line("b")])
        write(folder / held_out, [line("c")])
        found = load(folder)
        assert [[g.prompt for g in part] for part in (found.train, found.held_out)] == [["a", "b"], ["c"]]
    parts = tmp_path / "parts"
    write(parts / "one" / "train.jsonl.gz", [hh("q", " a", " b"), hh("q", " a", " a")])
    write(parts / "one" / "test.jsonl", [hh("r", " a", " b")])
    write(parts / "two" / "train.jsonl", [line("d")] * 3)                               # a part of another format, with nothing held out
    write(parts / "not" / "readme.txt", "no data")
    found = load(parts)
    assert (len(found.train), len(found.held_out), found.dropped) == (4, 1, {"equal answers": 1})
    alone = load(write(tmp_path / "alone" / "train.jsonl", [line(str(i)) for i in range(20)]).parent)
    assert (len(alone.train), len(alone.held_out)) == (18, 2)


STORY = 'section,text\n1,"Once upon\na time."\n2,  The end.  \n3,\n'
QUESTIONS = "question_id,cor_section,question\n1,1,Who  was\tit?\n2,\"1,2\",Why?\n3,1,Who was it?\n4,9,Lost?\n5,1,\n6,,Nowhere?\n7,3,Empty section?\n8, 1 ,Second?\n9,\"2,1\",Backwards?\n"


def fairytale(folder, story=STORY, questions=QUESTIONS):
    for split in ("train", "val"):
        write(folder / "questions" / split / "a-questions.csv", questions)
        write(folder / "section-stories" / split / "a-story.csv", story)
    return folder


def test_fairytaleqa_by_hand(tmp_path):
    groups, dropped = data.read_fairytaleqa(fairytale(tmp_path), "train")
    assert [(g.prompt, [r.text for r in g.responses]) for g in groups] == [
        ("Once upon\na time.\nQuestion:", [" Who was it?", " Second?"]),                 # spaces within a question are single, " 1 " is 1
        ("Once upon\na time.\nThe end.\nQuestion:", [" Why?"]),
        ("The end.\nOnce upon\na time.\nQuestion:", [" Backwards?"])]                    # the order that cor_section names
    assert dropped == {"question asked twice of one passage": 1, "question about a section that the story lacks": 3, "empty question": 1}
    assert sum(len(g.responses) for g in groups) + sum(dropped.values()) == 9


# ------------------------------------------------------------------------------------------------- what is wrong, and where

GOOD = '{"prompt": "p", "responses": [{"text": " a"}]}\n'
RESPONSE = lambda words: f'{{"prompt": "p", "responses": [{{"text": " a", {words}}}]}}'
BAD_LINES = {
    "not JSON": '{"prompt": "p", "responses": [{"text": " a"', "not  JSON": "prompt,text", "not JSON ": '{"prompt": "a" "b"}', "expected an object": '["prompt"]',
    "expected an object ": "17", "expected an object  ": "null", '"prompt"': '{"responses": []}', '"prompt" ': '{"prompt": 3}', '"prompt"  ': '{"prompt": null}',
    '"responses" is not a list': '{"prompt": "p", "responses": {"text": "a"}}', '"responses" is not a list ': '{"prompt": "p", "responses": null}',
    '"text"': '{"prompt": "p", "responses": ["a"]}', '"text" ': '{"prompt": "p", "responses": [{"text": 1}]}', '"text"  ': '{"prompt": "p", "responses": [{}]}',
    "place 'first'": RESPONSE('"place": "first"'), "place True": RESPONSE('"place": true'), "place nan": RESPONSE('"place": NaN'), "place inf": RESPONSE('"place": 1e999'),
    "place 1": RESPONSE('"place": ' + "1" * 60), "place [0]": RESPONSE('"place": [0]'), "label 2": RESPONSE('"label": 2'), "label True": RESPONSE('"label": true'),
    "label 'good'": RESPONSE('"label": "good"'), "label 0.5": RESPONSE('"label": 0.5'), "label nan": RESPONSE('"label": NaN'), "label []": RESPONSE('"label": []'),
    "scores": RESPONSE('"scores": 3'), "scores ": RESPONSE('"scores": []'), "scores  ": RESPONSE('"scores": [1, "2"]'), "scores   ": RESPONSE('"scores": [NaN]'),
    "scores    ": RESPONSE('"scores": [1e39]'), "scores     ": RESPONSE('"scores": [Infinity]'), "scores      ": RESPONSE('"scores": [1%s]' % ("0" * 400)),
    "scores       ": RESPONSE('"scores": [true]'), "scores        ": RESPONSE('"scores": {"a": 1}'), "ended 'no'": RESPONSE('"ended": "no"'), "ended 0": RESPONSE('"ended": 0'),
    "ended None": RESPONSE('"ended": null'), "cut": '{"prompt": "p", "cut": "left"}', "not JSON   ": "[" * 100_000, "not JSON    ": '{"prompt": "p", "x": %s}' % ("1" * 5000),
}


@pytest.mark.parametrize("words", BAD_LINES)
def test_bad_line_of_groups(words, tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD + "\n" + BAD_LINES[words] + "\n" + GOOD)
    refused(lambda: load(path), f"{path}:3: ", " ".join(words.split()))                  # the blank line counts


@pytest.mark.parametrize("line, words", [
    ('{"chosen": "\\n\\nAssistant: a"}', 'no "rejected"'), ('{"rejected": "\\n\\nAssistant: a"}', 'no "chosen"'), ('{"chosen": 1, "rejected": "x"}', 'no "chosen"'),
    ('{"chosen": "\\n\\nAssistant: a", "rejected": ["x"]}', 'no "rejected"'), ('{"chosen": "hello", "rejected": "\\n\\nAssistant: a"}', '"chosen" has no'),
    ('{"chosen": "\\n\\nAssistant: a", "rejected": "hello"}', '"rejected" has no'), ('{"prompt": "p", "responses": []}', 'no "chosen"'), ("{", "not JSON")])
def test_bad_line_of_hh(line, words, tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps(hh("q", " a", " b")) + "\n" + line + "\n")
    refused(lambda: load(path), f"{path}:2: ", words)
    refused(lambda: load(write(tmp_path / "b.jsonl.gz", path.read_bytes())), "b.jsonl.gz:2: ", words)


def test_bad_files(tmp_path):
    refused(lambda: load(tmp_path / "none"), f"{tmp_path}/none: no such file or folder")
    refused(lambda: read_groups(tmp_path / "none.jsonl"), f"{tmp_path}/none.jsonl: no such file")
    refused(lambda: read_groups(tmp_path), f"{tmp_path}: cannot be read")
    refused(lambda: load(tmp_path), f"{tmp_path}: neither FairytaleQA", "train.jsonl")
    for content in ("", "\n \n", "\ufeff"):
        refused(lambda content=content: load(write(tmp_path / "empty.jsonl", content)), "empty.jsonl: the file is empty")
    refused(lambda: load(write(tmp_path / "empty.jsonl.gz", "")), "empty.jsonl.gz: the file is empty")
    refused(lambda: load(write(tmp_path / "dropped.jsonl", [{"prompt": "p", "responses": [{"text": ""}]}])), "dropped.jsonl: no group left", "'empty response': 1")
    # encodings: Latin-1 in the third line, a UTF-16 file, gzip without its name
    refused(lambda: load(write(tmp_path / "latin.jsonl", GOOD.encode() * 2 + '{"prompt": "é"}'.encode("latin-1"))), "latin.jsonl:3: not UTF-8", "0xe9")
    refused(lambda: load(write(tmp_path / "wide.jsonl", GOOD.encode("utf-16"))), "wide.jsonl:1: not UTF-8")
    refused(lambda: load(write(tmp_path / "zipped.jsonl", gzip.compress(GOOD.encode()))), "zipped.jsonl:1: not UTF-8")
    # gzip: cut short, with a wrong byte, with a wrong checksum, not gzip at all
    packed = gzip.compress(("".join(GOOD.replace('"p"', f'"p{i}"') for i in range(200))).encode())
    flipped = bytes([*packed[:60], packed[60] ^ 0xFF, *packed[61:]])
    for raw in (packed[:-20], packed[:5], packed[:10], flipped, packed[:-8] + b"\0" * 8, GOOD.encode()):
        path = tmp_path / "broken.jsonl.gz"
        path.write_bytes(raw)
        refused(lambda path=path: load(path), f"{path}: cannot be read")


@pytest.mark.parametrize("story, questions, words", [
    (STORY, "question_id,question\n1,Who?\n", "a-questions.csv:1: no column 'cor_section'"),
    ("number,text\n1,x\n", QUESTIONS, "a-story.csv:1: no column 'section'"),
    (STORY, "", "a-questions.csv:1: no column 'cor_section' (found nothing)"),
    ("", QUESTIONS, "a-story.csv:1: no column 'section' (found nothing)"),
    (STORY, '"cor\nsection",question\n1,Who?\n', "a-questions.csv:1: no column 'cor_section'"),        # a header with a line break: still one line
    (STORY, '"cor_section,question\n1,Who?\n' + "x" * 140_000, "a-questions.csv:1: not CSV"),           # an unclosed quote in the header ...
    (STORY, QUESTIONS + '10,1,"Who?\n11,1,Why?\n', "a-questions.csv:11: not CSV"),                      # ... or at a question would swallow what follows
    (STORY + '4,"x" y\n', QUESTIONS, "a-story.csv:6: not CSV"),
    (STORY, QUESTIONS.encode() + "10,1,é\n".encode("latin-1"), "a-questions.csv:11: not UTF-8"),
    (STORY.encode("utf-16"), QUESTIONS, "a-story.csv:1: not UTF-8")])
def test_bad_csv(story, questions, words, tmp_path):
    refused(lambda: load(fairytale(tmp_path, story, questions)), str(tmp_path), words)


def test_bad_fairytale_folders(tmp_path):
    fairytale(tmp_path)
    (tmp_path / "section-stories" / "val" / "a-story.csv").unlink()
    refused(lambda: load(tmp_path), "val/a-story.csv: no such file")
    (tmp_path / "questions" / "val" / "a-questions.csv").unlink()
    refused(lambda: load(tmp_path), "questions/val: no *-questions.csv here")
    nothing = fairytale(tmp_path / "b", STORY, "cor_section,question\n7,Who?\n")
    refused(lambda: load(nothing), "no group left", "question about a section that the story lacks")


# --------------------------------------------------------------------------------------------------- any loss on any labels

def test_judge_by_hand():
    responses = lambda key, values: [Response("x", **{key: value}) for value in values]
    # places 2 0 1 5: half of 4 is good; wins 1 3 2 0
    found = derive_labels(responses("place", [2, 0, 1, 5]))
    assert found.place == [2, 0, 1, 3] and found.label == [0, 1, 1, 0]                  # ranks: only the order counts, 0 is the best
    assert found.targets == [[1, -1, -1], [1, 1, 1], [1, 1, -1], [-1, -1, -1]]
    # three: the middle is neither; a tie across the middle is left out: ranks 0 | 1 1 | 3
    assert derive_labels(responses("place", [0, 1, 2])).label == [1, None, 0]
    tied = derive_labels(responses("place", [0, 1, 1, 3]))
    assert tied.label == [1, None, None, 0] and tied.targets == [[1, 1, 1], [1, -1], [1, -1], [-1, -1, -1]]
    assert derive_labels(responses("place", [4, 4])).label == [None, None] and derive_labels(responses("place", [4, 4])).targets == [[], []]
    # labels: every good over every bad
    found = derive_labels(responses("label", [1, 0, 0]))
    assert (found.place, found.label, found.targets) == ([0, 1, 1], [1, 0, 0], [[1], [-1], [-1]])
    # scores: places of their means .5, .9, .1
    found = derive_labels(responses("scores", [[0.4, 0.6], [0.9], [0.0, 0.2]]))
    assert (found.place, found.label, found.targets) == ([1, 0, 2], [None, 1, 0], [[1, -1], [1, 1], [-1, -1]])


def test_equal_opinions_tie_whatever_their_order():
    # .1 + .2 + .3 is .6000000000000001 and .3 + .2 + .1 is .6: the same three opinions must not make a winner
    assert sum([0.1, 0.2, 0.3]) != sum([0.3, 0.2, 0.1])
    found = derive_labels([Response("x", scores=[0.1, 0.2, 0.3]), Response("y", scores=[0.3, 0.2, 0.1])])
    assert found.place == [0, 0] and found.targets == [[], []]


def test_places_that_float32_cannot_tell_apart_stay_apart():
    # 2^24 + 1 is 2^24 in float32, where a batch keeps places; ranks 0 and 1 are exact
    rows, _ = encode_all([Group("p", [Response("x", place=2**24 + 1), Response("y", place=2**24)])], Letters, 100)
    assert pack_rows(rows).place.tolist() == [[1, 0]]


def test_judge_takes_the_kind_that_all_have():
    mixed = [Response("x", place=1, label=1, scores=[0.0]), Response("y", label=0, scores=[1.0])]
    assert derive_labels(mixed).label == [1, 0] and derive_labels(mixed, "place") is None               # one response has no place
    assert derive_labels(mixed, "scores").place == [1, 0] and derive_labels(mixed, "label").place == [0, 1]
    assert derive_labels([]) is None and derive_labels([Response("x")]) is None


def test_a_supervised_policy_learns_from_good_responses_alone():
    group = lambda *responses: data.Group("p", list(responses))
    r = data.Response
    groups = [group(r("chosen", place=0, label=1), r("rejected", place=1, label=0)),          # HH: the chosen one
              group(r("first", place=1), r("second", place=2), r("also first", place=1)),     # ranked: the best place, ties and all
              group(r("a sample", label=0)),                                                  # nothing good: the group is gone
              group(r("an expert's", label=1), r("another's", label=1)),
              group(r("unjudged"), r("unjudged too"))]
    kept, left_out = data.keep_preferred(groups)
    assert [[x.text for x in g.responses] for g in kept] == [["chosen"], ["first", "also first"], ["an expert's", "another's"], ["unjudged", "unjudged too"]]
    assert left_out == 3                                                                      # rejected, second, a sample
    assert len(groups[0].responses) == 2                                                      # the data itself is not changed
