"""Judges: who orders K responses to one prompt. All of them answer the same two questions.

    rank(prompt, responses)  -> K places, 0 the best, equal places tie;  None: skipped
    compare(prompt, a, b)    -> 1 where a is better, -1 where b is, 0 a tie;  None: skipped.  a is shown first: ask both orders to see a bias for places

    python -m nanorlhf.study.judge --judge reference --reference FairytaleQAData --data samples.jsonl --out ranked.jsonl
    python -m nanorlhf.study.judge --judge replay --reference people.jsonl --data samples.jsonl --out ranked.jsonl
    python -m nanorlhf.study.judge --judge judge.py:score --data samples.jsonl --out ranked.jsonl
    python -m nanorlhf.study.judge --judge openai --url https://HOST/v1 --model NAME --cache answers.jsonl --data samples.jsonl --out ranked.jsonl [--dry_run]
"""
import email.utils
import hashlib
import http.client
import json
import math
import os
import re
import string
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..io import data
from ..io.files import replace
from ..io.read import InputError, parse_json, read_bytes
from ..reward import FunctionReward, is_function
from ..run.cli import check_bounds, run_script


def places(scores):
    """Place of each score: how many are higher.  K numbers -> K places, equal scores tie"""
    return [sum(other > score for other in scores) for score in scores]


class Judge:
    """What all judges share; a judge that looks at one response after the other needs `rank` alone."""

    skipped = 0                              # calls that were answered with None

    def compare(self, prompt, a, b):
        found = self.rank(prompt, [a, b])
        return None if found is None else (found[0] < found[1]) - (found[0] > found[1])


# ------------------------------------------------------------------------------------------------- scores and lookups

class Scoring(Judge):
    """Orders by `function(prompts, responses) -> scores`, flat lists of one length; scores of one multiple of `tie` tie (0: only equal ones)."""

    def __init__(self, function, tie=0.05):
        self.function, self.tie = function, tie

    def rank(self, prompt, responses):
        scores = [float(score) for score in self.function([prompt] * len(responses), responses)] if responses else []
        bad = next((score for score in scores if not math.isfinite(score)), None)
        if len(scores) != len(responses) or bad is not None:
            raise InputError(f"the judge's function gave {len(scores)} scores{'' if bad is None else f', {bad} among them,'} for {len(responses)} responses: "
                             f"one finite number each, please")
        # To the nearest multiple, not "closer than tie": that would tie a with b and b with c but not a with c, and an order would depend on who is asked about.
        return places([round(score / self.tie) if self.tie else score for score in scores])


NEAR, FORM, GROUNDED = 0.4, 0.3, 0.3     # weights of the reference rule, chosen by hand
ENOUGH = 0.4                             # overlap that counts as near: what expert questions of one FairytaleQA passage have with each other
ALONE = 0.7                              # `near` of an expert question that has no other beside it: the mean of those that have
NAME_COST = 0.5                          # for each name that the passage lacks
LENGTH = range(3, 26)                    # words of a question; experts' have 3 to 27, the mean is 10
ASKING = set("what why how who where when which whose whom".split())
STOP = ASKING | set("""a an the of to in on at by for with from and or but not no as is are was were be been being am do does did has have had will
would can could shall should may might must it its he his him she her they their them i you your we our this that these those there after before if
so than then""".split())


def words(text):
    return re.findall(r"[^\W_]+", re.sub(r"['’]s?\b", "", text))


def stem(word):
    """asked, asks, asking -> ask: crude, and the same for the question and for the passage."""
    return re.sub(r"(?<=...)(ing|ed|es|s)$", "", word).rstrip("e")


def content(text):
    """The words that carry meaning, without their common endings.  -> set of str"""
    return {stem(word) for word in words(text.lower()) if word not in STOP}


def form(response):
    """Share of the four checks of a well-formed question that hold (see Reference)."""
    text, said = response.strip(), words(response.lower())
    pairs = list(zip(said, said[1:]))
    return sum((bool(said) and said[0] in ASKING, text.endswith("?") and text.count("?") == 1 and "\n" not in text, len(said) in LENGTH,
                len(set(pairs)) == len(pairs) and all(a != b for a, b in pairs))) / 4


class Reference(Scoring):
    """A judge without people or a paid model: likeness to the questions that experts asked of the same passage. Scores are in [0, 1].

        score    = 0.4 near + 0.3 form + 0.3 grounded, to the nearest multiple of 0.05
        near     = min(1, F1 / 0.4), F1 of the content words (no function words, endings cut off) with the nearest expert question
        form     = share of four checks that hold: begins with a question word; its only "?" is its end, on one line; 3 to 25 words; nothing said twice
                   (no word after itself, no pair of words a second time)
        grounded = share of the content words that the passage has, less 0.5 for each capitalised word (not the first) that it lacks, at least 0

    It is a proxy: it prefers questions that sound like the experts', about what the passage speaks of. It cannot see whether a question is good, needs
    inference or has an answer, and right words in a wrong relation or order satisfy it. What is trained on it learns to sound so: no measure of quality.
    A response with the content words of an expert question is not compared with that one but with the others (leave one out), or the experts would win
    by being their own key; where there is no other, `near` is 0.7, what experts have on average. The cut at F1 0.4 keeps a near copy from earning
    much more. A score depends on prompt and response alone, so that `rank` and `compare` agree.
    """

    def __init__(self, groups):
        super().__init__(lambda prompts, responses: [self.score(p, r) for p, r in zip(prompts, responses)])
        self.experts, self.passages = {}, {}
        for group in data.keep_preferred(groups)[0]:
            self.experts.setdefault(group.prompt, []).extend(content(response.text) for response in group.responses)

    def near(self, prompt, response):
        mine = content(response)
        overlaps = [2 * len(mine & theirs) / (len(mine) + len(theirs)) for theirs in self.experts[prompt] if theirs != mine]
        return min(1.0, max(overlaps) / ENOUGH) if overlaps else ALONE

    def grounded(self, prompt, response):
        if prompt not in self.passages:
            self.passages[prompt] = {stem(word) for word in words(prompt.lower())}
        passage, mine = self.passages[prompt], content(response)
        unknown = sum(word[0].isupper() and stem(word.lower()) not in passage for word in words(response)[1:])
        return max(0.0, len(mine & passage) / len(mine) - NAME_COST * unknown) if mine else 0.0

    def score(self, prompt, response):
        if prompt not in self.experts:
            raise InputError(f"no reference for the prompt that ends in {prompt[-60:]!r}: --reference needs expert questions for every prompt of --data")
        return NEAR * self.near(prompt, response) + FORM * form(response) + GROUNDED * self.grounded(prompt, response)


class Replay(Judge):
    """Rankings that are at hand, a person's for example: looks up what a groups file with places says of these responses to this prompt."""

    def __init__(self, groups):
        self.groups = {}
        for group in groups:
            found = {}
            for r in group.responses:
                if r.place is None or found.setdefault(r.text, r.place) != r.place:
                    raise InputError(f"replay: the response {r.text[:60]!r} to the prompt that ends in {group.prompt[-60:]!r} has "
                                     f"{'no place' if r.place is None else 'two places'}: give each response one")
            self.groups.setdefault(group.prompt, []).append(found)

    def rank(self, prompt, responses):
        rankings = self.groups.get(prompt, [])
        # Places of different lines were given apart and cannot be compared: all the responses have to stand in one.
        found = next((ranking for ranking in rankings if all(text in ranking for text in responses)), None)
        if found is None:
            unknown = next((text for text in responses if not any(text in ranking for ranking in rankings)), None)
            what = "its responses were never ranked together" if unknown is None else f"the response {unknown[:60]!r} was never ranked"
            raise InputError(f"replay: {what} for the prompt that ends in {prompt[-60:]!r}; a replay knows only the rankings in its file")
        return places([-found[text] for text in responses])


# ------------------------------------------------------------------------------------------------- a model behind HTTP

# Paper A prompts for educational, inferential and grammatical questions, with one prompt for training and for evaluation; its wording is not published.
RUBRIC = """You compare questions that a teacher could ask children about a passage. A question is better the more it
- is educational: it helps a child to understand the story,
- needs inference: the answer follows from the passage but is not copied out of it,
- is grammatical and clear.
A question that the passage cannot answer is worse than any that it can."""
ASK = """Passage:
{passage}

Questions:
{questions}

Order all the questions from the best to the worst. Answer with a JSON list of lists of letters and nothing else; questions that are equally good \
share an inner list: [[best], [next, equally good], ..., [worst]]"""
ASKS = 3                                 # how often one question is asked before an answer that is no ranking is given up
TRIES = 6                                # requests, while the network or the server fails, before the run stops
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0     # seconds between them: doubled each time; a server's Retry-After is cut to the second
LARGEST_ANSWER = 2**20                   # bytes of one answer: a ranking with thousands of words around it has a hundredth of that
LETTERS = string.ascii_uppercase
CHARACTERS = 4                           # of English a token, and
ANSWER = 6                               # tokens of the answer a response: for the estimate of a dry run
KEY = "OPENAI_API_KEY"
START = b'{"key": "'                     # of every line of the cache


def parse(reply, k):
    """The ranking in a model's answer: a JSON list of letters or of lists of letters, best first, that names each of the first k letters once.

    Text around it is ignored; two rankings that differ are none.  -> list of lists of letters, or None
    """
    found, at = [], reply.find("[")
    while at >= 0:
        try:
            value, end = json.JSONDecoder().raw_decode(reply, at)
        except ValueError:
            value, end = [], at + 1
        except RecursionError:                   # thousands of brackets: no answer, and slow to look through
            return None
        tiers = [tier if isinstance(tier, list) else [tier] for tier in value]
        said = [letter for tier in tiers for letter in tier]
        if all(tiers) and all(isinstance(letter, str) for letter in said) and sorted(said) == list(LETTERS[:k]):
            found.append([sorted(tier) for tier in tiers])
        at = reply.find("[", end)
    return found[0] if found and all(tiers == found[0] for tiers in found) else None


def digest(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments):      # urllib would send the key along, to whatever host the answer names
        return None


class OpenAI(Judge):
    """Any chat-completions endpoint: POST url/chat/completions, temperature 0, the key from the environment variable OPENAI_API_KEY alone.

    rank shows distinct responses in an order drawn from (seed, prompt, responses); equal texts tie unasked. compare shows a first.
    Every answer is in the file `cache` (a JSON line: request, answer, model asked for, model that the answer names) before the next request, by a hash of
    (model, messages): nothing is asked twice, and a run that was stopped goes on. An answer that is no ranking (an empty one too) is asked for again,
    ASKS times in all, then it is skipped, and so recorded ("ranking": null): later runs skip it unasked; delete its line to ask again.
    Network trouble, 408, 409, 429 and 5xx are tried TRIES times; any other refusal is an InputError at once.   timeout: seconds a request
    """

    def __init__(self, url, model, cache, seed=0, timeout=60.0, sleep=time.sleep):
        if not re.fullmatch(r"https?://(\[[\da-fA-F:]+\]|[^\s/:@\[\]]+)(:\d{1,5})?(/[!-~]*)?", url):
            raise InputError(f"--url {url!r}: expected the base of a chat-completions endpoint, such as http://localhost:8000/v1")
        self.url, self.model, self.path, self.seed, self.timeout, self.sleep = url.rstrip("/"), model, Path(cache), seed, timeout, sleep
        if self.path.is_dir() or not self.path.parent.is_dir():
            raise InputError(f"--cache {cache}: name a file in a folder that exists")
        self.key = os.environ.get(KEY, "").strip()
        self.opener = urllib.request.build_opener(_NoRedirect)
        self.skipped, self.damaged, self.answered_by = 0, 0, Counter()
        self.cache = self._read() if self.path.exists() else {}

    def rank(self, prompt, responses):
        shown = self._order(prompt, responses)
        tiers = self._ask(prompt, shown)
        if tiers is None:
            return None
        tier = {shown[LETTERS.index(letter)]: -i for i, letters in enumerate(tiers) for letter in letters}
        return places([tier[text.strip()] for text in responses])

    def compare(self, prompt, a, b):
        if a.strip() == b.strip():
            return 0
        tiers = self._ask(prompt, [a.strip(), b.strip()])
        return None if tiers is None else 0 if len(tiers) == 1 else 1 if tiers[0] == ["A"] else -1

    def cost(self, groups):
        """What `rank` would still ask for these groups.  -> (requests, tokens of them and of their answers, estimated)"""
        tokens = {}
        for group in groups:
            shown = self._order(group.prompt, [response.text for response in group.responses])
            messages = self._messages(group.prompt, shown)
            key = digest(self.model, messages)
            if len(shown) > 1 and key not in self.cache:
                tokens[key] = sum(len(message["content"]) for message in messages) // CHARACTERS + ANSWER * len(shown)
        return len(tokens), sum(tokens.values())

    def _order(self, prompt, responses):
        distinct = sorted({text.strip() for text in responses})
        if len(distinct) > len(LETTERS):
            raise InputError(f"{len(distinct)} responses to the prompt that ends in {prompt[-60:]!r}: {len(LETTERS)} at most are ranked at once")
        return sorted(distinct, key=lambda text: digest(self.seed, prompt, distinct, text))

    def _messages(self, prompt, shown):
        # Responses stand as JSON strings: one that contains a line "B: ..." cannot pretend to be another.
        questions = "\n".join(f"{letter}: {json.dumps(text, ensure_ascii=False)}" for letter, text in zip(LETTERS, shown))
        passage = prompt.removesuffix(data.TEMPLATE.format(passage=""))
        return [{"role": "system", "content": RUBRIC}, {"role": "user", "content": ASK.format(passage=passage, questions=questions)}]

    def _ask(self, prompt, shown):
        """Tiers of letters for the responses in the order shown, from the cache or from the model; None, and counted, where they were skipped."""
        if len(shown) < 2:
            return [[letter] for letter, _ in zip(LETTERS, shown)]
        messages = self._messages(prompt, shown)
        key = digest(self.model, messages)
        if key not in self.cache:
            for _ in range(ASKS):
                reply, answered_by = self._request(messages)
                ranking = parse(reply, len(shown))
                if ranking is not None:
                    break
            self._write({"key": key, "model": self.model, "answered_by": self._redact(answered_by), "ranking": ranking,
                         "reply": self._redact(reply), "messages": messages})
        ranking = parse(json.dumps(self.cache[key]), len(shown))
        self.skipped += ranking is None
        return ranking

    def _read(self):
        """hash -> ranking of the answers on disk; writes nothing."""
        found = {}
        for number, line in enumerate(read_bytes(self.path).split(b"\n"), 1):
            try:
                row = parse_json(line, self.path) if line.strip() else None
            except InputError:
                if line.startswith(START) or START.startswith(line):
                    self.damaged += 1
                    continue                     # half a line, of a process that was killed while it wrote: that answer is asked for again
                row = {}
            if row is not None and not ({"ranking", "answered_by"} <= row.keys() and isinstance(row.get("key"), str)):
                raise InputError(f"--cache {self.path}:{number}: not an answer of a judge: {line[:60]!r}; name a new file or one that a judge wrote")
            if row is not None:
                found[row["key"]] = row["ranking"]
                self.answered_by[str(row["answered_by"])] += 1
        return found

    def _write(self, row):
        """On the disk before anything else is asked."""
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with open(self.path, "a+b") as file:
            if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                line = b"\n" + line              # ends the half line that is there
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.cache[row["key"]] = row["ranking"]
        self.answered_by[row["answered_by"]] += 1

    def _request(self, messages):
        """One answer, however often it takes to get one.  -> (text, the model that it names)"""
        if not re.fullmatch(r"[!#-&(-\[\]-~]+", self.key):         # no space, quote or backslash: a server's echo spells it as it is
            raise InputError(f"{KEY} {'holds a character that no key has' if self.key else 'is not set'}: export the endpoint's key "
                             f"(any word for a server that asks for none)")
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0}).encode()
        request = urllib.request.Request(f"{self.url}/chat/completions", body,
                                         {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"})
        wait = 0.0
        for attempt in range(TRIES):
            if attempt:
                self.sleep(wait)
            wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT)
            try:
                return self._answer(request)
            except urllib.error.HTTPError as error:
                reason = self._short(f"HTTP {error.code}: {self._said(error)}")
                if error.code not in (408, 409, 429) and error.code < 500:
                    raise InputError(f"{self.url} refused the request for model {self.model}: {reason}") from None
                wait = retry_after(error.headers.get("Retry-After"), wait)
            except (OSError, http.client.HTTPException, ValueError, OverflowError, RecursionError) as error:
                reason = self._short(f"{type(error).__name__}: {error}")
        raise InputError(f"{self.url}: no answer in {TRIES} tries, the last: {reason}; {len(self.cache)} answers are safe in {self.path}, "
                         f"and the same command goes on from there")

    def _answer(self, request):
        deadline, parts = time.monotonic() + self.timeout, []
        with self.opener.open(request, timeout=self.timeout) as response:
            while part := response.read1(65536):
                parts.append(part)
                if sum(map(len, parts)) > LARGEST_ANSWER:
                    raise ValueError(f"an answer of more than {LARGEST_ANSWER:,} bytes")
                if time.monotonic() > deadline:          # the socket's own timeout starts anew with each byte
                    raise TimeoutError(f"no whole answer in {self.timeout:g} s")
            if response.length:
                raise http.client.IncompleteRead(b"".join(parts), response.length)
        value = json.loads(b"".join(parts))
        try:
            reply = value["choices"][0]["message"]["content"]
            if not isinstance(reply, (str, type(None))):
                raise TypeError
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"not a chat completion: {str(value)}") from None
        return reply or "", str(value.get("model", ""))  # null: the model refused to answer

    @staticmethod
    def _said(error):
        """What the server says of its refusal: the message of the usual JSON, else the text as it is."""
        text = error.reason
        try:
            text = error.read(65536).decode("utf-8", "replace") or text
            return str(json.loads(text)["error"]["message"])
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, RecursionError):
            return text

    def _redact(self, text):
        return text.replace(self.key, "[key]")

    def _short(self, text):
        return " ".join(self._redact(text).split())[:200]        # cut last: half a key must not remain


def retry_after(value, otherwise):
    """Seconds that a Retry-After header (a number or a date) asks for, at most LONGEST_WAIT; `otherwise` where it says nothing."""
    try:
        seconds = float(value) if re.fullmatch(r"[\d.]+", value) else email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return otherwise
    return min(max(seconds, 0.0), LONGEST_WAIT)


# ---------------------------------------------------------------------------------------------------- the command line

NEEDS = {"reference": {"reference"}, "replay": {"reference"}, "openai": {"url", "model", "cache"}}


@dataclass(frozen=True)
class Config:
    judge: str                                      # reference, replay, openai, or path.py:function with (prompts, responses) -> scores
    data: str                                       # groups JSONL to rank
    out: str = ""                                   # groups JSONL to write, with places; must not exist
    reference: str = ""                             # expert questions (FairytaleQA folder, groups JSONL); for replay groups JSONL with places
    url: str = ""                                   # openai: base of the endpoint, ends in /v1; the key is read from OPENAI_API_KEY
    model: str = ""                                 # openai: a dated name, gpt-4-0613 for example, keeps its meaning
    cache: str = ""                                 # openai: JSONL of answers, kept and reused
    seed: int = 0                                   # openai: of the order in which responses are shown
    dry_run: bool = False                           # openai: say how many requests and tokens it would take, ask and write nothing


def make(config):
    """The judge that the flags name."""
    if config.judge not in NEEDS and not is_function(config.judge):
        raise InputError(f"--judge {config.judge}: expected reference, replay, openai or path.py:function")
    needs = NEEDS.get(config.judge, set())
    for name in ("reference", "url", "model", "cache"):
        if bool(getattr(config, name)) != (name in needs):
            raise InputError(f"--{name} {'is missing: --judge ' + config.judge + ' needs it' if name in needs else 'does not go with --judge ' + config.judge}")
    if config.dry_run and config.judge != "openai":
        raise InputError(f"--dry_run goes with --judge openai: {config.judge} costs nothing")
    if config.judge == "openai":
        return OpenAI(config.url, config.model, config.cache, config.seed)
    if is_function(config.judge):
        function = FunctionReward(config.judge)
        return Scoring(lambda prompts, responses: function.score_texts(prompts, [[text] for text in responses], None).flatten().tolist())
    try:
        found = data.load(config.reference)
    except InputError as error:
        raise InputError(str(error).replace("--data", "--reference", 1)) from None
    if found.dropped:
        print(f"{config.reference}: dropped {dict(found.dropped)}")
    try:
        return (Reference if config.judge == "reference" else Replay)(found.train + found.held_out)
    except InputError as error:
        raise InputError(f"--reference {config.reference}: {error}") from None


def main(config):
    check_bounds(config, seed=(0, 2**63 - 1))
    out = Path(config.out)
    if not config.dry_run and (not config.out or out.exists() or not out.parent.is_dir()):
        raise InputError(f"--out {config.out or '(missing)'}: name a file that does not exist yet, in a folder that does")
    judge = make(config)
    groups, dropped = data.read_groups(config.data)
    if config.dry_run:
        requests, tokens = judge.cost(groups)
        return print(f"{len(groups)} groups: {requests} requests to make, about {tokens} tokens (estimated at {CHARACTERS} characters each)")
    written = []
    for i, group in enumerate(groups, 1):
        found = judge.rank(group.prompt, [response.text for response in group.responses])
        if found is not None:
            for response, place in zip(group.responses, found):
                response.place = place
            written.append(group)
        if i % 100 == 0:
            print(f"{i}/{len(groups)} groups, {judge.skipped} skipped", flush=True)
    replace(out, data.write_groups(written))
    by = f"; answered by {', '.join(f'{name} ({n})' for name, n in judge.answered_by.items())}" if config.judge == "openai" else ""
    by += f"; {judge.damaged} half lines of the cache asked again" if config.judge == "openai" and judge.damaged else ""
    print(f"{out}: {len(written)} groups ranked, {len(groups) - len(written)} skipped and left out; dropped: {dict(+dropped) or 'nothing'}{by}")


if __name__ == "__main__":
    run_script(main, Config)
