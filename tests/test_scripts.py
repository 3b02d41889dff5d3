"""The scripts as a user meets them: the chain of stages, mistakes, interruptions. Models have one layer of width 32, data 24 prompts.

Most runs happen in this process, through the same main(parse(...)) as from the command line; signals and exit codes get a real one.
"""
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_ppo
import train_rm
import train_sft
from nanorlhf import gpt2, llama, sample
from nanorlhf.batching import Row, Stream
from nanorlhf.generate import Sampling, generate
from nanorlhf.heads import Policy
from nanorlhf.io import data, hub, tokenizer
from nanorlhf.reward import FunctionReward
from nanorlhf.run import cli, dist, run_folder
from nanorlhf.run.log import Log

ROOT = Path(__file__).resolve().parent.parent
ANSWERS = ((" it was glad", 0, 1, [0.9, 0.7]), (" it was calm", 1, 0, [0.1, 0.2]), (" it was sad", 2, 0, [-0.8, -0.6]))   # text, place, label, scores
PROMPTS = [f"the {who} saw the {what}:" for who in ("fox", "king", "queen", "bear", "crow", "wolf") for what in ("wood", "house", "river", "tower")]
FUNCTIONS = '''
def glad(prompts, responses):
    """The text that the tests want: 1, half of it for the first word."""
    return [(text == " it was glad") + 0.1 * text.startswith(" it") for text in responses]

def one(prompts, responses):
    return [1] * len(responses)

def raises(prompts, responses):
    raise ValueError("two\\nlines")

def leaves(prompts, responses):
    raise SystemExit("bye")

def nan(prompts, responses):
    return [float("nan")] * len(responses)

def short(prompts, responses):
    return [0.0] * (len(responses) - 1)

def nothing(prompts, responses):
    return None

number = 3
'''


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def judged(kind, prompts=PROMPTS):
    """Groups JSONL with one kind of judgement."""
    return [{"prompt": prompt, "responses": [{"text": text, **({kind: dict(place=place, label=label, scores=scores)[kind]} if kind else {})}
                                             for text, place, label, scores in ANSWERS]} for prompt in prompts]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Random policies of both families, each with its own tokenizer; the same groups with each kind of judgement; HH; reward functions."""
    folder = tmp_path_factory.mktemp("world")
    texts = [prompt + text for prompt in PROMPTS for text, *_ in ANSWERS]
    torch.manual_seed(0)
    tok = tokenizer.train_bpe(texts, 300)
    hub.save_policy(folder / "gpt2", Policy(gpt2.GPT2(gpt2.GPT2Config(vocab_size=tok.vocab_size, n_positions=48, n_embd=32, n_layer=1, n_head=2))), tok)
    tok = tokenizer.train_sentencepiece(texts, 300)
    hub.save_policy(folder / "llama", Policy(llama.Llama(llama.LlamaConfig(
        vocab_size=tok.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64))), tok)
    for kind in ("place", "label", "scores", ""):
        jsonl(folder / f"{kind or 'none'}.jsonl", judged(kind))
    (folder / "hh").mkdir()
    pairs = [{"chosen": f"\n\nHuman: {p}\n\nAssistant: glad", "rejected": f"\n\nHuman: {p}\n\nAssistant: sad"} for p in PROMPTS]
    jsonl(folder / "hh" / "train.jsonl", pairs[:20])
    jsonl(folder / "hh" / "test.jsonl", pairs[20:])
    (folder / "reward.py").write_text(FUNCTIONS)
    return folder


@pytest.fixture(autouse=True)
def signals():
    """A run takes over Ctrl-C; a test gives it back."""
    kept = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield
    for name, handler in kept.items():
        signal.signal(name, handler)


def words(flags):
    return [f"--{name}={value}" for name, value in flags.items()]


def start(script, **flags):
    """Runs a script in this process.  -> its run folder"""
    script.main(cli.parse(script.Config, words(flags)))
    return Path(flags.get("out", ""))


def metrics(out, name="lr"):
    """The rows of metrics.jsonl that have this number: `lr` of steps, eval_ ones of evaluations."""
    return [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if name in row]


SFT = dict(steps=120, groups=8, lr=5e-3, warmup=0, device="cpu", eval_every=60, save_every=60)
RM = dict(steps=30, groups=8, lr=3e-3, warmup=0, device="cpu", eval_every=15, save_every=30)
PPO = dict(steps=2, groups=4, k=2, max_new_tokens=12, minibatches=2, epochs=2, lr=1e-3, device="cpu", eval_every=2, save_every=2)


@pytest.fixture(scope="session")
def sft(world):
    """A supervised policy of each family that says one of the three answers."""
    return {family: start(train_sft, data=world / "none.jsonl", init=world / family, out=world / f"sft_{family}", **SFT) for family in ("gpt2", "llama")}


@pytest.fixture(scope="session")
def sampled(world, sft):
    """What the GPT-2 policy says, judged by a function, beside the data's own answers."""
    sample.main(cli.parse(sample.Config, words(dict(policy=sft["gpt2"], data=world / "none.jsonl", out=world / "sampled.jsonl", k=3, max_new_tokens=12, include_originals=True,
                                                       judge=f"{world / 'reward.py'}:glad", device="cpu"))))
    return world / "sampled.jsonl"


@pytest.fixture(scope="session")
def reward_models(world):
    """A LLaMA scalar model and a GPT-2 quantile model."""
    return {"llama": start(train_rm, data=world / "place.jsonl", init=world / "llama", out=world / "rm_llama", **RM),
            "gpt2": start(train_rm, data=world / "place.jsonl", init=world / "gpt2", out=world / "rm_gpt2", loss="quantile", **RM)}


# ------------------------------------------------------------------------------------------------------------- the chain

@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sft_learns(family, sft, world):
    rows, held = metrics(sft[family]), metrics(sft[family], "eval_loss")
    assert [row["step"] for row in rows] == list(range(120)) and [row["step"] for row in held] == [-1, 59, 119]
    assert all({"tokens", "loss", "grad_norm", "padding", *MEASURED} <= row.keys() for row in rows)
    assert rows[0]["loss"] > 5 and rows[-1]["loss"] < 1 and held[-1]["eval_loss"] < held[0]["eval_loss"] / 4     # ln 300 = 5.7 at first
    policy = hub.load_policy(sft[family])
    assert policy.trunk.family == family
    row = Row(policy.tokenizer.encode_prompt(PROMPTS[0]), [])
    sampling = Sampling(1, 12, policy.tokenizer.eos_id, 0, Stream.SAMPLE, temperature=0)
    (ids,), = generate(policy.trunk, [row], sampling, 0)
    assert ids[-1] == policy.tokenizer.eos_id and policy.tokenizer.decode(ids[:-1]) in [text for text, *_ in ANSWERS]
    # tokens: columns that are not padding, of the groups of this step
    tok = policy.tokenizer
    size = sum(len(tok.encode(text)) + 1 for text, *_ in ANSWERS)
    assert 8 * size < rows[0]["tokens"] < 8 * (size + 20)


def test_sampled_groups(sampled, sft):
    groups, dropped = data.read_groups(sampled)
    assert len(groups) == 22 and set(+dropped) <= {"empty response"}      # 24 prompts, every tenth held out
    assert sum(len(group.responses) for group in groups) + dropped["empty response"] == 22 * 6
    for group in groups:
        labels = [r.label for r in group.responses]
        assert labels == [1, 1, 1] + [0] * (len(labels) - 3)              # the data's own three, then the samples
        best = max(r.scores[0] for r in group.responses)
        assert all((r.place == 0) == (r.scores[0] == best) for r in group.responses)
        for r in group.responses:
            assert r.scores == [pytest.approx((r.text == " it was glad") + 0.1 * r.text.startswith(" it"))]
            assert r.place == sum(other.scores[0] > r.scores[0] for other in group.responses)      # an empty sample scores least
    assert any(r.text in [text for text, *_ in ANSWERS] for group in groups for r in group.responses[3:])


def test_sample_shows_two_policies(sft, capsys):
    sample.main(cli.parse(sample.Config, words(dict(policy=sft["gpt2"], compare_with=sft["llama"], prompt=PROMPTS[0], k=2, max_new_tokens=12, temperature=0))))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6 and printed[0] == f"{sft['gpt2']}:" and printed[3] == f"{sft['llama']}:"
    assert printed[1] == printed[2] and printed[4] == printed[5]              # temperature 0 says the same each time


LOSSES = [("ranking", "label"), ("classification", "label"), ("quantile", "label"), ("quantile", "scores"), ("quantile", "self_mean")]


@pytest.mark.parametrize("loss, target, pairs", [*((*pair, "together") for pair in LOSSES), ("ranking", "label", "apart")])
def test_reward_model_learns(loss, target, pairs, sampled, world, tmp_path):
    # From what the policy said, judged; a classifier from labels, because the judge's many ties leave the bad half empty.
    out = start(train_rm, data=world / "label.jsonl" if loss == "classification" else sampled, init=world / "llama", out=tmp_path / "rm", loss=loss, quantile_target=target, pairs=pairs, **RM)
    rows, held = metrics(out), metrics(out, "eval_loss")
    average = lambda part: sum(row["loss"] for row in part) / len(part)
    assert average(rows[-5:]) < average(rows[:5]) / 1.5
    assert all({"tokens", "lr", "grad_norm", "padding", *MEASURED} <= row.keys() for row in rows)
    assert {"eval_loss", "eval_accuracy", "eval_auc"} <= held[-1].keys() and held[-1]["eval_accuracy"] > 0.7
    assert ("eval_crossing" in held[-1]) == (loss == "quantile")
    model = hub.load_reward_model(out)
    assert model.model.score.out_features == (10 if loss == "quantile" else 1)
    assert model.transform == ("tanh_half" if loss == "classification" else "identity")
    texts = [text for text, *_ in ANSWERS]
    scores = model.score_texts(PROMPTS, [texts] * len(PROMPTS), [[True] * 3] * len(PROMPTS))
    assert scores[:, 0].mean() > scores[:, 2].mean() + 0.5                 # glad over sad, in deviations


def test_a_reward_model_from_a_reward_model(world, reward_models, tmp_path, capsys):
    # ten quantiles before, one score now: the trunk is the old one's, the head is new
    quantile = reward_models["gpt2"]
    flags = dict(data=world / "label.jsonl", init=quantile, **{**RM, "steps": 1, "lr": 0})
    out = start(train_rm, loss="classification", out=tmp_path / "rm", **flags)
    printed = capsys.readouterr().out
    assert f"weights from {quantile / 'model'}" in printed and "deviation within prompts" in printed
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (quantile, out))
    assert before.pop("score.weight").shape == (10, 32) and after.pop("score.weight").shape == (1, 32)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    refuse(capsys, train_sft, dict(data=world / "label.jsonl", init=quantile, out=tmp_path / "sft", **SFT), "a reward model")


def test_the_floor_is_said_and_so_is_a_mix_without_pairs(world, tmp_path, capsys):
    # a learning rate of 0 leaves a head of deviation .2 at the most, tanh halves it: under .1
    flags = dict(init=world / "gpt2", loss="classification", **{**RM, "steps": 1, "lr": 0})
    start(train_rm, data=world / "label.jsonl", out=tmp_path / "rm", **flags)
    assert "under the floor 0.1: rewards will deviate by 0." in capsys.readouterr().out
    lone = [{"prompt": prompt, "responses": [{"text": ANSWERS[i % 3][0], "label": ANSWERS[i % 3][2]}]} for i, prompt in enumerate(PROMPTS)]
    start(train_rm, data=jsonl(tmp_path / "lone.jsonl", lone), out=tmp_path / "lone", **flags)
    assert "deviation over the mix, as no prompt has two responses, 0." in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["place", "label", "scores", "hh"])
@pytest.mark.parametrize("loss, target", LOSSES)
def test_any_loss_on_any_labels(loss, target, kind, world, tmp_path, capsys):
    source = world / "hh" if kind == "hh" else world / f"{kind}.jsonl"
    flags = dict(data=source, init=world / "gpt2", out=tmp_path / "rm", loss=loss, quantile_target=target, **{**RM, "steps": 2})
    if target == "scores" and kind != "scores":
        refuse(capsys, train_rm, flags, "--quantile_target scores", str(source))      # else half of the loss would be silently 0
        return
    rows = metrics(start(train_rm, **flags))
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows) and len(rows) == 2
    assert metrics(tmp_path / "rm", "eval_pairs")[-1]["eval_pairs"] > 0


# ------------------------------------------------------------------------------------------------------------------ PPO

MEASURED = ("seconds", "tokens_per_second", "mfu", "memory_gb")                        # what differs from run to run
PPO_NAMES = {"step", "seconds", "tokens", "score", "score_normalised", "reward", "kl", "kl_k3", "approx_kl", "entropy", "ratio_first", "clip_fraction",
             "value_clip_fraction", "explained_variance", "response_length", "eos_rate", "distinct", "lr", "grad_norm", "kl_coef", "tokens_per_second"}


@pytest.mark.parametrize("family, other", [("gpt2", "llama"), ("llama", "gpt2")])
def test_ppo_on_a_reward_model_of_another_family(family, other, world, sft, reward_models, tmp_path):
    out = start(train_ppo, data=world / "none.jsonl", policy=sft[family], reward=reward_models[other], out=tmp_path / "ppo", **PPO)
    rows, held = metrics(out), metrics(out, "eval_score")
    assert len(rows) == 2 and all(PPO_NAMES <= row.keys() for row in rows)
    assert [row["step"] for row in held] == [-1, 1] and {"eval_kl", "eval_entropy", "eval_eos_rate"} <= held[0].keys()
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and held[0]["eval_kl"] == pytest.approx(0, abs=1e-6)      # the policy is its own reference
    assert all(abs(row["ratio_first"] - 1) < 1e-4 for row in rows)
    assert hub.load_policy(out).trunk.family == family
    model = hub.load_reward_model(reward_models[other])
    assert rows[0]["score_normalised"] == pytest.approx((rows[0]["score"] - model.mean) / model.std, rel=1e-4)


def test_ppo_learns(world, sft, tmp_path):
    out = start(train_ppo, data=world / "none.jsonl", policy=sft["gpt2"], reward=f"{world / 'reward.py'}:glad", out=tmp_path / "ppo",
                **{**PPO, "steps": 30, "groups": 8, "k": 4, "lr": 2e-3, "kl_coef": 0.05, "eval_every": 30})
    scores = [row["score"] for row in metrics(out)]
    assert scores[0] < 0.7 and sum(scores[-3:]) / 3 > 1.0                  # 1.1 is the most
    first, last = metrics(out, "eval_score")
    assert last["eval_score"] > first["eval_score"] + 0.3
    assert metrics(out)[-1]["kl"] > 0.3                                    # all mass on one of three answers: about ln 3


@pytest.mark.parametrize("dtype, max_tokens, bound", [("float32", 8192, 0), ("float32", 40, 1e-4), ("float64", 40, 1e-10)])
def test_first_ratio_is_one(dtype, max_tokens, bound, world, sft, tmp_path):
    # one minibatch in one micro-batch is the packing of the rollout; with four minibatches, or rows one by one, it is another
    flags = {**PPO, "minibatches": 4 if bound else 1, "max_tokens": max_tokens, "dtype": dtype, "groups": 8}
    out = start(train_ppo, data=world / "none.jsonl", policy=sft["gpt2"], reward=f"{world / 'reward.py'}:glad", out=tmp_path / "ppo", **flags)
    for row in metrics(out):
        assert abs(row["ratio_first"] - 1) <= bound, row["ratio_first"]


def test_nothing_moves_without_a_learning_rate(world, sft, tmp_path):
    out = start(train_ppo, data=world / "none.jsonl", policy=sft["gpt2"], reward=f"{world / 'reward.py'}:glad", out=tmp_path / "ppo", **{**PPO, "lr": 0, "steps": 3})
    for row in metrics(out):
        assert abs(row["kl"]) < 1e-6 and abs(row["approx_kl"]) < 1e-6 and row["clip_fraction"] == 0 and row["grad_norm"] > 0
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (sft["gpt2"], out))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("target", [1e-4, 1e4])
def test_kl_coef_follows_the_kl(target, world, sft, tmp_path):
    # beta' = beta (1 + clip(KL / target - 1, -.2, .2) n / horizon), n = 4 prompts x 2 responses
    out = start(train_ppo, data=world / "none.jsonl", policy=sft["gpt2"], reward=f"{world / 'reward.py'}:glad", out=tmp_path / "ppo",
                **{**PPO, "steps": 4, "kl_coef_target": target, "kl_horizon": 40})
    rows = metrics(out)
    for row, after in zip(rows, rows[1:]):
        step = min(max(row["kl"] / target - 1, -0.2), 0.2)
        assert after["kl_coef"] == pytest.approx(row["kl_coef"] * (1 + step * 8 / 40), rel=1e-5)
        assert target == 1e-4 or step == -0.2
    assert target == 1e4 or any(row["kl"] > target for row in rows[:-1])      # it has moved away: beta rose


def test_target_kl_ends_the_passes(world, sft, tmp_path):
    flags = {**PPO, "steps": 1, "epochs": 6, "lr": 5e-3}
    updates = [metrics(start(train_ppo, data=world / "none.jsonl", policy=sft["gpt2"], reward=f"{world / 'reward.py'}:glad",
                             out=tmp_path / str(target), **flags, target_kl=target))[0]["updates"] for target in (0, 1e-6, 1e6)]
    assert updates[0] == updates[2] == 12 and updates[1] == 2               # the pass in which it was passed is finished: 2 minibatches


@pytest.mark.parametrize("detach", [True, False])
def test_detach_value(detach, world, sft, tmp_path):
    # one token a response, one reward for all, the value still 0: every advantage is equal, whitened 0. The value's gradient is left.
    flags = {**PPO, "max_new_tokens": 1, "kl_coef": 0, "eos_penalty": 0, "vf_coef": 1, "steps": 1, "detach_value": detach}
    out = start(train_ppo, data=world / "none.jsonl", policy=sft["gpt2"], reward=f"{world / 'reward.py'}:one", out=tmp_path / "ppo", **flags)
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (sft["gpt2"], out))
    assert all(torch.equal(before[name], after[name]) for name in before) == detach
    assert metrics(out)[-1]["grad_norm"] > 0 and load_file(run_folder.states(out)[0])["model.value_head.weight"].abs().max() > 0


def test_statistic(world, sft, reward_models, tmp_path, capsys):
    flags = dict(data=world / "none.jsonl", policy=sft["llama"], **{**PPO, "steps": 1})
    found = {name: metrics(start(train_ppo, reward=reward_models["gpt2"], out=tmp_path / name.replace(":", ""), statistic=name, **flags))[0]
             for name in ("mean", "q0", "cvar:0.3")}
    assert found["q0"]["score"] < found["cvar:0.3"]["score"] < found["mean"]["score"]            # the lowest; the mean of the lowest three; of all
    assert all(abs(row["score_normalised"]) < 4 for row in found.values())                       # each by a normalisation of its own
    for name in ("q0", "cvar:0.3"):
        refuse(capsys, train_ppo, dict(reward=reward_models["llama"], out=tmp_path / "no", statistic=name, **flags), f"--statistic {name}", "one output")
    for name in ("q10", "cvar:0", "median"):
        refuse(capsys, train_ppo, dict(reward=reward_models["gpt2"], out=tmp_path / "no", statistic=name, **flags), f"--statistic {name}")


def a_rollout(world, sft, reward, **more):
    settings = train_ppo.Config(data="", policy="", reward="", out="", **{**PPO, "groups": 8, "k": 4, "max_new_tokens": 5, **more})
    policy = Policy(hub.load_trunk(sft["gpt2"])[0], value_head=True)
    tok = hub.load_policy(sft["gpt2"]).tokenizer
    prompts, texts, _ = train_ppo.encode_prompts([data.Group(prompt, []) for prompt in PROMPTS], tok, settings, 48)
    setup = train_ppo.Setup(settings, dist.setup("cpu", 0), tok, policy, policy, reward)
    rows = train_ppo.generate_responses(setup, prompts[:8], Stream.ROLLOUT, 0, 4)
    return train_ppo.score_responses(setup, rows, texts, 0), setup


def test_the_penalty_is_for_what_did_not_end(world, sft):
    reward = FunctionReward(f"{world / 'reward.py'}:glad")
    rollout, setup = a_rollout(world, sft, reward, eos_penalty=0.5, max_new_tokens=5, temperature=2.0)
    tok = setup.tokenizer
    assert 0 < rollout.ended.double().mean() < 1                            # some of each
    for g, row in enumerate(rollout.rows):
        for k, ids in enumerate(row.responses):
            ended = ids[-1] == tok.eos_id
            assert rollout.ended[g, k] == ended and tok.eos_id not in ids[:-1] and (ended or len(ids) == 5)
            assert rollout.response_mask[g, k].sum() == len(ids)
            assert rollout.texts[g][k] == tok.decode([i for i in ids if i != tok.eos_id])
            assert rollout.scores[g, k] == rollout.raw[g, k] - (0 if ended else 0.5)


def test_a_rollout_is_normalised_once(world, sft, reward_models):
    model = hub.load_reward_model(reward_models["gpt2"])
    assert abs(model.mean) > 0.01 and abs(model.std - 1) > 0.01             # so that twice would be seen
    rollout, setup = a_rollout(world, sft, model, max_new_tokens=12)
    texts = [PROMPTS[row.index] for row in rollout.rows], rollout.texts, rollout.ended.tolist()
    assert torch.equal(rollout.raw, model.score_texts(*texts, normalised=False)) and torch.equal(rollout.normalised, model.score_texts(*texts))
    assert torch.allclose(rollout.scores, (rollout.raw - model.mean) / model.std - ~rollout.ended * 1.0)


def test_scores_are_clipped_before_the_penalty(world, sft):
    class Wild:
        normalise = staticmethod(lambda raw: 100 * raw)

        def score_texts(self, prompts, responses, ended, normalised=True):
            return torch.tensor([[1.0, -1.0, 0.05, -0.05]] * len(prompts))
    rollout, setup = a_rollout(world, sft, Wild(), max_new_tokens=1, eos_penalty=6)
    assert not rollout.ended.any()                                          # one token is not enough
    assert rollout.normalised[0].tolist() == pytest.approx([10, -10, 5, -5]) and rollout.scores[0].tolist() == pytest.approx([4, -16, -1, -11])
    train_ppo.compute_logprobs_and_values(setup, rollout)
    numbers = train_ppo.rollout_stats(rollout, train_ppo.compute_advantages(rollout, 0.1, setup.config), 0.1)
    assert numbers["score_clipped"] == 0.5 and numbers["score_normalised"] == pytest.approx(0) and numbers["reward"] == pytest.approx(-6)


# -------------------------------------------------------------------------------------------------------------- mistakes

def tree(path):
    """All that lies at a path: None, bytes, or the tree of a folder."""
    path = Path(path)
    if not path.exists():
        return None
    return path.read_bytes() if path.is_file() else {p.name: tree(p) for p in path.iterdir()}


def refuse(capsys, script, flags, *says):
    """One line on stderr, exit code 2, and the run folder as it was."""
    capsys.readouterr()
    before, sys_argv = tree(flags.get("out", "/nowhere")), sys.argv
    sys.argv = [script.__name__, *words(flags)]
    try:
        with pytest.raises(SystemExit) as end:
            cli.run_script(script.main, script.Config)
    finally:
        sys.argv = sys_argv
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert all(word in error for word in says), (error, says)
    assert tree(flags.get("out", "/nowhere")) == before, f"left something behind: {error}"


def test_mistakes_in_data(world, tmp_path, capsys):
    def file(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    good = json.dumps(judged("place")[0])
    file("csv/questions/train/a-questions.csv", "cor_section,asked\n1,why?\n")
    file("csv/section-stories/train/a-story.csv", "section,text\n1,once\n")
    for path, says in ((tmp_path / "missing.jsonl", ["no such file"]), (file("empty.jsonl", ""), ["empty"]), (file("blank.jsonl", "\n \n"), ["empty"]),
                       (file("broken.jsonl", f"{good}\n{good[:40]}\n"), ["broken.jsonl:2", "not JSON"]),
                       (file("list.jsonl", "[1]\n"), ["list.jsonl:1"]), (file("noprompt.jsonl", '{"responses": []}\n'), ["noprompt.jsonl:1", "prompt"]),
                       (file("text.jsonl", '{"prompt": "a", "responses": [{"place": 0}]}\n'), ["text.jsonl:1", "text"]),
                       (file("nan.jsonl", '{"prompt": "a", "responses": [{"text": "b", "place": NaN}]}\n'), ["nan.jsonl:1", "place"]),
                       (file("hh/train.jsonl", '{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b"}\n').parent, ["train.jsonl:1", "rejected"]),
                       (tmp_path / "csv", ["a-questions.csv:1", "'question'"]), (file("folder/x.txt", "a").parent, ["train.jsonl"]),
                       (world / "none.jsonl", ["no group left to train on"])):
        refuse(capsys, train_rm, dict(data=path, init=world / "gpt2", out=tmp_path / "out", **RM), *says)
    refuse(capsys, train_rm, dict(data=world / "place.jsonl", init=world / "gpt2", out=tmp_path / "out", labels="scores", **RM), "--labels scores")
    promptless = jsonl(tmp_path / "bare.jsonl", [{"prompt": "a"}])
    refuse(capsys, train_sft, dict(data=promptless, init=world / "gpt2", out=tmp_path / "out", **SFT), "no group left")
    long = jsonl(tmp_path / "long.jsonl", [{"prompt": "the fox " * 40, "responses": [{"text": " glad"}]}])
    refuse(capsys, train_sft, dict(data=long, init=world / "gpt2", out=tmp_path / "out", **SFT), "over 48 tokens")
    refuse(capsys, train_ppo, dict(data=long, policy=world / "gpt2", reward=f"{world / 'reward.py'}:glad", out=tmp_path / "out", **PPO), "no prompt fits")


def edited(folder, to, values=None, tensors=None):
    """A copy of a model folder with other config values or tensors (None takes one away)."""
    shutil.copytree(folder, to)
    (to / "SHA256SUMS").unlink()         # it would notice before anything is read
    for name, change, read, write in (("config.json", values, lambda p: json.loads(p.read_text()), lambda d, p: p.write_text(json.dumps(d))),
                                      ("model.safetensors", tensors, load_file, save_file)):
        if change:
            merged = {**read(to / name), **change}
            write({key: value for key, value in merged.items() if value is not None}, to / name)
    return to


def test_mistakes_in_models(world, reward_models, tmp_path, capsys):
    weights = load_file(world / "gpt2" / "model.safetensors")
    name = next(key for key in weights if key.endswith("c_proj.weight"))
    nan = weights[name].clone()
    nan[0, 0] = float("nan")
    small = tokenizer.train_bpe(["a"], 257)
    foreign = edited(world / "gpt2", tmp_path / "foreign")
    tokenizer.train_bpe([f"{prompt} {i} {i * 7919}" for i, prompt in enumerate(PROMPTS * 20)], 900).save(foreign)
    cut = edited(world / "gpt2", tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    no_tokenizer = edited(world / "gpt2", tmp_path / "none")
    for path in small.files:
        (no_tokenizer / path).unlink()
    for folder, says in ((edited(world / "gpt2", tmp_path / "nan", tensors={name: nan}), [name, "NaN"]),
                         (edited(world / "gpt2", tmp_path / "less", tensors={name: None}), [name, "missing"]),
                         (edited(world / "gpt2", tmp_path / "more", tensors={"transformer.h.7.attn.c_proj.weight": nan}), ["h.7", "not part"]),
                         (edited(world / "gpt2", tmp_path / "wide", {"n_embd": 64}), ["shape"]),
                         (edited(world / "gpt2", tmp_path / "heads", {"n_head": 5}), ["n_head 5"]),
                         (edited(world / "gpt2", tmp_path / "bert", {"model_type": "bert"}), ["bert"]),
                         (foreign, ["tokenizer"]), (cut, ["model.safetensors"]), (no_tokenizer, ["none"]), (tmp_path / "nowhere", ["no such folder"]),
                         (tmp_path, ["config.json"]), (reward_models["llama"], ["reward model"])):
        refuse(capsys, train_ppo, dict(data=world / "none.jsonl", policy=folder, reward=f"{world / 'reward.py'}:glad", out=tmp_path / "out", **PPO), *says)
    refuse(capsys, train_ppo, dict(data=world / "none.jsonl", policy=world / "gpt2", reward=world / "llama", out=tmp_path / "out", **PPO), "not a reward model")
    refuse(capsys, train_sft, dict(data=world / "label.jsonl", init="gpt2", out=tmp_path / "out", **SFT), "--tokenizer")
    refuse(capsys, train_sft, dict(data=world / "label.jsonl", init=world / "gpt2", tokenizer=world / "gpt2", out=tmp_path / "out", **SFT), "--tokenizer")


def test_mistakes_in_flags(world, sft, tmp_path, capsys):
    reward = f"{world / 'reward.py'}:glad"
    ppo = dict(data=world / "none.jsonl", policy=sft["gpt2"], reward=reward, out=tmp_path / "out", **PPO)
    for change, says in (({"k": 0}, ["--k 0"]), ({"k": "four"}, ["--k", "four"]), ({"groups": 0}, ["--groups"]), ({"minibatches": 3}, ["--minibatches 3", "--groups 4"]),
                         ({"temperature": 0}, ["--temperature"]), ({"lam": 1.1}, ["--lam"]), ({"lr": "nan"}, ["--lr nan"]), ({"nonsense": 1}, ["--nonsense"]),
                         ({"device": "cuda:63"}, ["--device cuda:63"]), ({"device": "toaster"}, ["--device toaster"]), ({"device": "meta"}, ["--device meta"]),
                         ({"max_length": 49}, ["--max_length 49", "48"]), ({"max_new_tokens": 48}, ["--max_new_tokens 48"]), ({"seed": 10**30}, ["--seed"]), ({"seed": -1}, ["--seed"]),
                         ({"dtype": "float16"}, ["--dtype"]), ({"schedule": "cosine"}, ["--schedule"])):
        refuse(capsys, train_ppo, {**ppo, **change}, *says)
    if not torch.cuda.is_available():
        refuse(capsys, train_ppo, {**ppo, "device": "cuda"}, "--device cuda", "not usable")
    for script, flags in ((train_sft, SFT), (train_rm, RM), (train_ppo, PPO)):
        refuse(capsys, script, flags, "required", "--data")
    for script, flags in ((train_sft, SFT), (train_rm, RM)):
        refuse(capsys, script, dict(data=world / "place.jsonl", init=world / "gpt2", out=tmp_path / "out", **flags, max_length=49), "--max_length 49")
        refuse(capsys, script, dict(data=world / "place.jsonl", init=world / "gpt2", out=tmp_path / "out", **{**flags, "seed": 2**63}), "--seed")


def test_mistakes_in_sampling(world, sft, tmp_path, capsys):
    ask = dict(policy=sft["gpt2"], max_new_tokens=12)
    for change, says in (({"prompt": "the fox " * 40}, ["--prompt", "need more", "48"]), ({}, ["--prompt", "--data"]), ({"prompt": "a", "k": 0}, ["--k 0"]),
                         ({"prompt": "a", "data": world / "none.jsonl"}, ["--prompt", "--data"]), ({"prompt": "a", "top_p": 0}, ["--top_p"])):
        refuse(capsys, sample, {**ask, **change}, *says)
    ask |= dict(data=world / "none.jsonl")
    refuse(capsys, sample, ask, "--out")
    refuse(capsys, sample, {**ask, "out": tmp_path / "no" / "x.jsonl"}, "--out")           # said before the sampling, not after it
    refuse(capsys, sample, {**ask, "out": "/proc/x.jsonl"}, "--out /proc/x.jsonl")
    refuse(capsys, sample, {**ask, "out": world / "none.jsonl"}, "does not exist yet")
    refuse(capsys, sample, {**ask, "out": tmp_path / "x.jsonl", "max_length": 49}, "--max_length 49")
    refuse(capsys, sample, {**ask, "out": tmp_path / "x.jsonl", "judge": world / "gpt2"}, "not a reward model")
    for name, says in (("raises", "two lines"), ("nan", "nan")):
        refuse(capsys, sample, {**ask, "out": tmp_path / "x.jsonl", "judge": f"{world / 'reward.py'}:{name}"}, name, says)


def test_mistakes_in_reward_functions(world, sft, tmp_path, capsys):
    (tmp_path / "syntax.py").write_text("def f(:\n")
    (tmp_path / "imports.py").write_text("import no_such_module\n")
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(0)\n")
    flags = dict(data=world / "none.jsonl", policy=sft["gpt2"], out=tmp_path / "out", **PPO)
    for spec, says in ((f"{tmp_path / 'missing.py'}:f", ["missing.py"]), (f"{tmp_path / 'syntax.py'}:f", ["syntax.py", "SyntaxError"]),
                       (f"{tmp_path / 'imports.py'}:f", ["imports.py", "no_such_module"]), (f"{tmp_path / 'exits.py'}:f", ["exits.py", "SystemExit"]),
                       (f"{world / 'reward.py'}:absent", ["absent"]), (f"{world / 'reward.py'}:number", ["number"]), (world / "reward.py", ["reward.py"])):
        refuse(capsys, train_ppo, {**flags, "reward": spec}, *says)
    # asked once before anything is written: what shows only when the function is called leaves no folder either
    for name, says in (("raises", ["ValueError", "two"]), ("leaves", ["SystemExit", "bye"]), ("nan", ["nan"]), ("short", ["0 scores for 1"]), ("nothing", ["TypeError"])):
        refuse(capsys, train_ppo, {**flags, "reward": f"{world / 'reward.py'}:{name}"}, *says)


def test_mistakes_about_the_run_folder(world, tmp_path, capsys):
    flags = dict(data=world / "label.jsonl", init=world / "gpt2", **{**SFT, "steps": 2})
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "mine"):
        refuse(capsys, train_sft, dict(out=out, **flags), str(out), "another folder")
    for out in (tmp_path / "file" / "run", "/proc/x"):
        refuse(capsys, train_sft, dict(out=out, **flags), f"--out {out}: cannot be written")
    out = start(train_sft, out=tmp_path / "run", **flags)
    refuse(capsys, train_sft, dict(out=out, **{**flags, "lr": 0.1, "groups": 4}), "--lr 0.005 is now 0.1", "--groups 8 is now 4")
    refuse(capsys, train_sft, dict(out=out, **{**flags, "steps": 9}), "--steps 2 is now 9", "learning rate depends on it")
    refuse(capsys, train_sft, dict(out=out, **{**flags, "steps": 1}), "--steps 2 is now 1")
    refuse(capsys, train_rm, dict(out=out, data=world / "place.jsonl", init=world / "gpt2", **RM), "a run of train_sft")
    before = tree(out)
    start(train_sft, out=out, **flags)       # the same command on a finished run: nothing to do
    assert tree(out) == before
    for path in run_folder.states(out):
        path.write_bytes(b"damaged")
    refuse(capsys, train_sft, dict(out=out, **flags), "state-000002.safetensors", "damaged", "remove the folder")


def test_a_run_goes_on_with_its_own_parent_judge_and_data(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(world / "none.jsonl", "data.jsonl")
    shutil.copy(world / "reward.py", "judge.py")
    sft = dict(data="data.jsonl", init=world / "gpt2", out="sft", schedule="constant", **{**SFT, "groups": 2, "eval_every": 9})
    start(train_sft, **{**sft, "steps": 1})
    ppo = dict(data="data.jsonl", policy="sft", reward="judge.py:glad", out=tmp_path / "ppo", schedule="constant", **{**PPO, "steps": 1})
    start(train_ppo, **ppo)
    assert json.loads((tmp_path / "ppo" / "config.json").read_text())["inputs"].keys() == {"data", "policy", "reward"}
    capsys.readouterr()
    start(train_ppo, **{**ppo, "data": tmp_path / "data.jsonl", "policy": "sft/model/", "steps": 2, "eval_every": 5, "save_every": 1})
    said = capsys.readouterr().out
    assert "resuming at step 1\n" in said and "to rounding" not in said
    start(train_ppo, **{**ppo, "steps": 3, "max_tokens": 500})
    assert "resuming at step 2\nfrom step 2 on equal to rounding, not to the bit\n" in capsys.readouterr().out
    ppo |= {"steps": 4, "max_tokens": 500}
    with open("judge.py", "a") as file:
        file.write("# a word more\n")
    refuse(capsys, train_ppo, ppo, "--reward 'judge.py:glad' has other content now")
    shutil.copy(world / "reward.py", "judge.py")
    with open("data.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "the hen saw the wood:"}) + "\n")
    refuse(capsys, train_ppo, ppo, "--data 'data.jsonl' has other content now")
    shutil.copy(world / "none.jsonl", "data.jsonl")
    start(train_sft, **{**sft, "steps": 2})              # the parent trains on
    refuse(capsys, train_ppo, ppo, "--policy 'sft' has other content now")


def test_more_steps_with_a_constant_schedule(world, tmp_path, capsys):
    flags = dict(data=world / "label.jsonl", init=world / "gpt2", schedule="constant", **SFT)
    whole = start(train_sft, out=tmp_path / "whole", **{**flags, "steps": 6})
    part = start(train_sft, out=tmp_path / "part", **{**flags, "steps": 3})
    start(train_sft, out=part, **{**flags, "steps": 6})
    strip = lambda out: [{key: value for key, value in row.items() if key not in MEASURED} for row in metrics(out)]
    assert strip(whole) == strip(part) and [row["step"] for row in metrics(part)] == list(range(6))
    assert tree(whole / "model") == tree(part / "model")
    assert json.loads((part / "config.json").read_text())["flags"]["steps"] == 6
    refuse(capsys, train_sft, dict(out=part, **{**flags, "steps": 5}), "--steps 6 is now 5 (fewer)")


def process(script, flags, **env):
    """A real process of a script, with one thread."""
    return subprocess.Popen([sys.executable, str(ROOT / f"{script.__name__}.py"), *words(flags)], env={**os.environ, "OMP_NUM_THREADS": "1", **env},
                            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_process_ends_with_one_line(world, tmp_path):
    good = dict(data=world / "label.jsonl", init=world / "gpt2", out=tmp_path / "out", **SFT)
    for started, says in ((process(train_sft, {**good, "nonsense": 1}), "--nonsense"), (process(train_rm, {**good, "data": tmp_path / "no.jsonl"}), "no.jsonl"),
                          (process(train_sft, good, WORLD_SIZE="2"), "several processes are started by torchrun")):
        error = started.communicate(timeout=100)[1]
        assert started.returncode == 2 and error.startswith("error: ") and error.count("\n") == 1 and says in error, error
    # the ninth of sixteen processes, the first of its machine: nobody else there would say it
    second = process(train_sft, {**good, "nonsense": 1}, WORLD_SIZE="16", RANK="8", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1")
    assert "--nonsense" in second.communicate(timeout=100)[1] and second.returncode == 2
    assert not (tmp_path / "out").exists()


def test_two_runs_in_one_folder(world, tmp_path):
    """The second is refused and changes nothing; the first goes on."""
    flags = dict(data=world / "label.jsonl", init=world / "gpt2", out=tmp_path / "run", **{**STOP, "steps": 2000, "save_every": 2000, "eval_every": 2000})
    first = process(train_sft, flags)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    second = process(train_sft, flags)
    error = second.communicate(timeout=100)[1]
    assert second.returncode == 2 and error == f"error: --out {tmp_path / 'run'}: another process is at work there; wait for it, or stop it\n"
    assert signal_at_step(first, tmp_path / "run", 1, signal.SIGTERM) == "stopped; the same command goes on from the last save\n"


# -------------------------------------------------------------------------------------------------------------- the log

def test_odd_texts_do_not_break_the_log(tmp_path):
    odd = "half \ud83d pair, line\u2028breaks\x85\x0b\x1c\r\n, nul \x00, \U0001f600 ﬁ \u202e \"{}\\"
    for start_step in (0, 1, 2):             # read back by a run that goes on, twice
        log = Log(tmp_path, start_step, 3, ("loss",))
        log.step(start_step, loss=1.0)
        log.text(start_step, odd, odd, score=float("nan"))
        log.eval(start_step, eval_loss=float("inf"))
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_bytes().split(b"\n")[:-1]]
    assert rows == [{"step": step, "prompt": odd, "response": odd, "score": None} for step in range(3)]
    assert [row["step"] for row in metrics(tmp_path)] == [] and [row["eval_loss"] for row in metrics(tmp_path, "eval_loss")] == [None] * 3


def test_a_run_on_odd_texts(world, tmp_path):
    rows = [{"prompt": f"the fox \ud800\u2028{i}", "responses": [{"text": f" é\x85\udfff{i}😀"}]} for i in range(12)]
    flags = dict(data=jsonl(tmp_path / "odd.jsonl", rows), init=world / "llama", out=tmp_path / "run", schedule="constant", **{**SFT, "groups": 2, "eval_every": 1})
    start(train_sft, **{**flags, "steps": 1})
    out = start(train_sft, **{**flags, "steps": 2})
    found = [json.loads(line)["step"] for line in (out / "samples.jsonl").read_bytes().split(b"\n")[:-1]]
    assert found == [0, 1]                   # one of twelve prompts is held out


def test_a_prompt_without_room_is_not_sampled_from(world, tmp_path):
    """A held-out prompt may fill the context but for its short response; showing 48 tokens after it would leave the table of positions."""
    rows = [{"prompt": "the fox saw the wood " * 4 + "ab"[i % 2] * (1 + i // 2), "responses": [{"text": "a"}]} for i in range(10)]
    start(train_sft, data=jsonl(tmp_path / "long.jsonl", rows), init=world / "gpt2", out=tmp_path / "run", **{**SFT, "steps": 1, "groups": 2})
    assert metrics(tmp_path / "run", "eval_loss")


def test_a_run_that_died_before_its_first_save_starts_again(world, tmp_path, monkeypatch):
    flags = dict(data=world / "label.jsonl", init=world / "gpt2", **{**SFT, "steps": 3})
    whole = start(train_sft, out=tmp_path / "whole", **flags)
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError):         # the model is saved, its state is not
            start(train_sft, out=tmp_path / "again", **flags)
    start(train_sft, out=tmp_path / "again", **flags)
    same_run(whole, tmp_path / "again")


# ------------------------------------------------------------------------------------------------------- stop and go on

def untimed(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def same_run(whole, other):
    """Bit for bit, but for the clock; and nothing is left lying about."""
    assert untimed(whole) == untimed(other)
    assert tree(whole / "model") == tree(other / "model")
    assert [path.name for path in run_folder.states(whole)][:1] == [path.name for path in run_folder.states(other)][:1]
    assert run_folder.states(whole)[0].read_bytes() == run_folder.states(other)[0].read_bytes()
    assert (whole / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    assert not list(other.rglob("*.tmp"))


def signal_at_step(started, out, step, name):
    """Sends the signal once metrics.jsonl has the row of this step.  -> stderr"""
    deadline = time.time() + 120
    while not ((out / "metrics.jsonl").exists() and any(f'"step": {step}, ' in line and '"lr"' in line for line in (out / "metrics.jsonl").read_text().splitlines())):
        assert started.poll() is None, started.communicate()[1]
        assert time.time() < deadline
        time.sleep(0.002)
    started.send_signal(name)
    return started.communicate(timeout=100)[1]


def finished_steps(out):
    with safe_open(run_folder.states(out)[0], framework="pt") as file:
        return json.loads(file.metadata()["run"])["step"]


def interrupted(script, flags, tmp_path):
    """The same run three times: whole; stopped by Ctrl-C after its half; killed between two saves. The last two go on."""
    steps, save_every = flags["steps"], flags["save_every"]
    stopped, killed = tmp_path / "stopped", tmp_path / "killed"
    started = [process(script, {**flags, "out": out}) for out in (stopped, killed)]
    with ThreadPoolExecutor(2) as pool:      # side by side: neither runs away while the other is waited for
        error, _ = pool.map(signal_at_step, started, (stopped, killed), (steps // 2, save_every + 1), (signal.SIGINT, signal.SIGKILL))
    assert started[0].returncode == 130 and error.splitlines()[-1] == "stopped; the same command goes on from the last save" and "Traceback" not in error
    assert steps // 2 < finished_steps(stopped) == len(metrics(stopped)) < steps
    assert started[1].returncode == -signal.SIGKILL and save_every <= finished_steps(killed) < len(metrics(killed)) <= steps
    (killed / "state-000099.safetensors.tmp").write_bytes(b"half")                # as if it had died while writing
    (killed / "model" / "model.safetensors.tmp").write_bytes(b"half")
    with open(killed / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 99, "loss": "\xe2')
    whole = start(script, **flags, out=tmp_path / "whole")
    for out in (stopped, killed):
        start(script, **flags, out=out)
        same_run(whole, out)


# Small micro-batches: a step is slow enough to be hit
STOP = dict(steps=24, save_every=10, eval_every=7, groups=8, device="cpu", lr=3e-3, warmup=3)


def test_sft_goes_on(world, tmp_path):
    interrupted(train_sft, dict(data=world / "label.jsonl", init=world / "llama", max_tokens=64, **{**STOP, "groups": 24}), tmp_path)


@pytest.mark.parametrize("loss, target", [pytest.param(*pair, marks=() if i == 0 else pytest.mark.slow) for i, pair in enumerate(LOSSES)])
def test_reward_models_go_on(loss, target, world, tmp_path):
    interrupted(train_rm, dict(data=world / "scores.jsonl", init=world / "gpt2", loss=loss, quantile_target=target, max_tokens=64, **{**STOP, "groups": 24}), tmp_path)


def test_ppo_goes_on(world, sft, reward_models, tmp_path):
    interrupted(train_ppo, dict(data=world / "none.jsonl", policy=sft["gpt2"], reward=reward_models["llama"], k=2, max_new_tokens=12, minibatches=2, epochs=2,
                                kl_coef_target=0.1, kl_horizon=100, **STOP), tmp_path)


def test_sigterm_is_a_stop(world, tmp_path):
    """What a cluster sends before it takes the machine away."""
    flags = dict(data=world / "label.jsonl", init=world / "gpt2", out=tmp_path / "run", **{**STOP, "steps": 2000, "save_every": 2000, "eval_every": 2000})
    started = process(train_sft, flags)
    error = signal_at_step(started, tmp_path / "run", 2, signal.SIGTERM)
    assert started.returncode == 75 and error == "stopped; the same command goes on from the last save\n"
    assert finished_steps(tmp_path / "run") == len(metrics(tmp_path / "run"))
    hub.load_policy(tmp_path / "run")


def test_other_flags_are_listed_by_every_script(world, sft, reward_models, tmp_path, capsys):
    ppo = dict(data=world / "none.jsonl", policy=sft["gpt2"], reward=reward_models["llama"], out=tmp_path / "ppo", **{**PPO, "steps": 1})
    start(train_ppo, **ppo)
    refuse(capsys, train_ppo, {**ppo, "kl_coef": 0.5, "seed": 3}, "--kl_coef 0.05 is now 0.5", "--seed 0 is now 3")
    rm = reward_models["llama"]
    refuse(capsys, train_rm, dict(data=world / "place.jsonl", init=world / "llama", out=rm, **RM, loss="quantile"), "--loss 'ranking' is now 'quantile'")
    assert {field.name for field in dataclasses.fields(train_ppo.Config)} == json.loads((tmp_path / "ppo" / "config.json").read_text())["flags"].keys()
