"""The embedded world against passages read by hand, a panel added up by hand, and policies whose faults are known; the small models' start."""
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nanorlhf import gpt2
from nanorlhf.io import data, hub
from nanorlhf.reward import FunctionReward
from nanorlhf.run import cli
from nanorlhf.study import small, world
from nanorlhf.study.world import (
    PANEL,
    UNKNOWN,
    Reading,
    answers,
    ask,
    mislead,
    panel,
    questions,
    read,
    tale,
    understand,
)

ROOT = Path(__file__).resolve().parent.parent


def stream(number):
    return np.random.Generator(np.random.Philox(key=[number, 99]))


def tales(n, number=0):
    rng = stream(number)
    return [tale(rng) for _ in range(n)]


# ------------------------------------------------------------------------------------------------------ reading a text

# Three passages, everything that can be asked about them, and the answer. Together they use every wording of QUESTIONS.
FOX = "The fox lived in the mill. The king brought the ring to the fox. The fox was glad. The fox thanked the king. The baker lost the cup in the cave."
OWL = "The witch stole the book from the owl. The owl was angry. The goat found the pie in the barn. The owl chased the witch. The goat danced in the grove."
QUEEN = "The queen lost the harp in the swamp. The queen was worried. The queen searched the tower."
HAND = {
    FOX: {
        "Where did the fox live?": ("where", "In the mill."),
        "Who brought the ring to the fox?": ("who", "The king."),
        "What did the king bring to the fox?": ("what", "The ring."),
        "Who was glad?": ("who", "The fox."),
        "Who thanked the king?": ("who", "The fox."),
        "How did the fox feel when the king brought the ring?": ("feel", "The fox was glad."),
        "Why did the fox thank the king?": ("why", "The king brought the ring."),              # two sentences: he thanked, and what had been brought
        "Who lost the cup?": ("who", "The baker."),
        "What did the baker lose in the cave?": ("what", "The cup."),
        "Where did the baker lose the cup?": ("where", "In the cave."),
        "How did the baker feel after losing the cup?": ("feel", "The baker was sad."),        # unsaid: who loses something is sad or worried, the first stands
    },
    OWL: {
        "Who stole the book from the owl?": ("who", "The witch."),
        "What did the witch steal from the owl?": ("what", "The book."),
        "Who was angry?": ("who", "The owl."),
        "Who chased the witch?": ("who", "The owl."),
        "How did the owl feel when the witch stole the book?": ("feel", "The owl was angry."),
        "Why did the owl chase the witch?": ("why", "The witch stole the book."),
        "Who found the pie?": ("who", "The goat."),
        "What did the goat find in the barn?": ("what", "The pie."),
        "Where did the goat find the pie?": ("where", "In the barn."),
        "Where did the goat dance?": ("where", "In the grove."),
        "How did the goat feel after finding the pie?": ("feel", "The goat was glad."),        # unsaid
        "Why did the goat dance in the grove?": ("why", "The goat found the pie."),
    },
    QUEEN: {
        "Who lost the harp?": ("who", "The queen."),
        "What did the queen lose in the swamp?": ("what", "The harp."),
        "Where did the queen lose the harp?": ("where", "In the swamp."),
        "Who was worried?": ("who", "The queen."),
        "Who searched the tower?": ("who", "The queen."),
        "How did the queen feel after losing the harp?": ("feel", "The queen was worried."),
        "Why did the queen search the tower?": ("why", "The queen lost the harp."),
    },
}


@pytest.mark.parametrize("passage", HAND, ids=["fox", "owl", "queen"])
def test_everything_that_can_be_asked_by_hand(passage):
    assert questions(passage) == sorted((question, *rest) for question, rest in HAND[passage].items())


def test_the_hand_written_passages_use_every_wording():
    blank = lambda wording: re.sub(r"\{\w\}", "_", wording)
    names = "fox|king|ring|glad|baker|cup|cave|mill|witch|owl|book|angry|goat|pie|barn|grove|queen|harp|swamp|worried|tower"
    asked = {re.sub(rf"\b({names})\b", "_", question) for found in HAND.values() for question in found}
    assert asked == {blank(wording) for _, wording, _, _ in world.QUESTIONS} and len(asked) == 24


def test_a_feeling_belongs_to_what_caused_it():
    # who is stolen from is angry or sad; glad he was because of the gift
    passage = "The goat brought the shawl to the troll. The troll was glad. The swan stole the chest from the troll."
    found = {question: answer for question, _, answer in questions(passage)}
    assert found["How did the troll feel when the goat brought the shawl?"] == "The troll was glad."
    assert found["How did the troll feel when the swan stole the chest?"] == "The troll was angry."


@pytest.mark.parametrize("question, kind, answerable, missing", [
    ("Why did the fox thank the king?", "why", True, 0),
    (" Who was glad?\n", "who", True, 0),                                        # a policy's text begins with a blank
    ("Who brought the ring to the king?", "who", False, 0),                      # the right words in another relation
    ("Why did the king thank the fox?", "why", False, 0),
    ("How did the fox feel after losing the cup?", "feel", False, 0),            # somebody else's loss
    ("Where did the baker live?", "where", False, 0),
    ("Where did the baker lose the ring?", "where", False, 0),
    ("Why did the baker search the cave?", "why", False, 0),                     # he lost something, but it is not told that he searched
    ("Who stole the crown from the fox?", "who", False, 1),                      # no crown
    ("Where did the wolf lose the pearl?", "where", False, 2),
    ("How did the wolf feel when the owl stole the pie?", "feel", False, 3),
    ("who was glad?", "ill formed", False, 0),
    ("Who was glad", "ill formed", False, 0),
    ("Who was glad? Who was glad?", "ill formed", False, 0),
    ("Who was the glad fox?", "ill formed", False, 0),
    ("The fox was glad.", "ill formed", False, 0),
    ("", "ill formed", False, 0),
])
def test_understanding_by_hand(question, kind, answerable, missing):
    found = understand(world.TEMPLATE.format(passage=FOX), question)
    assert (found.question_type, found.answerable, found.missing) == (kind, answerable, missing)


@pytest.mark.parametrize("left_out", ["The king brought the ring to the fox. ", "The fox thanked the king. "])
def test_why_needs_both_sentences(left_out):
    assert left_out in FOX and not understand(FOX.replace(left_out, ""), "Why did the fox thank the king?").answerable


def test_facts_join_on_the_same_word():
    facts = read(OWL)
    assert answers(facts, ["chase", "steal"], {}) == [{"x": "owl", "y": "witch", "o": "book"}]
    assert answers(facts, ["feel", "find"], {}) == []                            # the owl is angry, the goat finds
    assert answers(facts, ["find"], {"x": "goat"}) == [{"x": "goat", "o": "pie", "p": "barn"}] and answers(facts, ["find"], {"x": "owl"}) == []


# ------------------------------------------------------------------------------------------------------ writing a tale

@pytest.mark.parametrize("name", world.FACTS)
def test_a_fact_reads_back(name):
    letters = set(re.findall(r"\{(\w)\}", world.FACTS[name]))
    slots = {letter: world.WORDS[letter][i] for i, letter in enumerate("xyopqe") if letter in letters}
    assert read(world.FACTS[name].format(**slots)) == ((name, slots),)


def test_tales_read_back():
    """Every sentence is one fact, which written down again is the sentence; between three and six, no one meets himself."""
    lengths = set()
    for passage in tales(500):
        facts = read(passage)
        assert " ".join(world.FACTS[name].format(**slots) for name, slots in facts) == passage
        assert all(slots["x"] != slots.get("y") for _, slots in facts)
        lengths.add(len(facts))
    assert lengths == {3, 4, 5, 6}


def test_tales_are_told_in_turns():
    # Two episodes; in a third of tales or more, one is interrupted by the other: else "who stands beside whom" would answer every question.
    def interrupted(passage):
        objects = [slots["o"] for name, slots in read(passage) if name in world.EPISODES]
        assert len(objects) == 2 and len(set(objects)) == 2
        (first, one), (second, _) = [(i, slots) for i, (name, slots) in enumerate(read(passage)) if name in world.EPISODES]
        return any(name in ("dance", "search", "thank", "chase") and slots["x"] == one["x"] for name, slots in read(passage)[second + 1 :])
    assert np.mean([interrupted(passage) for passage in tales(500)]) > 1 / 3


def test_experts_ask_what_the_passage_answers():
    rng = stream(1)
    for passage in tales(200):
        prompt, asked = world.TEMPLATE.format(passage=passage), ask(passage, 6, rng)
        assert len({question for question, _, _ in asked}) == len(asked) == min(6, len(questions(passage)))
        for question, kind, _ in asked:
            reading = understand(prompt, question)
            assert (reading.question_type, reading.answerable, reading.missing) == (kind, True, 0)
    assert len(ask(QUEEN, 20, rng)) == len(HAND[QUEEN])                          # never more than there are


def test_four_in_ten_expert_questions_go_deep():
    # every tale has something of both sorts, so the first question is deep with probability .4: 4 deviations of 1,000 draws are .062
    rng = stream(2)
    first = [ask(passage, 1, rng)[0][1] for passage in tales(1000)]
    assert abs(np.mean([kind in world.DEEP for kind in first]) - 0.4) < 0.062 and set(first) == set(world.QUESTION_TYPES) - {"ill formed"}


def test_misleading_questions_have_no_answer():
    rng, missing = stream(3), []
    for passage in tales(200):
        found = mislead(passage, 5, rng)
        assert len(found) == 5
        for question in found:
            reading = understand(passage, question)
            assert reading.question_type != "ill formed" and not reading.answerable
            missing.append(reading.missing / len(reading.words))
    # three in four words are the passage's, fewer where it has none of that sort, more where accident helps
    assert 0.6 < 1 - np.mean(missing) < 0.85 and 0.25 < np.mean([share == 0 for share in missing]) < 0.75


@pytest.mark.parametrize("n", [1, 5, 6])
def test_half_of_what_the_reader_learns_is_that_nobody_knows(n):
    rng = stream(4)
    for passage in tales(50):
        known = {f" {question} {answer}" for question, _, answer in questions(passage)}
        lines = [line["text"] for line in world.reading_lines(passage, n, rng)]
        assert len(lines) == n and sum(text in known for text in lines) == n // 2
        for text in set(lines) - known:
            question = text.removesuffix(f" {UNKNOWN}")
            assert question != text and not understand(passage, question).answerable


# ----------------------------------------------------------------------------------------------------------- the panel

PROMPT = world.TEMPLATE.format(passage=FOX)
TEACHER, SCHOLAR, POET, NURSE, CHILD, LIBRARIAN, GOSSIP, SCEPTIC, COLLECTOR, TRAVELLER = range(10)


@pytest.mark.parametrize("question, scores, mean", [
    # why: the child adds .6 for the fox, the gossip .6 for the king; the sum is 26.6
    ("Why did the fox thank the king?", [3.2, 3.6, 2.4, 2.2, 2.2, 2.4, 3.0, 2.6, 2.2, 2.8], 2.66),
    # where: the nurse adds .3 for the baker, the collector .3 for the cup; the traveller nothing, for the cave is the answer; the sum is 10.6 + .6
    ("Where did the baker lose the cup?", [0.9, 0.8, 0.8, 1.2, 1.2, 1.5, 0.6, 1.0, 1.4, 1.8], 1.12),
    # who, without an answer and with one name missing: vague - missing, and nobody's fondness counts; the sum is 2.6 - 5.1
    ("Who stole the crown from the fox?", [-0.4, -0.7, 0.2, 0.0, 0.4, -0.8, 0.3, -1.3, -0.2, 0.0], -0.25),
    ("fox fox fox", [-1.2, -1.6, -0.8, -0.9, -0.6, -1.4, -0.7, -1.8, -1.2, -1.0], -1.12),
])
def test_the_panel_by_hand(question, scores, mean):
    assert panel(PROMPT, question) == pytest.approx(scores) and world.gold([PROMPT], [question]) == [pytest.approx(mean)]


def test_fondness_counts_once():
    traveller = PANEL[TRAVELLER]
    assert world.opinion(traveller, Reading("where", True, 0, ("cave", "mill"))) == pytest.approx(1.8 + 0.3) == world.opinion(traveller, Reading("where", True, 0, ("cave",)))


@pytest.mark.parametrize("one, other, better, worse", [
    (SCHOLAR, POET, "Why did the fox thank the king?", "How did the fox feel when the king brought the ring?"),             # why against feeling: 3.6 > 1.6, 2.4 < 3.4
    (LIBRARIAN, CHILD, "Where did the baker lose the cup?", "How did the baker feel after losing the cup?"),                # 1.5 > 1.4;  1.2 < 1.8
    (GOSSIP, TRAVELLER, "Who lost the cup?", "Where did the fox live?"),                                                    # 1.6 > .6;  .7 < 1.8
    (COLLECTOR, NURSE, "What did the king bring to the fox?", "Who lost the cup?"),                                         # 1.6 > .9 + .3;  .9 < 1.0
])
def test_tastes_differ(one, other, better, worse):
    first, second = panel(PROMPT, better), panel(PROMPT, worse)
    assert first[one] > second[one] and first[other] < second[other]


# --------------------------------------------------------------------------------------------------------------- floors

def copier(passage, rng):
    """The passage's words in any wording: a model that copies, but does not read relations."""
    there = set(re.findall(r"\w+", passage))
    has = {letter: [word for word in words if word in there] for letter, words in world.WORDS.items()}
    usable = [wording for _, wording, _, _ in world.QUESTIONS if all(has[letter] for letter in re.findall(r"\{(\w)\}", wording))]
    return world.pick(usable, 1, rng)[0].format(**{letter: world.pick(words, 1, rng)[0] for letter, words in has.items() if words})


def test_the_panel_orders_policies_by_what_they_can_do():
    """Who reads > who copies names > who has the form > who has the words, by margins that follow from the panel's table."""
    rng, passages = stream(5), tales(400)
    expert = [ask(passage, 1, rng)[0][0] for passage in passages]
    said = {"expert": expert, "copier": [copier(passage, rng) for passage in passages], "form": expert[1:] + expert[:1],
            "soup": [" ".join(world.pick(passage.split(), 6, rng)) for passage in passages]}
    gold = {name: np.array(world.gold(passages, texts)) for name, texts in said.items()}
    reading = {name: [understand(*pair) for pair in zip(passages, texts)] for name, texts in said.items()}
    # means of the columns: why 2.54, feel 2.16, who 1.00, what 1.00, where 1.06, vague .26, missing .51, broken -1.12; fondness adds .26 at most
    assert gold["expert"].min() > 1.0 - 1e-9 and gold["expert"].max() < 2.54 + 0.26
    assert gold["soup"] == pytest.approx(-1.12)
    for name in ("copier", "form"):
        unanswerable = [(score, read.missing) for score, read in zip(gold[name], reading[name]) if not read.answerable]
        assert [score for score, _ in unanswerable] == pytest.approx([0.26 - 0.51 * min(missing, 2) for _, missing in unanswerable])
    assert all(read.missing == 0 for read in reading["copier"]) and np.mean([read.answerable for read in reading["copier"]]) < 0.25
    # An expert's is worth 1.0 + .4 (2.16 - 1.0) = 1.46 at least. A copier's, at most a quarter answerable: .26 + .25 (2.54 - .26) = .83 at most.
    # The form with the names of another passage: most wordings have two or three, so 1.5 to 2 are missing: .26 - .51 * 1.5 = -.5.
    mean = {name: scores.mean() for name, scores in gold.items()}
    assert mean["expert"] > 1.46 - 0.1 and mean["expert"] - mean["copier"] > 0.6        # two deviations of 400 expert scores are .07
    assert mean["copier"] - mean["form"] > 0.6 and mean["form"] - mean["soup"] > 0.3


# ----------------------------------------------------------------------------------------------------------------- files

SIZES = dict(passages=40, held_out=10, questions=6)


def make(out, **flags):
    world.main(world.Config(str(out), **{**SIZES, **flags}))
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(Path(out).rglob("*")) if path.is_file()}


def test_no_passage_is_in_two_files_of_questions(tmp_path):
    make(tmp_path / "world")
    counts, passages = {}, []
    for name in ("sft", "reward", "ppo"):
        found = data.load(tmp_path / "world" / name)                             # what --data of the scripts reads
        assert not found.dropped
        counts[name] = len(found.train), len(found.held_out)
        passages += [group.prompt for group in found.train + found.held_out]
    assert counts == {"sft": (40, 10), "reward": (20, 10), "ppo": (20, 10)}      # half of 40 for rewards and for PPO
    assert len(set(passages)) == len(passages) == 110


def test_a_tale_that_comes_again_is_left_out(tmp_path, monkeypatch):
    told = iter([QUEEN, QUEEN, OWL, QUEEN, OWL, FOX])
    monkeypatch.setattr(world, "tale", lambda rng: next(told))
    world.write(tmp_path, {"a": 1, "b": 2}, 3, seed=0)
    written = [[group.prompt for group in data.read_groups(tmp_path / f"{name}.jsonl")[0]] for name in "ab"]
    assert written == [[world.TEMPLATE.format(passage=passage) for passage in part] for part in ([QUEEN], [OWL, FOX])]


def test_files_hold_expert_questions_and_reading(tmp_path):
    make(tmp_path / "world", questions=4)
    group = data.load(tmp_path / "world" / "sft").train[0]
    assert group.prompt.endswith(".\nQuestion:") and len(group.responses) == 4
    assert all(r.text.startswith(" ") and r.label == 1 and understand(group.prompt, r.text).question_type == r.extra["kind"] for r in group.responses)
    lines = data.load(tmp_path / "world" / "read").held_out[0].responses
    assert sum(r.text.endswith(f"? {UNKNOWN}") for r in lines) == 2 and len(lines) == 4


def test_the_seed_alone_decides(tmp_path):
    first = make(tmp_path / "a", seed=3)
    assert make(tmp_path / "b", seed=3) == first and len(first) == 8
    other = make(tmp_path / "c", seed=4)
    assert other.keys() == first.keys() and not any(other[name] == first[name] for name in first)


def process(*words, **env):
    return subprocess.run([sys.executable, "-m", "nanorlhf.study.world", *words], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)


def test_the_command_writes_the_same_whatever_the_hash_seed(tmp_path):
    flags = [f"--{name}={value}" for name, value in SIZES.items()]
    for hash_seed in "1", "2":
        done = process(f"--out={tmp_path / hash_seed}", *flags, PYTHONHASHSEED=hash_seed)
        assert done.returncode == 0 and done.stdout.count("\n") == 1 and "sft/train 40" in done.stdout, done.stderr
    files = [{p.relative_to(tmp_path / s): p.read_bytes() for p in (tmp_path / s).rglob("*.jsonl")} for s in "12"]
    assert files[0] == files[1] == {Path(name): raw for name, raw in make(tmp_path / "here").items()}


@pytest.mark.parametrize("flags, says", [(["--seed=-1"], "--seed -1"), (["--passages=0"], "--passages 0"), (["--questions=21"], "--questions 21"), ([], "is there already")])
def test_mistakes_are_one_line_and_nothing_is_written(flags, says, tmp_path, monkeypatch, capsys):
    out = tmp_path / "world"
    if not flags:
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["world", f"--out={out}", *flags])
    with pytest.raises(SystemExit) as end:
        cli.run_script(world.main, world.Config)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ") and says in error
    assert [p.name for p in tmp_path.rglob("*")] == ([] if flags else ["world", "mine.txt"])


def test_the_panel_is_a_reward_function():
    reward = FunctionReward(f"{world.__file__}:gold")                            # the file loaded by itself, as train_ppo --reward does it
    scores = reward.score_texts([PROMPT, QUEEN], [[" Why did the fox thank the king?", " fox"], [" Who was worried?", " Who was glad?"]], [[True] * 2] * 2)
    # Who was worried: 1.0, and no fondness; Who was glad: vague .26, and "glad" is missing: -.51
    assert torch.allclose(scores, torch.tensor([[2.66, -1.12], [1.0, -0.25]]))


# ------------------------------------------------------------------------------------------------- the small models' start

def test_a_shift_moves_waves():
    places = torch.arange(100)
    for columns in (1, 2, 3, 17):            # float32 knows an angle of 3 * 100 to 2e-5
        assert torch.allclose(small.position_waves(places) @ small.shift_matrix(columns), small.position_waves(places + columns), atol=1e-4)
    assert torch.equal(small.shift_matrix(0), torch.eye(small.POSITION_DIMS))


@torch.no_grad()
def scores_of_first_layer(trunk, tokens):
    """Attention logits, from c_attn alone.  (B,T) -> (B,H,T,T)"""
    x = trunk.h[0].ln_1(trunk.wte(tokens) + trunk.wpe(torch.arange(tokens.shape[1])))
    query, key, _ = (y.unflatten(-1, (small.HEADS, -1)).transpose(1, 2) for y in trunk.h[0].attn.c_attn(x).chunk(3, -1))
    earlier = torch.ones(tokens.shape[1], tokens.shape[1]).tril().bool()
    return (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~earlier, -1e9)


def test_heads_of_a_started_gpt2_look_back():
    scores = scores_of_first_layer(small.start_gpt2(300, 0), torch.randint(300, (8, 100), generator=torch.Generator().manual_seed(1)))
    for head in range(1, small.HEADS):
        looked = scores[:, head].argmax(-1)[:, head:]
        assert (looked == torch.arange(100 - head)).float().mean() > 0.98, head
    # and the remaining head matches words: a word repeated far off is what it looks at, rather than the 98 others before it
    tokens = torch.arange(100).repeat(8, 1) + 100
    tokens[:, 99] = tokens[:, 40]
    best = scores_of_first_layer(small.start_gpt2(300, 0), tokens)[:, 0, 99].topk(2).indices
    assert set(best.flatten().tolist()) == {40, 99}


def copying_loss(trunk):
    """60 steps on random words said twice; the loss of the second time.  -> nats a word"""
    draws, optimizer = torch.Generator().manual_seed(2), torch.optim.AdamW(trunk.parameters(), lr=5e-3)
    for _ in range(60):
        tokens = torch.randint(100, (32, 12), generator=draws).repeat(1, 2)
        hidden = trunk.hidden(tokens, torch.arange(24).expand(32, -1), torch.zeros_like(tokens))
        loss = F.cross_entropy(trunk.logits(hidden)[:, 12:-1].flatten(0, 1), tokens[:, 13:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_a_started_gpt2_learns_to_copy_sooner():
    torch.manual_seed(0)
    usual = gpt2.GPT2(gpt2.GPT2Config(100, small.CONTEXT, small.WIDTH, small.LAYERS, small.HEADS))
    # ln 100 = 4.6 at chance; three seeds had .12 to .15 against .77 to .84
    assert copying_loss(small.start_gpt2(100, 0)) < 0.3 < 0.5 < copying_loss(usual)


@pytest.fixture(scope="module")
def texts():
    rng = stream(6)
    return [text for passage in tales(150) for text in (passage, *(f" {question} {answer}" for question, _, answer in ask(passage, 6, rng)))]


@pytest.mark.parametrize("family, exact", [("gpt2", False), ("llama", True)])
def test_small_models_load_and_are_the_seeds_alone(family, exact, texts, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        small.write(tmp_path / name, family, texts, seed)
    files = {name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "abc"}
    assert files["a"] == files["b"] and {name for name in files["a"] if files["a"][name] != files["c"][name]} == {"model.safetensors", "SHA256SUMS"}
    policy = hub.load_policy(tmp_path / "a")
    tok, trunk = policy.tokenizer, policy.trunk
    assert trunk.family == family and trunk.config.context == small.CONTEXT and trunk.width == small.WIDTH
    # byte-level BPE ends early when every word of the texts is a token; sentencepiece fills the vocabulary
    assert tok.vocab_size == small.VOCAB_SIZE if exact else tok.vocab_size <= small.VOCAB_SIZE
    said = {word for text in texts for word in re.findall(r"[a-z]+", text)}
    assert np.mean([len(tok.encode(f" {word}")) == 1 for word in said]) > 0.5
    assert all(tok.decode(tok.encode(text)) == text for text in texts[:20])
