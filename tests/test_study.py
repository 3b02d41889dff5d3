"""The study as a user meets it: one command, Ctrl-C, kill -9, a stage that fails, mistakes; what its stages measure, by hand on tiny models.

One smoke run, stopped once by Ctrl-C and finished by the same command, is looked at by most tests here.
"""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nanorlhf import gpt2
from nanorlhf.heads import Policy
from nanorlhf.io import data, hub, tokenizer
from nanorlhf.io.read import InputError
from nanorlhf.run import cli
from nanorlhf.study import __main__ as study
from nanorlhf.study import stages, world
from nanorlhf.study.command import command, run_command

ROOT = Path(__file__).resolve().parent.parent
SCALE = stages.SCALES["smoke"]


def start(out, *flags):
    """A process of its own group, as a terminal gives it, so that Ctrl-C can go to all of them."""
    return subprocess.Popen([sys.executable, "-m", "nanorlhf.study", "--scale=smoke", "--workers=2", f"--out={out}", *flags], cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(out, *flags):
    """The whole command.  -> stdout"""
    started = start(out, *flags)
    printed, error = started.communicate(timeout=400)
    assert started.returncode == 0 and not error, error
    return printed


@pytest.fixture
def here(monkeypatch, capsys):
    """The same command in this process, which has imported everything: here(*flags) -> (exit code, stdout, stderr)"""
    kept = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}

    def command(*flags):
        monkeypatch.setattr(sys, "argv", ["study", *flags])
        code = 0
        try:
            cli.run_script(study.main, study.Config)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    yield command
    for name, handler in kept.items():
        signal.signal(name, handler)


def done(out):
    """What study.json says is done; empty before there is one."""
    path = out / "study.json"
    return json.loads(path.read_text())["stages"] if path.exists() else {}


def wait_for(condition, started=None, seconds=300):
    deadline = time.time() + seconds
    while not condition():
        assert started is None or started.poll() is None, started.communicate()
        assert time.time() < deadline
        time.sleep(0.02)


def files(folder, *patterns):
    return {str(path.relative_to(folder)): path.read_bytes() for pattern in patterns for path in sorted(folder.rglob(pattern)) if path.is_file()}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A smoke study that Ctrl-C stopped and the same command finished. With three workers one has had nothing to do by then."""
    out = tmp_path_factory.mktemp("study") / "smoke"
    started = start(out, "--workers=3")
    wait_for(lambda: "seed0/sft" in done(out), started)
    os.killpg(started.pid, signal.SIGINT)
    _, error = started.communicate(timeout=60)
    stopped = dict(code=started.returncode, error=error, done=done(out))
    return dict(out=out, stopped=stopped, printed=finish(out))


@pytest.fixture(scope="module")
def results(smoke):
    return json.loads((smoke["out"] / "seed0/results.json").read_text())


# ------------------------------------------------------------------------------------------------------------- the plan

@pytest.mark.parametrize("seeds", [1, 3])
def test_every_stage_waits_for_stages_of_the_plan(seeds):
    plan = study.plan(seeds)
    names = [stage.name for stage in plan]
    assert len(set(names)) == len(names) == 1 + seeds * (3 + len(stages.REWARDS) + 2 + len(stages.ARMS) + 1)
    order = set()
    while len(order) < len(plan):                # a cycle would leave nothing ready
        ready = {stage.name for stage in plan if set(stage.after) <= order} - order
        assert ready, set(names) - order
        order |= ready
    assert all(callable(getattr(stages, stage.function)) for stage in plan)
    assert all(name.startswith(("reader/", stage.name.split("/")[0])) for stage in plan for name in stage.after)      # seeds do not wait for each other


def test_arms_wait_for_their_reward():
    after = {stage.name: set(stage.after) for stage in study.plan(2)}
    for arm, (reward, _) in stages.ARMS.items():
        model = {"raw": "rm-classification", stages.GOLD: "sft"}.get(reward, reward)
        assert after[f"seed1/ppo-{arm}"] == {f"seed1/{model}"}
    assert after["seed1/measure"] == {name for name in after if name.startswith("seed1/")} - {f"seed1/{name}" for name in ("tales", "sft", "judged", "measure")}


def test_every_arm_and_reward_model_has_flags_that_exist():
    import train_ppo
    import train_rm
    for _, flags in stages.ARMS.values():
        words = command("train_ppo.py", data="d", policy="p", reward="r", out="o", **stages.PPO_FLAGS | flags)
        assert {name: getattr(cli.parse(train_ppo.Config, words[1:]), name) for name in flags} == flags
    for _, flags in stages.REWARDS.values():
        words = command("train_rm.py", data="d", init="i", out="o", **flags, **stages.TRAIN_FLAGS)
        assert {name: getattr(cli.parse(train_rm.Config, words[1:]), name) for name in flags} == flags


def test_a_command_is_run_here_and_shown_as_one_would_type_it(tmp_path, capsys):
    out = tmp_path / "a world"
    words = command("-m nanorlhf.study.world", out=out, passages=4, held_out=2)
    assert words == ["-m", "nanorlhf.study.world", "--out", str(out), "--passages", "4", "--held_out", "2"]
    run_command(words)
    shown = capsys.readouterr().out.splitlines()[0]
    assert shown == f"python -m nanorlhf.study.world --out '{out}' --passages 4 --held_out 2" and (out / "ppo/val.jsonl").exists()
    with pytest.raises(InputError, match="is there already"):
        run_command(words)
    with pytest.raises(InputError, match="--stepz"):
        run_command(["train_sft.py", "--data", "d", "--init", "i", "--out", "o", "--stepz", "3"])


# ------------------------------------------------------------------------------------------------------- one whole study

def test_every_stage_ran_and_left_its_log(smoke):
    state = json.loads((smoke["out"] / "study.json").read_text())
    assert state["stages"].keys() == {stage.name for stage in study.plan(1)} and (state["scale"], state["seeds"]) == ("smoke", 1)
    for name, cost in state["stages"].items():
        assert cost["seconds"] > 0 and 0.05 < cost["peak_gib"] < 4 and (smoke["out"] / f"{name}.log").exists()
    assert 0 < state["seconds"] and not list(smoke["out"].rglob("*.tmp"))
    total = len(state["stages"])
    assert f"[{total}/{total}] seed0/measure" in smoke["printed"] and f"{len(smoke['stopped']['done'])} done before" in smoke["printed"]


def finite(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def test_results_have_every_policy(results):
    policies = results["policies"]
    assert policies.keys() == {"experts", "control", "sft", *stages.ARMS} and results["ways"].keys() == stages.ARMS.keys()
    for name, found in policies.items():
        assert finite(found["gold"]) and found["judges"].keys() == {judge.name for judge in world.PANEL}
        assert found["gold"] == pytest.approx(np.mean(list(found["judges"].values())), abs=1e-5)
        assert sum(found["kinds"].values()) == pytest.approx(1, abs=1e-5) and found["n"] == (2 if name == "experts" else 1) * SCALE.held_out
        assert name in ("experts", "control") or all(finite(found[key]) for key in ("kl", "entropy", "tokens"))
    assert all([step["steps"] for step in way] == list(SCALE.ppo) and way[-1] == policies[arm] for arm, way in results["ways"].items())
    assert policies["experts"]["answerable"] == 1 and policies["experts"]["gold"] > 1 > policies["control"]["gold"]
    assert policies["sft"]["kl"] == 0 and all(way[-1]["kl"] != 0 for way in results["ways"].values())


def test_results_have_every_reward_model(results):
    assert results["rewards"].keys() == stages.REWARDS.keys()
    for name, (source, _) in stages.REWARDS.items():
        found = results["rewards"][name]
        assert all(finite(found[where]["accuracy"]) and finite(found[where]["auc"]) and found[where]["n"] > 0 for where in ("ranked", "labelled", "pairs"))
        assert finite(found["raw_deviation"]) and (source != "pairs" or finite(found["pairs"]["calibration"]["ece"]))
        assert ("values" in found) == (source == "pairs") == ("panel_accuracy" in found["pairs"])
    assert finite(results["rewards"]["self_mean"]["before"]["within_deviation"]) and finite(results["rewards"]["label"]["closed_form"]["max_deviation"])
    assert finite(results["rewards"]["scores"]["pairs"]["quantiles"]["coverage"]["pinball"])


def test_results_show_texts_a_row_and_wins(results, smoke):
    assert str(smoke["out"]) not in json.dumps(results) and results["seed"] == 0          # a study that is moved says the same
    row = results["row"]
    assert len(row["words"]) == len(row["branch"]) == len(row["positions"]) and set(row["branch"]) == {0, 1, 2, 3, 4}
    for shown in results["texts"]:
        assert shown["responses"].keys() == {"experts", "sft", *stages.ARMS}
        for response in shown["responses"].values():
            assert response["gold"] == pytest.approx(world.gold([shown["prompt"]], [response["text"]])[0], abs=1e-5)
    for name, found in results["wins"].items():
        assert found["n"] == SCALE.held_out == found["wins"] + found["ties"] + found["losses"] and found["disagreed"] == found["skipped"] == 0, name
    assert "experts : sft" in results["wins"] and results["wins"]["experts : sft"]["wins"] > SCALE.held_out / 2


def test_pairs_were_chosen_by_the_judge_that_is_named(smoke):
    names, judges = [judge.name for judge in world.PANEL], set()
    for split in ("train", "val"):
        groups, dropped = data.read_groups(smoke["out"] / f"seed0/pairs/{split}.jsonl")
        assert groups and not +dropped
        for group in groups:
            who = names.index(group.extra["judge"])
            judges.add(who)
            (won,), (lost,) = [[world.panel(group.prompt, r.text)[who] for r in group.responses if (r.label, r.place) == mark] for mark in ((1, 0), (0, 1))]
            assert won > lost and all(r.scores == pytest.approx(world.panel(group.prompt, r.text)) for r in group.responses)
    assert len(judges) == len(names)             # a crowd


def test_rankings_and_labels_are_of_the_same_samples(smoke):
    seed = smoke["out"] / "seed0"
    ranked, labelled = (data.read_groups(seed / f"{name}/train.jsonl")[0] for name in ("ranked", "labelled"))
    assert len(ranked) == len(labelled) == SCALE.passages // 2
    assert (seed / "few/train.jsonl").read_text().splitlines() == (seed / "ranked/train.jsonl").read_text().splitlines()[: SCALE.overfit]
    for group, other in zip(ranked, labelled):
        texts = [r.text for r in group.responses]
        assert group.prompt == other.prompt and [r.text for r in other.responses if r.label == 0] == texts
        experts = [r.text for r in other.responses if r.label == 1]
        assert len(experts) == 2 and all(world.understand(group.prompt, text).answerable for text in experts)
        for a in group.responses:                # a better place means a better mean opinion, one place at most .05 of rounding
            assert a.scores == pytest.approx(world.panel(group.prompt, a.text))
            assert all(np.mean(a.scores) > np.mean(b.scores) for b in group.responses if a.place < b.place)
            assert all(abs(np.mean(a.scores) - np.mean(b.scores)) < stages.TIE + 1e-9 for b in group.responses if a.place == b.place)


def test_the_raw_arm_lost_its_normalisation_and_nothing_else(smoke):
    fitted, raw = (hub.load_reward_model(str(smoke["out"] / f"seed0/rm-{name}")) for name in ("classification", "classification-raw"))
    assert (raw.mean, raw.std) == (0, 1) != (fitted.mean, fitted.std) and raw.transform == fitted.transform == "tanh_half"
    assert all(torch.equal(a, b) for a, b in zip(raw.model.parameters(), fitted.model.parameters()))


def test_done_is_done(smoke, here):
    """The same command runs no stage again and draws the same page."""
    out, before = smoke["out"], done(smoke["out"])
    kept = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.glob("seed0/*/**/*") if path.is_file()}
    page = files(out / "page", "*")
    code, printed, error = here("--scale=smoke", "--workers=2", f"--out={out}")
    assert code == 0 and not error and done(out) == before and f"{len(before)} done before" in printed and "[1" not in printed
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in kept} == kept
    timeless = lambda found: {name: re.sub(rb"[\d.]+ minutes", b"", raw) for name, raw in found.items()}
    assert "index.html" in page and timeless(files(out / "page", "*")) == timeless(page)


# ------------------------------------------------------------------------------------------------------- stop and go on

def test_ctrl_c_is_one_line(smoke):
    stopped = smoke["stopped"]
    assert stopped["code"] == 130 and stopped["error"] == "stopped; the same command goes on from the last save\n"
    assert "seed0/sft" in stopped["done"] and "seed0/measure" not in stopped["done"]
    after = done(smoke["out"])
    assert {name: after[name] for name in stopped["done"]} == stopped["done"]             # what was done is not done again


def children(pid):
    rows = [line.split() for line in subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout.splitlines()]
    return [int(child) for child, parent in rows if int(parent) == pid]


def alive(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def kill(out, condition):
    """kill -9 of the parent once the condition holds; its workers end by themselves."""
    started = start(out)
    wait_for(condition, started)
    workers = children(started.pid)
    started.kill()
    started.communicate()
    wait_for(lambda: not any(map(alive, workers)), seconds=10)
    return workers


@pytest.mark.slow
def test_killed_anywhere_it_ends_the_same(smoke, tmp_path):
    """Undisturbed, stopped by Ctrl-C, killed four times: the same results, the same weights, bit for bit."""
    finish(tmp_path / "whole")
    out = tmp_path / "killed"
    kill(out, (out / "study.json").exists)                                               # workers are still importing
    began = time.time()
    assert len(kill(out, lambda: time.time() - began > 8)) == 2
    for name in ("seed0/judged", "seed0/ppo-judge"):
        assert len(kill(out, lambda name=name: name in done(out))) == 2
    finish(out)

    def timeless(folder):
        found = files(folder, "model.safetensors", "results.json", "state-*.safetensors", "*.jsonl")
        found = {name: raw for name, raw in found.items() if not name.endswith("metrics.jsonl")}     # seconds are in there
        # a state's header records the run's paths, which differ here: its tensors follow
        return {name: raw[8 + int.from_bytes(raw[:8], "little"):] if "/state-" in name else raw for name, raw in found.items()}

    whole = timeless(tmp_path / "whole")
    assert len([name for name in whole if name.endswith("model.safetensors")]) == 2 + 2 + len(stages.REWARDS) + 2 + len(stages.ARMS) + 1
    for other in (out, smoke["out"]):
        found = timeless(other)
        assert {name for name in whole if found.get(name) != whole[name]} == set()


def test_a_stage_that_fails_is_named_and_can_be_repaired(smoke, tmp_path, here):
    out, flags = tmp_path / "study", ("--scale=smoke", "--workers=1", f"--out={tmp_path / 'study'}")
    shutil.copytree(smoke["out"], out)
    state = json.loads((out / "study.json").read_text())
    for name in ("seed0/rm-apart", "seed0/measure"):
        del state["stages"][name]
    (out / "study.json").write_text(json.dumps(state))
    kept = files(out, "results.json", "model.safetensors")
    shutil.move(out / "seed0/rm-apart", tmp_path / "aside")
    (out / "seed0/rm-apart").write_text("a file where a folder must be")
    code, _, error = here(*flags)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert "seed0/rm-apart: InputError: " in error and str(out / "seed0/rm-apart.log") in error
    assert "Traceback" in (out / "seed0/rm-apart.log").read_text()                        # where the line came from, for who wants to know
    assert "seed0/rm-apart" not in done(out) and done(out).items() >= state["stages"].items()
    (out / "seed0/rm-apart").unlink()
    assert here(*flags)[0] == 0
    assert done(out).keys() == {stage.name for stage in study.plan(1)} and files(out, "results.json", "model.safetensors") == kept


# ------------------------------------------------------------------------------------------------------------- mistakes

def tree(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_bytes(b"dear")
    (tmp_path / "file").write_bytes(b"a file")
    for name, text in (("other", '{"scale": "demo", "seconds": 0.0, "stages": {}}'), ("broken", '{"scale": '), ("list", "[1]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.json").write_bytes(text.encode())
    return tmp_path


@pytest.mark.parametrize("name, flags, says", [
    ("new", ["--scale=huge"], "--scale"),
    ("new", ["--seeds=-1"], "--seeds -1"),
    ("new", ["--workers=-2"], "--workers -2"),
    ("new", ["--seeds=two"], "--seeds"),
    ("mine", ["--scale=smoke"], "exists and is not a study"),
    ("other", ["--scale=smoke"], "holds a study of scale demo, not smoke"),
    ("file", ["--scale=smoke"], "file"),
    ("broken", ["--scale=smoke"], "study.json"),
    ("list", ["--scale=smoke"], "study.json"),
])
def test_mistakes_are_one_line(name, flags, says, folder, here):
    before = tree(folder)
    code, _, error = here(f"--out={folder / name}", *flags)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and says in error, error
    assert tree(folder) == before                # nothing was written, no folder made


# ------------------------------------------------------------------------------------------------------------ measuring

@pytest.fixture(scope="module")
def tiny():
    """Two tiny policies with one tokenizer, and groups of two answers, one of them cut off."""
    texts = ["the fox saw the wood", "who saw the wood?", "the fox", "why?"]
    torch.manual_seed(0)
    tok = tokenizer.train_bpe(texts, 280)
    policies = [Policy(gpt2.GPT2(gpt2.GPT2Config(tok.vocab_size, 48, 16, 1, 2))) for _ in range(2)]
    for policy in policies:
        policy.tokenizer = tok
        torch.nn.init.normal_(policy.trunk.wte.weight, std=0.5)         # so that they say something
    groups = [data.Group("the fox saw the wood", [data.Response(" who saw the wood?"), data.Response(" why?", ended=False)]),
              data.Group("the fox", [data.Response(" the"), data.Response(" who saw the fox?")])]
    return *policies, groups


@torch.no_grad()
def by_hand(policy, group, response):
    """One response, read as one plain text.  -> log-probabilities of its tokens over the vocabulary (R,V), its tokens (R,)"""
    tok = policy.tokenizer
    prompt, said = tok.encode_prompt(group.prompt), tok.encode(response.text) + [tok.eos_id] * response.ended
    row = torch.tensor([prompt + said])
    hidden = policy.trunk.hidden(row, torch.arange(row.shape[1])[None], torch.zeros_like(row))
    return policy.trunk.logits(hidden)[0, len(prompt) - 1 : -1].log_softmax(-1), torch.tensor(said)


def test_kl_to_sft_by_hand(tiny):
    one, other, groups = tiny
    kl, entropy, tokens, responses = 0.0, 0.0, 0, 0
    for group in groups:
        for response in group.responses:
            (mine, said), (theirs, _) = by_hand(one, group, response), by_hand(other, group, response)
            kl += (mine - theirs).gather(1, said[:, None]).sum().item()
            entropy -= (mine.exp() * mine).sum().item()
            tokens, responses = tokens + len(said), responses + 1
    found = stages.kl_to_sft(one, other, groups)     # nats a response; nats a token; tokens a response
    assert found["kl"] == pytest.approx(kl / responses, abs=1e-4) and abs(kl) > 0.5
    assert found["entropy"] == pytest.approx(entropy / tokens, abs=1e-5) and found["tokens"] == tokens / responses


def test_a_policy_has_not_drifted_from_itself(tiny):
    one, _, groups = tiny
    assert stages.kl_to_sft(one, one, groups)["kl"] == 0


FOX = "The fox found the ring in the mill. The fox was glad. The queen lost the harp in the swamp."


def test_opinions_by_hand():
    group = data.Group(f"{FOX}\nQuestion:", [data.Response(" Who found the ring?"), data.Response(" Who found the pie?"), data.Response(" fox"), data.Response(" fox")])
    found = stages.opinions_of([group])
    # the panel's mean: who 1.00 and the collector's .3 for the ring, 1.03;  vague .26 less .51 for the missing pie, -.25;  ill formed -1.12
    assert found["gold"] == pytest.approx((1.03 - 0.25 - 2 * 1.12) / 4)
    assert found["judges"]["collector"] == pytest.approx((1.2 - 0.2 - 2 * 1.2) / 4)
    assert (found["answerable"], found["missing"], found["n"], found["distinct"]) == (0.25, 0.25, 4, 0.75)
    assert found["kinds"] == {"why": 0, "feel": 0, "who": 0.5, "what": 0, "where": 0, "ill formed": 0.5}


def test_opinions_of_the_control_are_about_the_other_passage():
    rng = np.random.Generator(np.random.Philox(key=[1, 99]))
    groups = [data.Group(world.TEMPLATE.format(passage=(passage := world.tale(rng))), [data.Response(f" {question}") for question, _, _ in world.ask(passage, 2, rng)])
              for _ in range(60)]
    prompts = [group.prompt for group in groups]
    own, others = stages.opinions_of(groups), stages.opinions_of(groups, prompts[1:] + prompts[:1])
    # 1.46 or more for what is answerable, .26 less .51 a name for what is not: the margin of three names' worth is far off by chance
    assert own["answerable"] == 1 and others["answerable"] < 0.1 and own["gold"] > others["gold"] + 1.5
    assert own["missing"] == 0 < others["missing"] and own["kinds"] == others["kinds"]      # the form is the same
