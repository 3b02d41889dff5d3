"""The mistakes of mistakes.py, each put into a copy of the code, where a named test must fail.    pytest -m faults   (minutes)

The first half holds small tests of rows, models and the optimizer's step that catch such faults and stand nowhere else; they always run.
"""
import collections
import re
import shutil
from pathlib import Path

import forked
import pytest
import torch
from mistakes import MISTAKES

from nanorlhf import ppo
from nanorlhf.batching import Row, pack_rows
from nanorlhf.gpt2 import GPT2, GPT2Config
from nanorlhf.heads import Policy, RewardModel
from nanorlhf.llama import Llama, LlamaConfig
from nanorlhf.run import optim

ROOT = Path(__file__).resolve().parent.parent
EOS = 6
TRUNKS = {
    "gpt2": lambda: GPT2(GPT2Config(vocab_size=7, n_positions=32, n_embd=8, n_layer=2, n_head=2)),
    "llama": lambda: Llama(LlamaConfig(vocab_size=7, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
                                       num_key_value_heads=1, max_position_embeddings=32)),
}
ROWS = [Row([1, 2, 3], [[4, 5, EOS], [2, EOS], [5]]), Row([3, 1, 4, 1, 5], [[2, 2, EOS]])]


def drawn(module):
    """Weights large enough that every column that is seen matters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return module.double()


# -------------------------------------------------------------------------------------------------------- rows and models

def plain(trunk, prompt, response):
    """Hidden states (T,D) of one ordinary sequence, and log-probabilities and entropies of its response tokens (R)."""
    ids = torch.tensor([prompt + response])
    hidden = trunk.hidden(ids, torch.arange(ids.shape[1])[None], torch.zeros_like(ids))[0]
    logp = torch.log_softmax(trunk.logits(hidden), -1)[len(prompt) - 1 : -1]                      # column t predicts token t + 1
    return hidden, logp[torch.arange(len(response)), torch.tensor(response)], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("family", TRUNKS)
def test_a_row_equals_its_responses_one_by_one(family):
    policy, scorer = drawn(Policy(TRUNKS[family](), value_head=True)), drawn(RewardModel(TRUNKS[family](), outputs=2))
    batch = pack_rows(ROWS)
    output, outputs = policy(batch, return_entropy=True), scorer(batch)
    for b, row in enumerate(ROWS):
        for k, response in enumerate(row.responses):
            n = len(response)
            hidden, logprobs, entropy = plain(policy.trunk, row.prompt, response)
            values = policy.value_head(hidden[len(row.prompt) - 1 : -1]).squeeze(-1)
            for found, expected in zip(output, (logprobs, entropy, values)):
                assert torch.allclose(found[b, k, :n], expected, atol=1e-12)
                assert (found[b, k, n:] == 0).all()
            assert torch.allclose(outputs[b, k], scorer.score(plain(scorer.trunk, row.prompt, response)[0][-1]), atol=1e-12)
    assert not output.logprobs[1, 1:].any()                              # the second group has one response


def test_eos_is_a_token_like_any_other():
    # three responses that end, one that did not: every token counts, EOS included, and `last_index` points at it
    batch = pack_rows(ROWS)
    assert batch.response_mask.sum(-1).tolist() == [[3, 2, 1], [3, 0, 0]]
    assert (batch.responses[batch.response_mask] == EOS).sum() == 3
    assert batch.tokens.gather(1, batch.last_index)[batch.valid].tolist() == [EOS, EOS, 5, EOS]
    score = torch.tensor([[1.0, 2, 3], [4, 0, 0]])
    zero = torch.zeros(batch.response_mask.shape)
    rewards = ppo.shape_rewards(score, zero, zero, batch.response_mask, 0.1)
    assert batch.responses[rewards != 0].tolist() == [EOS, EOS, 5, EOS]


@pytest.mark.parametrize("detach", [False, True])
def test_detach_value_keeps_the_value_loss_out_of_the_trunk(detach):
    policy = drawn(Policy(TRUNKS["gpt2"](), value_head=True, detach_value=detach))
    policy(pack_rows(ROWS)).values.sum().backward()
    assert policy.value_head.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in policy.trunk.parameters()) if detach else policy.trunk.wte.weight.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------------------- the step

class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))


def step(model, optimizer):
    """-> the norm before clipping"""
    norm = optim.gradient_norm(model)
    optim.update(model, optimizer, 1.0, norm)
    return norm.item()


def test_update_clips_the_norm_of_the_whole_gradient():
    # gradient (3, 4), norm 5, in two parameters: a step of SGD with lr 1 is -(3, 4) / 5; parameter by parameter it would be -(1, 1)
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    (3 * model.a + 4 * model.b).backward()
    assert step(model, optimizer) == pytest.approx(5)
    assert [model.a.item(), model.b.item()] == pytest.approx([-0.6, -0.8], abs=1e-5)
    assert model.a.grad is None                                          # the next step starts from nothing
    (0.3 * model.a + 0.4 * model.b).backward()                           # norm .5: left as it is
    assert step(model, optimizer) == pytest.approx(0.5)
    assert [model.a.item(), model.b.item()] == pytest.approx([-0.9, -1.2], abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(bad):
    model = Two()
    (bad * model.a + model.b).backward()
    assert not optim.gradient_norm(model).isfinite()


# ------------------------------------------------------------------------------------- the mistakes


def test_every_mistake_has_its_place():
    # after a refactoring, a mistake whose text is gone says so here, not in the minutes of -m faults
    for mistake in MISTAKES:
        found = (ROOT / mistake.file).read_text(encoding="utf-8").count(mistake.old)
        assert found == 1, f"{mistake.name}: {found} times in {mistake.file}: {mistake.old!r}"
        assert mistake.old != mistake.new, mistake.name
        file, name = re.sub(r"\[.*", "", mistake.test).split("::")
        tests = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"def {name}(" in tests, f"{mistake.name}: no test {mistake.test}"
    for same in ("name", ("file", "old", "new")):
        fields = (same,) if isinstance(same, str) else same
        counts = collections.Counter(tuple(getattr(m, f) for f in fields) for m in MISTAKES)
        assert max(counts.values()) == 1, counts.most_common(3)


def run_in_copy(folder, tests, mistake=None):
    """These tests in a copy that has the mistake in it.  -> (exit code, what was printed)"""
    for part in ("nanorlhf", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    for script in ROOT.glob("train_*.py"):
        shutil.copy(script, folder)
    if mistake:
        path = folder / mistake.file
        text = path.read_text(encoding="utf-8")
        assert text.count(mistake.old) == 1, mistake.name
        path.write_text(text.replace(mistake.old, mistake.new), encoding="utf-8")
    return forked.run(folder, ["-x", "-q", "-m", "", *(f"tests/{test}" for test in tests)])


@pytest.mark.faults
def test_without_a_mistake_all_of_them_pass(tmp_path):
    code, printed = run_in_copy(tmp_path, sorted({mistake.test for mistake in MISTAKES}))
    assert code == 0, printed[-2000:]


@pytest.mark.faults
@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.name for mistake in MISTAKES])
def test_mistake_is_caught(mistake, tmp_path):
    code, printed = run_in_copy(tmp_path, [mistake.test], mistake)
    assert code == 1, printed[-2000:]              # 1: a test failed; 2: the copy has no sense
    by_its_result = r"^E +(assert |AssertionError|KeyError|Failed: DID NOT RAISE)"
    assert re.search(by_its_result, printed, re.MULTILINE), printed[-2000:]      # not by a crash
