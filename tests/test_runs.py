"""A run's folder: a state that resumes bit for bit, and one that is damaged; whose run it is; steps that are not finite."""
import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import FAMILIES, a_row, our_trunk
from test_models import tiny_tokenizer

import train_ppo
import train_rm
import train_sft
from nanorlhf.batching import pack_rows
from nanorlhf.heads import Policy
from nanorlhf.io import files
from nanorlhf.io.read import InputError
from nanorlhf.run import nonfinite, optim, run_folder


def step(model, optimizer, batch):
    """One real update.  -> loss"""
    loss = -model(batch).logprobs.sum() + model(batch).values.pow(2).sum()
    loss.backward()
    optim.update(model, optimizer, 1e-2, optim.gradient_norm(model))
    return loss.item()


def config(out, **flags):
    return train_sft.Config(data="d", init="i", out=str(out), **flags)


FRESH = {"step": 0, "skipped": 0, "in_a_row": 0}


def save(out, model, optimizer, step, **numbers):
    run_folder.save(config(out), "train_sft", model, optimizer, step, lambda: None, **{"skipped": 0, "in_a_row": 0, **numbers})


def fresh(family, dtype=torch.float32):
    tok = tiny_tokenizer(family)
    model = Policy(our_trunk(family, tok), value_head=True).to(dtype)
    return model, optim.adamw(model, 1e-2), pack_rows([a_row(tok)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_state_resumes_bit_for_bit(family, dtype, tmp_path):
    model, optimizer, batch = fresh(family, dtype)
    for _ in range(2):
        step(model, optimizer, batch)
    save(tmp_path, model, optimizer, 2, kl_coef=0.05)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SHA256SUMS", "state-000002.safetensors"]

    other, other_optimizer, _ = fresh(family, dtype)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(3)
    numbers = run_folder.load(config(tmp_path), other, other_optimizer, {**FRESH, "kl_coef": 1.0})
    assert numbers["step"] == 2 and numbers["kl_coef"] == 0.05
    for _ in range(2):                               # moments, bias correction and weights: all must be back for the steps to agree
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
            for key in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(optimizer.state[p][key], other_optimizer.state[q][key])
        assert step(model, optimizer, batch) == step(other, other_optimizer, batch)


def test_state_keeps_the_number_of_threads(tmp_path):
    (model, optimizer, _), before = fresh("gpt2"), torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        save(tmp_path, model, optimizer, 0)
        torch.set_num_threads(before)
        run_folder.load(config(tmp_path), model, optimizer, FRESH)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def about(**numbers):
    """Rewrites the state with other numbers; None takes one away."""
    def damage(path, found, metadata):
        run = json.loads(metadata["run"]) | numbers
        save_file(found, path, {"run": json.dumps({key: value for key, value in run.items() if value is not None})})
    return damage


def without(key):
    return lambda path, found, metadata: (found.pop(key), save_file(found, path, metadata))


def shaped(key, shape):
    return lambda path, found, metadata: save_file(found | {key: torch.ones(shape)}, path, metadata)


STATE_DAMAGE = {
    "truncated": lambda path, *_: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path, *_: path.write_bytes(b""),
    "text": lambda path, *_: path.write_text("not a state\nat all\n"),
    "no numbers": lambda path, found, metadata: save_file(found, path),
    "broken numbers": lambda path, found, metadata: save_file(found, path, {"run": '{"step":\n 3'}),
    "a list of numbers": lambda path, found, metadata: save_file(found, path, {"run": "[3]"}),
    "no threads": about(threads=None),
    "threads in words": about(threads="two"),
    "no threads at all": about(threads=0),
    "no step": about(step=None),
    "step in words": about(step="two"),
    "a weight is gone": without("model.trunk.h.1.ln_1.bias"),
    "a moment is gone": without("exp_avg_sq.trunk.h.1.ln_1.bias"),
    "a deeper model's": lambda path, found, metadata: save_file(found | {"model.trunk.h.2.ln_1.bias": torch.ones(32)}, path, metadata),
    "a weight that would broadcast": shaped("model.trunk.ln_f.bias", (1,)),
    "a moment that would broadcast": shaped("exp_avg.trunk.ln_f.bias", (1,)),
    "a wider model's": shaped("model.trunk.ln_f.bias", (64,)),
    "no processes": about(processes=0),
    "threads without end": about(threads=10**9),
    "a step below 0": about(step=-1),
    "a count in words": about(skipped="two"),
    "no count": about(in_a_row=None),
    "no flags": about(flags=None),
    "flags in words": about(flags="all"),
    "gone": lambda path, *_: path.unlink(),
}


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("case", STATE_DAMAGE)
def test_a_damaged_state_ends_in_one_line(case, listed, tmp_path):
    model, optimizer, batch = fresh("gpt2")
    step(model, optimizer, batch)
    save(tmp_path, model, optimizer, 1)
    path = tmp_path / "state-000001.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    if not listed:                       # as if somebody had made the file: the checks behind the checksum
        (tmp_path / "SHA256SUMS").unlink()
    STATE_DAMAGE[case](path, load_file(path), metadata)
    with pytest.raises(InputError, match="SHA-256" if listed and case != "gone" else None) as caught:
        run_folder.load(config(tmp_path), model, optimizer, FRESH)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


# ------------------------------------------------------------------------------------------------ which state, and whose

def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def names(out):
    return [path.name for path in run_folder.states(out)]


def state(step):
    return f"state-{step:06}.safetensors"


def test_the_newest_states_are_kept(tmp_path):
    model, optimizer, _ = fresh("gpt2")
    for number in range(1, 6):
        save(tmp_path, model, optimizer, number)
        kept = [state(n) for n in range(number, max(number - run_folder.KEEP, 0), -1)]
        assert names(tmp_path) == kept and files.read_checksums(tmp_path).keys() == set(kept) and not files.partial_files(tmp_path)


def test_a_damaged_state_falls_back_to_the_one_before(tmp_path, capsys):
    model, optimizer, batch = fresh("gpt2")
    save(tmp_path, model, optimizer, 2)
    before = [parameter.clone() for parameter in model.parameters()]
    step(model, optimizer, batch)
    save(tmp_path, model, optimizer, 4)
    flip(tmp_path / state(4))
    assert run_folder.load(config(tmp_path), model, optimizer, FRESH)["step"] == 2
    said = capsys.readouterr().out
    assert f"{state(4)} is damaged" in said and f"going on from {state(2)}" in said and "resuming at step 2" in said
    assert all(map(torch.equal, before, model.parameters())) and not optimizer.state       # nothing of the state that could not be used
    save(tmp_path, model, optimizer, 3)              # what is later than the run is gone
    assert names(tmp_path) == [state(3), state(2)] and files.read_checksums(tmp_path).keys() == {state(3), state(2)}


def test_all_states_damaged_are_all_named(tmp_path):
    model, optimizer, _ = fresh("gpt2")
    for number in (1, 2):
        save(tmp_path, model, optimizer, number)
        flip(tmp_path / state(number))
    with pytest.raises(InputError, match=f"{state(2)}.*{state(1)}.*remove the folder to start again"):
        run_folder.load(config(tmp_path), model, optimizer, FRESH)


def test_an_ended_run_writes_a_damaged_model_again(tmp_path, capsys):
    """At its last step a run has no save before it. It goes back by one state, unless its model is whole."""
    model, optimizer, _ = fresh("gpt2")
    (tmp_path / "model").mkdir()
    files.replace_all(tmp_path / "model", {"config.json": b"{}", "model.safetensors": b"weights"})
    for number in (2, 4):
        save(tmp_path, model, optimizer, number)
    ended = lambda steps: run_folder.load(config(tmp_path, steps=steps), model, optimizer, FRESH)["step"]
    assert ended(4) == 4 and "warning" not in capsys.readouterr().out
    for damage, says in ((lambda path: flip(path), "model.safetensors is damaged"), (lambda path: path.unlink(), "model.safetensors is gone"),
                         (lambda path: flip(path.with_name(files.SUMS)), ""), (lambda path: path.with_name(files.SUMS).write_text("abc"), "SHA256SUMS is gone or cut")):
        damage(tmp_path / "model" / "model.safetensors")
        assert ended(4) == 2
        said = capsys.readouterr().out
        assert f"{tmp_path / 'model'}: " in said and says in said and f"going on from {state(2)}" in said
        assert ended(6) == 4 and says in capsys.readouterr().out       # the next save writes it
        files.replace_all(tmp_path / "model", {"config.json": b"{}", "model.safetensors": b"weights"})
    (tmp_path / state(2)).unlink()
    flip(tmp_path / "model" / "config.json")
    with pytest.raises(InputError, match="config.json is damaged.*remove the folder to start again"):
        ended(4)


def started(out, **flags):
    """A run with a state."""
    model, optimizer, _ = fresh("gpt2")
    run_folder.write_config(config(out, **flags), "train_sft", "nowhere")
    run_folder.save(config(out, **flags), "train_sft", model, optimizer, 3, lambda: None, skipped=0, in_a_row=0)
    return model, optimizer


@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(path.read_bytes()[:40]), lambda path: path.unlink(),
                                    lambda path: (path.write_text("{"), path.with_name(files.SUMS).unlink())])
def test_flags_without_config_json_are_those_of_a_state(damage, tmp_path, capsys):
    started(tmp_path, lr=1e-3)
    damage(tmp_path / "config.json")
    assert run_folder.resumable(config(tmp_path, lr=1e-3), "train_sft") is True
    said = capsys.readouterr().out
    assert "config.json" in said and f"the flags are read from {state(3)}" in said
    with pytest.raises(InputError, match="--lr 0.001 is now 0.002"):
        run_folder.resumable(config(tmp_path, lr=2e-3), "train_sft")
    with pytest.raises(InputError, match="a run of train_sft, not of train_rm"):
        run_folder.resumable(config(tmp_path, lr=1e-3), "train_rm")
    run_folder.write_config(config(tmp_path, lr=1e-3), "train_sft", "nowhere")      # whole again
    assert json.loads((tmp_path / "config.json").read_text())["flags"] == dataclasses.asdict(config(tmp_path, lr=1e-3))
    assert files.file_damage(tmp_path / "config.json") is None


def test_flags_are_not_read_from_a_damaged_state(tmp_path):
    started(tmp_path)
    flip(tmp_path / "config.json")
    flip(tmp_path / state(3))
    with pytest.raises(InputError, match="config.json is damaged.*no state is whole; remove the folder to start again"):
        run_folder.resumable(config(tmp_path), "train_sft")


def test_a_moved_run_goes_on(tmp_path):
    model, optimizer = started(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert run_folder.resumable(config(tmp_path / "there"), "train_sft") and run_folder.load(config(tmp_path / "there"), model, optimizer, FRESH)["step"] == 3
    run_folder.write_config(config(tmp_path / "there"), "train_sft", "nowhere")
    assert json.loads((tmp_path / "there" / "config.json").read_text())["flags"]["out"] == str(tmp_path / "there")


def test_a_state_too_many_goes_at_the_next_start(tmp_path):
    """Killed in its last save, before the oldest state went: no save follows."""
    model, optimizer, _ = fresh("gpt2")
    for number in (1, 2, 3):
        save(tmp_path, model, optimizer, number)
    (tmp_path / state(1)).write_bytes(b"left")
    assert run_folder.load(config(tmp_path), model, optimizer, FRESH)["step"] == 3
    assert names(tmp_path) == [state(3), state(2)]


def test_a_run_killed_in_its_first_write_starts_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json.tmp").write_text('{"script": "tra')            # killed before the rename: nothing of anybody's is there
    assert run_folder.resumable(config(tmp_path / "run"), "train_sft") is False
    (tmp_path / "run" / files.SUMS).write_text(f"{'0' * 64}  config.json\n")        # which is renamed first
    assert run_folder.resumable(config(tmp_path / "run"), "train_sft") is False
    (tmp_path / "run" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="not a run of ours"):
        run_folder.resumable(config(tmp_path / "run"), "train_sft")


# ------------------------------------------------------------------------------------------------- the same inputs?

def a_model_folder(folder, weights="weights", sums=True):
    """A folder as hub.save_policy leaves it, or as it is downloaded."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"config.json": b"{}", "model.safetensors": weights.encode()}
    if sums:
        files.replace_all(folder, contents)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def parents(tmp_path):
    """Everything that a run reads.  -> its folder"""
    folder = tmp_path / "inputs"
    for part in ("one", "two"):
        (folder / "hh" / part).mkdir(parents=True)
        (folder / "hh" / part / "train.jsonl.gz").write_text(part)
        (folder / "hh" / part / "test.jsonl.gz").write_text("held out")
    for part in ("questions", "section-stories"):
        for split, book in (("train", "fox"), ("val", "hen")):
            (folder / "tales" / part / split).mkdir(parents=True)
            (folder / "tales" / part / split / f"{book}.csv").write_text(f"{part} {split}")
    shutil.copytree(folder / "tales", folder / "published" / "data-by-train-split")
    (folder / "split").mkdir()
    for name in ("train", "val"):
        (folder / "split" / f"{name}.jsonl").write_text(name)
    (folder / "groups.jsonl").write_text("groups")
    (folder / "judge.py").write_text("def good(): ...\ndef bad(): ...\n")
    a_model_folder(folder / "sft" / "model")
    (folder / "sft" / "config.json").write_text("{}")
    a_model_folder(folder / "rm" / "model", "scores")
    a_model_folder(folder / "downloaded", "published", sums=False)
    return folder


def settled(tmp_path, script="train_ppo", **flags):
    """A run with a state, whose inputs are those of `parents`.  -> its config"""
    folder = tmp_path / "inputs"
    if not folder.exists():
        parents(tmp_path)
    own = {"train_ppo": dict(policy="sft", reward="judge.py:good"), "train_rm": dict(init="sft"), "train_sft": dict(init="gpt2-nano", tokenizer="downloaded")}[script]
    named = {key: str(folder / value) if value != "gpt2-nano" else value for key, value in {"data": "groups.jsonl", **own, **flags}.items()}
    run = {"train_ppo": train_ppo, "train_rm": train_rm, "train_sft": train_sft}[script].Config(out=str(tmp_path / "run"), **named)
    run_folder.write_config(run, script, "nowhere")
    (tmp_path / "run" / state(3)).write_bytes(b"a state")        # only its name is asked for
    return run


def text(path, content="other"):
    return lambda folder: (folder / path).write_text(content)


def moved(path, to):
    return lambda folder: (folder / path).rename(folder / to)


OTHER_INPUTS = {
    "a groups file": ("data", "groups.jsonl", text("groups.jsonl")),
    "a train file": ("data", "split", text("split/train.jsonl")),
    "a held-out file": ("data", "split", text("split/val.jsonl")),
    "a held-out file more": ("data", "hh", text("hh/one/val.jsonl")),
    "a held-out file of another name": ("data", "split", text("split/test.jsonl")),
    "a part more": ("data", "hh", lambda folder: shutil.copytree(folder / "hh/one", folder / "hh/three")),
    "a held-out file less": ("data", "split", lambda folder: (folder / "split/val.jsonl").unlink()),
    "a part of HH": ("data", "hh", text("hh/two/train.jsonl.gz")),
    "a held-out part of HH": ("data", "hh", text("hh/two/test.jsonl.gz")),
    "questions": ("data", "tales", text("tales/questions/train/fox.csv")),
    "stories": ("data", "tales", text("tales/section-stories/val/hen.csv")),
    "a held-out book that is trained on": ("data", "tales", moved("tales/questions/val/hen.csv", "tales/questions/train/hen.csv")),
    "questions as published": ("data", "published", text("published/data-by-train-split/questions/train/fox.csv")),
    "a judge": ("reward", "judge.py:good", text("judge.py", "def good(): return 1\n")),
    "a policy that has trained on": ("policy", "sft", lambda folder: a_model_folder(folder / "sft/model", "later")),
    "a model folder that has trained on": ("policy", "sft/model", lambda folder: a_model_folder(folder / "sft/model", "later")),
    "a reward model that has trained on": ("reward", "rm", lambda folder: a_model_folder(folder / "rm/model", "later")),
    "downloaded weights": ("policy", "downloaded", lambda folder: a_model_folder(folder / "downloaded", "later", sums=False)),
}


@pytest.mark.parametrize("case", OTHER_INPUTS)
def test_other_inputs_are_refused(case, tmp_path):
    """The same words name something else than when the run was started."""
    flag, name, change = OTHER_INPUTS[case]
    run = settled(tmp_path, **{flag: name})
    assert run_folder.resumable(run, "train_ppo")
    change(tmp_path / "inputs")
    with pytest.raises(InputError) as refused:
        run_folder.resumable(run, "train_ppo")
    path = tmp_path / "inputs" / name
    assert str(refused.value) == (f"--out {tmp_path / 'run'} was started with other flags or inputs: "
                                  f"--{flag} {str(path)!r} has other content now; name another folder")


@pytest.mark.parametrize("script, flag, path", [("train_rm", "init", "sft/model"), ("train_sft", "tokenizer", "downloaded")])
def test_every_script_knows_its_parent(script, flag, path, tmp_path):
    run = settled(tmp_path, script)
    assert run_folder.resumable(run, script)
    a_model_folder(tmp_path / "inputs" / path, "later", sums=flag == "init")
    with pytest.raises(InputError, match=f"inputs: --{flag} '.*' has other content now; name another folder$"):
        run_folder.resumable(run, script)


@pytest.mark.parametrize("flags, says", [
    (dict(data="split"), "--data '.* is now '.*split'"), (dict(policy="downloaded"), "--policy '.* is now '.*downloaded'"),
    (dict(reward="judge.py:bad"), "--reward '.* is now '.*judge.py:bad'"), (dict(reward="rm"), "--reward '.* is now '.*rm'")])
def test_another_input_is_refused(flags, says, tmp_path):
    run = settled(tmp_path)
    flags = {key: str(tmp_path / "inputs" / value) for key, value in flags.items()}
    with pytest.raises(InputError, match=f"inputs: {says}; name another folder$"):
        run_folder.resumable(dataclasses.replace(run, **flags), "train_ppo")


@pytest.mark.parametrize("flags", [dict(lr=1e-3), dict(seed=1), dict(dtype="bfloat16"), dict(kl_coef=0.1), dict(groups=32), dict(compile=True), dict(data="elsewhere")])
def test_a_flag_that_changes_the_update_is_refused(flags, tmp_path):
    run = settled(tmp_path)
    (flag, value), = flags.items()
    with pytest.raises(InputError, match=f"inputs: --{flag} .* is now {value!r}; name another folder$"):
        run_folder.resumable(dataclasses.replace(run, **flags), "train_ppo")


@pytest.mark.parametrize("flags", [dict(eval_every=7), dict(save_every=7), dict(device="cpu"), dict(max_tokens=999)])
def test_other_flags_may_change(flags, tmp_path):
    run = dataclasses.replace(settled(tmp_path), **flags)
    assert run_folder.resumable(run, "train_ppo") is True


@pytest.mark.parametrize("flag, name, rest", [("data", "groups.jsonl", ""), ("data", "tales", ""), ("policy", "sft", ""), ("policy", "downloaded", ""),
                                              ("reward", "judge.py", ":good"), ("reward", "rm", "")])
def test_another_spelling_of_a_path_is_the_same(flag, name, rest, tmp_path):
    run = settled(tmp_path, **{flag: name + rest})
    path = tmp_path / "inputs" / name
    link = tmp_path / f"link-{name}"
    link.symlink_to(path)
    for other in (os.path.relpath(path), f"{path.parent}/../inputs/./{name}", str(link), f"{path}/" if path.is_dir() else str(path)):
        assert run_folder.resumable(dataclasses.replace(run, **{flag: other + rest}), "train_ppo") is True, other


def test_what_is_not_read_may_change(tmp_path):
    """Times of change, hidden files, the parent's log, a run inside of the data's folder."""
    run = settled(tmp_path, data="split", policy="sft", reward="downloaded")
    folder = tmp_path / "inputs"
    for path in folder.rglob("*"):
        os.utime(path, ns=(1, 1))
    (folder / "split" / ".git").mkdir()
    for path in ("split/.git/index", "downloaded/.DS_Store", "sft/metrics.jsonl", "split/notes.txt"):
        (folder / path).write_text("new")
    (folder / "split" / "run").mkdir()
    (folder / "split" / "run" / "samples.jsonl").write_text("new")
    assert run_folder.resumable(run, "train_ppo") is True
    shutil.copytree(folder, tmp_path / "elsewhere")      # and what is read may lie elsewhere
    moved_run = dataclasses.replace(run, **{flag: str(tmp_path / "elsewhere" / name) for flag, name in (("data", "split"), ("policy", "sft"), ("reward", "downloaded"))})
    assert run_folder.resumable(moved_run, "train_ppo") is True


def rewritten(out, change):
    """config.json as another version would have written it."""
    values = json.loads((out / "config.json").read_text())
    change(values)
    files.replace_all(out, {"config.json": json.dumps(values).encode()})


def test_a_flag_that_the_run_did_not_have(tmp_path):
    run = settled(tmp_path)
    rewritten(tmp_path / "run", lambda values: values["flags"].pop("target_kl"))
    assert run_folder.resumable(run, "train_ppo") is True
    with pytest.raises(InputError, match="inputs: --target_kl 0.0 is now 0.5; name another folder$"):
        run_folder.resumable(dataclasses.replace(run, target_kl=0.5), "train_ppo")


def test_inputs_that_the_run_did_not_note_are_not_compared(tmp_path, capsys):
    run = settled(tmp_path)
    text("groups.jsonl")(tmp_path / "inputs")
    with pytest.raises(InputError, match="--data"):
        run_folder.resumable(run, "train_ppo")
    rewritten(tmp_path / "run", lambda values: values.pop("inputs"))
    assert run_folder.resumable(run, "train_ppo") is True
    run_folder.write_config(run, "train_ppo", "nowhere")             # from here on they are
    text("groups.jsonl", "third")(tmp_path / "inputs")
    with pytest.raises(InputError, match="--data"):
        run_folder.resumable(run, "train_ppo")
    flags = {key: value for key, value in dataclasses.asdict(run).items() if key != "out"}
    save_file({}, tmp_path / "run" / state(3), {"run": json.dumps({"script": "train_ppo", "flags": flags})})
    flip(tmp_path / "run" / "config.json")
    assert run_folder.resumable(run, "train_ppo") is True
    assert f"the flags are read from {state(3)}" in capsys.readouterr().out


def test_inputs_of_another_kind_are_damage(tmp_path):
    run = settled(tmp_path)
    (tmp_path / "run" / state(3)).write_bytes(b"")
    rewritten(tmp_path / "run", lambda values: values.update(inputs=["data"]))
    with pytest.raises(InputError, match="config.json: does not say"):
        run_folder.resumable(run, "train_ppo")


def test_digests_are_those_of_sha256sum(tmp_path):
    """... so that a reader of config.json can compare them; a resumed run writes the same file again."""
    run = settled(tmp_path, data="split", reward="judge.py:good")
    folder, sha256 = tmp_path / "inputs", lambda raw: hashlib.sha256(raw).hexdigest()
    before = (tmp_path / "run" / "config.json").read_bytes()
    assert json.loads(before)["inputs"] == {
        "data": sha256(f"{sha256(b'train')}  train.jsonl\n{sha256(b'val')}  val.jsonl\n".encode()),
        "policy": sha256((folder / "sft" / "model" / files.SUMS).read_bytes()),
        "reward": f"{sha256((folder / 'judge.py').read_bytes())}:good",
    }
    assert run_folder.resumable(run, "train_ppo")
    run_folder.write_config(run, "train_ppo", "nowhere")
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.parametrize("is_new", [True, False])
def test_digests_are_those_of_what_was_there_before_it_was_read(is_new, tmp_path, monkeypatch):
    """Once per start, and first: the parent may save again while this run loads it."""
    run = settled(tmp_path)
    if is_new:
        shutil.rmtree(tmp_path / "run")
    asked = []
    content_digest = files.content_digest
    monkeypatch.setattr(run_folder, "content_digest", lambda path, *more: (asked.append(Path(path).name), content_digest(path, *more))[1])
    assert run_folder.resumable(run, "train_ppo") is not is_new
    a_model_folder(tmp_path / "inputs/sft/model", "later")
    run_folder.write_config(run, "train_ppo", "nowhere")
    assert sorted(asked) == ["SHA256SUMS", "groups.jsonl", "judge.py"]
    (tmp_path / "run" / state(3)).write_bytes(b"a state")
    with pytest.raises(InputError, match="--policy .* has other content now"):
        run_folder.resumable(run, "train_ppo")


def test_large_files_go_by_size_and_time(tmp_path, monkeypatch):
    path = tmp_path / "large"
    path.write_text("abcd")
    monkeypatch.setattr(files, "MAX_HASHED_BYTES", 4)
    assert files.content_digest(path) == hashlib.sha256(b"abcd").hexdigest()
    monkeypatch.setattr(files, "MAX_HASHED_BYTES", 3)
    os.utime(path, ns=(5, 1_000_000_007))
    assert files.content_digest(path) == "4 bytes of 1000000007 ns"
    path.write_text("efgh")
    os.utime(path, ns=(5, 1_000_000_007))
    assert files.content_digest(path) == "4 bytes of 1000000007 ns"


@pytest.mark.parametrize("flags, numbers, exact", [
    ({}, {}, True), (dict(eval_every=7, save_every=7), {}, True), (dict(device="cpu"), {}, False), (dict(max_tokens=999), {}, False), ({}, dict(processes=2), False)])
def test_where_the_run_goes_on_to_rounding_it_says_so(flags, numbers, exact, tmp_path, capsys):
    model, optimizer, _ = fresh("gpt2")
    a_model_folder(tmp_path / "model")
    save(tmp_path, model, optimizer, 3)
    path = tmp_path / state(3)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    before = torch.get_num_threads()
    about(**numbers, threads=before + 1)(path, load_file(path), metadata)
    (tmp_path / files.SUMS).unlink()
    try:
        run_folder.load(config(tmp_path, **flags), model, optimizer, FRESH)
        # other processes have threads of their own number
        assert torch.get_num_threads() == before + ("processes" not in numbers)
    finally:
        torch.set_num_threads(before)
    lines = ["resuming at step 3"]
    if not exact:
        lines.append("from step 3 on equal to rounding, not to the bit")
    assert capsys.readouterr().out.splitlines() == lines


# ------------------------------------------------------------------------------------------------- steps that are not finite

def loss_of(model, rows, tensors):
    """A loss with a part that depends on something beside rows and weights, as PPO's does on the rollout."""
    logprobs, *_ = model(pack_rows(rows))
    return -logprobs.sum() + (tensors["slope"] * model.trunk.ln_f.bias.sum()).sqrt().sum()


def tried(finite, model, rows, slope, number):
    """A step up to the question whether it may be taken.  -> (the answer, loss)"""
    loss = loss_of(model, rows, {"slope": slope})
    loss.backward()
    return finite.all_finite(number, rows, [[list(range(len(rows)))]], [[loss.item()]], [optim.gradient_norm(model).item()], slope=slope), loss.item()


def learner(tmp_path, family="gpt2", **counts):
    tok = tiny_tokenizer(family)
    model = Policy(our_trunk(family, tok))
    with torch.no_grad():
        model.trunk.ln_f.bias.fill_(0.25)
    rows = [dataclasses.replace(a_row(tok), index=i, place=[1.0, 0.0], label=[0, None]) for i in (7, 3)]
    return model, rows, nonfinite.NonFiniteGuard(config(tmp_path), "train_sft", model, **counts)


GOOD, BAD = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -2.0])          # the root of a negative number is NaN
FLAT = torch.tensor([1.0, 0.0])                                          # the root's slope at 0 is infinite, times 0: the gradient alone is NaN


@pytest.mark.parametrize("slope, says", [(BAD, "first the loss of rows [7, 3] of the data, micro-batch 0 of process 0"),
                                         (FLAT, "first the gradient of trunk.ln_f.bias, all losses are finite")])
def test_a_step_that_is_not_finite_is_reproduced_from_its_report(slope, says, tmp_path, capsys):
    model, rows, finite = learner(tmp_path)
    assert tried(finite, model, rows, GOOD, 4)[0] and finite.numbers() == {"skipped": 0, "in_a_row": 0} and not list(tmp_path.iterdir())
    model.zero_grad()
    taken, loss = tried(finite, model, rows, slope, 5)
    assert not taken and finite.numbers() == {"skipped": 1, "in_a_row": 1}
    assert all(parameter.grad is None for parameter in model.parameters())                 # nothing of it is left for the next step
    path = tmp_path / "nonfinite-000005.safetensors"
    said = capsys.readouterr().out
    assert f"step 5: not finite, {says}" in said and str(path) in said and files.file_damage(path) is None and path.name in files.read_checksums(tmp_path)

    other, _, _ = learner(tmp_path)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    found, tensors, about = nonfinite.reproduce(path, other)
    assert found == rows and torch.equal(tensors["slope"], slope) and about["step"] == 5 and says in about["message"]
    assert about["flags"] == dataclasses.asdict(config(tmp_path)) and all(map(torch.equal, model.parameters(), other.parameters()))
    again = loss_of(other, found, tensors)
    again.backward()
    assert again.item() == pytest.approx(loss, abs=0, nan_ok=True) and not optim.gradient_norm(other).isfinite()


def test_a_broken_weight_is_reproduced_too(tmp_path):
    model, rows, finite = learner(tmp_path)
    with torch.no_grad():
        model.trunk.h[1].ln_1.weight[3] = float("inf")
    assert not tried(finite, model, rows, GOOD, 1)[0]
    other, _, _ = learner(tmp_path)
    found, tensors, _ = nonfinite.reproduce(tmp_path / "nonfinite-000001.safetensors", other)
    assert other.trunk.h[1].ln_1.weight[3] == float("inf") and not loss_of(other, found, tensors).isfinite()


def test_patience_ends(tmp_path):
    model, rows, finite = learner(tmp_path)
    assert [tried(finite, model, rows, slope, n)[0] for n, slope in enumerate([BAD] * (nonfinite.MAX_SKIPS_IN_A_ROW - 1) + [GOOD])] == [False] * (nonfinite.MAX_SKIPS_IN_A_ROW - 1) + [True]
    assert finite.numbers() == {"skipped": nonfinite.MAX_SKIPS_IN_A_ROW - 1, "in_a_row": 0}               # in a row, not in all
    for n in range(10, 9 + nonfinite.MAX_SKIPS_IN_A_ROW):
        tried(finite, model, rows, BAD, n)
    with pytest.raises(FloatingPointError, match=rf"{nonfinite.MAX_SKIPS_IN_A_ROW} steps in a row .* began at step 10: not finite, .*nonfinite-000010"):
        tried(finite, model, rows, BAD, 20)
    assert sorted(path.name for path in tmp_path.glob("nonfinite-*")) == ["nonfinite-000000.safetensors", "nonfinite-000010.safetensors"]      # the first of each row


def test_patience_goes_on_where_the_run_does(tmp_path):
    """A state between two steps that are not finite keeps the counts."""
    model, rows, finite = learner(tmp_path)
    for n in range(nonfinite.MAX_SKIPS_IN_A_ROW - 1):
        tried(finite, model, rows, BAD, n)
    optimizer = optim.adamw(model, 1e-2)
    save(tmp_path, model, optimizer, nonfinite.MAX_SKIPS_IN_A_ROW - 1, **finite.numbers())
    numbers = run_folder.load(config(tmp_path), model, optimizer, FRESH)
    again = nonfinite.NonFiniteGuard(config(tmp_path), "train_sft", model, numbers["skipped"], numbers["in_a_row"])
    with pytest.raises(FloatingPointError, match="began at a step before this start"):
        tried(again, model, rows, BAD, nonfinite.MAX_SKIPS_IN_A_ROW - 1)


def test_so_many_reports(tmp_path):
    model, rows, finite = learner(tmp_path)
    for n in range(2 * (nonfinite.MAX_REPORTS + 2)):
        tried(finite, model, rows, (BAD, GOOD)[n % 2], n)
    assert sorted(path.name for path in tmp_path.glob("nonfinite-*")) == [f"nonfinite-{2 * n:06}.safetensors" for n in range(nonfinite.MAX_REPORTS)]
    assert finite.skipped == nonfinite.MAX_REPORTS + 2


def test_a_damaged_state_is_not_believed_after_a_kill(tmp_path, monkeypatch):
    """40 is damaged, the run goes on from 20 and is killed as it removes 40 after saving 30: 40 must not look whole."""
    model, optimizer, _ = fresh("gpt2")
    for step_ in (20, 40):
        save(tmp_path, model, optimizer, step_)
    flip(tmp_path / state(40))

    class Killed(BaseException):
        pass
    monkeypatch.setattr(files.Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        save(tmp_path, model, optimizer, 30)
    monkeypatch.undo()
    assert run_folder.load(config(tmp_path), model, optimizer, FRESH)["step"] == 30


def test_the_state_that_was_loaded_stays(tmp_path):
    """Three states, killed before the oldest went, and the two newer ones are damaged."""
    model, optimizer, _ = fresh("gpt2")
    started(tmp_path)
    for path in run_folder.states(tmp_path):
        path.unlink()
    for step_ in (1, 2):
        save(tmp_path, model, optimizer, step_)
    kept = (tmp_path / state(1)).read_bytes(), (tmp_path / "SHA256SUMS").read_text()
    save(tmp_path, model, optimizer, 3)
    (tmp_path / state(1)).write_bytes(kept[0])
    (tmp_path / "SHA256SUMS").write_text("".join(sorted({*kept[1].splitlines(True), *(tmp_path / "SHA256SUMS").read_text().splitlines(True)})))
    for n in (2, 3):
        flip(tmp_path / state(n))
    for _ in range(2):
        assert run_folder.load(config(tmp_path), model, optimizer, FRESH)["step"] == 1
        run_folder.write_config(config(tmp_path), "train_sft", "nowhere")


def test_a_run_whose_states_are_gone_is_not_begun_anew(tmp_path):
    started(tmp_path)
    for path in run_folder.states(tmp_path):
        path.unlink()
    with pytest.raises(InputError, match="its states are gone"):
        run_folder.resumable(config(tmp_path), "train_sft")
