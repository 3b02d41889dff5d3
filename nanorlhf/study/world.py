"""The embedded world: fairy tales from a grammar, experts' questions about them, and a panel of ten judges with known tastes.

    python -m nanorlhf.study.world --out world            folders of groups JSONL that a person can read
    python train_ppo.py --reward nanorlhf/study/world.py:gold ...           the panel's mean as the reward

The panel judges *text*: it parses the passage back into facts, the question into what it asks, and looks the answer up. So it
scores any question about any passage, and rankings, win rates and the spread of opinions are exact. Imports are absolute
because `--reward path.py:function` loads this file by itself.
"""
import itertools
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from nanorlhf.io.files import replace
from nanorlhf.io.read import InputError
from nanorlhf.run.cli import check_bounds, run_script

ANIMALS = "fox wolf bear hare owl raven mouse cat frog goat goose swan hound pony".split()
ROYALS = "king queen prince princess knight duchess".split()
MAGICAL = "witch wizard giant dwarf troll fairy ogre elf dragon mermaid".split()
FOLK = "baker miller tailor cobbler farmer shepherd hunter fisherman widow nurse cook smith weaver beggar minstrel monk sailor soldier merchant gardener".split()
CHARACTERS = ANIMALS + ROYALS + MAGICAL + FOLK
OBJECTS = ("ring crown lamp mirror cloak basket apple lantern key sword shield drum harp flute candle rope hammer kettle spoon cup purse coin pearl ruby "
           "feather ribbon bell book map letter cake loaf pie pear cheese egg blanket boot glove hat shawl comb needle wheel ladder saddle chest broom flower mask").split()
PLACES = ("forest mill castle garden cave tower valley meadow river market village barn chapel cottage orchard swamp desert island harbor kitchen cellar attic "
          "stable palace temple bridge quarry field hill lake library tavern bakery courtyard tunnel hollow ravine marsh grove den hut shed lodge pond cliff inn").split()

FACTS = {                                # letters: x who it is about, y the other one, o an object, p and q places, e a feeling
    "live": "The {x} lived in the {p}.",
    "find": "The {x} found the {o} in the {p}.",
    "lose": "The {x} lost the {o} in the {p}.",
    "bring": "The {y} brought the {o} to the {x}.",
    "steal": "The {y} stole the {o} from the {x}.",
    "feel": "The {x} was {e}.",
    "dance": "The {x} danced in the {q}.",
    "search": "The {x} searched the {q}.",
    "thank": "The {x} thanked the {y}.",
    "chase": "The {x} chased the {y}.",
}
EPISODES = {                             # what happens -> (how x feels, what x does then)
    "find": (("glad", "proud"), "dance"),
    "lose": (("sad", "worried"), "search"),
    "bring": (("glad", "grateful"), "thank"),
    "steal": (("angry", "sad"), "chase"),
}
QUESTIONS = [                            # (kind, wording, facts that together answer it: the same letter is the same word, the answer)
    ("who", "Who found the {o}?", ["find"], "The {x}."),
    ("who", "Who lost the {o}?", ["lose"], "The {x}."),
    ("who", "Who brought the {o} to the {x}?", ["bring"], "The {y}."),
    ("who", "Who stole the {o} from the {x}?", ["steal"], "The {y}."),
    ("who", "Who was {e}?", ["feel"], "The {x}."),
    ("who", "Who thanked the {y}?", ["thank"], "The {x}."),
    ("who", "Who chased the {y}?", ["chase"], "The {x}."),
    ("who", "Who searched the {q}?", ["search"], "The {x}."),
    ("what", "What did the {x} find in the {p}?", ["find"], "The {o}."),
    ("what", "What did the {x} lose in the {p}?", ["lose"], "The {o}."),
    ("what", "What did the {y} bring to the {x}?", ["bring"], "The {o}."),
    ("what", "What did the {y} steal from the {x}?", ["steal"], "The {o}."),
    ("where", "Where did the {x} live?", ["live"], "In the {p}."),
    ("where", "Where did the {x} find the {o}?", ["find"], "In the {p}."),
    ("where", "Where did the {x} lose the {o}?", ["lose"], "In the {p}."),
    ("where", "Where did the {x} dance?", ["dance"], "In the {q}."),
    ("feel", "How did the {x} feel after finding the {o}?", ["find"], "The {x} was {e}."),
    ("feel", "How did the {x} feel after losing the {o}?", ["lose"], "The {x} was {e}."),
    ("feel", "How did the {x} feel when the {y} brought the {o}?", ["bring"], "The {x} was {e}."),
    ("feel", "How did the {x} feel when the {y} stole the {o}?", ["steal"], "The {x} was {e}."),
    ("why", "Why did the {x} dance in the {q}?", ["dance", "find"], "The {x} found the {o}."),
    ("why", "Why did the {x} search the {q}?", ["search", "lose"], "The {x} lost the {o}."),
    ("why", "Why did the {x} thank the {y}?", ["thank", "bring"], "The {y} brought the {o}."),
    ("why", "Why did the {x} chase the {y}?", ["chase", "steal"], "The {y} stole the {o}."),
]
WORDS = {"x": CHARACTERS, "y": CHARACTERS, "o": OBJECTS, "p": PLACES, "q": PLACES, "e": sorted({e for feelings, _ in EPISODES.values() for e in feelings})}
UNKNOWN = "Nobody knows."
DEEP = ("why", "feel")                   # need two sentences, or what a fairy tale leaves unsaid
QUESTION_TYPES = ("why", "feel", "who", "what", "where", "ill formed")
TEMPLATE = "{passage}\nQuestion:"


@dataclass(frozen=True)
class Judge:
    """A judge's taste: what an answerable question of each kind is worth, and what faults cost."""
    name: str
    why: float
    feel: float
    who: float
    what: float
    where: float
    vague: float                         # well formed, but the passage does not answer it
    missing: float                       # taken away for each name that the passage lacks, two at most
    broken: float                        # not a question of this world at all
    fond: tuple = ()                     # words it likes to be asked about ...
    fondness: float = 0.0                # ... and what one of them adds to an answerable question


PANEL = (
    #      name            why  feel  who  what where vague missing broken
    Judge("teacher",       3.2, 2.4, 0.8, 0.9, 0.9, 0.2, 0.6, -1.2),
    Judge("scholar",       3.6, 1.6, 0.6, 0.8, 0.8, 0.0, 0.7, -1.6),
    Judge("poet",          2.4, 3.4, 0.7, 0.6, 0.8, 0.5, 0.3, -0.8, tuple(MAGICAL), 0.5),
    Judge("nurse",         2.2, 3.2, 1.0, 0.9, 0.9, 0.4, 0.4, -0.9, tuple(FOLK), 0.3),
    Judge("child",         1.6, 1.8, 1.6, 1.4, 1.2, 0.6, 0.2, -0.6, tuple(ANIMALS), 0.6),
    Judge("librarian",     2.4, 1.4, 1.2, 1.3, 1.5, 0.0, 0.8, -1.4),
    Judge("gossip",        2.4, 2.6, 1.6, 0.8, 0.6, 0.6, 0.3, -0.7, tuple(ROYALS), 0.6),
    Judge("sceptic",       2.6, 1.2, 0.9, 1.0, 1.0, -0.4, 0.9, -1.8),
    Judge("collector",     2.2, 1.8, 0.9, 1.6, 1.1, 0.3, 0.5, -1.2, tuple(OBJECTS), 0.3),
    Judge("traveller",     2.8, 2.2, 0.7, 0.7, 1.8, 0.4, 0.4, -1.0, tuple(PLACES), 0.3),
)

_pattern = lambda wording: re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\w+)", re.escape(wording)))
_FACTS = {name: _pattern(wording) for name, wording in FACTS.items()}
_QUESTIONS = [(kind, _pattern(wording), wanted) for kind, wording, wanted, _ in QUESTIONS]


# ------------------------------------------------------------------------------------------------------ reading a text

@lru_cache(maxsize=1 << 15)
def read(passage):
    """A passage's text back into facts.  -> tuple of (name of the fact, {letter: word})"""
    found = []
    for sentence in re.findall(r"[^.\n]+\.", passage):
        for name, pattern in _FACTS.items():
            if match := pattern.fullmatch(sentence.strip()):
                found.append((name, match.groupdict()))
    return tuple(found)


def answers(facts, wanted, known):
    """Every way in which one fact of each name in `wanted` agrees with the others and with `known`, letter by letter.  -> list of {letter: word}"""
    found = []
    for chosen in itertools.product(*[[slots for name, slots in facts if name == want] for want in wanted]):
        merged = dict(known)
        if all(merged.setdefault(letter, word) == word for slots in chosen for letter, word in slots.items()):
            found.append(merged)
    return found


@dataclass(frozen=True)
class Reading:
    """What a question is to the passage it was asked about."""
    question_type: str                   # one of QUESTION_TYPES
    answerable: bool
    missing: int                         # names and things in it that the passage lacks
    words: tuple                         # its names and things


def understand(prompt, question):
    """Parses a question and looks its answer up in the passage.  -> Reading"""
    passage = prompt.split("\nQuestion:")[0]
    for kind, pattern, wanted in _QUESTIONS:
        if match := pattern.fullmatch(question.strip()):
            slots = match.groupdict()
            there = set(re.findall(r"\w+", passage))
            missing = sum(word not in there for word in slots.values())
            return Reading(kind, bool(answers(read(passage), wanted, slots)), missing, tuple(slots.values()))
    return Reading("ill formed", False, 0, ())


def opinion(judge, reading):
    """One judge's score of one question."""
    if reading.question_type == "ill formed":
        return judge.broken
    if not reading.answerable:
        return judge.vague - judge.missing * min(reading.missing, 2)          # beyond two it is as lost as can be
    return getattr(judge, reading.question_type) + judge.fondness * any(word in judge.fond for word in reading.words)


def panel(prompt, question):
    """The ten opinions on one question.  -> list of 10 floats, in the order of PANEL"""
    reading = understand(prompt, question)
    return [opinion(judge, reading) for judge in PANEL]


def gold(prompts, responses):
    """The panel's mean: the judge of this world, and with train_ppo's --reward its reward.  n str, n str -> n floats"""
    return [sum(panel(prompt, response)) / len(PANEL) for prompt, response in zip(prompts, responses)]


# ------------------------------------------------------------------------------------------------------ writing a tale

def pick(words, n, rng):
    """n different ones."""
    return [words[i] for i in rng.permutation(len(words))[:n]]


def tale(rng):
    """3 to 6 sentences: two episodes of a small cast, told in turns, so that who did what to whom is not who stands next to whom."""
    while True:
        cast, objects, places = pick(CHARACTERS, 4, rng), pick(OBJECTS, 2, rng), pick(PLACES, 5, rng)
        stories = [[("live", {"x": cast[0], "p": places.pop()})]] if rng.random() < 0.5 else []
        for thing in objects:
            what, (x, y) = pick(list(EPISODES), 1, rng)[0], pick(cast, 2, rng)
            feelings, then = EPISODES[what]
            slots = {"x": x, "y": y, "o": thing, "p": places.pop(), "q": places.pop(), "e": pick(feelings, 1, rng)[0]}
            stories.append([(name, slots) for name, chance in ((what, 1), ("feel", 0.5), (then, 0.7)) if rng.random() < chance])
        turns = rng.permutation([i for i, story in enumerate(stories) for _ in story])
        if 3 <= len(turns) <= 6:
            return " ".join(FACTS[name].format(**slots) for name, slots in (stories[i].pop(0) for i in turns))


def questions(passage):
    """Every question of this world that the passage answers.  -> sorted list of (question, kind, answer)"""
    facts, found = read(passage), {}
    for kind, wording, wanted, answer in QUESTIONS:
        for slots in answers(facts, wanted, {}):
            usual = EPISODES.get(wanted[0], ("",))[0]                          # how one feels then; a tale may leave it unsaid
            said = [felt["e"] for name, felt in facts if name == "feel" and felt["x"] == slots.get("x") and felt["e"] in usual]
            found.setdefault(wording.format(**slots), (kind, answer.format(**{"e": (said or usual or [""])[0], **slots})))
    return sorted((question, *rest) for question, rest in found.items())


def ask(passage, n, rng):
    """n different questions, as an expert asks them: four in ten go deep, as long as there are any.  -> list of (question, kind, answer)"""
    pools = {True: [], False: []}
    for found in questions(passage):
        pools[found[1] in DEEP].append(found)
    chosen = []
    while len(chosen) < n and (pools[True] or pools[False]):
        pool = pools[bool(rng.random() < 0.4)] or pools[True] or pools[False]
        chosen.append(pool.pop(int(rng.integers(len(pool)))))
    return chosen


def mislead(passage, n, rng):
    """n well-formed questions that the passage does not answer; three in four of their words are the passage's.  -> list of str"""
    facts, chosen = read(passage), []
    there = {letter: [slots[letter] for _, slots in facts if letter in slots] for letter in WORDS}
    while len(chosen) < n:
        _, wording, wanted, _ = QUESTIONS[rng.integers(len(QUESTIONS))]
        letters = dict.fromkeys(re.findall(r"\{(\w)\}", wording))
        slots = {letter: pick(there[letter] if there[letter] and rng.random() < 0.75 else WORDS[letter], 1, rng)[0] for letter in letters}
        if not answers(facts, wanted, slots):
            chosen.append(wording.format(**slots))
    return chosen


# ----------------------------------------------------------------------------------------------------------------- files

def expert_lines(passage, n, rng):
    return [{"text": " " + question, "label": 1, "kind": kind} for question, kind, _ in ask(passage, n, rng)]


def reading_lines(passage, n, rng):
    """Questions with their answers, half of them with none: what a language model that can read has learnt before it judges."""
    known = [f" {question} {answer}" for question, _, answer in ask(passage, n // 2, rng)]
    return [{"text": text} for text in known + [f" {question} {UNKNOWN}" for question in mislead(passage, n - len(known), rng)]]


def write(out, sizes, n, seed, lines=expert_lines):
    """Writes out/NAME.jsonl for each NAME of `sizes` (how many passages): groups JSONL, no passage in two of them, n responses each."""
    rng, seen = np.random.Generator(np.random.Philox(key=[seed, 6])), set()        # a stream of its own
    for name, passages in sizes.items():
        groups = []
        while len(groups) < passages:
            passage = tale(rng)
            if passage not in seen:
                seen.add(passage)
                groups.append(json.dumps({"prompt": TEMPLATE.format(passage=passage), "responses": lines(passage, n, rng)}))
        path = Path(out) / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, ("\n".join(groups) + "\n").encode())


@dataclass(frozen=True)
class Config:
    out: str                                        # folder for sft/, reward/, ppo/ and read/, each with train.jsonl and val.jsonl; may not exist yet
    passages: int = 8000                            # in sft/train and read/train; reward/train and ppo/train have half as many
    held_out: int = 250                             # in each val.jsonl
    questions: int = 6                              # an expert asks about a passage, at most
    seed: int = 0                                   # other seeds, other tales


def sizes(passages, held_out):
    """How many passages each file of experts' questions has."""
    half = max(passages // 2, 1)
    return {"sft/train": passages, "sft/val": held_out, "reward/train": half, "reward/val": held_out,
            "ppo/train": half, "ppo/val": held_out}


def main(config):
    check_bounds(config, passages=(1, 10**6), held_out=(1, 10**5), questions=(1, 20), seed=(0, 2**62))
    if Path(config.out).exists():
        raise InputError(f"--out {config.out}: is there already; name a folder that is not")
    named = sizes(config.passages, config.held_out)
    write(config.out, named, config.questions, config.seed)
    write(config.out, {"read/train": config.passages, "read/val": config.held_out}, config.questions, config.seed + 2**62, reading_lines)
    print(f"{config.out}: " + ", ".join(f"{name} {n}" for name, n in named.items()) + f", read/train {config.passages}")


if __name__ == "__main__":
    run_script(main, Config)
