"""Operations counted, numbers logged, the optimizer's step, the process: against hand counts and formulas written out."""
import re
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanorlhf.batching import Row, pack_rows
from nanorlhf.gpt2 import GPT2, GPT2Config
from nanorlhf.heads import Policy, RewardModel
from nanorlhf.llama import Llama, LlamaConfig
from nanorlhf.run import dist, optim, speed

CPU = torch.device("cpu")
GPT = lambda **how: GPT2(GPT2Config(vocab_size=11, n_positions=32, n_embd=8, n_layer=2, n_head=2, **how))
LLAMA = lambda **how: Llama(LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                                        max_position_embeddings=32, **how))
TRUNKS = {"gpt2": GPT, "gpt2-untied": lambda: GPT(tie_word_embeddings=False, n_inner=20), "llama": LLAMA, "llama-tied": lambda: LLAMA(tie_word_embeddings=True),
          "llama-head-dim": lambda: LLAMA(head_dim=4)}
ROWS = [Row([1, 2, 3], [[4, 5], [6]]), Row([1, 2], [[3, 4, 5]])]      # 6 + 5 = 11 columns


# --------------------------------------------------------------------------------------------------------- operations

# pairs that attend: the prompts 3 x 4 / 2 + 2 x 3 / 2 = 9; responses among themselves 3 + 1 + 6 = 10; on their prompts 2 x 3 + 1 x 3 + 3 x 2 = 15
PAIRS = 34


def test_operations_of_gpt2_by_hand():
    # D = 8; a block has c_attn 8 x 24 = 192, c_proj 64, mlp 2 x 8 x 32 = 512; biases and norms are not counted.
    # 11 columns go through block 1 (768) and c_attn of block 2 (192); 6 response tokens, or 3 last columns, through the rest (576).
    # Attention, 2 blocks: q k and p v, 2 x 2 operations a pair and dimension. The head: 6 tokens x 8 x 11.
    through, attention, head = 11 * (768 + 192), 2 * 4 * 8 * PAIRS, 6 * 8 * 11
    assert speed.forward_flops(GPT(), ROWS, head=True) == 2 * (through + 6 * 576) + attention + 2 * head == 31_264
    assert speed.forward_flops(GPT(), ROWS, head=False) == 2 * (through + 3 * 576) + attention == 26_752


def test_operations_of_llama_by_hand():
    # D = 8, 4 heads and 2 groups of 2; a block has q 64, k and v 32 each, o 64, mlp 3 x 8 x 12 = 288: q, k, v 128, late 352
    through, attention, head = 11 * (2 * 480 + 128), 3 * 4 * 8 * PAIRS, 6 * 8 * 11
    assert speed.forward_flops(LLAMA(), ROWS, head=True) == 2 * (through + 6 * 352) + attention + 2 * head == 32_480
    assert speed.forward_flops(LLAMA(), ROWS, head=False) == 2 * (through + 3 * 352) + attention == 29_312


@pytest.mark.parametrize("name", TRUNKS)
@pytest.mark.parametrize("rows", [[Row([1, 2, 3, 4], [[5, 6, 7]])], [Row([1, 2, 3], [[4, 5], [6], [7, 8, 9, 1]])], ROWS], ids=["K1", "K3", "two-rows"])
def test_operations_are_what_pytorch_counts(name, rows):
    """It counts all T x T pairs of a row (and nothing in a fused kernel, hence MATH), and the scorer's own layer, 2 x D a response."""
    trunk, batch = TRUNKS[name](), pack_rows(rows)
    inner = 16 if name == "llama-head-dim" else 8                     # heads x their width
    seen = sum(int(((row[None] == 0) | (row[None] == row[:, None])).tril().sum()) for row in (x[x >= 0] for x in batch.branch))
    more = 4 * len(trunk.blocks) * inner * (sum(row.num_tokens ** 2 for row in rows) - seen)
    for model, head, own in ((Policy(trunk), True, 0), (RewardModel(trunk), False, 2 * 8 * int(batch.valid.numel()))):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(batch)
        absent = 0 if head else int((~batch.valid).sum())             # pack_rows reads column 0 where a response is absent
        late = sum(p.numel() for n, p in trunk.blocks[-1].named_parameters() if p.ndim == 2 and not any(word in n for word in speed.QKV_NAMES))
        assert counter.get_total_flops() == speed.forward_flops(trunk, rows, head) + more + own + 2 * absent * late


# ------------------------------------------------------------------------------------------------------------- the log

def test_meter(monkeypatch):
    monkeypatch.setattr(speed, "measured_flops", lambda device, dtype: 5e9)
    trunk = GPT()
    meter = speed.Meter(trunk, CPU, "float32")
    assert "5 GFLOP/s" in str(meter) and "no padding" in str(meter)
    rows = [Row([1] * 100, [[2] * 20, [3] * 30]), Row([1] * 40, [[2] * 10]), Row([1] * 206, [[2] * 50])]      # 150, 50 and 256 columns
    found = meter(rows, [[[0, 1], [2]]], flops=3e9, seconds=2.0)
    # 456 columns in 2 s; 3e9 / 2 of 5e9 operations a second
    assert found == {"tokens": 456, "tokens_per_second": 228.0, "padding": 0.0, "mfu": pytest.approx(0.3), "seconds": 2.0}
    trunk.flex = True                    # micro-batches of 200 and 256: computed as 256 and 256; 56 of 512 are padding
    assert meter(rows, [[[0, 1], [2]]], 3e9, 2.0)["padding"] == pytest.approx(56 / 512) and "FlexAttention" in str(meter)
    assert meter(rows, [[[2]]], 3e9, 2.0)["padding"] == 0               # 256 = 2 x 128; and rows that are not in the plan do not count
    monkeypatch.setattr(speed.dist, "world_size", lambda: 2)
    two = speed.Meter(trunk, CPU, "float32")             # 3e9 / 2 of 2 x 5e9; 200 columns at one, 256 at the other
    assert two(rows, [[[0, 1]], [[2]]], 3e9, 2.0) == {"tokens": 456, "tokens_per_second": 228.0, "padding": pytest.approx(56 / 512), "mfu": pytest.approx(0.15), "seconds": 2.0}
    assert two(rows, [[[2]], []], 3e9, 2.0)["tokens"] == 256          # nothing at one of them


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_product_rate(dtype, monkeypatch):
    """2 x 1024^3 operations in the shortest of the measured times; everybody's random numbers stay as they were."""
    state = torch.get_rng_state()
    assert 1e8 < speed.measured_flops(CPU, dtype, repeats=1) < 1e14
    assert torch.equal(torch.get_rng_state(), state)


def test_product_rate_is_operations_by_time(monkeypatch):
    ticks = iter([0, 9, 10, 12, 20, 21, 30, 34])                      # 9, 2, 1 and 4 seconds
    monkeypatch.setattr(speed, "synchronised_time", lambda device: next(ticks))
    assert speed.measured_flops(CPU, "float32", repeats=3) == 2 * 1024**3 / 1


def test_peak_memory():
    """In GB: as Linux says of this process, and no less than what was just held."""
    size = int((speed.peak_memory(CPU) + 0.05) * 2**30)               # more than ever before
    held = torch.ones(size, dtype=torch.uint8)
    assert size / 2**30 <= speed.peak_memory(CPU) < size / 2**30 + 8
    del held
    status = Path("/proc/self/status")
    if status.exists():
        high = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20
        assert speed.peak_memory(CPU) == pytest.approx(high, rel=0.02)


# ------------------------------------------------------------------------------------------------------------ the step

def grads_of(scale):
    """Two parameters with gradients whose common norm is `scale`."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 7)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    for p in model.parameters():
        p.grad.mul_(scale / norm)
    return model


@pytest.mark.parametrize("norm", [0.01, 0.99, 1.01, 30.0])
def test_update_clips_as_clip_grad_norm(norm):
    """SGD with lr 1 moves by the gradient it was given: bit for bit what clip_grad_norm_ leaves, and under the limit the gradient itself."""
    model, other = grads_of(norm), grads_of(norm)
    untouched = [p.grad.clone() for p in other.parameters()]
    total = torch.nn.utils.clip_grad_norm_(other.parameters(), optim.MAX_GRAD_NORM)
    right = [p.detach() - p.grad for p in other.parameters()]
    assert all(torch.equal(p.grad, g) for p, g in zip(other.parameters(), untouched)) == (norm < 1)
    assert (found := optim.gradient_norm(model)) == total and total.item() == pytest.approx(norm, rel=1e-5)
    optim.update(model, torch.optim.SGD(model.parameters(), lr=9.0), 1.0, found)
    assert all(torch.equal(p.detach(), x) for p, x in zip(model.parameters(), right))


@pytest.mark.parametrize("eps", [1e-8, 1e-5])
def test_fused_adamw_is_adamw(eps):
    """m = .9 m + .1 g, v = .95 v + .05 g^2, p -= lr (m / (1 - .9^t)) / (sqrt(v / (1 - .95^t)) + eps); no weight decay. Gradients from 1e-7 to 1."""
    torch.manual_seed(0)
    model = torch.nn.Linear(30, 20)
    optimizer = optim.adamw(model, 1.0, eps)
    assert optimizer.defaults["fused"]
    p = [x.detach().double() for x in model.parameters()]
    m, v = [torch.zeros_like(x) for x in p], [torch.zeros_like(x) for x in p]
    for t, lr in enumerate((1e-2, 5e-3, 2e-2), 1):
        for i, x in enumerate(model.parameters()):
            g = torch.randn_like(x) * 10 ** (-7 * torch.rand_like(x)) / 40              # norm under 1: not clipped
            x.grad = g
            m[i], v[i] = 0.9 * m[i] + 0.1 * g.double(), 0.95 * v[i] + 0.05 * g.double() ** 2
            p[i] = p[i] - lr * m[i] / (1 - 0.9**t) / ((v[i] / (1 - 0.95**t)).sqrt() + eps)
        optim.update(model, optimizer, lr, optim.gradient_norm(model))
        for x, y in zip(model.parameters(), p):
            assert (x - y).abs().max() < 1e-6


# --------------------------------------------------------------------------------------------------------- the process

def test_setup_works_twice():
    """The same seed, the same numbers; sums are repeatable, memory is not filled before use."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        drawn = []
        for _ in range(2):
            assert dist.setup("cpu", 7) == CPU
            drawn.append(torch.rand(3))
            assert torch.are_deterministic_algorithms_enabled() and not torch.utils.deterministic.fill_uninitialized_memory
            assert torch.ones(30_000_000).sum() == 30_000_000                           # large blocks still come and go
        assert torch.equal(*drawn)
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
