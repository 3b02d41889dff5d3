"""Judges order K responses to one prompt. All of them answer the same two questions:

    rank(prompt, responses)  -> K places, 0 the best, equal places tie;  None: skipped
    compare(prompt, a, b)    -> 1 where a is better, -1 where b is, 0 a tie;  None: skipped
                                a is shown first: ask both orders to see a bias for places

    python -m nanorlhf.study.judge --data samples.jsonl --out ranked.jsonl JUDGE

JUDGE is one of
    --judge reference --reference FairytaleQAData
    --judge replay --reference people.jsonl
    --judge judge.py:score
    --judge openai --url https://HOST/v1 --model NAME --cache answers.jsonl [--dry_run]
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
    """What all judges share; a judge that scores one response at a time needs `rank` alone."""

    skipped = 0                          # calls that were answered with None

    def compare(self, prompt, a, b):
        ranking = self.rank(prompt, [a, b])
        if ranking is None:
            return None
        place_a, place_b = ranking
        return (place_a < place_b) - (place_a > place_b)


# --------------------------------------------------------------------------- scores and lookups

class Scoring(Judge):
    """Orders by `function(prompts, responses) -> scores`, flat lists of one length.

    Scores that round to the same multiple of `tie` tie; 0: only equal ones.
    """

    def __init__(self, function, tie=0.05):
        self.function = function
        self.tie = tie

    def rank(self, prompt, responses):
        scores = []
        if responses:
            scores = list(map(float, self.function([prompt] * len(responses), responses)))
        infinite = [score for score in scores if not math.isfinite(score)]
        if len(scores) != len(responses) or infinite:
            among = f", {infinite[0]} among them," if infinite else ""
            raise InputError(
                f"the judge's function gave {len(scores)} scores{among} "
                f"for {len(responses)} responses: one finite number each, please"
            )
        # To the nearest multiple, not "closer than tie": that would tie a with b and b with c but
        # not a with c, and an order would depend on which responses are ranked together.
        return places([round(score / self.tie) if self.tie else score for score in scores])


NEAR, FORM, GROUNDED = 0.4, 0.3, 0.3     # weights of the reference rule, chosen by hand
NEAR_ENOUGH = 0.4            # F1 between expert questions of one FairytaleQA passage, on average
NEAR_ALONE = 0.7             # `near` of a passage's only expert question: the mean of the others
NAME_COST = 0.5              # for each name that the passage lacks
NUM_WORDS = range(3, 26)     # of a question; experts' have 3 to 27, the mean is 10
QUESTION_WORDS = set("what why how who where when which whose whom".split())
STOP_WORDS = QUESTION_WORDS | set("""
    a an the of to in on at by for with from and or but not no as is are was were be been being am
    do does did has have had will would can could shall should may might must it its he his him she
    her they their them i in you your we our this that these those there after before if so than
    then
""".split())


def words(text):
    return re.findall(r"[^\W_]+", re.sub(r"['’]s?\b", "", text))


def stem(word):
    """asked, asks, asking -> ask: crude, and the same for the question and for the passage."""
    return re.sub(r"(?<=...)(ing|ed|es|s)$", "", word).rstrip("e")


def content(text):
    """The words that carry meaning, without their common endings.  -> set of str"""
    return {stem(word) for word in words(text.lower()) if word not in STOP_WORDS}


def form(response):
    """Share of the four checks of a well-formed question that hold (see Reference)."""
    text = response.strip()
    sequence = words(response.lower())
    pairs = list(zip(sequence, sequence[1:]))
    checks = (
        bool(sequence) and sequence[0] in QUESTION_WORDS,
        text.endswith("?") and text.count("?") == 1 and "\n" not in text,
        len(sequence) in NUM_WORDS,
        len(set(pairs)) == len(pairs) and all(a != b for a, b in pairs),
    )
    return sum(checks) / len(checks)


class Reference(Scoring):
    """A judge without people or a paid model: likeness to the questions that experts asked of the
    same passage. Scores are in [0, 1].

        score    = 0.4 near + 0.3 form + 0.3 grounded, to the nearest multiple of 0.05
        near     = min(1, F1 / 0.4), F1 of the content words (no function words, endings cut off)
                   with the nearest expert question
        form     = share of four checks that hold: begins with a question word; its only "?" is its
                   end, on one line; 3 to 25 words; nothing said twice (no word after itself, no
                   pair of words a second time)
        grounded = share of the content words that the passage has, less 0.5 for each capitalised
                   word (not the first) that it lacks, at least 0

    It is a proxy: it prefers questions that sound like the experts', about what the passage speaks
    of. It cannot see whether a question is good, needs inference or has an answer, and right words
    in a wrong relation or order satisfy it. What is trained on it learns to sound so: no measure of
    quality.

    A response with the content words of an expert question is compared with the other ones (leave
    one out), or the experts would win by being their own key; where there is no other, `near` is
    0.7, what experts have on average. The cut at F1 0.4 keeps a near copy from earning much more. A
    score depends on prompt and response alone, so that `rank` and `compare` agree.
    """

    def __init__(self, groups):
        super().__init__(lambda prompts, responses: list(map(self.score, prompts, responses)))
        self.experts = {}                # prompt -> content words of each expert question
        self.passages = {}               # prompt -> stems of its words
        for group in data.keep_preferred(groups)[0]:
            questions = self.experts.setdefault(group.prompt, [])
            questions += [content(response.text) for response in group.responses]

    def near(self, prompt, response):
        own = content(response)
        overlaps = []
        for expert in self.experts[prompt]:
            if expert != own:
                overlaps.append(2 * len(own & expert) / (len(own) + len(expert)))
        return min(1.0, max(overlaps) / NEAR_ENOUGH) if overlaps else NEAR_ALONE

    def grounded(self, prompt, response):
        if prompt not in self.passages:
            self.passages[prompt] = {stem(word) for word in words(prompt.lower())}
        passage = self.passages[prompt]
        own = content(response)
        if not own:
            return 0.0
        names = [word for word in words(response)[1:] if word[0].isupper()]
        unknown = sum(stem(name.lower()) not in passage for name in names)
        return max(0.0, len(own & passage) / len(own) - NAME_COST * unknown)

    def score(self, prompt, response):
        if prompt not in self.experts:
            raise InputError(
                f"no reference for the prompt that ends in {prompt[-60:]!r}: "
                f"--reference needs expert questions for every prompt of --data"
            )
        near = self.near(prompt, response)
        grounded = self.grounded(prompt, response)
        return NEAR * near + FORM * form(response) + GROUNDED * grounded


class Replay(Judge):
    """Rankings that are at hand, a person's for example: looks up the places that a groups file
    gives to these responses to this prompt.
    """

    def __init__(self, groups):
        self.rankings = {}               # prompt -> a list of {text: place}
        for group in groups:
            ranking = {}
            for r in group.responses:
                if r.place is None or ranking.setdefault(r.text, r.place) != r.place:
                    problem = "no place" if r.place is None else "two places"
                    raise InputError(
                        f"replay: the response {r.text[:60]!r} to the prompt that ends in "
                        f"{group.prompt[-60:]!r} has {problem}: give each response one"
                    )
            self.rankings.setdefault(group.prompt, []).append(ranking)

    def rank(self, prompt, responses):
        rankings = self.rankings.get(prompt, [])
        # Places of different lines were given apart and cannot be compared: all the responses have
        # to stand in one.
        for ranking in rankings:
            if all(text in ranking for text in responses):
                return places([-ranking[text] for text in responses])
        ranked = set().union(*rankings)
        unknown = next((text for text in responses if text not in ranked), None)
        problem = "its responses were never ranked together"
        if unknown is not None:
            problem = f"the response {unknown[:60]!r} was never ranked"
        raise InputError(
            f"replay: {problem} for the prompt that ends in {prompt[-60:]!r}; "
            f"a replay knows only the rankings in its file"
        )


# --------------------------------------------------------------------------- a model behind HTTP

# Paper A prompts for educational, inferential and grammatical questions, with one prompt for
# training and for evaluation; its wording is not published.
RUBRIC = """You compare questions that a teacher could ask children about a passage. A question is \
better the more it
- is educational: it helps a child to understand the story,
- needs inference: the answer follows from the passage but is not copied out of it,
- is grammatical and clear.
A question that the passage cannot answer is worse than any that it can."""
ASK = """Passage:
{passage}

Questions:
{questions}

Order all the questions from the best to the worst. Answer with a JSON list of lists of letters \
and nothing else; questions that are equally good share an inner list: \
[[best], [next, equally good], ..., [worst]]"""
ASKS = 3                     # times that a question is asked while no answer is a ranking
TRIES = 6                    # requests, while the network or the server fails, before the run stops
FIRST_WAIT = 1.0             # seconds until the second request, doubled each time up to
LONGEST_WAIT = 60.0          # which also cuts a server's Retry-After
LARGEST_ANSWER = 2**20       # bytes: a ranking with thousands of words around it has a hundredth
LETTERS = string.ascii_uppercase
CHARACTERS = 4               # per token of English, and
ANSWER = 6                   # tokens of the answer per response: for the estimate of a dry run
KEY = "OPENAI_API_KEY"
LINE_START = b'{"key": "'    # of every line of the cache
# what the network, the server's HTTP and its JSON raise
NO_ANSWER = (OSError, http.client.HTTPException, ValueError, OverflowError, RecursionError)


def parse(reply, k):
    """The ranking in a model's answer: a JSON list of letters or of lists of letters, best first,
    that names each of the first k letters once.

    Text around it is ignored; two rankings that differ are none.  -> lists of letters, or None
    """
    rankings = []
    start = reply.find("[")
    while start >= 0:
        try:
            value, end = json.JSONDecoder().raw_decode(reply, start)
        except ValueError:
            value, end = [], start + 1
        except RecursionError:           # thousands of brackets: no answer, and slow to search
            return None
        tiers = [tier if isinstance(tier, list) else [tier] for tier in value]
        letters = [letter for tier in tiers for letter in tier]
        all_text = all(isinstance(letter, str) for letter in letters)
        if all(tiers) and all_text and sorted(letters) == list(LETTERS[:k]):
            rankings.append([sorted(tier) for tier in tiers])
        start = reply.find("[", end)
    if rankings and all(ranking == rankings[0] for ranking in rankings):
        return rankings[0]
    return None


def digest(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments):      # urllib would send the key to the host it names
        return None


class OpenAI(Judge):
    """Any chat-completions endpoint: POST url/chat/completions, temperature 0, the key from the
    environment variable OPENAI_API_KEY alone.

    rank shows distinct responses in an order drawn from (seed, prompt, responses); equal texts tie
    unasked. compare shows a first.

    Every answer is in the file `cache` (a JSON line: request, answer, model asked for, model that
    the answer names) before the next request, by a hash of (model, messages): nothing is asked
    twice, and a run that was stopped goes on. An answer that is no ranking (an empty one too) is
    asked for again, ASKS times in all, then it is skipped, and so recorded ("ranking": null): later
    runs skip it unasked; delete its line to ask again.

    Network trouble, 408, 409, 429 and 5xx are tried TRIES times; any other refusal is an InputError
    at once.   timeout: seconds per request
    """

    def __init__(self, url, model, cache, seed=0, timeout=60.0, sleep=time.sleep):
        host = r"(\[[\da-fA-F:]+\]|[^\s/:@\[\]]+)(:\d{1,5})?"
        if not re.fullmatch(rf"https?://{host}(/[!-~]*)?", url):
            raise InputError(
                f"--url {url!r}: expected the base of a chat-completions endpoint, "
                f"such as http://localhost:8000/v1"
            )
        self.url = url.rstrip("/")
        self.model = model
        self.path = Path(cache)
        self.seed = seed
        self.timeout = timeout
        self.sleep = sleep
        if self.path.is_dir() or not self.path.parent.is_dir():
            raise InputError(f"--cache {cache}: name a file in a folder that exists")
        self.key = os.environ.get(KEY, "").strip()
        self.opener = urllib.request.build_opener(_NoRedirect)
        self.skipped = 0
        self.damaged = 0                         # half lines in the cache
        self.answered_by = Counter()             # model that the answer names -> answers
        self.cache = self._read() if self.path.exists() else {}

    def rank(self, prompt, responses):
        shown = self._order(prompt, responses)
        tiers = self._ask(prompt, shown)
        if tiers is None:
            return None
        score = {}
        for i, tier in enumerate(tiers):
            for letter in tier:
                score[shown[LETTERS.index(letter)]] = -i
        return places([score[text.strip()] for text in responses])

    def compare(self, prompt, a, b):
        if a.strip() == b.strip():
            return 0
        tiers = self._ask(prompt, [a.strip(), b.strip()])
        if tiers is None:
            return None
        if len(tiers) == 1:
            return 0
        return 1 if tiers[0] == ["A"] else -1

    def cost(self, groups):
        """What `rank` would still ask for these groups.

        -> (requests, tokens of them and of their answers, estimated)
        """
        tokens = {}
        for group in groups:
            shown = self._order(group.prompt, [response.text for response in group.responses])
            messages = self._messages(group.prompt, shown)
            key = digest(self.model, messages)
            if len(shown) > 1 and key not in self.cache:
                characters = sum(len(message["content"]) for message in messages)
                tokens[key] = characters // CHARACTERS + ANSWER * len(shown)
        return len(tokens), sum(tokens.values())

    def _order(self, prompt, responses):
        distinct = sorted({text.strip() for text in responses})
        if len(distinct) > len(LETTERS):
            raise InputError(
                f"{len(distinct)} responses to the prompt that ends in {prompt[-60:]!r}: "
                f"{len(LETTERS)} at most are ranked at once"
            )
        return sorted(distinct, key=lambda text: digest(self.seed, prompt, distinct, text))

    def _messages(self, prompt, shown):
        # Responses are JSON strings: one with a line "B: ..." in it cannot pretend to be another.
        lines = []
        for letter, text in zip(LETTERS, shown):
            lines.append(f"{letter}: {json.dumps(text, ensure_ascii=False)}")
        passage = prompt.removesuffix(data.TEMPLATE.format(passage=""))
        question = ASK.format(passage=passage, questions="\n".join(lines))
        return [{"role": "system", "content": RUBRIC}, {"role": "user", "content": question}]

    def _ask(self, prompt, shown):
        """Tiers of letters for the responses in the order shown, from the cache or from the model;
        None, and counted, where they were skipped.
        """
        if len(shown) < 2:
            return [[letter] for letter in LETTERS[: len(shown)]]
        messages = self._messages(prompt, shown)
        key = digest(self.model, messages)
        if key not in self.cache:
            for _ in range(ASKS):
                reply, answered_by = self._request(messages)
                ranking = parse(reply, len(shown))
                if ranking is not None:
                    break
            self._write({
                "key": key,
                "model": self.model,
                "answered_by": self._redact(answered_by),
                "ranking": ranking,
                "reply": self._redact(reply),
                "messages": messages,
            })
        ranking = parse(json.dumps(self.cache[key]), len(shown))
        self.skipped += ranking is None
        return ranking

    def _read(self):
        """hash -> ranking of the answers on disk; writes nothing."""
        rankings = {}
        for number, line in enumerate(read_bytes(self.path).split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line, self.path)
            except InputError:
                if line.startswith(LINE_START) or LINE_START.startswith(line):
                    self.damaged += 1
                    continue     # half a line, its process was killed while it wrote: asked again
                row = {}
            if not {"ranking", "answered_by"} <= row.keys() or type(row.get("key")) is not str:
                raise InputError(
                    f"--cache {self.path}:{number}: not an answer of a judge: {line[:60]!r}; "
                    f"name a new file or one that a judge wrote"
                )
            rankings[row["key"]] = row["ranking"]
            self.answered_by[str(row["answered_by"])] += 1
        return rankings

    def _write(self, row):
        """On the disk before anything else is asked."""
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with open(self.path, "a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line          # ends the half line that is there
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.cache[row["key"]] = row["ranking"]
        self.answered_by[row["answered_by"]] += 1

    def _request(self, messages):
        """One answer, however often it takes to get one.  -> (text, the model that it names)"""
        # no space, quote or backslash: a server's echo spells the key as it is
        if not re.fullmatch(r"[!#-&(-\[\]-~]+", self.key):
            problem = "holds a character that no key has" if self.key else "is not set"
            raise InputError(
                f"{KEY} {problem}: export the endpoint's key "
                f"(any word for a server that asks for none)"
            )
        request = urllib.request.Request(
            f"{self.url}/chat/completions",
            json.dumps({"model": self.model, "messages": messages, "temperature": 0}).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"},
        )
        wait = 0.0
        for attempt in range(TRIES):
            if attempt:
                self.sleep(wait)
            wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT)
            try:
                return self._answer(request)
            except urllib.error.HTTPError as error:
                reason = self._short(f"HTTP {error.code}: {self._refusal(error)}")
                if error.code not in (408, 409, 429) and error.code < 500:
                    raise InputError(
                        f"{self.url} refused the request for model {self.model}: {reason}"
                    ) from None
                wait = retry_after(error.headers.get("Retry-After"), wait)
            except NO_ANSWER as error:
                reason = self._short(f"{type(error).__name__}: {error}")
        raise InputError(
            f"{self.url}: no answer in {TRIES} tries, the last: {reason}; "
            f"{len(self.cache)} answers are safe in {self.path}, "
            f"and the same command goes on from there"
        )

    def _answer(self, request):
        """The answer to one request.  -> (text, the model that it names);  raises NO_ANSWER"""
        deadline = time.monotonic() + self.timeout
        raw = bytearray()
        with self.opener.open(request, timeout=self.timeout) as response:
            while part := response.read1(65536):
                raw += part
                if len(raw) > LARGEST_ANSWER:
                    raise ValueError(f"an answer of more than {LARGEST_ANSWER:,} bytes")
                if time.monotonic() > deadline:  # the socket's own timeout starts anew per byte
                    raise TimeoutError(f"no whole answer in {self.timeout:g} s")
            if response.length:
                raise http.client.IncompleteRead(bytes(raw), response.length)
        value = json.loads(raw)
        try:
            reply = value["choices"][0]["message"]["content"]
            if not isinstance(reply, (str, type(None))):
                raise TypeError
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"not a chat completion: {value}") from None
        return reply or "", str(value.get("model", ""))  # null: the model refused to answer

    @staticmethod
    def _refusal(error):
        """What the server says of its refusal: the message of the usual JSON, else the text."""
        text = error.reason
        try:
            text = error.read(65536).decode("utf-8", "replace") or text
            return str(json.loads(text)["error"]["message"])
        except (*NO_ANSWER, KeyError, TypeError):
            return text

    def _redact(self, text):
        return text.replace(self.key, "[key]")

    def _short(self, text):
        return " ".join(self._redact(text).split())[:200]        # cut last: no half key remains


def retry_after(value, otherwise):
    """Seconds that a Retry-After header (a number or a date) asks for, at most LONGEST_WAIT;
    `otherwise` where it says nothing.
    """
    try:
        if re.fullmatch(r"[\d.]+", value):
            seconds = float(value)
        else:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return otherwise
    return min(max(seconds, 0.0), LONGEST_WAIT)


# ------------------------------------------------------------------------------ the command line

NEEDS = {
    "reference": {"reference"},
    "replay": {"reference"},
    "openai": {"url", "model", "cache"},
}


@dataclass(frozen=True)
class Config:
    judge: str         # reference, replay, openai, or path.py:function of (prompts, responses)
    data: str          # groups JSONL to rank
    out: str = ""      # groups JSONL to write, with places; must not exist
    reference: str = ""# expert questions: FairytaleQA, groups JSONL; for replay with places
    url: str = ""      # openai: base of the endpoint, ends in /v1; its key: OPENAI_API_KEY
    model: str = ""    # openai: a dated name, gpt-4-0613 for example, keeps its meaning
    cache: str = ""    # openai: JSONL of answers, kept and reused
    seed: int = 0      # openai: of the order in which responses are shown
    dry_run: bool = False# openai: print how many requests and tokens it would take, ask nothing


def load_judge(config):
    """The judge that the flags name."""
    kind = config.judge
    if kind not in NEEDS and not is_function(kind):
        raise InputError(
            f"--judge {kind}: expected reference, replay, openai or path.py:function"
        )
    needs = NEEDS.get(kind, set())
    for name in ("reference", "url", "model", "cache"):
        given = bool(getattr(config, name))
        if name in needs and not given:
            raise InputError(f"--{name} is missing: --judge {kind} needs it")
        if given and name not in needs:
            raise InputError(f"--{name} does not go with --judge {kind}")
    if config.dry_run and kind != "openai":
        raise InputError(f"--dry_run goes with --judge openai: {kind} costs nothing")
    if kind == "openai":
        return OpenAI(config.url, config.model, config.cache, config.seed)
    if is_function(kind):
        function = FunctionReward(kind)
        return Scoring(lambda prompts, responses: function.score_texts(
            prompts, [[text] for text in responses], None
        ).flatten().tolist())
    try:
        source = data.load(config.reference)
    except InputError as error:
        raise InputError(str(error).replace("--data", "--reference", 1)) from None
    if source.dropped:
        print(f"{config.reference}: dropped {dict(source.dropped)}")
    try:
        return (Reference if kind == "reference" else Replay)(source.train + source.held_out)
    except InputError as error:
        raise InputError(f"--reference {config.reference}: {error}") from None


def rank_groups(judge, groups):
    """Writes the judge's places into the groups.  -> those that it ranked"""
    ranked = []
    for i, group in enumerate(groups, 1):
        ranking = judge.rank(group.prompt, [response.text for response in group.responses])
        if ranking is not None:
            for response, place in zip(group.responses, ranking):
                response.place = place
            ranked.append(group)
        if i % 100 == 0:
            print(f"{i}/{len(groups)} groups, {judge.skipped} skipped", flush=True)
    return ranked


def main(config):
    check_bounds(config)
    out = Path(config.out)
    if not config.dry_run and (not config.out or out.exists() or not out.parent.is_dir()):
        raise InputError(
            f"--out {config.out or '(missing)'}: name a file that does not exist yet, "
            f"in a folder that does"
        )
    judge = load_judge(config)
    groups, dropped = data.read_groups(config.data)
    if config.dry_run:
        requests, tokens = judge.cost(groups)
        print(
            f"{len(groups)} groups: {requests} requests to make, about {tokens} tokens "
            f"(estimated at {CHARACTERS} characters each)"
        )
        return
    ranked = rank_groups(judge, groups)
    replace(out, data.write_groups(ranked))
    ending = ""
    if config.judge == "openai":
        models = ", ".join(f"{name} ({n})" for name, n in judge.answered_by.items())
        ending = f"; answered by {models}"
        if judge.damaged:
            ending += f"; {judge.damaged} half lines of the cache asked again"
    print(
        f"{out}: {len(ranked)} groups ranked, {len(groups) - len(ranked)} skipped and left out; "
        f"dropped: {dict(+dropped) or 'nothing'}{ending}"
    )


if __name__ == "__main__":
    run_script(main, Config)
