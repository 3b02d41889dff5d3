"""The same update however the work is shared: one process or several, one micro-batch or four, uneven shares, a process without any.

    python -m pytest tests/test_processes.py -s -k "same_update"          prints the differences       -m slow: ten steps

Processes talk by gloo on a CPU. Models have two layers of width 32; prompts have 3 to 28 words, groups 1 to 5 responses.
"""
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanorlhf import checkpoint, gpt2, heads, llama, reward, runs, tokenizer
from nanorlhf.batching import deal, pack_rows, plans
from nanorlhf.losses import sft_loss

ROOT = Path(__file__).resolve().parent.parent
WORDS = "a king queen saw the wood house and old river bear went".split()


class Jobs:
    """tests/launch.py: one import of torch for many runs."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, str(ROOT / "tests" / "launch.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def __call__(self, script, flags, **how):
        self.process.stdin.write(json.dumps({"script": script, "flags": {key: str(value) for key, value in flags.items()}, **how}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def well(self, script, flags, **how):
        answer = self(script, flags, **how)
        assert answer["codes"] == [0] * how.get("processes", 1), answer
        return Path(flags["out"])

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def jobs():
    found = Jobs()
    yield found
    found.close()


def tiny_world(folder):
    """Groups of very different length with every kind of judgement; a GPT-2 policy and a LLaMA reward model with their tokenizers, weights as after training."""
    draws = random.Random(0)
    say = lambda low, high: " ".join(draws.choice(WORDS) for _ in range(draws.randint(low, high)))
    lines, texts = [], []
    for i in range(30):
        responses = [{"text": " " + say(1, 9), "place": k // 2 if i % 3 else k, "label": k % 2, "scores": [draws.random() for _ in range(1 + k)]} for k in range(1 + i % 5)]
        lines.append({"prompt": say(3, 28), "responses": responses})
        texts += [lines[-1]["prompt"]] + [r["text"] for r in responses]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "reward.py").write_text("def wood(prompts, responses):\n    return [text.count('o') - 0.1 * len(text) for text in responses]\n")
    torch.manual_seed(0)
    policy_tok, reward_tok = tokenizer.train_bpe(texts, 300), tokenizer.train_sentencepiece(texts, 300)
    policy = heads.Policy(gpt2.GPT2(gpt2.GPT2Config(vocab_size=policy_tok.vocab_size, n_positions=96, n_embd=32, n_layer=2, n_head=2)))
    trunk = llama.Llama(llama.LlamaConfig(vocab_size=reward_tok.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                          num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96))
    scorer = heads.Scorer(trunk)
    scorer.draw_head()
    with torch.no_grad():
        for model in (policy, scorer):
            for parameter in model.parameters():             # biases of a new model are 0: a relative difference to them would say nothing
                parameter.add_(0.1 * torch.randn_like(parameter))
        eos = policy.trunk.wte.weight[policy_tok.eos_id]         # every tenth token of the policy is EOS, so that its responses differ in length
        policy.trunk.ln_f.bias.add_(3.4 * eos / eos.dot(eos))    # logit + 3.4: e^3.4 = 30 times its share of one in 300
    trunk.lm_head = None
    checkpoint.save_policy(folder / "policy", policy, policy_tok)
    checkpoint.save_reward_model(folder / "reward", reward.RewardModel(scorer, reward_tok))
    language = llama.Llama(trunk.config)
    checkpoint.save_policy(folder / "llama", heads.Policy(language), reward_tok)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("world"))


QUIET = dict(device="cpu", schedule="constant", eval_every=100, save_every=100)
RM = dict(groups=8, warmup=0)
STAGES = {
    "sft": ("train_sft", dict(groups=8, warmup=0)),
    "ranking": ("train_rm", dict(loss="ranking", labels="place", **RM)),
    "classification": ("train_rm", dict(loss="classification", labels="label", **RM)),
    "quantile": ("train_rm", dict(loss="quantile", labels="place", **RM)),
    "scores": ("train_rm", dict(loss="quantile", quantile_target="scores", kappa=0, rank_coef=0.5, labels="place", **RM)),
    "ppo": ("train_ppo", dict(groups=8, k=3, max_new=8, epochs=2, minibatches=2, kl_target=0.05, kl_horizon=100, target_kl=0.5)),
}
# processes, columns a micro-batch, groups or prompts a step
SPLITS = {"two processes": (2, 10**6), "accumulation 2": (1, 220), "accumulation 4": (1, 110), "two processes, accumulation 2": (2, 110),
          "three, one of them without": (3, 10**6)}


def flags_of(world, name, out, **more):
    script, flags = STAGES[name]
    start = dict(policy=world / "policy", reward=world / "reward") if script == "train_ppo" else dict(init=world / ("policy" if script == "train_sft" else "llama"))
    return script, {"data": world / "data.jsonl", **start, "out": out, "steps": 1, "max_tokens": 10**6, **QUIET, **flags, **more}


def difference(one, other):
    """Largest relative difference over the parameters: of each tensor max |a - b| / max |a|."""
    a, b = load_file(one / "model" / "model.safetensors"), load_file(other / "model" / "model.safetensors")
    assert a.keys() == b.keys()
    return max((((a[name] - b[name]).abs().max() / a[name].abs().max().clamp(min=1e-12)).item(), name) for name in a)


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def reference(jobs, world, name, folder, **more):
    """One process, everything in one micro-batch, made once for each stage."""
    out = folder / f"whole-{name}-{'-'.join(map(str, more.values()))}"
    if not out.exists():
        script, flags = flags_of(world, name, out, **more)
        jobs.well(script, flags)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def compared(jobs, world, folder, name, split, fault=None, **more):
    """-> (largest relative difference of a parameter, the two metrics rows)"""
    processes, max_tokens = SPLITS[split]
    more = {**more, **({"groups": 2} | ({"minibatches": 1} if name == "ppo" else {}) if processes == 3 else {})}
    whole = reference(jobs, world, name, folder, **more)
    out = folder / f"{name}-{split.replace(' ', '-')}-{fault}-{'-'.join(map(str, more.values()))}"
    script, flags = flags_of(world, name, out, **{**more, "max_tokens": max_tokens})
    jobs.well(script, flags, processes=processes, **({"fault": fault} if fault else {}))
    return difference(whole, out), rows_of(whole), rows_of(out)


MEASURED = {"seconds", "tokens_per_second", "share", "memory_gb"}


def same_rows(rows, others, tolerance=1e-4):
    """Every number of the log, over all processes."""
    return len(rows) == len(others) and all(row.keys() == other.keys() and all(
        value == pytest.approx(other[name], rel=tolerance, abs=tolerance) for name, value in row.items() if name not in MEASURED) for row, other in zip(rows, others))


QUICK = [(name, split) for name in STAGES for split in SPLITS if name in ("sft", "ranking", "ppo") or split == "two processes, accumulation 2"]


@pytest.mark.parametrize("name, split", [pytest.param(name, split, marks=() if (name, split) in QUICK else pytest.mark.slow) for name in STAGES for split in SPLITS])
def test_the_same_update(name, split, jobs, world, folder):
    """One step at the script's own learning rate, in float32. Sums are taken in another order; nothing else may differ."""
    (found, where), whole, other = compared(jobs, world, folder, name, split)
    print(f"\n1 step, {name}, {split}: {found:.1e} ({where})")
    assert found <= 1e-5 and same_rows(whole, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("split", SPLITS)
def test_ten_steps(name, split, jobs, world, folder):
    """AdamW divides a gradient by its size, so one that is 0 but for rounding (GPT-2's biases of keys; an output whose loss is flat) moves by up to
    lr a step in a direction that rounding chose. In float64 it is 1e-9 of that."""
    (found, where), whole, other = compared(jobs, world, folder, name, split, steps=10)
    wide = compared(jobs, world, folder, name, split, steps=10, dtype="float64")[0][0]
    print(f"\n10 steps, {name}, {split}: {found:.1e} ({where}), in float64 {wide:.1e}")
    assert found <= 1e-3 and same_rows(whole, other, 1e-3)
    assert wide <= 2e-7                  # the model folder is float32: half of its last digit


@pytest.mark.parametrize("fault, name", [("mean_of_means", "sft"), ("mean_of_means", "ranking"), ("mean_of_means", "ppo"), ("own_whitening", "ppo"),
                                         ("averaged", "sft"), ("averaged", "ppo"), ("same_shard", "sft")])
def test_a_fault_shows(fault, name, jobs, world, folder):
    """What goes wrong elsewhere, put into every process by tests/launch.py, is seen by the comparison above."""
    (found, _), whole, other = compared(jobs, world, folder, name, "two processes, accumulation 2", fault)
    print(f"\n{fault}, {name}: {found:.1e}")
    assert found > 1e-5 or not same_rows(whole, other)
    if fault == "mean_of_means":
        assert found > 1e-4
