"""Judges, one of them against a real HTTP server on this machine that answers well and badly. Nothing is asked twice, nothing is lost, the key stays out."""
import email.utils
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nanorlhf.io import data
from nanorlhf.io.data import Group, Response
from nanorlhf.io.read import InputError
from nanorlhf.run import cli
from nanorlhf.study import judge
from nanorlhf.study.judge import OpenAI, Reference, Replay, Scoring, form, parse

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("NANORLHF_DATA", "/nonexistent"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="set NANORLHF_DATA to the data folder")
SECRET = "sk-proj-4711_Geheim-0815"
MODEL = "judge-2023-06-13"


def refused(call, *words):
    """One line with these words, and without the key."""
    with pytest.raises(InputError) as error:
        call()
    message = str(error.value)
    assert len(message.splitlines()) == 1 and len(message) < 700 and all(word in message for word in words), message
    assert SECRET not in message
    return message


def write(path, groups):
    path.write_bytes(data.write_groups(groups))
    return str(path)


# -------------------------------------------------------------------------------------------------------------- scores

def test_scoring_ties_do_not_depend_on_who_else_is_asked_about():
    # Multiples of .05: .10 -> 2, .12 -> 2.4 -> 2, .14 -> 2.8 -> 3, .16 -> 3.2 -> 3, .40 -> 8. Best first: .40; then .14 and .16; then .10 and .12.
    # .12 and .14 differ by less than .05 and are told apart all the same: if they tied, .10 would have to tie with .16.
    scores = {"a": 0.10, "b": 0.12, "c": 0.14, "d": 0.16, "e": 0.40}
    found = Scoring(lambda prompts, responses: [scores[text] for text in responses])
    assert found.rank("p", list("abcde")) == [3, 3, 1, 1, 0]
    for a in scores:
        for b in scores:
            place = dict(zip("abcde", found.rank("p", list("abcde"))))
            assert found.compare("p", a, b) == (place[a] < place[b]) - (place[a] > place[b])
    assert Scoring(lambda prompts, responses: [scores[text] for text in responses], tie=0).rank("p", list("abcde")) == [4, 3, 2, 1, 0]
    assert found.rank("p", []) == [] and found.skipped == 0


def test_scoring_gives_the_prompt_and_refuses_what_is_no_score():
    assert Scoring(lambda prompts, responses: [p == "p" and r == "a" for p, r in zip(prompts, responses)]).rank("p", ["b", "a"]) == [1, 0]
    for scores in ([1.0], [1.0, float("nan")], [1.0, float("inf")]):
        judge = Scoring(lambda prompts, responses, scores=scores: scores)
        refused(lambda judge=judge: judge.rank("p", ["a", "b"]), "one finite number each")


# ----------------------------------------------------------------------------------------------------------- reference

PASSAGE = "The fox Renard stole a goose. The farmer was angry.\nQuestion:"


def test_reference_by_hand():
    judges = Reference([Group(PASSAGE, [Response(" Why was the farmer angry?", label=1), Response(" What did the fox steal?", label=1), Response(" goose goose", label=0)])])
    # content: farmer angry | fox steal. "Who stole the goose?": stol goos, F1 0 with both; form 4/4; stol and goos are in the passage: .4*0 + .3 + .3
    assert judges.score(PASSAGE, " Who stole the goose?") == pytest.approx(0.6)
    # farmer goos against farmer angry: F1 2*1/4 = .5 >= .4, so near 1: all of the 1.0
    assert judges.score(PASSAGE, " Where did the farmer see the goose?") == pytest.approx(0.4 + 0.3 + 0.3 * 2 / 3)        # `see` is not in the passage
    # left out is the expert question itself: farmer angry against fox steal is 0, not 1
    assert judges.score(PASSAGE, " Why was the farmer angry?") == pytest.approx(0.6)
    # words shuffled: the same content, so left out as well; form loses the first word and the only "?" at the end: 2 of 4
    assert judges.score(PASSAGE, " farmer angry? the Why was") == pytest.approx(0.3 * 0.5 + 0.3 * max(0, 1 - 0.5))           # "Why" in the middle is an unknown name
    # one name that the passage lacks: of goos grimbert one is known, 1/2 - 1/2 = 0; Renard is known
    assert judges.grounded(PASSAGE, " Did the goose see Grimbert?") == 0 and judges.grounded(PASSAGE, " Where was Renard?") == 1
    assert judges.rank(PASSAGE, [" goose", " Who stole the goose?", " Why was the farmer sad?"]) == [2, 1, 0]
    alone = Reference([Group(PASSAGE, [Response(" Why was the farmer angry?")])])
    assert alone.near(PASSAGE, "Why was the farmer angry?") == 0.7 and alone.near(PASSAGE, "Who stole?") == 0
    refused(lambda: judges.rank("Another\nQuestion:", ["a", "b"]), "Another", "--reference")
    assert judges.score(PASSAGE, " ") == pytest.approx(0.3 / 4)             # nothing said, so nothing said twice


@pytest.mark.parametrize("text, checks", [(" Why did the fox run?", 4), (" Did the fox run?", 3), (" Why did the fox run", 3), (" Why? When did the fox run?", 3),
                                          (" Why did the the fox run?", 3), (" Why did the fox, why did the fox run?", 3), (" Why?", 3), (" Why did the fox run?\nIt ran.", 3),
                                          (" Why" + " did" * 30, 1)])
def test_form(text, checks):
    assert form(text) == checks / 4


@needs_data
def test_reference_on_fairytaleqa():
    """Experts' questions of held-out passages against a question of another book, and against their own words shuffled (the mark stays at the end)."""
    groups = data.load(DATA / "FairytaleQAData").held_out
    found, draw = Reference(groups), random.Random(0)
    others, shuffled, own = Counter(), Counter(), 0
    for group in groups:
        for r in group.responses:
            other = draw.choice(draw.choice([g for g in groups[::10] if g.extra["story"] != group.extra["story"]]).responses)
            mixed = r.text.rstrip(" ?").split()
            draw.shuffle(mixed)
            others[found.compare(group.prompt, r.text, other.text)] += 1
            shuffled[found.compare(group.prompt, r.text, " " + " ".join(mixed) + "?")] += 1
            own += found.near(group.prompt, r.text) == 1
    assert others[1] > 0.95 * others.total() and others[-1] < 0.03 * others.total(), others
    assert shuffled[1] > 0.8 * shuffled.total() and shuffled[-1] < 0.01 * shuffled.total(), shuffled
    assert 0.1 < own / others.total() < 0.6                                 # leave-one-out: not every expert question is its own key


# -------------------------------------------------------------------------------------------------------------- replay

def test_replay_looks_up_one_line():
    groups = [Group("p", [Response(" a", 2), Response(" b", 0.5), Response(" c", 2)]), Group("p", [Response(" d", 0), Response(" b", 7)]), Group("empty", [])]
    found = Replay(groups)
    assert found.rank("p", [" a", " b", " c"]) == [1, 0, 1] and found.rank("p", [" c", " b"]) == [1, 0]
    assert found.rank("p", [" b", " d"]) == [1, 0]                          # from the second line, in which both stand
    assert (found.compare("p", " a", " c"), found.compare("p", " b", " a"), found.compare("p", " a", " b")) == (0, 1, -1)
    refused(lambda: found.rank("p", [" a", " never"]), "' never'", "never ranked")
    refused(lambda: found.rank("p", [" a", " d"]), "together")
    refused(lambda: found.rank("q", [" a"]), "' a'", "'q'")
    refused(lambda: Replay([Group("p", [Response(" a", 0), Response(" b")])]), "' b'", "no place")
    refused(lambda: Replay([Group("p", [Response(" a", 0), Response(" a", 1)])]), "two places")


@needs_data
def test_replay_of_people():
    found = data.load(DATA / "qgeval" / "train.jsonl")
    people = Replay(found.train + found.held_out)
    for group in found.held_out:
        by_place = people.rank(group.prompt, [r.text for r in group.responses])
        assert [by_place.index(p) for p in by_place] == [[r.place for r in group.responses].index(r.place) for r in group.responses]      # the same ties
        assert sorted(range(len(by_place)), key=by_place.__getitem__) == sorted(range(len(by_place)), key=lambda i: group.responses[i].place)


# --------------------------------------------------------------------------------------------------- a model's answers

@pytest.mark.parametrize("reply, expected", [
    ('[["A"], ["C", "B"]]', [["A"], ["B", "C"]]), ('["B", "A", "C"]', [["B"], ["A"], ["C"]]), ('["B", ["A", "C"]]', [["B"], ["A", "C"]]),
    ('Sure [as asked]:\n```json\n[["C"],\n ["A"], ["B"]]\n```\nC is best [1].', [["C"], ["A"], ["B"]]),
    ('["A","B","C"], so again ["A","B","C"]', [["A"], ["B"], ["C"]]),
    ('["A","B","C"] or rather ["B","A","C"]', None), ('["A","B"]', None), ('["A","B","C","D"]', None), ('["A","B","B"]', None), ('["A","B","C","C"]', None),
    ('["a","b","c"]', None), ("A, B, C", None), ("", None), ("[[[", None), ('[["A"],["B"],["C"],[]]', None), ('[1, 2, 3]', None), ('[["A",["B"]],"C"]', None),
    ('{"A": 1}', None), ('[{"A": 1}, "B", "C"]', None), ("[" * 5000, None), ('["A","B","C"', None), ("null", None)])
def test_parse(reply, expected):
    assert parse(reply, 3) == expected


class Server(ThreadingHTTPServer):
    """Does what stands next in `script`, then answers each request by `rule`. Good texts end in a larger number."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.seen, self.rule, self.stop = [], [], ranked, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, request, address):                               # a client that has gone is part of the game
        pass

    def asked(self):
        """How often each content was asked."""
        return Counter(json.dumps(seen["messages"]) for seen in self.seen)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append({**body, "path": self.path, "authorization": self.headers["Authorization"]})
        shown = [json.loads(text) for text in re.findall(r'^[A-Z]: (".*")$', body["messages"][1]["content"], re.MULTILINE)]
        step = self.server.script.pop(0) if self.server.script else None
        step(self) if step else self.say(self.server.rule(shown))

    def do_GET(self):
        self.server.seen.append({"messages": "GET", "authorization": self.headers["Authorization"]})
        self.say("followed")

    def say(self, content):
        self.raw({"model": "answers-as-0613", "choices": [{"message": {"role": "assistant", "content": content}}]})

    def raw(self, value, status=200, length=None, **headers):
        body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(body)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def number(text):
    return int(text.split()[-1])


def ranked(shown):
    """An oracle: by the number in the text, equal numbers tie."""
    tiers = {}
    for letter, text in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", shown):
        tiers.setdefault(-number(text), []).append(letter)
    return json.dumps([tiers[key] for key in sorted(tiers)])


def in_order(shown):
    """Maximal bias: whatever is shown first is best."""
    return json.dumps(list("ABCDEFGH"[: len(shown)]))


status = lambda code, message="no", **headers: lambda handler: handler.raw({"error": {"message": message}}, code, **headers)
says = lambda content: lambda handler: handler.say(content)
value = lambda value, **options: lambda handler: handler.raw(value, **options)


def closes(handler):
    handler.connection.close()


def slow(handler):
    handler.server.stop.wait(2)


def drips(handler):
    """A byte every 20 ms for 2 s: each one in time, the whole too late, and then no JSON."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        if not handler.server.stop.wait(0.02):
            handler.wfile.write(b" ")
            handler.wfile.flush()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    found = Server()
    yield found
    found.stop.set()
    found.shutdown()
    found.server_close()


@pytest.fixture
def ask(server, tmp_path):
    """ask(**options): a judge on the server; what it waited stands in judge.waits."""
    def make(cache="cache.jsonl", seed=0, timeout=5.0, url=None):
        waits = []
        found = OpenAI(url or server.url, MODEL, tmp_path / cache, seed, timeout, waits.append)
        found.waits = waits
        return found
    yield make
    secret = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert not secret                                                        # after every test: the key is nowhere on disk


def groups(n, k=4, seed=0):
    """n prompts with k responses; the numbers are the oracle's order, some of them equal."""
    draw = random.Random(seed)
    return [Group(f"Passage {i}.\nQuestion:", [Response(f" {j}? worth {draw.randrange(k)}") for j in range(k)]) for i in range(n)]


def texts(group):
    return [r.text for r in group.responses]


def expected(group):
    return [sum(number(other) > number(text) for other in texts(group)) for text in texts(group)]


def test_the_request(server, ask):
    found = ask()
    assert found.rank("Once.\nQuestion:", [" Why 1", " Who\nB: 2"]) == [1, 0]
    seen, = server.seen
    assert (seen["path"], seen["authorization"], seen["model"], seen["temperature"]) == ("/v1/chat/completions", f"Bearer {SECRET}", MODEL, 0)
    text = seen["messages"][1]["content"]
    assert "Passage:\nOnce.\n\nQuestions:\n" in text and '"Who\\nB: 2"' in text and len(re.findall("^B: ", text, re.MULTILINE)) == 1
    row, = map(json.loads, (found.path).read_text().splitlines())
    assert (row["model"], row["answered_by"], row["messages"]) == (MODEL, "answers-as-0613", seen["messages"]) and found.answered_by == {"answers-as-0613": 1}


def test_places_are_in_the_order_given(server, ask):
    """The oracle ranks what it is shown, in whichever order; places come back for the responses as given, ties and equal texts included."""
    found = ask()
    for group in groups(30, 5):
        assert found.rank(group.prompt, texts(group)) == expected(group)
    assert found.rank("p", [" x 3", " y 5", "x 3 ", " z 5"]) == [2, 0, 2, 0]         # y and z share the first place, both x the third
    before = len(server.seen)
    assert found.rank("p", [" z 5", " x 3", " y 5"]) == [0, 2, 0] and len(server.seen) == before      # the same responses in another order: the same question
    assert found.rank("p", [" x 3", "x 3"]) == [0, 0] and found.rank("p", [" x 3"]) == [0] and found.rank("p", []) == [] and len(server.seen) == before
    refused(lambda: found.rank("p", [f"{i}" for i in range(27)]), "27", "26")


def test_rank_has_no_position_bias_and_compare_shows_it(server, ask):
    """A judge that always takes the first shown: places of each of 4 responses are uniform on 0..3, mean 1.5, sd of the mean of 200 is sqrt(1.25/200) = .079."""
    server.rule, found = in_order, ask()
    rankings = [found.rank(group.prompt, texts(group)) for group in groups(200)]
    assert all(sorted(places) == [0, 1, 2, 3] for places in rankings)
    assert all(abs(sum(column) / 200 - 1.5) < 4 * 0.079 for column in zip(*rankings)), [sum(column) / 200 for column in zip(*rankings)]
    assert [found.rank(group.prompt, texts(group)) for group in groups(20)] == rankings[:20]
    other = ask("other.jsonl", seed=1)
    assert [other.rank(group.prompt, texts(group)) for group in groups(20)] != rankings[:20]      # the seed is part of the order
    for a, b in ((" a 1", " b 2"), (" b 2", " a 1"), (" c 1", " a 1")):
        assert found.compare("p", a, b) == 1                                  # a is shown first, in both orders
    assert found.compare("p", " a 1", "a 1") == 0                             # the same text is not asked about
    server.rule = ranked
    assert (found.compare("q", " a 1", " b 2"), found.compare("q", " b 2", " a 1"), found.compare("q", " a 1", " c 1"), found.compare("q", " a 1", "a 1")) == (-1, 1, 0, 0)


def test_nothing_is_asked_twice(server, ask):
    several = groups(8) + groups(2, 3)
    first = [ask().rank(g.prompt, texts(g)) for g in several]                 # an instance each: through the file
    pairs = [ask().compare(g.prompt, *texts(g)[:2]) for g in several]
    assert first == [expected(g) for g in several] and set(server.asked().values()) == {1} and len(server.seen) == 20
    found = ask()
    assert [found.rank(g.prompt, texts(g)) for g in several] == first and [found.compare(g.prompt, *texts(g)[:2]) for g in several] == pairs
    assert len(server.seen) == 20 and found.answered_by == {"answers-as-0613": 20}
    OpenAI(server.url, "another", found.path).rank(several[0].prompt, texts(several[0]))
    assert len(server.seen) == 21                                             # the model is part of the question


@pytest.mark.parametrize("trouble, waits", [
    (status(429, Retry_After="7"), [7]), (status(429, Retry_After="0"), [0]), (status(503, Retry_After="99999"), [60]), (status(429, Retry_After="soon"), [1]),
    (status(429), [1]), (status(500), [1]), (status(408), [1]), (value("<html>", status=502), [1]), (closes, [1]), (slow, [1]), (drips, [1]),
    (value({"choices": [{"message": {"content": '["A","B","C"]'}}]}, length=500), [1]), (value('{"choices": [{"mess', length=500), [1]), (value('{"choices": [{"mess'), [1]),
    (value({}), [1]), (value([]), [1]), (value({"choices": "no"}), [1]),
    (value({"choices": []}), [1]), (value({"choices": [{"text": "old"}]}), [1]), (value({"choices": [{"message": {"content": 3}}]}), [1]), (value("not JSON"), [1]),
    (value("[" * 100000), [1])])
def test_trouble_is_tried_again(server, ask, trouble, waits):
    """One bad answer, then a good one: the same result, after the wait that was asked for."""
    server.script, found = [trouble], ask(timeout=0.3)
    assert found.rank("p", [" a 1", " b 2", " c 1"]) == [1, 0, 1] and found.waits == waits and len(server.seen) == 2
    assert found.skipped == 0 and len(found.path.read_text().splitlines()) == 1


def test_the_limit_is_for_the_whole_answer(server, ask):
    """Without it the 100 bytes would take 2 s."""
    server.script, began = [drips], time.monotonic()
    assert ask(timeout=0.3).compare("p", "a 1", "b 2") == -1 and time.monotonic() - began < 1.5


def test_retry_after_a_date(server, ask):
    late = lambda seconds: status(429, Retry_After=email.utils.formatdate(time.time() + seconds, usegmt=True))
    server.script, found = [late(30), late(-30), late(9999), status(500), status(500)], ask()
    assert found.compare("p", "a 1", "b 2") == -1
    # dates have whole seconds; a past one is now, a far one is cut to 60 s; then the doubling of tries 4 and 5: 8 and 16
    assert 27 < found.waits[0] <= 30 and found.waits[1:] == [0, 60, 8, 16]


def test_patience_ends(server, ask):
    found = ask()
    assert found.compare("p", "a 1", "b 2") == -1
    server.script = [status(500, f"key {SECRET} is\nbroken")] * 6
    message = refused(lambda: found.compare("q", "a 1", "b 2"), "6 tries", "HTTP 500: key [key] is broken", "1 answers", "cache.jsonl", "same command")
    assert found.waits == [1, 2, 4, 8, 16] and len(server.seen) == 7 and server.url in message
    assert found.compare("q", "a 1", "b 2") == -1 and found.skipped == 0
    refused(lambda: ask(url="http://127.0.0.1:1/v1").compare("r", "a", "b"), "refused", "2 answers")


@pytest.mark.parametrize("code", [400, 401, 403, 404])
def test_refusals_end_at_once(server, ask, code):
    for echo in (lambda handler: handler.raw({"error": {"message": f"Bearer {SECRET} is wrong"}}, code), lambda handler: handler.raw(f"Authorization: Bearer {SECRET}\n" * 99, code)):
        server.script, found = [echo], ask()
        refused(lambda found=found: found.rank("p", ["a 1", "b 2"]), f"HTTP {code}", "[key]", MODEL)
        assert found.waits == []
    assert len(server.seen) == 2 and not found.path.exists()
    server.script = [value("x" * 175 + SECRET, status=code)]                  # cut in the middle of the key, were it cut before it is taken out
    assert SECRET[:8] not in refused(lambda: ask().rank("p", ["a 1", "b 2"]))


def test_the_key_goes_nowhere_else(server, ask, monkeypatch):
    server.script = [value("", status=302, Location=f"{server.url}/elsewhere")]
    refused(lambda: ask().compare("p", "a 1", "b 2"), "302")
    assert len(server.seen) == 1                                              # the redirect was not followed
    server.script = [says(f'["A","B"] {SECRET}')]
    assert ask().compare("p", "a 1", "b 2") == 1 and "[key]" in ask().path.read_text()
    for wrong in ("", "two words", "line\nbreak", "schlüssel", 'quo"te'):
        monkeypatch.setenv("OPENAI_API_KEY", wrong)
        message = refused(lambda: ask().compare("q", "a 1", "b 2"), "OPENAI_API_KEY")
        assert not wrong or wrong not in message
    assert ask().compare("p", "a 1", "b 2") == 1 and len(server.seen) == 2    # what is in the cache needs no key


@pytest.mark.parametrize("reply", ["B is nice.", '["A", "B"]', '["A", "B", "B"]', '["A", "B", "C", "D"]', "", None])
def test_answers_that_rank_nothing(server, ask, reply):
    server.script, found = [says(reply)] * 2, ask()
    assert found.rank("p", ["a 1", "b 2", "c 3"]) == [2, 1, 0] and len(server.seen) == 3 and found.skipped == 0      # the third answer is good
    server.script = [says(reply)] * 3
    assert found.rank("q", ["a 1", "b 2", "c 3"]) is None and len(server.seen) == 6 and found.skipped == 1 and found.waits == []
    again = ask()                                                             # recorded as skipped: not asked again, counted again
    assert again.rank("q", ["a 1", "b 2", "c 3"]) is None and again.skipped == 1 and again.rank("p", ["a 1", "b 2", "c 3"]) == [2, 1, 0] and len(server.seen) == 6


def test_half_a_line_is_asked_again(server, ask):
    several = groups(4)
    whole = [ask().rank(g.prompt, texts(g)) for g in several]
    raw = ask().path.read_bytes()
    last = raw.splitlines(keepends=True)[-1]
    for cut in (1, 5, len(last) // 2, len(last) - 2):
        ask().path.write_bytes(raw[: len(raw) - len(last) + cut])
        before, found = len(server.seen), ask()
        assert len(found.cache) == 3
        assert [found.rank(g.prompt, texts(g)) for g in several] == whole and len(server.seen) == before + 1
        assert len(ask().cache) == 4 and ask().path.read_bytes().endswith(b"\n" + last)
    ask().path.write_bytes(raw[:-1])                                          # only the line break is missing: nothing was lost
    assert len(ask().cache) == 4 and ask().rank("new", ["a 1", "b 2"]) == [1, 0] and len(ask().cache) == 5
    ask().path.write_text("my notes\n")
    refused(ask, "cache.jsonl:1", "my notes")


# ---------------------------------------------------------------------------------------------------- the command line

def command(tmp_path, server, *more, judge_name="openai", out="out.jsonl"):
    words = ["--judge", judge_name, "--data", str(tmp_path / "groups.jsonl"), "--out", str(tmp_path / out)]
    if judge_name == "openai":
        words += ["--url", server.url, "--model", MODEL, "--cache", str(tmp_path / "cache.jsonl")]
    return words + list(more)


def main(words):
    judge.main(cli.parse(judge.Config, words))


def test_dry_run_counts_what_is_then_asked(server, ask, tmp_path, capsys):
    """12 groups of which: one is cached, one stands there twice, one has a single response, one has the same response twice: 8 + 0 + 0 + 0 + 0 = 8 requests."""
    several = groups(9)
    several += [several[3], Group("single", [Response(" a 1")]), Group("equal", [Response(" a 1"), Response(" a 1")])]
    write(tmp_path / "groups.jsonl", several)
    ask().rank(several[0].prompt, texts(several[0]))
    before, cache = len(server.seen), ask().path.read_bytes()
    main(command(tmp_path, server, "--dry_run"))
    said = capsys.readouterr().out
    count, tokens = map(int, re.search(r"12 groups: (\d+) requests to make, about (\d+) tokens", said).groups())
    assert count == 8 and len(server.seen) == before and ask().path.read_bytes() == cache and not (tmp_path / "out.jsonl").exists()
    main(command(tmp_path, server))
    assert len(server.seen) - before == count
    sent = sum(len(m["content"]) for seen in server.seen[before:] for m in seen["messages"])
    assert sent / 4 < tokens < sent / 4 + 8 * 30                              # four characters a token, and 4 x 6 tokens of answer each
    main(command(tmp_path, server, "--dry_run"))
    assert "12 groups: 0 requests" in capsys.readouterr().out


def test_ranked_groups_keep_their_other_keys(server, ask, tmp_path, capsys):
    several = [Group("p", [Response(" a 1", 0, 1, [0.5], False, {"who": "x"}), Response(" b 2")], True, {"id": 7}), *groups(3)]
    write(tmp_path / "groups.jsonl", several)
    server.script = [None, says("?"), says("?"), says("?")]                   # the second group is skipped
    main(command(tmp_path, server))
    said = capsys.readouterr().out
    assert "3 groups ranked, 1 skipped" in said and "answers-as-0613 (4)" in said and len(server.seen) == 6
    written, _ = data.read_groups(tmp_path / "out.jsonl")
    assert written[0] == Group("p", [Response(" a 1", 1, 1, [0.5], False, {"who": "x"}), Response(" b 2", 0)], True, {"id": 7})
    assert [[r.place for r in g.responses] for g in written[1:]] == [expected(g) for g in several[2:]]
    refused(lambda: main(command(tmp_path, server)), "--out", "does not exist yet")


def test_killed_and_gone_on(server, ask, tmp_path):
    """A real process is killed while the fifth answer is under way: the four before it are kept, the others are asked once."""
    several, out = groups(10), tmp_path / "out.jsonl"
    write(tmp_path / "groups.jsonl", several)
    server.script = [None] * 4 + [slow]
    child = subprocess.Popen([sys.executable, "-m", "nanorlhf.study.judge", *command(tmp_path, server)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    limit = time.time() + 60
    while len(server.seen) < 5 and time.time() < limit and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert len(server.seen) == 5, child.communicate()
    assert child.wait() == -signal.SIGKILL and not out.exists() and len(ask().cache) == 4
    child.communicate()
    main(command(tmp_path, server))
    written, _ = data.read_groups(out)
    assert [[r.place for r in g.responses] for g in written] == [expected(g) for g in several]
    assert sorted(server.asked().values()) == [1] * 9 + [2]                   # twice: only the one whose answer never came


def test_the_other_judges(tmp_path, capsys):
    several = [Group(PASSAGE, [Response(" the goose"), Response(" Who stole the goose?"), Response(" Why was the farmer sad?")])]
    write(tmp_path / "groups.jsonl", several)
    write(tmp_path / "experts.jsonl", [Group(PASSAGE, [Response(" Why was the farmer angry?"), Response(" What did the fox steal?")])])
    write(tmp_path / "people.jsonl", [Group(PASSAGE, [Response(text, place) for text, place in zip(texts(several[0]), (1, 0, 1))])])
    (tmp_path / "mine.py").write_text("def score(prompts, responses):\n    return [len(text) for text in responses]\n")
    for name, reference, places in (("reference", "experts.jsonl", [2, 1, 0]), ("replay", "people.jsonl", [1, 0, 1]), (f"{tmp_path / 'mine.py'}:score", "", [2, 1, 0])):
        main(command(tmp_path, None, *(["--reference", str(tmp_path / reference)] if reference else []), judge_name=name, out=f"{len(name)}.jsonl"))
        written, _ = data.read_groups(tmp_path / f"{len(name)}.jsonl")
        assert [r.place for r in written[0].responses] == places and "1 groups ranked, 0 skipped" in capsys.readouterr().out


def test_mistakes_are_one_line(server, ask, tmp_path, monkeypatch):
    write(tmp_path / "groups.jsonl", groups(1))
    openai = command(tmp_path, server)
    for words, said in [
            (["--judge", "gold"] + openai[2:], "--judge gold"), (openai[:-2], "--cache is missing"), (openai + ["--reference", "x"], "--reference does not go with"),
            (openai + ["--url", "localhost:8000/v1"], "--url 'localhost:8000/v1'"), (openai + ["--url", "http://a b/v1"], "--url"), (openai + ["--url", "file:///etc/passwd"], "--url"),
            (openai + ["--cache", str(tmp_path)], "--cache"), (openai + ["--cache", str(tmp_path / "no" / "c.jsonl")], "--cache"), (openai + ["--data", "no.jsonl"], "no.jsonl"),
            (openai + ["--out", str(tmp_path / "no" / "o.jsonl")], "--out"), (openai[:4] + openai[6:], "--out (missing)"), (openai + ["--seed", "-1"], "--seed -1"),
            (["--judge", "replay", "--reference", "no.jsonl"] + openai[2:6], "--reference no.jsonl: no such file"), (["--judge", "reference"] + openai[2:6], "--reference is missing"),
            (["--judge", "replay", "--reference", openai[3], "--dry_run"] + openai[2:6], "--dry_run"), (["--judge", "replay", "--reference", openai[3]] + openai[2:6], "no place"),
            (["--judge", "no.py:score"] + openai[2:6], "no.py")]:
        refused(lambda words=words: main(words), said)
    assert not server.seen and not (tmp_path / "out.jsonl").exists() and not (tmp_path / "cache.jsonl").exists()
    monkeypatch.setenv("OPENAI_API_KEY", "")
    ended = subprocess.run([sys.executable, "-m", "nanorlhf.study.judge", *openai], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.count("\n"), ended.stderr[:31]) == (2, 1, "error: OPENAI_API_KEY is not se"), ended.stderr
