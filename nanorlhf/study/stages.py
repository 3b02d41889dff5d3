"""The stages of the study: what each of them runs. Everything that is trained or sampled is a
command line of the programs that a user calls, with the flags that are written here.

A study is a folder: reader/ (the reward models' trunk, one for all seeds), seed0/, seed1/ ...
(everything else); each stage writes a run folder or files in it. A stage that is called again finds
what it did and goes on: that is all that resuming needs.
"""
import json
from dataclasses import dataclass

import numpy as np
import torch

from .. import ppo
from ..batching import encode_all, micro_batches, pack_rows
from ..heads import RewardModel
from ..io import data, hub
from ..io.files import replace
from ..losses import quantile_levels
from ..reward import TextReward
from ..run.log import to_json
from . import evaluate, small, world
from .command import command, run_command
from .judge import Scoring

GOLD = f"{world.__file__}:gold"
TIE = 0.05                   # the panel's means that round to the same multiple of this are a tie
K = 4                        # samples per passage                                  [paper A, 3.1]
MAX_TOKENS = 16384           # columns per batch where nothing is trained
TRAIN_FLAGS = dict(groups=16, warmup=20, device="cpu")                  # train_sft.py, train_rm.py
PPO_FLAGS = dict(
    groups=16, k=K, epochs=2, minibatches=2,
    lr=3e-4, schedule="constant", warmup=0,
    max_new_tokens=20, device="cpu",
)


@dataclass(frozen=True)
class Scale:
    """How much of everything."""
    seeds: int
    passages: int            # experts' for the supervised policy; half as many for rewards, for PPO
    held_out: int            # passages that everything is judged on
    reader: int              # steps of the reward models' trunk, which learns to answer questions
    sft: int                 # steps of the supervised policy
    rm: int                  # steps of a reward model ...
    rm_lr: float             # ... and its learning rate: a trunk that reads better is changed less
    ppo: tuple               # steps of PPO after which the policy is measured
    overfit: int             # passages of the small set on which pairs together and apart compare


SCALES = {
    "smoke": Scale(1, 400, 24, 20, 100, 6, 2e-3, (2, 4), 16),
    "demo": Scale(2, 8000, 250, 600, 400, 300, 2e-3, (25, 50, 80), 800),
    "full": Scale(5, 16000, 500, 1500, 800, 800, 1e-3, (25, 50, 100, 150), 1600),
}
# arm -> (reward, more flags of train_ppo.py). rm-*: a reward model of this seed;
# raw: the classification model without its normalisation.
ARMS = {
    "ranking": ("rm-ranking", {}),
    "classification": ("rm-classification", {}),
    "judge": (GOLD, {}),
    "scores-mean": ("rm-scores", {}),
    "classification-raw": ("raw", {}),
    "ranking-on-labels": ("rm-ranking-on-labels", {}),
    "classification-on-places": ("rm-classification-on-places", {}),
    "scores-cvar": ("rm-scores", {"statistic": "cvar:0.3"}),
    # a tenth of the KL penalty: what over-optimisation looks like
    "ranking-loose": ("rm-ranking", {"kl_coef": 0.02}),
}
QUANTILE = dict(loss="quantile", labels="place")
# reward model -> (data, flags of train_rm.py). Paper A's are trained on the four samples or on
# experts and samples, paper B's on pairs.
REWARDS = {
    "ranking": ("ranked", dict(loss="ranking", labels="place")),
    "classification": ("labelled", dict(loss="classification", labels="label")),
    "ranking-on-labels": ("labelled", dict(loss="ranking", labels="label")),
    "classification-on-places": ("ranked", dict(loss="classification", labels="place")),
    "scalar": ("pairs", dict(loss="ranking", labels="place")),
    "quantile": ("pairs", QUANTILE),
    "label": ("pairs", QUANTILE | dict(rank_coef=0.0)),
    "scores": ("pairs", QUANTILE | dict(quantile_target="scores", kappa=0.0, rank_coef=0.0)),
    "self_mean": ("pairs", QUANTILE | dict(quantile_target="self_mean")),
}


# ----------------------------------------------------------------------------------------- data

def texts_of(path):
    groups, _ = data.read_groups(path)
    texts = []
    for group in groups:
        texts.append(group.prompt)
        texts += [response.text for response in group.responses]
    return texts


def reader(out, scale, seed):
    """The reward models' trunk: a LLaMA with its own tokenizer that has learnt to answer questions,
    and to say when a passage does not answer one.
    """
    sizes = {"world/train": scale.passages, "world/val": scale.held_out}
    world.write(out, sizes, 6, seed + 2**62, world.reading_lines)
    small.write(out / "start", "llama", texts_of(out / "world/train.jsonl"), seed)
    run_command(command(
        "train_sft.py", data=out / "world", init=out / "start", out=out / "run",
        steps=scale.reader, lr=4e-3, seed=seed,
        eval_every=200, save_every=100, **TRAIN_FLAGS,
    ))


def make_world(out, scale, seed):
    """This seed's passages and experts' questions, and the policy's start."""
    world.write(out / "world", world.sizes(scale.passages, scale.held_out), 6, seed)
    small.write(out / "start", "gpt2", texts_of(out / "world/sft/train.jsonl"), seed)


def sft(out, scale, seed):
    run_command(command(
        "train_sft.py", data=out / "world/sft", init=out / "start", out=out / "sft",
        steps=scale.sft, lr=5e-3, seed=seed,
        eval_every=100, save_every=100, **TRAIN_FLAGS,
    ))


def sample(policy, prompts, path, seed, **flags):
    """Samples of a policy for every prompt of a part of `prompts`, in the file `path`."""
    run_command(command(
        "-m nanorlhf.sample", policy=policy, data=prompts, out=path, seed=seed,
        max_new_tokens=20, max_tokens=MAX_TOKENS, device="cpu", **flags,
    ))


def samples_of(group):
    return [response for response in group.responses if response.label == 0]


def ranked_by_panel(group):
    """The samples of a passage: places by the panel's mean, scores its ten opinions."""
    samples = samples_of(group)
    places = Scoring(world.gold, TIE).rank(group.prompt, [response.text for response in samples])
    ranked = []
    for response, place in zip(samples, places):
        scores = world.panel(group.prompt, response.text)
        ranked.append(data.Response(response.text, place, scores=scores, ended=response.ended))
    return data.Group(group.prompt, ranked)


def labelled_by_origin(group):
    """Two experts' questions, which are good, and the samples, which are bad."""
    experts = [response for response in group.responses if response.label == 1]
    labelled = []
    for response in experts[:2] + samples_of(group):
        labelled.append(data.Response(response.text, label=response.label, ended=response.ended))
    return data.Group(group.prompt, labelled)


def crowd_pairs(group, rng):
    """Ranked samples two by two: which is chosen is said by a member of the panel that is drawn for
    each pair, as in a crowd, so opinions differ. Without a preference there is no pair.
    """
    pairs = []
    for responses in zip(group.responses[::2], group.responses[1::2]):
        member = int(rng.integers(len(world.PANEL)))
        best = max(response.scores[member] for response in responses)
        pair = []
        for response in responses:
            is_chosen = response.scores[member] == best
            pair.append(data.Response(
                response.text, float(not is_chosen), int(is_chosen), response.scores, response.ended
            ))
        if pair[0].label != pair[1].label:
            pairs.append(data.Group(group.prompt, pair, extra={"judge": world.PANEL[member].name}))
    return pairs


def judge_samples(out, scale, seed):
    """Four samples per passage for the reward models: ranked/, labelled/, pairs/ and few/, a small
    part of ranked/.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 8]))
    for split, name in (("train", "train"), ("held_out", "val")):
        path = out / f"sampled-{name}.jsonl"
        if not path.exists():
            prompts = out / "world/reward"
            sample(out / "sft", prompts, path, seed, split=split, k=K, include_originals="true")
        groups, _ = data.read_groups(path)
        ranked = [ranked_by_panel(group) for group in groups]
        folders = {
            "ranked": ranked,
            "labelled": [labelled_by_origin(group) for group in groups],
            "pairs": [pair for group in ranked for pair in crowd_pairs(group, rng)],
            "few": ranked[: scale.overfit] if name == "train" else ranked,
        }
        for folder, judged in folders.items():
            (out / folder).mkdir(exist_ok=True)
            replace(out / folder / f"{name}.jsonl", data.write_groups(judged))


# ------------------------------------------------------------------------------------- training

def train_reward_model(source, name, out, seed, **flags):
    run_command(command(
        "train_rm.py", data=out / source, init=out.parent / "reader/run", out=out / f"rm-{name}",
        seed=seed, save_every=100, **flags, **TRAIN_FLAGS,
    ))


def reward_model(out, scale, seed, name):
    source, flags = REWARDS[name]
    eval_every = max(1, scale.rm // 2)
    train_reward_model(
        source, name, out, seed, steps=scale.rm, lr=scale.rm_lr, eval_every=eval_every, **flags
    )


def groups_per_pass(out, mode):
    """How many groups one pass over the few passages has: together, passages that have a pair;
    apart, pairs of unequal place.
    """
    groups, _ = data.read_groups(out / "few/train.jsonl")
    places = [[response.place for response in group.responses] for group in groups]
    pairs = evaluate.ordered_pairs(places)
    return len(pairs) if mode == "apart" else len({group for group, _, _ in pairs})


def pair_mode(out, scale, seed, mode):
    """The pairs of a passage together in one minibatch, or apart, on few passages: for both as many
    optimizer steps as one pass over the pairs apart has.
    """
    steps = max(1, groups_per_pass(out, "apart") // TRAIN_FLAGS["groups"])
    train_reward_model(
        "few", mode, out, seed, labels="place", pairs=mode, steps=steps, lr=scale.rm_lr / 2,
        schedule="constant", eval_every=max(1, steps // 6),
    )


def without_normalisation(out):
    """The classification model, its rewards raw.  -> its folder"""
    folder = out / "rm-classification-raw"
    model = hub.load_reward_model(out / "rm-classification")
    model.norm_stats = {"mean": (0.0, 1.0)}
    hub.save_reward_model(folder, model)
    return folder


def run_ppo(out, scale, seed, arm):
    """PPO in stretches; after each the policy answers the held-out passages and is measured."""
    reward, more_flags = ARMS[arm]
    if reward == "raw":
        reward = without_normalisation(out)
    elif reward != GOLD:
        reward = out / reward
    flags = PPO_FLAGS | {"kl_coef": 0.2} | more_flags
    run = out / f"ppo-{arm}"
    for steps in scale.ppo:
        path = out / f"ppo-{arm}-{steps}.json"
        if path.exists():
            continue         # a stretch that is done is not run again: the run is past it
        run_command(command(
            "train_ppo.py", data=out / "world/ppo", policy=out / "sft", reward=reward, out=run,
            steps=steps, seed=seed, eval_every=10**9, save_every=50, **flags,
        ))
        groups = answer(run, out, seed, path.with_suffix(".jsonl"))
        moved = kl_to_sft(hub.load_policy(run), hub.load_policy(out / "sft"), groups)
        replace(path, json.dumps({"steps": steps, **moved}).encode())


def answer(policy, out, seed, path):
    """One answer to each held-out passage, from the same draws for every policy.  -> groups

    They are in the file `path`, too. One, because `sample` draws a second one again where it
    repeats the first: that would no longer be the policy's own distribution.
    """
    if not path.exists():
        sample(policy, out / "world/ppo", path, seed, split="held_out", k=1)
    return answers_in(path)


def answers_in(path):
    """As `data.read_groups`, but an empty answer stays: it is ill formed, not absent."""
    groups = []
    for line in path.read_bytes().splitlines():    # str.splitlines cuts at U+2028 and U+0085 too
        row = json.loads(line)
        responses = [data.Response(r["text"], ended=r.get("ended", True)) for r in row["responses"]]
        groups.append(data.Group(row["prompt"], responses))
    return groups


# ------------------------------------------------------------------------- measuring: policies

@torch.no_grad()
def kl_to_sft(policy, reference, groups):
    """How far a policy is from the reference, on the policy's own samples.

    -> {"kl": nats per response (k1), "entropy": nats per token, "tokens": per response}
    """
    rows, _ = encode_all(groups, policy.tokenizer, policy.trunk.config.context)
    total = np.zeros(4)
    for indices in micro_batches([row.num_tokens for row in rows], MAX_TOKENS):
        batch = pack_rows([rows[i] for i in indices])
        mask = batch.response_mask
        output = policy(batch, return_entropy=True)
        k1 = ppo.kl_k1(output.logprobs, reference(batch).logprobs)[mask].double().sum()
        entropy = output.entropy[mask].double().sum()
        total += [k1, entropy, mask.sum(), batch.valid.sum()]
    k1, entropy, tokens, responses = total
    return {"kl": k1 / responses, "entropy": entropy / tokens, "tokens": tokens / responses}


def opinions_of(groups, prompts=None):
    """What the panel says of a policy's responses: scores, question types, names that the passage
    lacks.  prompts: judged as if asked about these  -> dict
    """
    prompts = prompts or [group.prompt for group in groups]
    asked = []
    for group, prompt in zip(groups, prompts):
        asked += [(prompt, response.text) for response in group.responses]
    readings = [world.understand(*pair) for pair in asked]
    types = [reading.question_type for reading in readings]
    scores = np.array([world.panel(*pair) for pair in asked])
    names = [member.name for member in world.PANEL]
    return {
        "gold": scores.mean(),
        "judges": dict(zip(names, scores.mean(0).tolist())),
        "answerable": np.mean([reading.answerable for reading in readings]),
        "missing": np.mean([reading.missing for reading in readings]),
        "kinds": {name: types.count(name) / len(types) for name in world.QUESTION_TYPES},
        **evaluate.distinct([text for _, text in asked]),
    }


def measure_policies(out, scale, seed):
    """Every policy as the panel sees it: experts, supervised, PPO's arms after each stretch, and a
    control, the supervised answers as if asked about another passage.  -> dict for results.json
    """
    supervised = answer(out / "sft", out, seed, out / "sft.jsonl")
    groups, _ = data.read_groups(out / "world/ppo/val.jsonl")
    experts = [data.Group(group.prompt, group.responses[:2]) for group in groups]
    prompts = [group.prompt for group in supervised]
    reference = hub.load_policy(out / "sft")
    results = {
        "experts": opinions_of(experts),
        "control": opinions_of(supervised, prompts[1:] + prompts[:1]),
        "sft": opinions_of(supervised) | kl_to_sft(reference, reference, supervised),
    }
    answers = {"experts": experts, "sft": supervised}
    stretches = {}
    for arm in ARMS:
        stretches[arm] = []
        for steps in scale.ppo:
            path = out / f"ppo-{arm}-{steps}.json"
            answers[arm] = answers_in(path.with_suffix(".jsonl"))
            stretches[arm].append(opinions_of(answers[arm]) | json.loads(path.read_text()))
        results[arm] = stretches[arm][-1]
    return {
        "policies": results,
        "ways": stretches,
        "wins": comparisons(answers),
        "texts": example_answers(answers),
    }


def comparisons(answers):
    """Win rates as the panel judges, first samples only, both orders asked.  -> {"a : b": dict}"""
    judge = Scoring(world.gold, TIE)
    first = {}
    for name, groups in answers.items():
        first[name] = [group.responses[0].text for group in groups]
    prompts = [group.prompt for group in answers["sft"]]
    pairs = [
        ("ranking", "classification"), ("judge", "ranking"), ("scores-mean", "ranking"),
        ("scores-cvar", "scores-mean"), ("ranking-loose", "ranking"),
    ]
    pairs += [(arm, "sft") for arm in ARMS]
    wins = {}
    for a, b in [*pairs, ("experts", "sft")]:
        wins[f"{a} : {b}"] = evaluate.win_rate(judge, prompts, first[a], first[b])
    return wins


def example_answers(answers, n=6):
    """The first held-out passages with every policy's question and the panel's mean for it."""
    examples = []
    for i, group in enumerate(answers["sft"][:n]):
        responses = {}
        for name, groups in answers.items():
            text = groups[i].responses[0].text
            responses[name] = {"text": text, "gold": world.gold([group.prompt], [text])[0]}
        examples.append({"prompt": group.prompt, "responses": responses})
    return examples


# -------------------------------------------------------------------- measuring: reward models

def outputs_on(model, path, labels):
    """A reward model's raw outputs, (K,N) per group of a file.  -> (outputs, rows, groups)"""
    groups, _ = data.read_groups(path)
    rows, _ = encode_all(groups, model.tokenizer, model.max_length, labels=labels)
    return evaluate.raw_outputs(model, rows), rows, [groups[row.index] for row in rows]


def measure_reward_model(out, seed, name):
    """One reward model: on the panel's ranking of held-out samples, on experts against samples, on
    held-out pairs; for paper B's models its analyses.  -> dict
    """
    source, _ = REWARDS[name]
    model = hub.load_reward_model(out / f"rm-{name}")
    results = {}
    for folder, labels in (("ranked", "place"), ("labelled", "label"), ("pairs", "place")):
        outputs, rows, groups = outputs_on(model, out / folder / "val.jsonl", labels)
        means = [group.mean(-1) for group in outputs]
        results[folder] = evaluate.pair_accuracy(means, [row.place for row in rows])
        results[folder]["auc"] = evaluate.label_auc(means, [row.label for row in rows])
        if folder == source:
            raw = model.raw(torch.tensor(np.concatenate(outputs)))
            results["raw_deviation"] = raw.std().item()
    if source == "pairs":                        # the file that was read last
        opinions = opinions_in(groups)
        training = None
        if name == "scores":
            train_groups, _ = data.read_groups(out / "pairs/train.jsonl")
            training = [scores for group in opinions_in(train_groups) for scores in group]
        results["pairs"] |= evaluate.measure(outputs, rows, None, opinions, training)
        places = [[-np.mean(scores) for scores in group] for group in opinions]
        accuracy = evaluate.pair_accuracy(means, places)["accuracy"]
        results["pairs"]["panel_accuracy"] = accuracy
        results["values"] = reward_values(outputs, rows)
    if name == "self_mean":
        results["before"] = untrained(out, seed)
    if name == "label":
        # On the pairs that it was fitted to, of which there are many: the closed form is about the
        # loss's optimum.
        outputs, rows, _ = outputs_on(model, out / "pairs/train.jsonl", "place")
        labels = [float(label) for row in rows for label in row.label]
        levels = quantile_levels(10).numpy()
        closed_form = evaluate.label_against_closed_form(np.concatenate(outputs), labels, levels)
        results["closed_form"] = closed_form
    return results


def opinions_in(groups):
    return [[response.scores for response in group.responses] for group in groups]


def measure_rewards(out, seed):
    """Every reward model, and how the held-out pairs came about.  -> dict for results.json"""
    passes = {}
    for mode in ("together", "apart"):
        passes[mode] = TRAIN_FLAGS["groups"] / groups_per_pass(out, mode)
    return {
        "rewards": {name: measure_reward_model(out, seed, name) for name in REWARDS},
        "pairs": crowd_agreement(out),
        "passes_a_step": passes,
    }


def reward_values(outputs, rows):
    """Rewards of chosen and rejected for histograms: mean, lowest and highest quantile.

    -> {statistic: {"chosen": [...], "rejected": [...]}}
    """
    outputs = np.concatenate(outputs)
    labels = np.concatenate([row.label for row in rows])
    ordered = np.sort(outputs, -1)
    statistics = {"mean": outputs.mean(-1), "q0": ordered[:, 0], "q9": ordered[:, -1]}
    values = {}
    for name, rewards in statistics.items():
        chosen = rewards[labels == 1].tolist()
        values[name] = {"chosen": chosen, "rejected": rewards[labels == 0].tolist()}
    return values


def untrained(out, seed):
    """The deviation among a quantile model's outputs before its first step, on the held-out pairs:
    the same start, drawn again.
    """
    trunk, tokenizer = hub.load_trunk(out.parent / "reader/run", head=False)
    torch.manual_seed(seed)
    model = RewardModel(trunk, len(quantile_levels(10)))
    model.init_head()
    outputs, _, _ = outputs_on(TextReward(model, tokenizer), out / "pairs/val.jsonl", "place")
    return {"within_deviation": evaluate.within_deviation(np.concatenate(outputs))}


def crowd_agreement(out):
    """The held-out pairs: how many, and how often the choice agrees with the panel's mean."""
    groups, _ = data.read_groups(out / "pairs/val.jsonl")
    agree = []
    for group in groups:
        first, second = group.responses
        gap = np.mean(first.scores) - np.mean(second.scores)
        if abs(gap) > 1e-9:
            agree.append((gap > 0) == (first.label == 1))
    return {"n": len(groups), "panel_agrees": float(np.mean(agree))}


def one_row(out):
    """A real group as the models see it, for the drawing of a row on the page.  -> dict of lists"""
    policy = hub.load_policy(out / "sft")
    groups, _ = data.read_groups(out / "ranked/val.jsonl")
    rows, _ = encode_all(groups[:1], policy.tokenizer, policy.trunk.config.context)
    batch = pack_rows(rows)
    words = [policy.tokenizer.decode([token]) or "<EOS>" for token in batch.tokens[0].tolist()]
    branch = batch.branch[0].tolist()
    return {"words": words, "branch": branch, "positions": batch.positions[0].tolist()}


def to_plain(value):
    """numpy's numbers become Python's, floats as JSON allows them."""
    if isinstance(value, dict):
        return {key: to_plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(inner) for inner in value]
    return to_json(value.item() if isinstance(value, np.generic) else value)


def measure(out, scale, seed):
    """Everything that the page says about this seed, in one file."""
    policies = measure_policies(out, scale, seed)
    results = {"seed": seed, **policies, **measure_rewards(out, seed), "row": one_row(out)}
    replace(out / "results.json", (json.dumps(to_plain(results), indent=1) + "\n").encode())
