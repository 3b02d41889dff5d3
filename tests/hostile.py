"""Corrupted inputs by the thousand, each fed to its reader, which must take it whole, refuse it in one line, or count what it drops.

    python -m tests.hostile --inputs 5000 --seed 0

Prints a table and ends with code 1 if a reader let an exception of another kind out, hung, or lost a row without a word. Whatever a reader
accepts is then used (encoded, ranked, written and read again), where a value that should have been refused shows itself. One process, no network.
"""
import argparse
import contextlib
import csv
import faulthandler
import gzip
import io
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nanorlhf import sample
from nanorlhf.batching import encode_all, pack_rows
from nanorlhf.gpt2 import GPT2, GPT2Config
from nanorlhf.heads import Policy, RewardModel
from nanorlhf.io import data, hub, read, tokenizer
from nanorlhf.io.read import InputError
from nanorlhf.llama import Llama, LlamaConfig
from nanorlhf.reward import TextReward
from nanorlhf.run import cli, run_folder
from nanorlhf.study import __main__ as study
from nanorlhf.study import evaluate, findings, judge

LIMIT, SHARE = 10.0, 6                   # seconds of this process's own time: what takes longer, hangs; of the clock, six times that: others work here too
LONGEST = 1000                           # letters of one line that somebody is to read
MEMORY = 16 * 2**30                      # bytes of address space; torch alone has five
TEXTS = ["The king said: what's 1234 + 5678?\nThe queen met the witch in the woods.", "Un café, s'il vous plaît — 日本語 😀"] * 3


class Hang(BaseException):
    """Not an Exception: no reader may swallow it."""


@dataclass
class Reader:
    """files: name -> sound bytes;  read(folder) -> anything;  rows(files, result) -> (rows there, used, dropped), counted without the reader."""
    name: str
    files: dict
    read: Callable
    rows: Callable | None = None
    weight: int = 4                      # how often it is drawn
    use: Callable = lambda result: None


@dataclass
class Tally:
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    dropped: int = 0
    tracebacks: int = 0
    hangs: int = 0
    lost: int = 0
    said: list = field(default_factory=list)         # the first few failures, in words


# ------------------------------------------------------------------------------------------------------------- damage

DEEP = (60, 99, 101, 300, 700, *range(900, 1000, 7), 100_000)
ODD = [None, True, False, 0, 1, 2, -1, 0.5, 1.0, 1e38, 1e300, float("nan"), float("inf"), -float("inf"), 10**400, -(2**63), 999_999_999, "", " ", "a", "7",
       "\ud800", "\0", "../x", "/etc/passwd", "\u2028", "<script>", "$\\frac{", "\n\nAssistant: x", [], [[]], {}, [1], ["a"], [None], {"text": "a"}, {"a": {}},
       {"text": " b", "place": 0}, [{"text": "c", "scores": [1, 2]}], "x" * 3000, ["x"] * 2000]


def replaced(value, draw):
    """One value somewhere in a JSON tree becomes another kind of thing; or a key goes, or comes."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.85:
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        kind = draw.random()
        if isinstance(value, dict) and kind < 0.12:
            return {k: v for k, v in value.items() if k != key}
        if isinstance(value, dict) and kind < 0.2:
            return {**value, draw.choice(["chosen", "cut", "ended", "prompt", "text", "label", *value]): draw.choice(ODD)}
        changed = replaced(value[key], draw)
        return {**value, key: changed} if isinstance(value, dict) else [*value[:key], changed, *value[key + 1 :]]
    return draw.choice(ODD)


def json_damage(raw, draw):
    """A valid tree with a wrong value, or a value that is too deep or too long for Python's parser."""
    lines = raw.decode("utf-8", "replace").split("\n")
    which = [i for i, line in enumerate(lines) if line.strip()] or [0]
    whole = not raw.lstrip().startswith(b"{") or raw.count(b"\n{") == 0          # one object in many lines, or an object a line
    i = draw.choice(which)
    try:
        tree = replaced(json.loads("\n".join(lines) if whole else lines[i]), draw)
        text = json.dumps(tree)
    except (ValueError, RecursionError):
        return draw.randbytes(40)
    if draw.random() < 0.25:
        deep, key = draw.choice(DEEP), draw.choice(['"x"', '"prompt"', '"responses"', '"vocab"', '"weight_map"', '"model_type"', '"stages"'])
        bad = draw.choice(["[" * deep + "]" * deep, '{"a":' * deep + "1" + "}" * deep, "[" * deep, "1" * 5000, "-" + "9" * 4299, "1" * 4301, "1e999", "NaN",
                           "Infinity", "0" * 50])
        open_ = text.rstrip("}")
        text = open_ + (", " if text.strip() != "{}" else "") + f"{key}: {bad}" + text[len(open_):]
    return (text if whole else "\n".join([*lines[:i], text, *lines[i + 1 :]])).encode("utf-8", "surrogatepass")


def line_damage(raw, draw):
    lines = raw.split(b"\n")
    i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
    kind = draw.choice(["twice", "gone", "swap", "blank", "joined", "often"])
    if kind == "swap":
        lines[i], lines[j] = lines[j], lines[i]
    else:
        lines[i : i + 1] = {"twice": [lines[i]] * 2, "often": [lines[i]] * 50, "gone": [], "blank": [b"", b" \t", lines[i]],
                            "joined": [lines[i] + lines[j]]}[kind]
    return b"\n".join(lines)


def byte_damage(raw, draw):
    at, n = draw.randrange(len(raw) + 1), draw.randint(1, 12)
    kind = draw.choice(["flip", "flip", "cut", "insert", "delete", "repeat", "swap", "noise"])
    if kind in ("flip", "noise") and raw:
        raw = bytearray(raw)
        for _ in range(draw.randint(1, 4) if kind == "flip" else len(raw) // 10 + 1):
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        return bytes(raw)
    odd = draw.choice([draw.randbytes(n), b'"', b",", b"\n", b"\r", b"\0", b"{", b"]", b"\xff\xfe", b"\xed\xa0\x80", b"[" * 3000,
                       b"9" * 5000, b"," * 500, b'"' * 200_001])
    return {"cut": raw[:at], "insert": raw[:at] + odd + raw[at:], "delete": raw[:at] + raw[at + n :], "repeat": raw[: at + n] + raw[at:],
            "swap": raw[at:] + raw[:at]}.get(kind, odd)


def encoding_damage(raw, draw):
    text = raw.decode("utf-8", "replace")
    kind = draw.choice(["utf-16", "utf-32", "latin-1", "bom", "bom inside", "crlf", "cr", "mixed", "nul", "utf-7"])
    if kind in ("utf-16", "utf-32", "latin-1", "utf-7"):
        return (text + "é").encode(kind, "replace")
    return {"bom": b"\xef\xbb\xbf" + raw, "bom inside": raw.replace(b"\n", b"\n\xef\xbb\xbf", 1),
            "crlf": raw.replace(b"\n", b"\r\n"), "cr": raw.replace(b"\n", b"\r"),
            "mixed": raw.replace(b"\n", b"\r\n", 2).replace(b"\n", b"\n\r", 1), "nul": raw.replace(b" ", b"\0")}[kind]


def varint(raw, at):
    value = shift = 0
    while True:
        value, shift, at = value | (raw[at] & 127) << shift, shift + 7, at + 1
        if raw[at - 1] < 128:
            return value, at


def proto_fields(raw):
    """A protobuf message as [[key, value]]."""
    at, found = 0, []
    while at < len(raw):
        key, at = varint(raw, at)
        value, end = varint(raw, at) if key & 7 in (0, 2) else (None, at + (4 if key & 7 == 5 else 8))
        found.append([key, value if key & 7 == 0 else raw[end : end + value] if key & 7 == 2 else raw[at:end]])
        at = end + value if key & 7 == 2 else end
    return found


def proto_bytes(fields):
    def number(value):
        return bytes([value & 127 | (128 if value > 127 else 0)]) + (number(value >> 7) if value > 127 else b"")
    return b"".join(number(key) + (number(x) if key & 7 == 0 else number(len(x)) + x if key & 7 == 2 else x) for key, x in fields)


def proto_damage(raw, draw):
    """A sentencepiece model that is still a protobuf, with other pieces, scores, kinds and settings."""
    fields = proto_fields(raw)
    for _ in range(draw.randint(1, 3)):
        i = draw.randrange(len(fields)) if draw.random() < 0.6 else draw.choice([i for i, (key, _) in enumerate(fields) if key >> 3 != 1] or [0])
        inner = proto_fields(fields[i][1])
        j, kind = draw.randrange(len(inner)), draw.random()
        if kind < 0.1:
            fields[i : i + draw.randint(1, 300)] = [fields[0]]
        elif kind < 0.2:
            fields.insert(draw.randrange(len(fields)), list(fields[i]))
        else:
            how = inner[j][0] & 7
            inner[j][1] = draw.choice([0, 1, 2, 3, 4, 5, 6, 255, 400, 2**31, 2**32 - 1, 2**64 - 1]) if how == 0 else \
                struct.pack("f", draw.choice([0.0, float("nan"), float("inf"), -1e38])) if how == 5 else \
                draw.choice([b"", b"\xff\xfe", b"<0x00>", b"<0xGG>", b"<s>", b"a" * 100_000, inner[j][1] * 2, b"\0", draw.randbytes(300)])
            fields[i][1] = proto_bytes(inner)
    return proto_bytes(fields)


def tensor_damage(raw, draw):
    """A safetensors file whose header says something else."""
    n = struct.unpack("<Q", raw[:8])[0]
    if draw.random() < 0.3:
        return struct.pack("<Q", draw.choice([0, 1, n - 1, n + 1, 2**32, 10**13, 2**63, 2**64 - 1])) + raw[8:]
    header = json_damage(raw[8 : 8 + n], draw)
    return struct.pack("<Q", len(header)) + header + raw[8 + n :]


def damaged(name, raw, draw):
    """-> other bytes for this file; None: a folder in its place; "": the file is gone"""
    kind, gz = draw.random(), name.endswith(".gz")
    if kind < 0.02:
        return draw.choice([None, "", b"", b"\n"])
    if gz:                               # inside, or the packed bytes, or packed twice, or not at all
        inner = gzip.decompress(raw)
        ways = [lambda: gzip.compress(damaged(name[:-3], inner, draw) or b"", 1), lambda: byte_damage(raw, draw), lambda: gzip.compress(raw), lambda: inner,
                lambda: raw + raw, lambda: raw + b"trailing", lambda: zlib.compress(inner)]
        return draw.choice([ways[0], ways[0], ways[0], *ways[1:]])()
    if kind < 0.06:
        return gzip.compress(raw)
    if name.endswith(".model") and kind < 0.7:
        return proto_damage(raw, draw)
    if name.endswith(".safetensors") and kind < 0.7:
        return tensor_damage(raw, draw)
    if name.endswith((".json", ".jsonl")) and kind < 0.6:
        return json_damage(raw, draw)
    return draw.choice([byte_damage, byte_damage, line_damage, encoding_damage])(raw, draw)


# -------------------------------------------------------------------------------------------------------- sound inputs

def lines(*objects):
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in objects).encode()


def hh(prompt, chosen, rejected):
    return {"chosen": f"\n\nHuman: {prompt}\n\nAssistant:{chosen}", "rejected": f"\n\nHuman: {prompt}\n\nAssistant:{rejected}"}


GROUPS = lines(
    {"prompt": "One ", "responses": [{"text": " a", "place": 0, "label": 1, "scores": [0.3, 0.7], "who": "x"}, {"text": " b", "place": 1.5, "label": 0}], "id": 7},
    {"prompt": "Two", "responses": [{"text": " c", "place": 0, "ended": False}, {"text": " ", "place": 1}], "source": {"book": "x", "pages": [1, 2]}},
    {"prompt": "Three", "responses": []}, {"prompt": "Fünf 日本", "responses": [{"text": "\nun thé\u2028\x85 \"q\"", "place": -2}], "cut": True})
PAIRS = lines(*(hh(f"q{i}", f" yes {i}", f" no {i}") for i in range(4)), hh("e", " same", " same"))
STORY = b'section,text\n1,"Once upon\na time, there was a king."\n2,"The end, ""really""."\n3,\n'
QUESTIONS = b'question_id,cor_section,question\n1,1,Who was it?\n2,1,Who was it?\n3,"1,2","Why, then?"\n4,7,Where?\n5,2,\n6,2,What ended?\n'
FAIRYTALE = {f"{name.format(split)}.csv": raw for split in ("train", "val")
             for name, raw in (("questions/{}/a-questions", QUESTIONS), ("section-stories/{}/a-story", STORY))}
SIZES = {"gpt2": (GPT2, GPT2Config(n_positions=32, n_embd=8, n_layer=2, n_head=2)),
         "llama": (Llama, LlamaConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                                      max_position_embeddings=32))}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file() and path.name != "SHA256SUMS"}


def model_files(folder, family, reward=False):
    """A tiny model's folder, without checksums: they would notice any damage before it is read."""
    torch.manual_seed(0)
    kind, sizes = SIZES[family]
    tok = tokenizer.train_bpe(TEXTS, 270) if family == "gpt2" else tokenizer.train_sentencepiece(TEXTS, 340)
    trunk = kind(type(sizes)(**{**vars(sizes), "vocab_size": tok.vocab_size, "tie_word_embeddings": True}))
    if reward:
        model = TextReward(RewardModel(trunk, 3), tok, norm_stats={"mean": (0.1, 0.5), "q0": (0.0, 1.0)})
        torch.nn.init.normal_(model.model.score.weight, std=0.3)
        hub.save_reward_model(folder, model)
    else:
        hub.save_policy(folder, Policy(trunk), tok)
    return contents(folder)


def shards(folder):
    """A LLaMA folder in two files with an index."""
    files = model_files(folder, "llama")
    tensors, parts = sorted(load_file(folder / "model.safetensors").items()), {}
    for i, part in enumerate((tensors[:9], tensors[9:]), 1):
        save_file(dict(part), folder / f"model-0000{i}-of-00002.safetensors")
        parts |= {name: f"model-0000{i}-of-00002.safetensors" for name, _ in part}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": parts}))
    assert files.keys() - {"model.safetensors"} < contents(folder).keys()
    return contents(folder)


def tokenizer_json(files):
    """GPT-2's two files in tokenizer.json's layout, with Llama 3's kind of rules and template."""
    merges = files["merges.txt"].decode().split("\n")[1:-1]
    vocab = json.loads(files["vocab.json"])
    special = [{"id": vocab.pop("<|endoftext|>"), "content": "<|endoftext|>", "special": True},
               {"id": len(vocab) + 1, "content": "<|begin|>", "special": True}]
    steps = [{"type": "Split", "pattern": {"Regex": tokenizer.GPT2_SPLIT}, "behavior": "Isolated", "invert": False},
             {"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
                "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [len(vocab) + 1]}}}
    table = {"added_tokens": special, "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "post_processor": template,
             "model": {"type": "BPE", "dropout": None, "vocab": vocab, "merges": [merge.split(" ") if i % 2 else merge for i, merge in enumerate(merges)]}}
    return {"tokenizer.json": json.dumps(table).encode(), "tokenizer_config.json": json.dumps({"eos_token": {"content": "<|endoftext|>"}}).encode(),
            "config.json": b'{"eos_token_id": [266], "bos_token_id": null}'}


def results():
    """results.json of one seed, as the page reads it, with few policies and models."""
    levels = [{"level": 0.1 * i, "below": 0.1 * i, "at_most": 0.1 * i, "gap": 0.0, "ok": True} for i in range(10)]
    policy = {"gold": 1.0, "judges": {"a": 1.0}, "answerable": 0.9, "missing": 0.1, "kinds": {"why": 0.5}, "distinct": 1.0, "words": 7.0, "kl": 1.0,
              "entropy": 0.4}
    pairs = {"accuracy": 0.7, "n": 100, "auc": 0.7, "panel_accuracy": 0.7, "kl": {name: 0.4 for name in (*findings.ESTIMATORS, "histogram_raw", "js")},
             "calibration": {"bins": [{"low": 0.5, "high": 0.55, "n": 9, "predicted": 0.5, "observed": 0.6}], "ece": 0.08, "log_loss": 0.6},
             "quantiles": {"within_deviation": 0.3, "spread": {"spearman": 0.2, "deciles": [{"spread": 0.1, "accuracy": 0.6, "n": 9}]},
                           "per_quantile": {"quantiles": [{"accuracy": 0.6, "auc": 0.6}] * 10, "mean": {"accuracy": 0.6, "auc": 0.6}},
                           "coverage": {"quantiles": levels, "pinball": 0.2, "constant": {"quantiles": levels, "pinball": 0.3}}}}
    reward = {"ranked": {"accuracy": 0.7}, "labelled": {"auc": 0.6}, "pairs": pairs, "raw_deviation": 0.5, "before": {"within_deviation": 0.2},
              "values": {name: {"chosen": [0.1, 0.4], "rejected": [0.0, 0.2]} for name in ("mean", "q0", "q9")},
              "closed_form": {"bins": [{"n": 9, "won": 0.3, "outputs": [0.0] * 10, "closed": [0.1] * 10}], "mean_deviation": 0.1}}
    arms = (*findings.CORNERS.values(), "judge", "scores-mean", "scores-cvar", "ranking-loose")
    return {"seed": 0, "policies": {name: policy for name in ("experts", "sft", "control", *arms)}, "ways": {arm: [{**policy, "steps": 2}] for arm in arms},
            "rewards": {name: reward for name in (*findings.CORNERS.values(), "scalar", "quantile", "label", "scores", "self_mean")},
            "wins": {"ranking : classification": {"n": 10, "wins": 5, "ties": 2, "losses": 3, "share": 0.6, "share_low": 0.2, "share_high": 0.8, "p": 0.7}},
            "texts": [{"prompt": "The fox.\nQuestion:", "responses": {"sft": {"text": " Who?", "gold": 1.0}}}], "pairs": {"n": 9, "panel_agrees": 0.9},
            "passes_a_step": {"together": 1.0, "apart": 0.1}, "row": {"words": ["The", "Who", "_"], "branch": [0, 1, -1], "positions": [0, 1, 0]}}


def study_files():
    rows = lines(*({"step": i, "score_normalised": 0.1 * i, "entropy": 0.5, "eval_loss": 0.7, "eval_accuracy": 0.6} for i in range(4)))
    state = {"scale": "smoke", "sizes": {"seeds": 1}, "seconds": 60.0, "workers": 2, "stages": {"seed0/sft": {"seconds": 5.0, "peak_gib": 0.4}}}
    return {"study.json": json.dumps(state).encode(), "seed0/results.json": json.dumps(results()).encode(),
            "seed0/sft/config.json": b'{"versions": {"torch": "2"}}',
            **{f"seed0/{run}/metrics.jsonl": rows for run in ("ppo-ranking", "ppo-judge", "rm-apart", "rm-together")}}


# ------------------------------------------------------------------------------------------------ rows, counted another way

def unpacked(name, files):
    """What a file says, or None where another unpacker does not get through it."""
    try:
        return (gzip.decompress(files[name]) if name.endswith(".gz") else files[name]).decode("utf-8-sig")
    except (KeyError, TypeError, OSError, EOFError, ValueError, zlib.error):
        return None


def json_rows(*names):
    """Lines of JSONL, and the responses in them."""
    def count(files, result):
        groups, dropped = (result.train + result.held_out, result.dropped) if isinstance(result, data.Data) else result
        there, responses = [], 0
        for text in [unpacked(name, files) for name in names if files[name] != ""]:
            mine = [json.loads(line.strip("\ufeff")) for line in text.split("\n") if line.strip("\ufeff \t\r\n\v\f")]
            responses += 2 * len(mine) if "chosen" in mine[0] else sum(len(line.get("responses", [])) for line in mine)
            there += mine
        whole = sum(n for reason, n in dropped.items() if reason != "empty response")
        pairs = sum(n for reason, n in dropped.items() if "answer" in reason)
        return [(len(there), len(groups), whole), (responses, sum(len(g.responses) for g in groups), dropped["empty response"] + 2 * pairs)]
    return count


def csv_rows(files, result):
    there = 0
    for split in ("train", "val"):
        there += sum(map(bool, csv.reader(io.StringIO(unpacked(f"questions/{split}/a-questions.csv", files), newline=""), strict=True))) - 1
    return [(there, sum(len(group.responses) for group in result.train + result.held_out), sum(result.dropped.values()))]


def cache_rows(files, result):
    there = sum(bool(line.strip()) for line in (files["cache.jsonl"] or b"").split(b"\n"))
    return [(there, sum(result.answered_by.values()), result.damaged)]


# -------------------------------------------------------------------------------------------------------------- readers

class Letters:
    bos_id, eos_id = 1, 2
    encode = staticmethod(lambda text: [ord(letter) for letter in text])
    encode_prompt = staticmethod(lambda text: [1, *(ord(letter) for letter in text)])


def use_groups(result):
    groups = result.train + result.held_out if isinstance(result, data.Data) else result[0]
    for group in groups:
        for labels in ("auto", "place", "label", "scores"):
            data.derive_labels(group.responses, labels)
    rows, _ = encode_all(groups, Letters, 10_000, target="scores")
    assert not rows or all(x.isfinite().all() for x in (pack_rows(rows).targets, pack_rows(rows).place))
    raw = data.write_groups(groups)
    assert [json.loads(line)["prompt"] for line in raw.decode().split("\n") if line] == [group.prompt for group in groups]


def use_tokenizer(tok):
    for text in ["", " a", "The king said 12\0é日本😀▁▁ x", "z" * 2000, "".join(map(chr, range(1, 1000)))]:
        ids = tok.encode_prompt(text) + tok.encode(text)
        assert all(type(i) is int and 0 <= i < tok.vocab_size for i in ids) and isinstance(tok.decode(ids), str)


def use_model(model):
    trunk, tok = model if isinstance(model, tuple) else (model.trunk if isinstance(model, Policy) else model.model.trunk, model.tokenizer)
    use_tokenizer(tok)
    ids = torch.tensor([tok.encode_prompt("the king")[: trunk.config.context]])
    with torch.no_grad():
        trunk.hidden(ids, torch.arange(ids.shape[1])[None], torch.zeros_like(ids))


class Replies:
    """An endpoint that gives one answer: what urllib's opener would."""
    def __init__(self, raw):
        self.raw = raw

    def open(self, request, timeout):
        file = io.BytesIO(self.raw)
        file.length = 0
        return file


def ask(folder):
    """A judge behind HTTP, whose server answers with the file."""
    found = judge.OpenAI("http://localhost:1/v1", "m", folder / "new-cache.jsonl", sleep=lambda seconds: None)
    found.key, found.opener = "key", Replies(read.read_bytes(folder / "reply.json"))
    assert found.compare("A passage\nQuestion:", " Who?", " Why?") in (-1, 0, 1, None)
    return found


def tell(folder):
    """All words and numbers of the page, without its drawings."""
    with findings.as_written(folder):
        about, found, metrics = findings.load(folder, 1)
        findings.sentence_wins(found), findings.sentence_why(found), findings.sentence_quantile(found)
        findings.claims_a(found, metrics), findings.claims_b(found, metrics), findings.floors(found)


def page(folder):
    from nanorlhf.study import report
    report.write(folder, 1)


def opened(folder):
    study.open_study(folder, "smoke", {"seeds": 1})


def words(folder):
    """A command line, a word a line."""
    given = read.read_bytes(folder / "words").decode("utf-8", "surrogateescape").split("\n")
    kind = {"judge": judge.Config, "evaluate": evaluate.Config, "sample": sample.Config}.get(given[0], study.Config)
    try:
        found = cli.parse(kind, given[1:])
        cli.check_bounds(found, **{name: (0, 10) for name in ("k", "seeds", "seed") if hasattr(found, name)})
    except SystemExit:                   # --help
        return


def answers(folder):
    found = judge.OpenAI("http://localhost:1/v1", "m", folder / "cache.jsonl")
    for key in list(found.cache):
        judge.parse(json.dumps(found.cache[key]), 2)
    return found


def measured(folder):
    """evaluate --reward: flags of the run, the model, the data."""
    evaluate.measure_reward(evaluate.Config(reward=str(folder), data=str(folder / "data.jsonl"), device="cpu"))


@dataclass(frozen=True)
class RunConfig:
    out: str
    steps: int = 9
    schedule: str = "constant"


def a_model():
    torch.manual_seed(0)
    model = Policy(GPT2(GPT2Config(vocab_size=7, n_positions=8, n_embd=4, n_layer=1, n_head=1)))
    return model, torch.optim.AdamW(model.parameters())


def run_files(folder):
    """A run that stopped after two steps, without checksums."""
    run_folder.write_config(RunConfig(str(folder)), "train_x", "nowhere")
    model, optimizer = a_model()
    for step in (1, 2):
        sum(p.sum() for p in model.parameters()).backward()
        optimizer.step()
        run_folder.save(RunConfig(str(folder)), "train_x", model, optimizer, step, lambda: None)
    return contents(folder)


def go_on(folder):
    try:
        if run_folder.resumable(RunConfig(str(folder)), "train_x"):
            run_folder.load(RunConfig(str(folder)), *a_model(), {"step": 0})
    finally:
        torch.set_num_threads(1)


def readers(scratch):
    """Every reader with sound inputs."""
    gpt2, llama, reward, split = *(model_files(scratch / "-".join(map(str, how)), *how) for how in (("gpt2",), ("llama",), ("gpt2", True))), shards(scratch / "s")
    weights = {"model.safetensors", "config.json"}
    plain = {name: raw for name, raw in gpt2.items() if name not in weights} | {"config.json": b'{"eos_token_id": 269}'}
    cache = lines(*({"key": judge.digest(i), "model": "m", "answered_by": "m", "ranking": [["A"], ["B"]], "reply": "", "messages": []} for i in range(5)))
    reply = json.dumps({"model": "m", "choices": [{"message": {"role": "assistant", "content": 'Surely [["B"], ["A"]].'}}]}).encode()
    run = {"config.json": b'{"flags": {"labels": "place", "kappa": 1.0, "quantile_target": "label"}}', **{f"model/{name}": raw for name, raw in reward.items()},
           "data.jsonl": lines(*({"prompt": f"p{i}", "responses": [{"text": " a" * (j + 1), "place": j} for j in range(3)]} for i in range(20)))}
    named = lambda kind, path: judge.load_judge(judge.Config(kind, "x", reference=str(path)))
    return [
        Reader("groups .jsonl", {"g.jsonl": GROUPS}, lambda f: data.read_groups(f / "g.jsonl"), json_rows("g.jsonl"), 10, use_groups),
        Reader("groups .jsonl.gz", {"g.jsonl.gz": gzip.compress(GROUPS)}, lambda f: data.read_groups(f / "g.jsonl.gz"), json_rows("g.jsonl.gz"), 6, use_groups),
        Reader("HH .jsonl", {"h.jsonl": PAIRS}, lambda f: data.read_hh(f / "h.jsonl"), json_rows("h.jsonl"), 6, use_groups),
        Reader("HH .jsonl.gz", {"h.jsonl.gz": gzip.compress(PAIRS)}, lambda f: data.read_groups(f / "h.jsonl.gz"), json_rows("h.jsonl.gz"), 6, use_groups),
        Reader("a folder of JSONL", {"train.jsonl": GROUPS, "val.jsonl": GROUPS}, data.load, json_rows("train.jsonl", "val.jsonl"), 6, use_groups),
        Reader("FairytaleQA", FAIRYTALE, data.load, csv_rows, 12, use_groups),
        Reader("vocab.json, merges.txt", plain, hub.load_tokenizer, None, 6, use_tokenizer),
        Reader("tokenizer.json", tokenizer_json(gpt2), hub.load_tokenizer, None, 10, use_tokenizer),
        Reader("tokenizer.model", {"tokenizer.model": llama["tokenizer.model"]}, hub.load_tokenizer, None, 8, use_tokenizer),
        Reader("load_policy", gpt2, hub.load_policy, None, 10, use_model),
        Reader("load_trunk, shards", split, lambda f: hub.load_trunk(f, head=False), None, 8, use_model),
        Reader("load_reward_model", reward, hub.load_reward_model, None, 8, use_model),
        Reader("evaluate --reward", run, measured, None, 2),
        Reader("evaluate --a --b", {"a.jsonl": GROUPS, "b.jsonl": GROUPS}, lambda f: evaluate.matched(f / "a.jsonl", f / "b.jsonl")),
        Reader("judge replay", {"r.jsonl": GROUPS}, lambda f: named("replay", f / "r.jsonl")),
        Reader("judge reference", FAIRYTALE, lambda f: named("reference", f)),
        Reader("judge cache", {"cache.jsonl": cache}, answers, cache_rows),
        Reader("judge reply", {"reply.json": reply}, ask, None, 6),
        Reader("a run's state", run_files(scratch / "run"), go_on, None, 6),
        Reader("study.json", {"study.json": study_files()["study.json"]}, opened),
        Reader("results.json", study_files(), tell, None, 6),
        Reader("the page", study_files(), page, None, 0),
        Reader("command line", {"words": b"judge\n--judge\nreplay\n--data\nx.jsonl\n--seed\n7\n--dry_run\ntrue"}, words),
    ]


# --------------------------------------------------------------------------------------------------------- the harness

def put(folder, files):
    """files: name -> bytes, None for a folder of that name, "" for nothing"""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, raw in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if raw is None:
            path.mkdir()
        elif raw != "":
            path.write_bytes(raw)


def feed(reader, files, folder, tally, limit=LIMIT):
    """One input to its reader, and what became of it."""
    def late(*_):
        if time.process_time() - worked > limit or time.monotonic() - began > SHARE * limit:
            raise Hang

    put(folder, files)
    tally.inputs += 1
    faulthandler.dump_traceback_later(2 * SHARE * LIMIT, exit=True)     # a hang in C, where no signal handler of Python's runs
    before, worked, began = signal.signal(signal.SIGALRM, late), time.process_time(), time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, limit, limit / 10)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            result = reader.read(folder)
            reader.use(result)
        signal.setitimer(signal.ITIMER_REAL, 0)
        counts = reader.rows(files, result) if reader.rows else []
        tally.lost += sum(there != used + dropped for there, used, dropped in counts)
        tally.said += [f"{reader.name}: rows {counts}"] * any(there != used + dropped for there, used, dropped in counts)
        tally.dropped += sum(dropped for _, _, dropped in counts)
        tally.accepted += 1
    except InputError as error:
        tally.refused += 1
        message = str(error)
        if len(message.splitlines()) != 1 or len(message) > LONGEST or not (str(folder) in message or reader.name in ("command line", "judge reply")):
            tally.tracebacks += 1
            tally.said.append(f"{reader.name}: not one line that names the file: {message[:300]!r}")
    except Hang:
        tally.hangs += 1
        tally.said.append(f"{reader.name}: no end within {limit:g} s")
    except KeyboardInterrupt:
        raise
    except BaseException as error:       # a panic in Rust is no Exception
        tally.tracebacks += 1
        tally.said.append(f"{reader.name}: {type(error).__name__}: {str(error)[:300]}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def attack(found, inputs, seed, folder, pages=0, limit=LIMIT):
    """So many damaged inputs over all readers, and `pages` whole pages.  -> {reader's name: Tally}"""
    draw, tallies = random.Random(seed), {reader.name: Tally() for reader in found}
    order = [reader for reader in found for _ in range(reader.weight)]
    page = [reader for reader in found if not reader.weight]
    for case in range(inputs):
        reader = draw.choice(page if page and case < pages else order)
        files = dict(reader.files)
        for name in draw.sample(list(files), min(len(files), draw.choice([1, 1, 1, 2]))):
            files[name] = damaged(name, files[name], draw)
        mine = tallies[reader.name]
        known = len(mine.said)
        feed(reader, files, folder, mine, limit)
        mine.said[known:] = [f"input {case}, {', '.join(name for name in files if files[name] != reader.files[name])}: {said}" for said in mine.said[known:]]
    return tallies


def table(tallies):
    names = ("inputs", "accepted", "refused", "dropped", "tracebacks", "hangs", "lost")
    total = {name: sum(getattr(tally, name) for tally in tallies.values()) for name in names}
    rows = [("reader", *names), *((name, *(getattr(tally, n) for n in names)) for name, tally in tallies.items()), ("all", *total.values())]
    text = "\n".join(f"{row[0]:<24}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows)
    return text, bool(total["tracebacks"] or total["hangs"] or total["lost"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    began = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        tallies = attack(readers(Path(scratch)), flags.inputs, flags.seed, Path(scratch) / "input", flags.inputs // 500)
    text, bad = table(tallies)
    print(text)
    for tally in tallies.values():
        print(*tally.said[:5], sep="\n", end="\n" * bool(tally.said))
    print(f"{time.time() - began:.0f} seconds")
    sys.exit(int(bad))


if __name__ == "__main__":
    main()
