"""The stages of the study: what each of them runs. All training is done by the three scripts that a user calls, with the flags that are written here.

A study is a folder: reader/ (the reward models' trunk, one for all seeds), seed0/, seed1/ ... (everything else), each stage a run
folder or a file in it. A stage that is called again finds what it did and goes on: that is all that resuming needs.
"""
import json
from dataclasses import dataclass

import numpy as np
import torch

import train_ppo
import train_rm
import train_sft

from .. import ppo, sample
from ..batching import encode_all, micro_batches, pack_rows
from ..heads import RewardModel
from ..io import data, hub
from ..io.files import replace
from ..losses import quantile_levels
from ..reward import TextReward
from ..run.log import to_json
from . import evaluate, small, world
from .judge import Scoring

GOLD = f"{world.__file__}:gold"
TIE = 0.05                               # scores of one multiple of this, of the panel's mean, are a tie
K = 4                                    # samples of a passage                                                        [paper A, 3.1]
ACTOR = dict(groups=16, k=K, epochs=2, minibatches=2, lr=3e-4, schedule="constant", warmup=0, max_new_tokens=20, device="cpu")
SOLID = dict(groups=16, warmup=20, device="cpu")


@dataclass(frozen=True)
class Scale:
    """How much of everything."""
    seeds: int
    passages: int                        # experts' passages for the supervised policy; half as many for rewards and for PPO
    held_out: int                        # passages that everything is judged on
    reader: int                          # steps of the reward trunk, which learns to answer questions
    sft: int                             # steps of the supervised policy
    rm: int                              # steps of a reward model ...
    rm_lr: float                         # ... and its learning rate: the better the trunk can read, the less it should be shaken
    ppo: tuple                           # steps of PPO at which it is looked at
    overfit: int                         # passages of the small ranking set on which pairs together and apart are compared


# arm -> (reward, more flags of train_ppo.py). rm-* are runs of this seed; "raw" stands for a reward model whose normalisation is taken away.
ARMS = {
    "ranking": ("rm-ranking", {}),
    "classification": ("rm-classification", {}),
    "judge": (GOLD, {}),
    "scores-mean": ("rm-scores", {}),
    "classification-raw": ("raw", {}),
    "ranking-on-labels": ("rm-ranking-on-labels", {}),
    "classification-on-places": ("rm-classification-on-places", {}),
    "scores-cvar": ("rm-scores", {"statistic": "cvar:0.3"}),
    "ranking-loose": ("rm-ranking", {"kl_coef": 0.02}),               # a tenth of the KL penalty: what over-optimisation looks like
}
# reward model -> (data, flags of train_rm.py). Paper A's are trained on the four samples or on experts and samples, paper B's on pairs.
REWARDS = {
    "ranking": ("ranked", dict(loss="ranking", labels="place")),
    "classification": ("labelled", dict(loss="classification", labels="label")),
    "ranking-on-labels": ("labelled", dict(loss="ranking", labels="label")),
    "classification-on-places": ("ranked", dict(loss="classification", labels="place")),
    "scalar": ("pairs", dict(loss="ranking", labels="place")),
    "quantile": ("pairs", dict(loss="quantile", labels="place")),
    "label": ("pairs", dict(loss="quantile", labels="place", rank_coef=0.0)),
    "scores": ("pairs", dict(loss="quantile", labels="place", quantile_target="scores", kappa=0.0, rank_coef=0.0)),
    "self_mean": ("pairs", dict(loss="quantile", labels="place", quantile_target="self_mean")),
}
SCALES = {
    "smoke": Scale(1, 400, 24, 20, 100, 6, 2e-3, (2, 4), 16),
    "demo": Scale(2, 8000, 250, 600, 400, 300, 2e-3, (25, 50, 80), 800),
    "full": Scale(5, 16000, 500, 1500, 800, 800, 1e-3, (25, 50, 100, 150), 1600),
}


# -------------------------------------------------------------------------------------------------------------- data

def texts_of(path):
    groups, _ = data.read_groups(path)
    return [text for group in groups for text in (group.prompt, *(response.text for response in group.responses))]


def reader(out, scale, seed):
    """The reward models' trunk: a LLaMA with its own tokenizer that has learnt to answer questions, and to say when a tale does not."""
    world.write(out, {"world/train": scale.passages, "world/val": scale.held_out}, 6, seed + 2**62, world.reading_lines)
    small.write(out / "start", "llama", texts_of(out / "world/train.jsonl"), seed)
    train_sft.main(train_sft.Config(str(out / "world"), str(out / "start"), str(out / "run"), steps=scale.reader, lr=4e-3, seed=seed, eval_every=200, save_every=100, **SOLID))


def tales(out, scale, seed):
    """This seed's passages and experts' questions, and the policy's start."""
    world.write(out / "world", world.sizes(scale.passages, scale.held_out), 6, seed)
    small.write(out / "start", "gpt2", texts_of(out / "world/sft/train.jsonl"), seed)


def sft(out, scale, seed):
    train_sft.main(train_sft.Config(str(out / "world/sft"), str(out / "start"), str(out / "sft"), steps=scale.sft, lr=5e-3, seed=seed, eval_every=100, save_every=100, **SOLID))


def judged(out, scale, seed):
    """Four samples of each passage for the reward models, ranked by the panel; with the experts' labels; and as pairs of which one judge chose.

    ranked/: places by the panel's mean, scores its ten opinions.  labelled/: experts' questions good, samples bad.
    pairs/: the samples two by two; a judge drawn for each pair says which is chosen, as a crowd does it, so opinions differ.
    """
    judge, rng = Scoring(world.gold, TIE), np.random.Generator(np.random.Philox(key=[seed, 8]))
    for split, name in (("train", "train"), ("held_out", "val")):
        path = out / f"sampled-{name}.jsonl"
        if not path.exists():
            sample.main(sample.Config(policy=str(out / "sft"), data=str(out / "world/reward"), split=split, k=K, include_originals=True, max_new_tokens=20, seed=seed,
                                      out=str(path), max_tokens=16384, device="cpu"))
        ranked, labelled, pairs = [], [], []
        for group in data.read_groups(path)[0]:
            experts = [r for r in group.responses if r.label == 1][:2]
            samples = [r for r in group.responses if r.label == 0]
            labelled.append(data.Group(group.prompt, [data.Response(r.text, label=r.label, ended=r.ended) for r in experts + samples]))
            opinions = [world.panel(group.prompt, r.text) for r in samples]
            places = judge.rank(group.prompt, [r.text for r in samples])
            ranked.append(data.Group(group.prompt, [data.Response(r.text, place, None, scores, r.ended) for r, place, scores in zip(samples, places, opinions)]))
            for i in range(0, len(samples) - 1, 2):
                who = int(rng.integers(len(world.PANEL)))
                first, second = opinions[i][who], opinions[i + 1][who]
                if first != second:
                    pair = [data.Response(samples[j].text, float(mine < other), int(mine > other), opinions[j], samples[j].ended)
                            for j, mine, other in ((i, first, second), (i + 1, second, first))]
                    pairs.append(data.Group(group.prompt, pair, extra={"judge": world.PANEL[who].name}))
        for folder, groups in (("ranked", ranked), ("labelled", labelled), ("pairs", pairs), ("few", ranked[: scale.overfit] if name == "train" else ranked)):
            (out / folder).mkdir(exist_ok=True)
            replace(out / folder / f"{name}.jsonl", data.write_groups(groups))


# ------------------------------------------------------------------------------------------------------------- training

def reward_model(out, scale, seed, name):
    source, flags = REWARDS[name]
    train_rm.main(train_rm.Config(str(out / source), str(out.parent / "reader/run"), str(out / f"rm-{name}"), steps=scale.rm, lr=scale.rm_lr, seed=seed, eval_every=max(1, scale.rm // 2),
                                  save_every=100, **flags, **SOLID))


def pass_over(out, mode):
    """How many groups one pass over the few passages has: passages with a pair, or, apart, pairs of unequal place."""
    pairs = evaluate.ordered_pairs([[r.place for r in group.responses] for group in data.read_groups(out / "few/train.jsonl")[0]])
    return len(pairs) if mode == "apart" else len({group for group, _, _ in pairs})


def pairs_mode(out, scale, seed, mode):
    """The pairs of a passage in one minibatch, or apart, on few passages: as many optimizer steps for both as one pass over the pairs apart has."""
    steps = max(1, pass_over(out, "apart") // SOLID["groups"])
    train_rm.main(train_rm.Config(str(out / "few"), str(out.parent / "reader/run"), str(out / f"rm-{mode}"), labels="place", pairs=mode, steps=steps, lr=scale.rm_lr / 2, seed=seed,
                                  schedule="constant", eval_every=max(1, steps // 6), save_every=100, **SOLID))


def actor(out, scale, seed, arm):
    """PPO in stretches; after each the policy answers the held-out passages."""
    reward, flags = ARMS[arm]
    if reward == "raw":
        reward = str(out / "rm-classification-raw")
        model = hub.load_reward_model(str(out / "rm-classification"))
        model.norm_stats = {"mean": (0.0, 1.0)}
        hub.save_reward_model(reward, model)
    elif reward != GOLD:
        reward = str(out / reward)
    for steps in scale.ppo:
        path = out / f"ppo-{arm}-{steps}.json"
        if not path.exists():                    # a stretch that is done is not asked for again: the run is past it
            train_ppo.main(train_ppo.Config(data=str(out / "world/ppo"), policy=str(out / "sft"), reward=reward, out=str(out / f"ppo-{arm}"), steps=steps, seed=seed,
                                            eval_every=10**9, save_every=50, **{"kl_coef": 0.2, **flags}, **ACTOR))
            groups = answer(out / f"ppo-{arm}", out, seed, f"ppo-{arm}-{steps}.jsonl")
            moved = drift(hub.load_policy(out / f"ppo-{arm}"), hub.load_policy(out / "sft"), groups)
            replace(path, json.dumps({"steps": steps, **moved}).encode())


def answer(policy, out, seed, name):
    """One answer to each held-out passage, the same draws for every policy.  -> groups, also in the file `name`

    One, because `sample` draws a second one again where it repeats the first: no longer the policy's own distribution.
    """
    if not (out / name).exists():
        sample.main(sample.Config(policy=str(policy), data=str(out / "world/ppo"), split="held_out", k=1, max_new_tokens=20, seed=seed, out=str(out / name), max_tokens=16384,
                                  device="cpu"))
    return answers_in(out / name)


def answers_in(path):
    """As `data.read_groups`, but an answer that says nothing stays: it is ill formed, not absent."""
    lines = map(json.loads, path.read_bytes().splitlines())            # bytes: in a text, str.splitlines cuts at U+2028 and U+0085 too
    return [data.Group(line["prompt"], [data.Response(r["text"], ended=r.get("ended", True)) for r in line["responses"]]) for line in lines]


# ------------------------------------------------------------------------------------------------------------ measuring

@torch.no_grad()
def drift(policy, reference, groups):
    """How far a policy has gone, on its own samples: nats a response to the reference (k1), and entropy a token.  -> dict"""
    rows, _ = encode_all(groups, policy.tokenizer, policy.trunk.config.context)
    total = np.zeros(4)
    for part in micro_batches([row.num_tokens for row in rows], 16384):
        batch = pack_rows([rows[i] for i in part])
        mine, theirs = policy(batch, return_entropy=True), reference(batch)
        k1 = ppo.kl_k1(mine.logprobs, theirs.logprobs)[batch.response_mask].double().sum()
        total += [k1, mine.entropy[batch.response_mask].double().sum(), batch.response_mask.sum(), batch.valid.sum()]
    return {"kl": total[0] / total[3], "entropy": total[1] / total[2], "tokens": total[2] / total[3]}


def opinions_of(groups, prompts=None):
    """What the panel says of a policy's responses: scores, question types, names that the passage lacks.  -> dict"""
    asked = [(prompt, response.text) for group, prompt in zip(groups, prompts or [group.prompt for group in groups]) for response in group.responses]
    readings = [world.understand(*pair) for pair in asked]
    scores = np.array([world.panel(*pair) for pair in asked])
    return {"gold": scores.mean(), "judges": dict(zip([judge.name for judge in world.PANEL], scores.mean(0).tolist())),
            "answerable": np.mean([reading.answerable for reading in readings]), "missing": np.mean([reading.missing for reading in readings]),
            "kinds": {kind: np.mean([reading.kind == kind for reading in readings]) for kind in world.KINDS}, **evaluate.distinct([text for _, text in asked])}


def policies(out, scale, seed):
    """Every policy before the panel: experts, supervised, the control that reads another passage, and PPO's arms along their way.  -> dict for results.json"""
    supervised = answer(out / "sft", out, seed, "sft.jsonl")
    experts = [data.Group(group.prompt, group.responses[:2]) for group in data.read_groups(out / "world/ppo/val.jsonl")[0]]
    prompts = [group.prompt for group in supervised]
    reference = hub.load_policy(out / "sft")
    found = {"experts": opinions_of(experts), "control": opinions_of(supervised, prompts[1:] + prompts[:1]),
             "sft": {**opinions_of(supervised), **drift(reference, reference, supervised)}}
    answers, ways = {"experts": experts, "sft": supervised}, {}
    for arm in ARMS:
        ways[arm] = []
        for steps in scale.ppo:
            answers[arm] = answers_in(out / f"ppo-{arm}-{steps}.jsonl")
            ways[arm].append({**opinions_of(answers[arm]), **json.loads((out / f"ppo-{arm}-{steps}.json").read_text())})
        found[arm] = ways[arm][-1]
    return {"policies": found, "ways": ways, "wins": duels(answers), "texts": show(answers)}


def duels(answers):
    """Win rates before the panel, first samples only, both orders asked."""
    judge = Scoring(world.gold, TIE)
    first = {name: [group.responses[0].text for group in groups] for name, groups in answers.items()}
    prompts = [group.prompt for group in answers["sft"]]
    named = [("ranking", "classification"), ("judge", "ranking"), ("scores-mean", "ranking"), ("scores-cvar", "scores-mean"), ("ranking-loose", "ranking"),
             *((arm, "sft") for arm in ARMS), ("experts", "sft")]
    return {f"{a} : {b}": evaluate.win_rate(judge, prompts, first[a], first[b]) for a, b in named if a in first and b in first}


def show(answers, n=6):
    """The first held-out passages with what every policy asks about them, and what the panel thinks of it."""
    return [{"prompt": group.prompt, "responses": {name: {"text": groups[i].responses[0].text, "gold": world.gold([group.prompt], [groups[i].responses[0].text])[0]}
                                                   for name, groups in answers.items()}} for i, group in enumerate(answers["sft"][:n])]


def outputs_on(model, path, labels):
    """A reward model's raw outputs, (K,N) a group, for a file of groups.  -> (outputs, rows, groups)"""
    groups, _ = data.read_groups(path)
    rows, _ = encode_all(groups, model.tokenizer, model.max_length, labels=labels)
    return evaluate.raw_outputs(model, rows), rows, [groups[row.index] for row in rows]


def rewards(out, scale, seed):
    """Every reward model: on the panel's ranking of held-out samples, on experts against samples, on held-out pairs; paper B's analyses.  -> dict for results.json"""
    found, training = {}, [r.scores for group in data.read_groups(out / "pairs/train.jsonl")[0] for r in group.responses]
    for name, (source, flags) in REWARDS.items():
        model = hub.load_reward_model(str(out / f"rm-{name}"))
        mine = found[name] = {}
        for where, labels in (("ranked", "place"), ("labelled", "label"), ("pairs", "place")):
            outputs, rows, groups = outputs_on(model, out / where / "val.jsonl", labels)
            means = [group.mean(-1) for group in outputs]
            mine[where] = {**evaluate.pair_accuracy(means, [row.place for row in rows]), "auc": evaluate.label_auc(means, [row.label for row in rows])}
            if where == source:
                mine["raw_deviation"] = model.raw(torch.tensor(np.concatenate(outputs))).std().item()
        if source == "pairs":                    # the last file read
            opinions = [[r.scores for r in group.responses] for group in groups]
            mine["pairs"].update(evaluate.measure(outputs, rows, None, opinions, training if name == "scores" else None))
            mine["values"] = values(outputs, rows)
            panel = [[float(-np.mean(r.scores)) for r in group.responses] for group in groups]
            mine["pairs"]["panel_accuracy"] = evaluate.pair_accuracy(means, panel)["accuracy"]
        if name == "self_mean":
            mine["before"] = untrained(out, seed)
        if name == "label":                      # on the pairs that it was fitted to, of which there are many: the form is about the loss's optimum
            outputs, rows, _ = outputs_on(model, out / "pairs/train.jsonl", "place")
            won = [float(y) for row in rows for y in row.label]
            mine["closed_form"] = evaluate.label_against_closed_form(np.concatenate(outputs), won, quantile_levels(10).numpy())
    passes = {mode: SOLID["groups"] / pass_over(out, mode) for mode in ("together", "apart")}
    return {"rewards": found, "pairs": pairs_of(out), "passes_a_step": passes}


def values(outputs, rows):
    """Rewards of chosen and rejected as histograms need them: mean, lowest and highest quantile.  -> {statistic: {chosen: [...], rejected: [...]}}"""
    read = {"mean": lambda z: z.mean(-1), "q0": lambda z: np.sort(z, -1)[:, 0], "q9": lambda z: np.sort(z, -1)[:, -1]}
    return {statistic: {kind: [to_json(float(x)) for group, row in zip(outputs, rows) for x, y in zip(of(group), row.label) if y == label]
                        for kind, label in (("chosen", 1), ("rejected", 0))} for statistic, of in read.items()}


def untrained(out, seed):
    """The deviation among a quantile model's outputs before its first step, on the held-out pairs: the same start, drawn again."""
    trunk, tok = hub.load_trunk(str(out.parent / "reader/run"), head=False)
    torch.manual_seed(seed)
    scorer = RewardModel(trunk, len(quantile_levels(10)))
    scorer.init_head()
    outputs, _, _ = outputs_on(TextReward(scorer, tok), out / "pairs/val.jsonl", "place")
    return {"within_deviation": evaluate.within_deviation(np.concatenate(outputs))}


def pairs_of(out):
    """How the held-out pairs came about: how many, and how often the judge that chose agrees with the panel's mean."""
    groups, _ = data.read_groups(out / "pairs/val.jsonl")
    better = [np.mean(group.responses[0].scores) - np.mean(group.responses[1].scores) for group in groups]
    agree = [(gap > 0) == (group.responses[0].label == 1) for gap, group in zip(better, groups) if abs(gap) > 1e-9]
    return {"n": len(groups), "panel_agrees": float(np.mean(agree))}


def one_row(out):
    """A real group as the reward model sees it: the row of the first page.  -> dict of lists"""
    policy = hub.load_policy(out / "sft")
    group = data.read_groups(out / "ranked/val.jsonl")[0][0]
    batch = pack_rows(encode_all([group], policy.tokenizer, policy.trunk.config.context)[0])
    words = [policy.tokenizer.decode([i]) or "<EOS>" for i in batch.tokens[0].tolist()]
    return {"words": words, "branch": batch.branch[0].tolist(), "positions": batch.positions[0].tolist()}


def measure(out, scale, seed):
    """Everything that the page says about this seed, in one file."""
    found = {"seed": seed, **policies(out, scale, seed), **rewards(out, scale, seed), "row": one_row(out)}
    plain = lambda x: {k: plain(v) for k, v in x.items()} if isinstance(x, dict) else [plain(v) for v in x] if isinstance(x, (list, tuple)) else \
        to_json(float(x)) if isinstance(x, (float, np.floating)) else bool(x) if isinstance(x, np.bool_) else int(x) if isinstance(x, np.integer) else x
    replace(out / "results.json", (json.dumps(plain(found), indent=1) + "\n").encode())
