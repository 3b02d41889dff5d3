"""A run's folder: a state that resumes bit for bit, and one that is damaged; whose run it is; steps that are not finite."""
import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import FAMILIES, a_row, our_trunk
from test_models import tiny_tokenizer

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
