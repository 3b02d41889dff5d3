"""Faults found elsewhere, each put into a copy of the code, where a named test must fail.    pytest -m faults   (minutes)

The first half holds small tests of rows, models and the optimizer's step that catch such faults and stand nowhere else; they always run.
"""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanorlhf import optim, ppo
from nanorlhf.batching import Row, pack_rows
from nanorlhf.gpt2 import GPT2, GPT2Config
from nanorlhf.heads import Policy, Scorer
from nanorlhf.llama import Llama, LlamaConfig

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
    policy, scorer = drawn(Policy(TRUNKS[family](), value_head=True)), drawn(Scorer(TRUNKS[family](), outputs=2))
    batch = pack_rows(ROWS)
    output, outputs = policy(batch, entropy=ppo.entropy), scorer(batch)
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
    # three responses that end, one that did not: every token counts, EOS included, and `last` points at it
    batch = pack_rows(ROWS)
    assert batch.mask.sum(-1).tolist() == [[3, 2, 1], [3, 0, 0]]
    assert (batch.responses[batch.mask] == EOS).sum() == 3
    assert batch.tokens.gather(1, batch.last)[batch.valid].tolist() == [EOS, EOS, 5, EOS]
    score = torch.tensor([[1.0, 2, 3], [4, 0, 0]])
    zero = torch.zeros(batch.mask.shape)
    rewards = ppo.shape_rewards(score, zero, zero, batch.mask, 0.1)
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


# --------------------------------------------------------------------------------------------------------------- the faults

ONE_BY_ONE, SAMPLES = "test_faults.py::test_a_row_equals_its_responses_one_by_one", "test_generate.py::test_cached_is_uncached"
MICRO_BATCHES, IGNORED = "test_micro_batches_with_the_whole_count_are_the_whole", "test_ppo.py::test_what_stands_behind_the_mask_is_ignored"
PATHS, EACH, WORDS = "test_paths.py", "test_every_path_is_each_response_alone", "test_who_sees_whom_in_flex_attention"
VISIBLE = "mine = (branch_key[:, None] == 0) | (branch_key[:, None] == branch_query[:, :, None])"
SAME = "test_processes.py::test_the_same_update"
CLIP = "torch.nn.utils.clip_grads_with_norm_(model.parameters(), MAX_GRAD_NORM, norm)"
FAULTS = [   # name, file, what stands there, what is put there, the test that must fail
    # KL
    ("k1 reversed", "ppo.py", "return logprobs.to(torch.promote_types(logprobs.dtype, torch.float32)) - ref_logprobs",
     "return ref_logprobs - logprobs.to(torch.promote_types(logprobs.dtype, torch.float32))", "test_ppo.py::test_kl_estimates_by_enumeration"),
    ("k3 with the wrong sign", "ppo.py", "torch.expm1(-k1) + k1", "torch.expm1(k1) - k1", "test_ppo.py::test_kl_estimates_by_enumeration"),
    ("k3 by exp(x) - 1", "ppo.py", "torch.expm1(-k1) + k1", "torch.exp(-k1) - 1 + k1",
     "test_ppo.py::test_k3_keeps_its_digits_where_policy_and_reference_nearly_agree"),
    ("KL rewarded", "ppo.py", "rewards = -kl_coef *", "rewards = kl_coef *", "test_ppo.py::test_rewards_add_up_to_the_objective"),
    ("adaptive KL the wrong way", "ppo.py", "kl / target - 1", "1 - kl / target", "test_ppo.py::test_adaptive_kl"),
    # losses
    ("log(sigmoid(d) + 1e-5)", "losses.py", "-logsigmoid(margin)", "-torch.log(torch.sigmoid(margin) + 1e-5)",
     "test_losses.py::test_ranking_gradient_of_badly_wrong_pairs_does_not_die"),
    ("pairs divided by C(K,2) twice", "losses.py", "per_pair.sum((-1, -2)) / pairs_in_group.clamp(min=1)",
     "per_pair.sum((-1, -2)) / pairs_in_group.clamp(min=1) ** 2", "test_losses.py::test_ranking_loss_by_hand"),
    ("a tie makes a pair", "losses.py", "place.unsqueeze(-1) < place.unsqueeze(-2)", "place.unsqueeze(-1) <= place.unsqueeze(-2)",
     "test_losses.py::test_ranked_pairs"),
    ("the worst place preferred", "losses.py", "place.unsqueeze(-1) < place.unsqueeze(-2)", "place.unsqueeze(-1) > place.unsqueeze(-2)",
     "test_losses.py::test_ranking_loss_by_hand"),
    ("an absent response ranked", "losses.py", "return better & valid.unsqueeze(-1) & valid.unsqueeze(-2)", "return better",
     "test_losses.py::test_ranked_pairs"),
    ("tau the wrong way round", "losses.py", "(tau - (u < 0)", "(tau - (u > 0)", "test_losses.py::test_kappa_zero_learns_quantiles"),
    ("quantile levels without their half", "losses.py", "dtype=torch.float64) + 0.5) / n", "dtype=torch.float64) + 1.0) / n",
     "test_losses.py::test_quantile_levels"),
    ("quantiles read unsorted", "reward.py", "ordered = outputs.sort(-1).values", "ordered = outputs", "test_losses.py::test_statistics_of_unsorted_outputs"),
    ("tanh(z) for tanh(z/2)", "reward.py", "torch.tanh(z / 2)", "torch.tanh(z)", "test_losses.py::test_the_reward_of_a_classifier_is_tanh"),
    ("a middle tie called bad", "data.py", "0 if l >= half else None", "0", "test_losses.py::test_places_to_labels"),
    # what is averaged, and over what
    ("mean of means in the losses", "losses.py", "if count is None else count", "", f"test_losses.py::{MICRO_BATCHES}"),
    ("mean of means in PPO", "ppo.py", "if count is None else count", "", f"test_ppo.py::{MICRO_BATCHES}"),
    ("entropy averaged over padding", "ppo.py", "_inside(x, mask).sum() / (mask.sum().clamp(min=1)", "_inside(x, mask).sum() / (mask.numel()",
     "test_ppo.py::test_padding_never_enters_an_entropy"),
    ("entropy of a pad counted as -1", "ppo.py", "torch.where(mask, x, torch.zeros_like(x))", "torch.where(mask, x, -torch.ones_like(x))",
     "test_ppo.py::test_padding_never_enters_an_entropy"),
    ("a mask accepted and ignored, losses", "losses.py", "torch.where(mask, x, torch.zeros_like(x)).sum()", "x.sum()",
     "test_losses.py::test_sft_loss_is_a_mean_over_tokens"),
    ("a mask accepted and ignored, PPO", "ppo.py", "torch.where(mask, x, torch.zeros_like(x))", "x", IGNORED),
    ("a mask multiplied: 0 * NaN", "ppo.py", "torch.where(mask, x, torch.zeros_like(x))", "x * mask", IGNORED),
    ("a target mask accepted and ignored", "losses.py", "* huber * target_mask.unsqueeze(-2)", "* huber",
     "test_losses.py::test_quantile_loss_means_over_targets_then_over_responses"),
    # rewards and advantages
    ("score one token past EOS", "ppo.py", "return mask & ~after", "return torch.cat([torch.zeros_like(mask[..., :1]), (mask & ~after)[..., :-1]], -1)",
     "test_ppo.py::test_the_score_sits_on_the_last_token_alone"),
    ("score on the last column", "ppo.py", "return mask & ~after", "return torch.zeros_like(mask).index_fill(-1, torch.tensor(mask.shape[-1] - 1), True)",
     "test_ppo.py::test_the_score_sits_on_the_last_token_alone"),
    ("a value after the last token", "ppo.py", "_inside(values, mask).detach()", "values.detach()", "test_ppo.py::test_the_value_after_the_last_token_is_zero"),
    ("advantages of the wrong sign", "ppo.py", "delta = rewards[..., t] + gamma * value_after - values[..., t]",
     "delta = values[..., t] - rewards[..., t] - gamma * value_after", "test_ppo.py::test_gae_by_hand"),
    ("gamma forgotten in the recursion", "ppo.py", "delta + gamma * lam * advantage", "delta + lam * advantage",
     "test_ppo.py::test_gae_is_the_sum_of_discounted_deltas"),
    ("variance of a sample", "ppo.py", "var = (squares / count.clamp(min=1) - mean * mean)", "var = (squares / count - mean * mean) * count / (count - 1)",
     "test_ppo.py::test_whiten_by_hand"),
    ("whitening over padding", "ppo.py", "torch.stack([mask.sum(),", "torch.stack([torch.tensor(mask.numel()),",
     "test_ppo.py::test_whiten_by_hand"),
    # clipped losses
    ("policy clipped on the wrong side", "ppo.py", "torch.minimum(free, clipped)", "torch.maximum(free, clipped)", "test_ppo.py::test_policy_loss_by_case"),
    ("policy loss of the wrong sign", "ppo.py", "return -masked_mean(", "return masked_mean(", "test_ppo.py::test_policy_loss_by_case"),
    ("ratio upside down", "ppo.py",
     "kl_k1(_inside(logprobs, mask), _inside(old_logprobs, mask))", "kl_k1(_inside(old_logprobs, mask), _inside(logprobs, mask))",
     "test_ppo.py::test_policy_loss_by_case"),
    ("a clipped ratio that overflows", "ppo.py", "log_ratio.clamp(max=80)", "log_ratio", "test_ppo.py::test_policy_loss_at_extremes"),
    ("value clipped on the wrong side", "ppo.py", "0.5 * torch.maximum(free, clipped)", "0.5 * torch.minimum(free, clipped)",
     "test_ppo.py::test_value_loss_by_case"),
    # rows
    ("pad = EOS, so EOS is masked away", "batching.py", "mask[b, k, :n] = response, True",
     "mask[b, k, :n] = response, [token != response[-1] for token in response]",
     "test_faults.py::test_eos_is_a_token_like_any_other"),
    ("reward read at the last column", "batching.py", "last[b, k], valid[b, k] = end - 1 if n else P - 1, True", "last[b, k], valid[b, k] = T - 1, True",
     ONE_BY_ONE),
    ("reward read one column late", "batching.py", "last[b, k], valid[b, k] = end - 1 if n else P - 1, True", "last[b, k], valid[b, k] = min(end, T - 1), True",
     ONE_BY_ONE),
    ("`last` accepted and ignored", "heads.py", "columns(batch, batch.last)", "columns(batch, torch.zeros_like(batch.last))", ONE_BY_ONE),
    ("predictor off by one", "batching.py", "[P - 1, *range(start, end - 1)]", "range(start, end)", ONE_BY_ONE),
    ("first token predicted by the column before", "batching.py", "[P - 1, *range(start, end - 1)]", "range(start - 1, end - 1)", ONE_BY_ONE),
    ("logits at the token, not before it", "heads.py", "columns(batch, batch.predictor)[batch.mask]", "columns(batch, batch.predictor)[batch.mask] + 1", ONE_BY_ONE),
    ("positions run on through the row", "batching.py", "response, np.arange(P, P + n), k + 1", "response, np.arange(start, end), k + 1", ONE_BY_ONE),
    ("gpt2: responses see each other", "gpt2.py", VISIBLE, "mine = branch_key[:, None] >= branch_query[:, :, None] * 0", f"{ONE_BY_ONE}[gpt2]"),
    ("llama: responses see each other", "llama.py", VISIBLE, "mine = branch_key[:, None] >= branch_query[:, :, None] * 0", f"{ONE_BY_ONE}[llama]"),
    ("gpt2: an attention mask accepted and ignored", "gpt2.py", "attn_mask=mask", "attn_mask=None", f"{ONE_BY_ONE}[gpt2]"),
    ("llama: an attention mask accepted and ignored", "llama.py", "attn_mask=mask", "attn_mask=None", f"{ONE_BY_ONE}[llama]"),
    ("detach_value ignored", "heads.py", "hidden.detach() if self.detach_value else hidden", "hidden",
     "test_faults.py::test_detach_value_keeps_the_value_loss_out_of_the_trunk"),
    # faster paths
    ("flex: rows see each other", "gpt2.py", "(row[i] == row[j]) & (j <= i)", "(j <= i)", f"{PATHS}::{WORDS}[gpt2]"),
    ("flex: columns see later ones", "llama.py", "(row[i] == row[j]) & (j <= i)", "(row[i] == row[j])", f"{PATHS}::{EACH}[llama-flex]"),
    ("dense: columns see later ones", "gpt2.py", "[visible(mine[None], mine[None]) for mine in", "[visible(mine[None], mine[None]) | visible(mine[None], mine[None]).mT for mine in",
     f"{PATHS}::{EACH}[gpt2-dense]"),
    ("the last block's columns counted with padding", "llama.py", "torch.searchsorted(index, at).clamp(max=len(index) - 1)", "at.clamp(max=len(index) - 1)", f"{PATHS}::{EACH}[llama-dense]"),
    ("a cache that forgets branches", "gpt2.py", "else self.branch[:, : self.used], self.length)", "else 0 * self.branch[:, : self.used], self.length)", SAMPLES),
    ("a chunk without its temperature", "heads.py", "checkpoint(self.read, *chunk, temperature, entropy", "checkpoint(self.read, *chunk, 1.0, entropy",
     f"{PATHS}::{EACH}[gpt2-chunked]"),
    ("a softmax in bfloat16", "heads.py", "logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature", "logits / temperature",
     f"{PATHS}::test_bfloat16_moves_little[gpt2]"),
    ("recompute accepted and ignored", "gpt2.py", "if self.recompute and torch.is_grad_enabled()", "if False", f"{PATHS}::test_recompute_keeps_less_than_half[gpt2]"),
    ("oneDNN without the bias", "speed.py", "_product(x, layer.weight, layer.bias,", "_product(x, layer.weight, None,",
     f"{PATHS}::test_decoding_with_onednn_says_the_same"),
    ("the last block counted in full", "speed.py", "read * late)", "columns * late)", "test_speed.py::test_operations_of_gpt2_by_hand"),
    ("clipped where it is small", "optim.py", "if norm > MAX_GRAD_NORM", "if norm < MAX_GRAD_NORM", "test_speed.py::test_update_clips_as_clip_grad_norm"),
    # sampling
    ("top-p one token short", "generate.py", "before = ordered.cumsum(-1) - ordered", "before = ordered.cumsum(-1)",
     "test_generate.py::test_top_p_is_the_smallest_set"),
    ("top-p one token too many", "generate.py", "before < top_p", "before <= top_p", "test_generate.py::test_top_p_is_the_smallest_set"),
    ("a token of no probability drawn", "generate.py", "right=True", "right=False",
     "test_generate.py::test_extremes_never_draw_what_has_no_probability"),
    ("a response without its EOS", "generate.py", "r + 1, lengths[alive]", "r, lengths[alive]", SAMPLES),
    ("samples see the prompt's padding", "generate.py", "torch.full((B, longest), -1)", "torch.zeros(B, longest, dtype=torch.long)", SAMPLES),
    # the step, and resume
    ("clipping before backward or after the step: the step is not clipped", "optim.py", CLIP, CLIP.replace("MAX_GRAD_NORM", "1e9"),
     "test_faults.py::test_update_clips_the_norm_of_the_whole_gradient"),
    ("clipping parameter by parameter", "optim.py", CLIP,
     "[torch.nn.utils.clip_grad_norm_([p], MAX_GRAD_NORM) for p in model.parameters()]",
     "test_faults.py::test_update_clips_the_norm_of_the_whole_gradient"),
    ("a step with NaN", "runs.py", "if all(map(math.isfinite, sum(losses, []) + list(norms))):", "if True:",
     "test_runs.py::test_a_step_that_is_not_finite_is_reproduced_from_its_report"),
    ("a resume that forgets the optimizer", "runs.py", "            if state:", "            if False:",
     "test_runs.py::test_state_resumes_bit_for_bit"),
    # several processes
    ("each process counts its own share", "../train_sft.py", "for row in chosen for response in row.responses)     #",
     "for part in parts[dist.rank()] for i in part for response in chosen[i].responses)     #", f"{SAME}[sft-two processes]"),
    ("gradients that nobody adds up", "dist.py", "waiting.append(distributed.all_reduce(parameter.grad, async_op=True))", "pass", f"{SAME}[sft-two processes]"),
    ("a loss of one process in the log", "../train_sft.py", "loss=sum(map(sum, losses))", "loss=sum(losses[0])", f"{SAME}[sft-two processes]"),
    ("early stop, KL and logs of one process", "../train_ppo.py", "sum(numbers.get(name, 0.0) for numbers in told)", "told[0].get(name, 0.0)", f"{SAME}[ppo-two processes]"),
    ("a rollout of one process", "../train_ppo.py", "    for tensor in tensors:\n        dist.add(tensor)\n", "", f"{SAME}[ppo-two processes]"),
]


def run_in_copy(folder, tests, fault=None):
    """Copies code and tests, puts the fault in, runs these tests in a process of its own.  -> (exit code, what it printed)"""
    for part in ("nanorlhf", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("train_*.py"):
        shutil.copy(script, folder)
    if fault:
        name, old, new = fault
        path = folder / "nanorlhf" / name
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{name} has {text.count(old)} times {old!r}: write this fault anew"
        path.write_text(text.replace(old, new), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "", *(f"tests/{test}" for test in tests)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.faults
def test_without_a_fault_all_of_them_pass(tmp_path):
    code, printed = run_in_copy(tmp_path, sorted({fault[-1] for fault in FAULTS}))
    assert code == 0, printed[-2000:]


@pytest.mark.faults
@pytest.mark.parametrize("file, old, new, test", [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_fault_is_caught(file, old, new, test, tmp_path):
    code, printed = run_in_copy(tmp_path, [test], (file, old, new))
    assert code == 1, printed[-2000:]                                    # 1: a test failed; 2: the copy could not be imported
    assert re.search(r"^E +(assert |AssertionError|KeyError|Failed: DID NOT RAISE)", printed, re.MULTILINE), printed[-2000:]   # by its result, not by a crash
