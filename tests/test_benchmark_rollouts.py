"""The benchmarks of sampling, PPO and growth, with nano models on tiny data: what they count, what they refuse, what the peer is given."""
import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks import generation, growth, ppo_step
from benchmarks import side_by_side as bench
from nanorlhf.io import hub, tokenizer
from nanorlhf.io.read import InputError
from nanorlhf.run import cli

TINY_POINT = {"k": 3, "prompt": 9, "new": 4, "layers": 2, "width": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Passages of every length and a tokenizer; the folder has FairytaleQA's name, groups are read from any."""
    root = tmp_path_factory.mktemp("data")
    texts = [" ".join(f"The {who} saw a house." for who in ("fox", "king", "queen", "bear") * n)[: 25 * n] + "\nQuestion:" for n in range(10, 60)]
    (root / "FairytaleQAData").mkdir()
    (root / "FairytaleQAData" / "train.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    tokenizer.train_bpe(texts, 300).save(root / "tokenizers")
    return root


def options(benchmark, folder, *more):
    return cli.parse(benchmark.Config, ["--data", str(folder), "--size", "tiny", "--runs", "1", "--steps", "2", *more])


def test_sampling_alone(folder):
    result = generation.main(options(generation, folder))
    assert result["per_second"] * result["ours_seconds"] == pytest.approx(4 * 4 * 24) and 0 < result["share"] < 1 and result["ratio"] is None


def test_compared_log_probabilities_are_those_of_the_plain_text(folder, tmp_path):
    # of a text in a row of its own: the probes after the last prompt column, then each token of the continuation
    flags, prompts, continuation = options(generation, folder), [[5, 6, 7, 8], [9, 8, 7, 6]], [3, 2]
    bench.save_policy(flags, tmp_path / "policy")
    job = {"model": str(tmp_path / "policy"), "prompts": prompts, "k": 2, "max_new_tokens": 3, "temperature": 1.0, "dtype": "float32", "seed": 0, "steps": 1,
           "probe": [11, 12], "continuation": continuation}
    side, expected, policy = generation.sampling(job), [], hub.load_policy(tmp_path / "policy")
    for prompt in prompts:
        ids = torch.tensor([prompt + continuation])
        with torch.no_grad():
            hidden = policy.trunk.hidden(ids, torch.arange(6)[None], torch.zeros(1, 6, dtype=torch.long))
        logprobs = torch.log_softmax(policy.trunk.logits(hidden)[0], -1)
        expected += logprobs[3, [11, 12]].tolist() + [logprobs[3, 3].item(), logprobs[4, 2].item()]
    assert side.losses == pytest.approx(expected, rel=1e-5) and len(side.seconds) == 1


@pytest.mark.parametrize("at", [0, 1])
def test_other_log_probabilities_are_refused(at, folder, monkeypatch):
    theirs = [-10.0005, -11.0]
    monkeypatch.setattr(generation, "ours", lambda job: bench.Side([1, 1], [-10.0, -11.0], 1.0, {}))
    monkeypatch.setattr(bench, "run_peer", lambda *_: bench.Side([1, 1], theirs, 1.0, {}))
    monkeypatch.setattr(bench, "python_of", lambda *_: "python")
    assert generation.main(options(generation, folder))["loss_difference"] == pytest.approx(5e-5, rel=1e-2)
    theirs[at] *= 1.001
    with pytest.raises(InputError, match="not the same work"):
        generation.main(options(generation, folder))


@pytest.mark.parametrize("k", [4])
def test_ppo_alone(k, folder):
    result = ppo_step.main(options(ppo_step, folder, "--k", str(k)))
    assert result["work"].startswith(f"PPO step, {8 // k} prompts x {k} responses") and result["ours_seconds"] > 0 and 0 < result["share"] < 1 and result["goal"] == {1: 3.5, 4: 12}[k]


def test_what_both_sides_of_ppo_are_given(folder, monkeypatch):
    seen, done = {}, lambda losses: bench.Side([1, 1], losses, 1.0, {"torch": "2"}, {"kl": [0], "ratio_first": [1], "response_length": [16]})
    monkeypatch.setattr(bench, "python_of", lambda *_: "python")
    monkeypatch.setattr(bench, "run_peer", lambda python, script, job, work: seen.update(job=job) or done(seen["scores"]))
    monkeypatch.setattr(bench, "run_ours", lambda script, flags, loss: seen.update(flags=flags) or done([0]))
    measure = bench.measure                              # our scores of the given texts are known only when ours() has run
    monkeypatch.setattr(bench, "measure", lambda config, row, ours, peer, *rest: seen.update(scores=ours().losses) or measure(config, row, ours, peer, *rest))
    result = ppo_step.main(options(ppo_step, folder, "--k", "4"))
    assert result["ratio"] == result["memory_ratio"] == 1 and result["memory_goal"] == 0.6
    job, flags = seen["job"], seen["flags"]
    assert len(job["prompts"]) == 8 and len(set(map(tuple, job["prompts"]))) == 2 and flags["groups"] * flags["k"] == 8
    assert all(150 <= len(prompt) <= 250 for prompt in job["prompts"])
    assert [ids[: len(prompt)] for ids, prompt in zip(job["scored"], job["prompts"][::4])] == job["prompts"][::4]
    shared = set(job) & set(flags) - {"policy", "reward", "out"}
    assert shared >= set(ppo_step.SETTINGS) | {"steps", "dtype", "seed"} and all(job[name] == flags[name] for name in shared)
    assert len(seen["scores"]) == 2 and all(map(math.isfinite, seen["scores"]))


def test_ppo_refuses_another_rollout():
    good = {"kl": [1e-6, 9], "ratio_first": [1.0001, 9], "response_length": [16, 9]}         # the first step's alone are looked at
    side = bench.Side([1, 1], [0.2, -0.4], 1.0, {}, good)
    assert ppo_step.checked(side, "float32") is side
    for name, value, words in (("kl", 0.01, "KL"), ("kl", math.nan, "KL"), ("ratio_first", 1.01, "ratio"), ("response_length", 15.9, "ended early")):
        with pytest.raises(InputError, match=words):
            ppo_step.checked(replace(side, found=good | {name: [value, 0]}), "float32")
    assert ppo_step.checked(replace(side, found=good | {"ratio_first": [1.1]}), "bfloat16")
    with pytest.raises(InputError, match="not the same work"):                               # another reward
        bench.same_work(side, replace(side, losses=[0.2, -0.41]), ppo_step.SAME, ppo_step.SAME)


@pytest.mark.parametrize("benchmark", [generation, ppo_step, growth])
def test_wrong_peers_are_one_line(benchmark, folder, tmp_path):
    flags = growth.Config(peers=str(tmp_path)) if benchmark is growth else options(benchmark, folder, "--peers", str(tmp_path))
    with pytest.raises(InputError, match="--peers .*bin/python") as caught:
        benchmark.main(flags)
    assert "\n" not in str(caught.value)


def test_other_mistakes_are_one_line(folder):
    with pytest.raises(InputError, match="--k 3"):
        ppo_step.main(options(ppo_step, folder, "--k", "3"))
    with pytest.raises(InputError, match="0 prompts of 5000 to 6000 tokens"):
        generation.passages(options(generation, folder), hub.load_tokenizer(folder / "tokenizers"), 5000, 6000, 1)


def test_one_point_of_growth():
    # one row: 9 prompt columns and 3 responses of 4
    found = growth.step_figures("ours", TINY_POINT, 2)
    assert found["tokens"] == 9 + 3 * 4 and found["tokens_per_second"] == pytest.approx(21 / found["seconds"])
    assert found["parameters"] == (50257 + 2048) * 64 + 2 * (12 * 64 * 64 + 13 * 64) + 2 * 64 and 0 <= found["memory_gb"] < 2


def test_growth_compares_the_same_work():
    pytest.importorskip("transformers")
    losses = [growth.step_figures(side, TINY_POINT, 1)["loss"] for side in growth.SIDES]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5) and losses[0] > 5


def test_growth_writes_numbers_and_figure_and_leaves_out_what_is_too_large(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = {"loss": 10.0, "seconds": 1.0, "tokens": 10, "tokens_per_second": 10.0, "memory_gb": 1.0, "parameters": 3_000_000}
    asked = []
    too_large = lambda side, point: side == "peer" and point["k"] == 16
    monkeypatch.setattr(growth, "in_process", lambda _, side, point, __: asked.append(point) or ({} if too_large(side, point) else figures))
    (tmp_path / "now" / "bin").mkdir(parents=True)
    (tmp_path / "now" / "bin" / "python").touch()
    growth.main(growth.Config(peers=str(tmp_path), out=str(tmp_path / "out")))
    sweeps = json.loads((tmp_path / "out" / "growth.json").read_text())["sweeps"]
    assert [len(points) for points in sweeps.values()] == [5, 5, 5] and (tmp_path / "out" / "growth.png").stat().st_size > 1000
    assert [point["peer"] == {} for point in sweeps["responses a prompt (K)"]] == [False] * 4 + [True]
    assert len(asked) == 3 * 13                          # where the sweeps meet, a point is measured once


def test_growth_refuses_other_work(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "in_process", lambda python, side, *_: {"loss": 10.0 + 0.01 * (side == "lean"), "tokens_per_second": 1.0, "memory_gb": 1.0})
    with pytest.raises(InputError, match="not the same work"):
        growth.measure("python", growth.Config())


def test_a_peer_over_the_limits_is_left_out(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(growth, "MOST_SECONDS", 0)
    assert growth.step_figures("lean", TINY_POINT, 1) == {} != growth.step_figures("ours", TINY_POINT, 1)
