"""A run's folder: a state that resumes bit for bit, and one that is damaged."""
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_sft
from nanorlhf import optim, runs
from nanorlhf.batching import pack_rows
from nanorlhf.config import InputError
from nanorlhf.heads import Policy
from test_checkpoint import FAMILIES, a_row, our_trunk
from test_models import tiny_tokenizer


def step(model, optimizer, batch):
    """One real update.  -> loss"""
    loss = -model(batch).logprobs.sum() + model(batch).values.pow(2).sum()
    loss.backward()
    optim.update(model, optimizer, 1e-2, optim.gradient_norm(model))
    return loss.item()


def config(out):
    return train_sft.Config(data="d", init="i", out=str(out))


def save(out, model, optimizer, step, **numbers):
    runs.save(config(out), "train_sft", model, optimizer, step, lambda: None, **numbers)


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
    numbers = runs.load(config(tmp_path), other, other_optimizer)
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
        runs.load(config(tmp_path), model, optimizer)
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
        runs.load(config(tmp_path), model, optimizer)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_run_killed_in_its_first_write_starts_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json.tmp").write_text('{"script": "tra')            # killed before the rename: nothing of anybody's is there
    assert runs.resumable(config(tmp_path / "run"), "train_sft") is False
    (tmp_path / "run" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="not a run of ours"):
        runs.resumable(config(tmp_path / "run"), "train_sft")
