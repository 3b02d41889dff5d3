"""The embedded world: fairy tales from a grammar, experts' questions about them, and a panel of ten
members with known tastes.

    python -m nanorlhf.study.world --out world
        folders of groups JSONL that a person can read
    python train_ppo.py --reward nanorlhf/study/world.py:gold ...
        the panel's mean as the reward

The panel judges *text*: it parses the passage back into facts, the question into what it asks, and
looks the answer up. So it scores any question about any passage, and rankings, win rates and the
spread of opinions are exact. Imports are absolute because `--reward path.py:function` loads this
file by itself.
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
FOLK = """
    baker miller tailor cobbler farmer shepherd hunter fisherman widow nurse cook smith weaver
    beggar minstrel monk sailor soldier merchant gardener
""".split()
CHARACTERS = ANIMALS + ROYALS + MAGICAL + FOLK
OBJECTS = """
    ring crown lamp mirror cloak basket apple lantern key sword shield drum harp flute candle rope
    hammer kettle spoon cup purse coin pearl ruby feather ribbon bell book map letter cake loaf pie
    pear cheese egg blanket boot glove hat shawl comb needle wheel ladder saddle chest broom flower
    mask
""".split()
PLACES = """
    forest mill castle garden cave tower valley meadow river market village barn chapel cottage
    orchard swamp desert island harbor kitchen cellar attic stable palace temple bridge quarry field
    hill lake library tavern bakery courtyard tunnel hollow ravine marsh grove den hut shed lodge
    pond cliff inn
""".split()

# {x} is who it is about, {y} the other one, {o} an object, {p} and {q} places, {e} a feeling
FACTS = {
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
EPISODES = {                 # what happens -> (how x feels, what x does then)
    "find": (("glad", "proud"), "dance"),
    "lose": (("sad", "worried"), "search"),
    "bring": (("glad", "grateful"), "thank"),
    "steal": (("angry", "sad"), "chase"),
}
# (question type, wording, facts that together answer it, the answer);
# the same letter is the same word in all of them
QUESTIONS = [
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
WORDS = {                    # letter -> what it may stand for
    "x": CHARACTERS,
    "y": CHARACTERS,
    "o": OBJECTS,
    "p": PLACES,
    "q": PLACES,
    "e": sorted({feeling for feelings, _ in EPISODES.values() for feeling in feelings}),
}
UNKNOWN = "Nobody knows."
DEEP = ("why", "feel")       # need two sentences, or what a fairy tale leaves unsaid
QUESTION_TYPES = ("why", "feel", "who", "what", "where", "ill formed")
TEMPLATE = "{passage}\nQuestion:"


@dataclass(frozen=True)
class PanelMember:
    """A taste: what an answerable question of each type is worth, and what faults cost."""
    name: str
    why: float
    feel: float
    who: float
    what: float
    where: float
    vague: float             # well formed, but the passage does not answer it
    missing: float           # taken away for each name that the passage lacks, two at most
    broken: float            # not a question of this world at all
    fond: tuple = ()         # words that it likes to be asked about ...
    fondness: float = 0.0    # ... and what one of them adds to an answerable question


PANEL = (
    #            name         why  feel  who  what where vague missing broken
    PanelMember("teacher",    3.2, 2.4, 0.8, 0.9, 0.9, 0.2, 0.6, -1.2),
    PanelMember("scholar",    3.6, 1.6, 0.6, 0.8, 0.8, 0.0, 0.7, -1.6),
    PanelMember("poet",       2.4, 3.4, 0.7, 0.6, 0.8, 0.5, 0.3, -0.8, tuple(MAGICAL), 0.5),
    PanelMember("nurse",      2.2, 3.2, 1.0, 0.9, 0.9, 0.4, 0.4, -0.9, tuple(FOLK), 0.3),
    PanelMember("child",      1.6, 1.8, 1.6, 1.4, 1.2, 0.6, 0.2, -0.6, tuple(ANIMALS), 0.6),
    PanelMember("librarian",  2.4, 1.4, 1.2, 1.3, 1.5, 0.0, 0.8, -1.4),
    PanelMember("gossip",     2.4, 2.6, 1.6, 0.8, 0.6, 0.6, 0.3, -0.7, tuple(ROYALS), 0.6),
    PanelMember("sceptic",    2.6, 1.2, 0.9, 1.0, 1.0, -0.4, 0.9, -1.8),
    PanelMember("collector",  2.2, 1.8, 0.9, 1.6, 1.1, 0.3, 0.5, -1.2, tuple(OBJECTS), 0.3),
    PanelMember("traveller",  2.8, 2.2, 0.7, 0.7, 1.8, 0.4, 0.4, -1.0, tuple(PLACES), 0.3),
)


# ------------------------------------------------------------------------------ reading a text

def pattern_of(wording):
    """A wording as a regular expression with a group for each letter."""
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\w+)", re.escape(wording)))


FACT_PATTERNS = {name: pattern_of(wording) for name, wording in FACTS.items()}
QUESTION_PATTERNS = [
    (question_type, pattern_of(wording), needed) for question_type, wording, needed, _ in QUESTIONS
]


@lru_cache(maxsize=1 << 15)
def read(passage):
    """A passage's text back into facts.  -> tuple of (name of the fact, {letter: word})"""
    facts = []
    for sentence in re.findall(r"[^.\n]+\.", passage):
        for name, pattern in FACT_PATTERNS.items():
            if match := pattern.fullmatch(sentence.strip()):
                facts.append((name, match.groupdict()))
    return tuple(facts)


def answers(facts, needed, known):
    """Every way in which one fact of each name in `needed` agrees with the others and with `known`,
    letter by letter.  -> list of {letter: word}
    """
    choices = []
    for needed_name in needed:
        choices.append([slots for name, slots in facts if name == needed_name])
    agreeing = []
    for combination in itertools.product(*choices):
        merged = dict(known)
        pairs = itertools.chain.from_iterable(slots.items() for slots in combination)
        if all(merged.setdefault(letter, word) == word for letter, word in pairs):
            agreeing.append(merged)
    return agreeing


@dataclass(frozen=True)
class Reading:
    """What a question is to the passage that it was asked about."""
    question_type: str       # one of QUESTION_TYPES
    answerable: bool
    missing: int             # names and things in it that the passage lacks
    words: tuple             # its names and things


def understand(prompt, question):
    """Parses a question and looks its answer up in the passage.  -> Reading"""
    passage = prompt.split("\nQuestion:")[0]
    for question_type, pattern, needed in QUESTION_PATTERNS:
        if match := pattern.fullmatch(question.strip()):
            slots = match.groupdict()
            words = tuple(slots.values())
            passage_words = set(re.findall(r"\w+", passage))
            missing = sum(word not in passage_words for word in words)
            answerable = bool(answers(read(passage), needed, slots))
            return Reading(question_type, answerable, missing, words)
    return Reading("ill formed", False, 0, ())


def opinion(member, reading):
    """One member's score of one question."""
    if reading.question_type == "ill formed":
        return member.broken
    if not reading.answerable:
        return member.vague - member.missing * min(reading.missing, 2)   # two are as bad as more
    liked = any(word in member.fond for word in reading.words)
    return getattr(member, reading.question_type) + member.fondness * liked


def panel(prompt, question):
    """The ten opinions on one question.  -> list of 10 floats, in the order of PANEL"""
    reading = understand(prompt, question)
    return [opinion(member, reading) for member in PANEL]


def gold(prompts, responses):
    """The panel's mean: the judge of this world, and with train_ppo's --reward its reward.

    n str, n str -> n floats
    """
    return [sum(panel(*pair)) / len(PANEL) for pair in zip(prompts, responses)]


# ------------------------------------------------------------------------------ writing a tale

def pick(words, n, rng):
    """n different ones."""
    return [words[i] for i in rng.permutation(len(words))[:n]]


def pick_one(words, rng):
    return pick(words, 1, rng)[0]


def episode(thing, cast, places, rng):
    """What happens to a thing: the event, perhaps how x feels, perhaps what x does then.

    places: the last two are taken from it  ->  list of (name of the fact, {letter: word})
    """
    event = pick_one(list(EPISODES), rng)
    x, y = pick(cast, 2, rng)
    feelings, reaction = EPISODES[event]
    slots = {"x": x, "y": y, "o": thing, "p": places.pop(), "q": places.pop()}
    slots["e"] = pick_one(feelings, rng)
    facts = []
    for name, chance in ((event, 1), ("feel", 0.5), (reaction, 0.7)):
        if rng.random() < chance:
            facts.append((name, slots))
    return facts


def tale(rng):
    """3 to 6 sentences: two episodes of a small cast, told in turns, so that which words belong to
    one fact cannot be seen from which sentences are neighbours.
    """
    while True:
        cast = pick(CHARACTERS, 4, rng)
        objects = pick(OBJECTS, 2, rng)
        places = pick(PLACES, 5, rng)
        stories = []
        if rng.random() < 0.5:
            stories.append([("live", {"x": cast[0], "p": places.pop()})])
        for thing in objects:
            stories.append(episode(thing, cast, places, rng))
        turns = rng.permutation([i for i, story in enumerate(stories) for _ in story])
        if 3 <= len(turns) <= 6:
            facts = [stories[i].pop(0) for i in turns]
            return " ".join(FACTS[name].format(**slots) for name, slots in facts)


def feeling_after(event, x, facts):
    """How x feels after an event: as the tale says, else as is usual; "" after what is no event."""
    usual, _ = EPISODES.get(event, ("", ""))
    for name, slots in facts:
        if name == "feel" and slots["x"] == x and slots["e"] in usual:
            return slots["e"]
    return usual[0] if usual else ""


def questions(passage):
    """Every question of this world that the passage answers.

    -> sorted list of (question, type, answer)
    """
    facts = read(passage)
    by_text = {}
    for question_type, wording, needed, answer in QUESTIONS:
        for slots in answers(facts, needed, {}):
            feeling = feeling_after(needed[0], slots.get("x"), facts)
            answered = answer.format(**{"e": feeling, **slots})
            by_text.setdefault(wording.format(**slots), (question_type, answered))
    return sorted((question, *rest) for question, rest in by_text.items())


def ask(passage, n, rng):
    """n different questions, as an expert asks them: four in ten go deep, as long as there are any.

    -> list of (question, type, answer)
    """
    answered = questions(passage)
    deep = [row for row in answered if row[1] in DEEP]
    shallow = [row for row in answered if row[1] not in DEEP]
    asked = []
    while len(asked) < n and (deep or shallow):
        pool = deep if rng.random() < 0.4 else shallow
        pool = pool or deep or shallow
        asked.append(pool.pop(int(rng.integers(len(pool)))))
    return asked


def mislead(passage, n, rng):
    """n well-formed questions that the passage does not answer; three in four of their words are
    the passage's.  -> list of str
    """
    facts = read(passage)
    passage_words = {letter: [] for letter in WORDS}
    for _, slots in facts:
        for letter, word in slots.items():
            passage_words[letter].append(word)
    misleading = []
    while len(misleading) < n:
        _, wording, needed, _ = QUESTIONS[rng.integers(len(QUESTIONS))]
        slots = {}
        for letter in dict.fromkeys(re.findall(r"\{(\w)\}", wording)):
            own = passage_words[letter]
            slots[letter] = pick_one(own if own and rng.random() < 0.75 else WORDS[letter], rng)
        if not answers(facts, needed, slots):
            misleading.append(wording.format(**slots))
    return misleading


# --------------------------------------------------------------------------------------- files

def expert_lines(passage, n, rng):
    lines = []
    for question, question_type, _ in ask(passage, n, rng):
        lines.append({"text": " " + question, "label": 1, "kind": question_type})
    return lines


def reading_lines(passage, n, rng):
    """Questions with their answers, half of them with none: what a language model that can read has
    learnt before it judges.
    """
    texts = [f" {question} {answer}" for question, _, answer in ask(passage, n // 2, rng)]
    for question in mislead(passage, n - len(texts), rng):
        texts.append(f" {question} {UNKNOWN}")
    return [{"text": text} for text in texts]


def write(out, sizes, n, seed, lines=expert_lines):
    """Writes out/NAME.jsonl for each NAME of `sizes` (how many passages): groups JSONL, no passage
    in two of them, n responses each.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 6]))           # a stream of its own
    seen = set()
    for name, passages in sizes.items():
        rows = []
        while len(rows) < passages:
            passage = tale(rng)
            if passage not in seen:
                seen.add(passage)
                prompt = TEMPLATE.format(passage=passage)
                rows.append(json.dumps({"prompt": prompt, "responses": lines(passage, n, rng)}))
        path = Path(out) / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, ("\n".join(rows) + "\n").encode())


@dataclass(frozen=True)
class Config:
    out: str                 # folder for sft/, reward/, ppo/ and read/; may not exist yet
    passages: int = 8000     # in sft/train and read/train; reward/train and ppo/train: half as many
    held_out: int = 250      # in each val.jsonl
    questions: int = 6       # an expert asks about a passage, at most
    seed: int = 0            # other seeds, other tales


def sizes(passages, held_out):
    """How many passages each file of experts' questions has."""
    half = max(passages // 2, 1)
    return {
        "sft/train": passages, "sft/val": held_out,
        "reward/train": half, "reward/val": held_out,
        "ppo/train": half, "ppo/val": held_out,
    }


def main(config):
    check_bounds(
        config,
        passages=(1, 10**6),
        held_out=(1, 10**5),
        questions=(1, 20),
        seed=(0, 2**62),
    )
    if Path(config.out).exists():
        raise InputError(f"--out {config.out}: is there already; name a folder that is not")
    expert_sizes = sizes(config.passages, config.held_out)
    write(config.out, expert_sizes, config.questions, config.seed)
    reading_sizes = {"read/train": config.passages, "read/val": config.held_out}
    write(config.out, reading_sizes, config.questions, config.seed + 2**62, reading_lines)
    listed = ", ".join(f"{name} {n}" for name, n in expert_sizes.items())
    print(f"{config.out}: {listed}, read/train {config.passages}")


if __name__ == "__main__":
    run_script(main, Config)
