"""Frozen models hold their blocks' matrices in the number format of the forward, and compute the same."""
import copy

import pytest
import torch

from nanorlhf.batching import Row, pack_rows
from nanorlhf.gpt2 import GPT2, GPT2Config
from nanorlhf.heads import Policy, RewardModel
from nanorlhf.llama import Llama, LlamaConfig
from nanorlhf.run import precision

CPU = torch.device("cpu")
TRUNKS = {
    "gpt2": lambda: GPT2(GPT2Config(vocab_size=23, n_positions=32, n_embd=16, n_layer=2, n_head=2)),
    "llama-grouped": lambda: Llama(LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )),
}
ROWS = [Row([1, 2, 3], [[4, 5], [6, 7, 8]]), Row([9, 10], [[11, 12, 13, 14]])]


def trained(kind, name):
    """A model in float32 whose weights are all large enough to matter, rounded nowhere."""
    torch.manual_seed(0)
    trunk = TRUNKS[name]()
    model = kind(trunk, value_head=True) if kind is Policy else kind(trunk, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def outputs(model, dtype):
    with torch.no_grad(), precision.autocast(model, dtype):
        found = model(pack_rows(ROWS))
    return [found.logprobs, found.values] if isinstance(model, Policy) else [found]


def product_layers(model):
    """The blocks' layers with a matrix."""
    layers = [layer for layer in model.trunk.blocks.modules() if getattr(layer, "weight", None) is not None]
    return [layer for layer in layers if layer.weight.ndim == 2]


@pytest.mark.parametrize("kind", [Policy, RewardModel])
@pytest.mark.parametrize("name", TRUNKS)
def test_frozen_in_bfloat16_is_the_same_bit_for_bit(kind, name):
    model = trained(kind, name)
    frozen = precision.freeze(copy.deepcopy(model), CPU, "bfloat16")
    assert all(map(torch.equal, outputs(model, "bfloat16"), outputs(frozen, "bfloat16")))
    assert not any(p.requires_grad for p in frozen.parameters())
    layers = product_layers(frozen)
    size = lambda layers: sum(layer.weight.nbytes for layer in layers)
    assert len(layers) >= 8 and 2 * size(layers) == size(product_layers(model))
    held = {id(p) for layer in layers for p in layer.parameters()}               # GPT-2's biases go with their matrices
    kept = {name: p for name, p in frozen.named_parameters() if id(p) not in held}
    assert {p.dtype for p in kept.values()} == {torch.float32}                   # embeddings, norms, heads
    before = dict(model.named_parameters())
    assert len(kept) >= 6 and all(torch.equal(p, before[name]) for name, p in kept.items())


@pytest.mark.parametrize("kind", [Policy, RewardModel])
@pytest.mark.parametrize("name", TRUNKS)
def test_frozen_in_float32_changes_nothing(kind, name):
    model = trained(kind, name)
    frozen = precision.freeze(copy.deepcopy(model), CPU, "float32")
    assert all(map(torch.equal, outputs(model, "float32"), outputs(frozen, "float32")))
    assert all(p.dtype == q.dtype and torch.equal(p, q) for p, q in zip(model.parameters(), frozen.parameters()))
    # and the number format matters: else the test above would say nothing
    assert not any(map(torch.equal, outputs(model, "float32"), outputs(model, "bfloat16")))
