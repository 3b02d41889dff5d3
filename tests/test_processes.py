"""The same update however the work is shared: one process or several, one micro-batch or four, uneven shares, a process without any.

    python -m pytest tests/test_processes.py -s -k "same_update"          prints the differences       -m slow: ten steps

Processes talk by gloo on a CPU. Models have two layers of width 32; prompts have 3 to 28 words, groups 1 to 5 responses.
"""
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanorlhf import gpt2, heads, llama, reward
from nanorlhf.io import hub, tokenizer
from nanorlhf.run import dist, nonfinite, run_folder, signals

ROOT = Path(__file__).resolve().parent.parent
WORDS = "a king queen saw the wood house and old river bear went".split()


FUNCTIONS = """import os

def wood(prompts, responses):
    return [text.count('o') - 0.1 * len(text) for text in responses]

def last_one_raises(prompts, responses):
    if os.environ["RANK"] == "1" and len(responses) > 1:
        raise ValueError("no opinion")
    return wood(prompts, responses)

def last_one_says_nan(prompts, responses):
    return [float("nan") if os.environ["RANK"] == "1" and len(responses) > 1 else 1.0 for text in responses]
"""


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
    (folder / "reward.py").write_text(FUNCTIONS)
    torch.manual_seed(0)
    policy_tok, reward_tok = tokenizer.train_bpe(texts, 300), tokenizer.train_sentencepiece(texts, 300)
    policy = heads.Policy(gpt2.GPT2(gpt2.GPT2Config(vocab_size=policy_tok.vocab_size, n_positions=96, n_embd=32, n_layer=2, n_head=2)))
    trunk = llama.Llama(llama.LlamaConfig(vocab_size=reward_tok.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                          num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96))
    scorer = heads.RewardModel(trunk)
    scorer.init_head()
    with torch.no_grad():
        for model in (policy, scorer):
            for parameter in model.parameters():             # biases of a new model are 0: a relative difference to them would say nothing
                parameter.add_(0.1 * torch.randn_like(parameter))
        eos = policy.trunk.wte.weight[policy_tok.eos_id]         # every tenth token of the policy is EOS, so that its responses differ in length
        policy.trunk.ln_f.bias.add_(3.4 * eos / eos.dot(eos))    # logit + 3.4: e^3.4 = 30 times its share of one in 300
    trunk.lm_head = None
    hub.save_policy(folder / "policy", policy, policy_tok)
    hub.save_reward_model(folder / "reward", reward.TextReward(scorer, reward_tok))
    language = llama.Llama(trunk.config)
    hub.save_policy(folder / "llama", heads.Policy(language), reward_tok)
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
    "ppo": ("train_ppo", dict(groups=8, k=3, max_new_tokens=8, epochs=2, minibatches=2, kl_coef_target=0.05, kl_horizon=100, target_kl=0.5)),
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


def steps_of(out):
    return [row for row in rows_of(out) if "lr" in row]


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


MEASURED = {"seconds", "tokens_per_second", "mfu", "memory_gb"}


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


# ---------------------------------------------------------------------------------------------------------- stop and go on

def state_bytes(out):
    return run_folder.states(out)[0].read_bytes()


@pytest.mark.parametrize("name, processes", [("sft", 2), ("ppo", 2), ("ranking", 3)])
def test_going_on_is_bit_for_bit(name, processes, jobs, world, folder):
    """Three steps and then four more are seven, on the same number of processes."""
    script, flags = flags_of(world, name, folder / f"seven-{name}", steps=7, groups=4)
    whole = jobs.well(script, flags, processes=processes)
    part = {**flags, "out": folder / f"parts-{name}"}
    jobs.well(script, {**part, "steps": 3}, processes=processes)
    jobs.well(script, part, processes=processes)
    assert state_bytes(whole) == state_bytes(part["out"]) and same_rows(steps_of(whole), steps_of(part["out"]), 0)
    assert (whole / "model" / "model.safetensors").read_bytes() == (part["out"] / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_going_on_with_another_number_of_processes(before, after, jobs, world, folder):
    script, flags = flags_of(world, "sft", folder / f"from-{before}", steps=6)
    whole = jobs.well(script, {**flags, "out": folder / f"whole-{before}"}, processes=1)
    jobs.well(script, {**flags, "steps": 3}, processes=before)
    jobs.well(script, flags, processes=after)
    assert difference(whole, flags["out"])[0] <= 1e-3 and same_rows(steps_of(whole), steps_of(flags["out"]), 1e-3)


# ------------------------------------------------------------------------------------------------------------------ mistakes

@pytest.mark.parametrize("changes, says", [
    (dict(data="nowhere.jsonl"), "nowhere.jsonl: no such file"), (dict(device="cuda:1"), "torchrun gives each process its own GPU"),
    (dict(nonsense=1), "--nonsense"), (dict(init="nowhere"), "nowhere: no such folder"), (dict(out="/proc/run"), "--out /proc/run: cannot be written")])
def test_a_mistake_is_said_once(changes, says, jobs, world, folder):
    script, flags = flags_of(world, "sft", folder / "mistake")
    answer = jobs(script, {**flags, **changes}, processes=2)
    assert answer["codes"] == [2, 2] and answer["stderr"].count("\n") == 1 and says in answer["stderr"], answer
    assert not (folder / "mistake").exists()


@pytest.mark.parametrize("function, says", [("last_one_raises", "raised ValueError: no opinion"), ("last_one_says_nan", "returned nan for the response")])
def test_one_process_ends_and_the_others_with_it(function, says, jobs, world, folder):
    """A user's function fails at the second process alone, in the middle of a rollout: the first is left waiting for its numbers."""
    script, flags = flags_of(world, "ppo", folder / function)
    answer = jobs(script, {**flags, "reward": f"{world / 'reward.py'}:{function}"}, processes=2)
    assert answer["codes"] == [2, 2] and answer["stderr"].count("\n") == 1 and says in answer["stderr"], answer


# ---------------------------------------------------------------------------------------------------------- not finite

def test_a_step_that_is_not_finite_is_not_taken(jobs, world, folder):
    """The fault: NaN at the last process in its micro-batches 2, 3 and 5 to 9. One process, one micro-batch a step: steps 1 and 2 are left out, 3 is
    taken, and the run ends after the third of 4, 5, 6."""
    script, flags = flags_of(world, "sft", folder / "nan", steps=10)
    answer = jobs(script, flags, fault="nan_loss")
    assert answer["codes"] == [2] and answer["stderr"].count("\n") == 1, answer
    assert "3 steps in a row are not finite" in answer["stderr"] and "step 4: not finite, first the loss of rows [" in answer["stderr"]
    assert "micro-batch 0 of process 0" in answer["stderr"] and "nonfinite-000004.safetensors" in answer["stderr"]
    rows = rows_of(flags["out"])
    assert [row["skipped"] for row in rows if "skipped" in row] == [0, 1, 2, 2, 3, 4] and rows[2]["loss"] is None and rows[4]["loss"] > 0
    assert sorted(path.name for path in flags["out"].glob("nonfinite-*")) == ["nonfinite-000001.safetensors", "nonfinite-000004.safetensors"]
    model = heads.Policy(hub.load_trunk(world / "policy")[0])
    found, _, about = nonfinite.reproduce(flags["out"] / "nonfinite-000001.safetensors", model)
    assert len(found) == 8 and about["step"] == 1 and about["flags"]["groups"] == 8 and all(row.responses for row in found)


def test_all_processes_leave_a_step_out_together(jobs, world, folder):
    """NaN at the second process alone: both leave the step out, and their weights stay the same."""
    script, flags = flags_of(world, "sft", folder / "nan-two", steps=4)
    jobs.well(script, flags, fault="nan_loss", processes=2)
    rows = [row for row in rows_of(flags["out"]) if "skipped" in row]
    assert [row["skipped"] for row in rows] == [0, 1, 2, 2] and [row["grad_norm"] is None for row in rows] == [False, True, True, False]
    again = jobs.well(script, {**flags, "steps": 1, "out": folder / "nan-one"}, processes=2)
    wrong = {**flags, "steps": 3, "out": folder / "nan-three"}
    jobs.well(script, wrong, fault="nan_loss", processes=2)
    assert difference(again, wrong["out"])[0] == 0                       # steps 1 and 2 changed nothing
    kept = load_file(run_folder.states(wrong["out"])[0])
    assert all(torch.equal(value, kept[name]) for name, value in load_file(run_folder.states(again)[0]).items() if name.startswith("exp_avg"))


@pytest.mark.parametrize("processes", [1, 2])
def test_ppo_leaves_minibatches_out(processes, jobs, world, folder):
    """Four minibatches a step: of the first step two are left out; the next step's first three end the run, nothing of them is learnt."""
    script, flags = flags_of(world, "ppo", folder / f"nan-ppo-{processes}", steps=5, save_every=1)
    answer = jobs(script, flags, fault="nan_loss", processes=processes)
    assert answer["codes"] == [2] * processes and answer["stderr"].count("\n") == 1 and "3 steps in a row are not finite" in answer["stderr"], answer
    first, = steps_of(flags["out"])
    assert first["skipped"] == 2 and first["updates"] == 2 and first["policy_loss"] is not None
    path, other = sorted(flags["out"].glob("nonfinite-*"))               # where each row of them began: rollout 0 and rollout 1
    assert (path.name, other.name) == ("nonfinite-000000.safetensors", "nonfinite-000001.safetensors")
    rows, tensors, about = nonfinite.reproduce(path, heads.Policy(hub.load_trunk(world / "policy")[0], value_head=True))
    assert len(rows) == 4 and tensors["advantages"].shape[:2] == (4, 3) and about["script"] == "train_ppo"
    assert [path.name for path in run_folder.states(flags["out"])] == ["state-000001.safetensors"]


def test_a_reward_model_leaves_a_step_out(jobs, world, folder):
    script, flags = flags_of(world, "ranking", folder / "nan-ranking", steps=4)
    jobs.well(script, flags, fault="nan_loss", processes=2)
    assert [row["skipped"] for row in steps_of(flags["out"])] == [0, 1, 2, 2]


def test_stop_is_asked_once_by_torchrun_and_twice_by_a_person(monkeypatch):
    """torchrun passes on what the terminal has sent already: two signals within a second are one. SIGTERM never hurries."""
    kept = {name: signal.getsignal(name) for name in signals.EXIT_CODES}
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    try:
        stop = signals.GracefulStop()
        assert stop.signum == 0
        for at, name in ((100.0, signal.SIGTERM), (105.0, signal.SIGTERM), (110.0, signal.SIGTERM), (110.9, signal.SIGINT)):
            now[0] = at
            signal.raise_signal(name)
        assert stop.signum == signal.SIGINT
        now[0] = 112.0
        with pytest.raises(signals.Preempted) as left:
            signal.raise_signal(signal.SIGINT)
        assert left.value.code == 130 and signals.Preempted(signal.SIGTERM).code == 75
    finally:
        for name, handler in kept.items():
            signal.signal(name, handler)


# ------------------------------------------------------------------------------------------------ sampling and evaluation

def test_sampling_is_shared(jobs, world, folder):
    written = []
    for processes in (1, 2, 3):
        out = folder / f"samples-{processes}.jsonl"
        jobs.well("sample", dict(policy=world / "policy", data=world / "data.jsonl", k=3, max_new_tokens=6, out=out, judge=world / "reward", include_originals="true", device="cpu"), processes=processes)
        written.append([json.loads(line) for line in out.read_text().splitlines()])
    scores = [[r.pop("scores") for line in lines for r in line["responses"]] for lines in written]
    assert written[0] == written[1] == written[2] and len(written[0]) == 27            # of 30 prompts every tenth is held out
    assert all(a == pytest.approx(b, abs=1e-5) and a == pytest.approx(c, abs=1e-5) for a, b, c in zip(*scores))


# --------------------------------------------------------------------------------------------------------- dist by itself

def test_one_process_is_world_size_one_of_the_same_path():
    x = torch.arange(3.0)
    dist.all_reduce(x)
    dist.broadcast([x])
    assert dist.world_size() == 1 and dist.rank() == 0 and x.tolist() == [0, 1, 2]
    assert dist.all_gather_object({"a": [1, 2.5, None, "\ud800"], "b": float("inf")}) == [{"a": [1, 2.5, None, "\ud800"], "b": float("inf")}]
    assert dist.on_rank_zero(lambda: 0.1 + 0.2) == 0.1 + 0.2
    with pytest.raises(OSError, match="full"):
        dist.on_rank_zero(lambda: (_ for _ in ()).throw(OSError(28, "full")))


def torchrun(script, flags, processes=2, *options):
    """A real torchrun, beside this Python."""
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    return [str(Path(sys.executable).with_name("torchrun")), "--standalone", f"--nproc_per_node={processes}", *options, *script, *words]


def test_torchrun(jobs, world, folder):
    """The launcher that users have: the same as forked processes, and one progress line a step."""
    script, flags = flags_of(world, "sft", folder / "torchrun", steps=3)
    done = subprocess.run(torchrun([str(ROOT / f"{script}.py")], flags), capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0 and done.stdout.count("\nstep ") == 3, done
    forked = jobs.well(script, {**flags, "out": folder / "forked"}, processes=2)
    assert difference(forked, flags["out"])[0] == 0


@pytest.mark.slow
def test_the_job_file(world, folder, tmp_path):
    """The job file of docs/cluster.md under bash, with stand-ins for Slurm's commands; the queue's SIGTERM comes after a few steps."""
    text = re.search(r"```sbatch\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)[1]
    script, flags = flags_of(world, "ppo", folder / "queued", steps=400, save_every=1000)
    job, ours = re.subn(r"train_ppo\.py --data .*? &\n", f"{ROOT / script}.py {' '.join(f'--{key} {value}' for key, value in flags.items())} &\n", text, flags=re.DOTALL)
    job = job.replace("--nproc_per_node=8", "--nproc_per_node=2").replace("29500", "29517")
    assert ours == 1 and "--nproc_per_node=2" in job
    for name, body in (("srun", f'"$@" & echo $! > {tmp_path / "step"}; trap "kill -KILL $!" TERM; wait $!'),      # as Slurm's: SIGTERM to it kills the tasks
                       ("scancel", f'kill -TERM $(cat {tmp_path / "step"}); echo "$@" >> {tmp_path / "said"}'),
                       ("scontrol", f'[ "$1" = show ] && echo localhost || echo "$@" >> {tmp_path / "said"}')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    started = subprocess.Popen(["bash", "-c", job], cwd=ROOT, env={**os.environ, "PATH": path, "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_JOB_ID": "77"},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not (flags["out"] / "metrics.jsonl").exists() or len(steps_of(flags["out"])) < 3:
        assert started.poll() is None and time.time() < deadline, started.communicate()
        time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    out, errors = started.communicate(timeout=120)
    assert "stopped; the same command goes on from the last save" in errors, errors
    assert (tmp_path / "said").read_text() == "--signal=TERM 77\nrequeue 77\n"
    done = len(steps_of(flags["out"]))
    assert 3 <= done < 400 and [path.name for path in run_folder.states(flags["out"])] == [f"state-{done:06}.safetensors"]
