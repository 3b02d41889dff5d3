"""Both families against transformers, float32 on both sides: the same weights give the same logits, there and back."""
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanorlhf import generate, llama
from nanorlhf.batching import Row, pack_rows
from nanorlhf.heads import Policy
from nanorlhf.io import hub, tokenizer
from nanorlhf.io.read import InputError
from nanorlhf.llama import rope_frequencies

DATA = Path(os.environ.get("NANORLHF_DATA", "/nonexistent"))
TEXTS = ["the king said what is this", "the queen said that the king is in the woods", "who met the king in the woods?"] * 3
VOCAB = 307                              # more rows than either tokenizer has tokens: folders from the hub often pad

GPT2 = dict(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None)
LLAMA = dict(vocab_size=VOCAB, max_position_embeddings=64, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4)
# d = 8, theta 100: wavelengths 2 pi 100^(i/4) = 6.3, 19.9, 62.8, 199. An original context of 40 holds 6.4, 2.0, 0.64, 0.2 of
# them: over high = 4 is kept, below low = 1 is stretched, the second is between. All three rules act on positions below 45.
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=100.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=40)
CASES = {
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", dict(tie_word_embeddings=False)),
    "gpt2-inner": ("gpt2", dict(n_inner=40, layer_norm_epsilon=1e-3)),
    "llama": ("llama", {}),
    "llama-tied": ("llama", dict(tie_word_embeddings=True, rms_norm_eps=1e-3)),
    "llama-grouped": ("llama", dict(num_key_value_heads=2)),
    "llama-one-group-tied": ("llama", dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "llama-head-dim": ("llama", dict(head_dim=12, num_key_value_heads=2)),
    "llama-theta": ("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=500.0))),
    "llama-linear": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=3.0))),
    "llama-llama3": ("llama", dict(num_key_value_heads=2, rope_parameters=LLAMA3_ROPE)),
}
PREFIX = {"gpt2": "transformer.", "llama": "model."}


def ids(n, seed):
    return torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


ROWS = [Row(ids(13, 1), [ids(30, 2), ids(1, 3), ids(7, 4)]), Row(ids(1, 5), [ids(4, 6), ids(9, 7)]), Row(ids(5, 8), [ids(2, 9)])]


@torch.no_grad()
def scramble(model):
    """Random weights large enough that every one of them, biases and norms too, is seen in the logits; logits of order 1."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        p.normal_(std=0.15).add_(1.0 if p.dim() == 1 and name.endswith("weight") else 0.0)
    return model


def tiny_tokenizer(family):
    return tokenizer.train_bpe(TEXTS, 280) if family == "gpt2" else tokenizer.train_sentencepiece(TEXTS, 300)


def their_model(family, options, kind="ForCausalLM"):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(**{**GPT2, **options}) if family == "gpt2" else transformers.LlamaConfig(**{**LLAMA, **options})
    name = {"gpt2ForCausalLM": "GPT2LMHeadModel", "gpt2ForSequenceClassification": "GPT2ForSequenceClassification"}.get(family + kind, "Llama" + kind)
    return scramble(getattr(transformers, name)(config)).eval()


def their_folder(folder, family, options=None, **how):
    """A folder that transformers wrote, with a small tokenizer in it.  -> (folder, their model)"""
    theirs = their_model(family, options or {})
    theirs.save_pretrained(folder, **how)
    tiny_tokenizer(family).save(folder)
    return folder, theirs


def their_load(folder):
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info              # no tensor missing, left over or of another shape
    return model.eval()


@torch.no_grad()
def worst_difference(policy, theirs):
    """Our logits on packed rows against theirs on each prompt + response alone; our logprobs against theirs.  -> largest difference"""
    batch, trunk, found = pack_rows(ROWS), policy.trunk, []
    logits, logprobs = trunk.logits(trunk.hidden(batch.tokens, batch.positions, batch.branch)), policy(batch).logprobs
    for b, row in enumerate(ROWS):
        for k, response in enumerate(row.responses):
            mine = (batch.branch[b] == 0) | (batch.branch[b] == k + 1)
            expected = theirs(input_ids=torch.tensor([row.prompt + response])).logits[0]
            assert expected.std() > 0.1 and mine.sum() == len(expected)
            predicted = expected.log_softmax(-1)[len(row.prompt) - 1 : -1].gather(-1, torch.tensor(response)[:, None])[:, 0]
            found += [(logits[b, mine] - expected).abs().max(), (logprobs[b, k, : len(response)] - predicted).abs().max()]
    return torch.stack(found).max().item()           # NaN if one is; Python's max would lose it


def spell_as_transformers_4(folder):
    """rope_theta and rope_scaling, whose kind was `type` before Llama 3 came; no head_dim; nothing of transformers 5."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config.update(rope_theta=rope.pop("rope_theta"), torch_dtype=config.pop("dtype"), transformers_version="4.31.0")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"rope_type" if kind == "llama3" else "type": kind, **rope}
    if config["head_dim"] == config["hidden_size"] // config["num_attention_heads"]:
        del config["head_dim"]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("case", CASES)
def test_logits_there_and_back(case, tmp_path):
    family, options = CASES[case]
    folder, theirs = their_folder(tmp_path / "theirs", family, options)
    policy = hub.load_policy(folder)
    assert worst_difference(policy, theirs) < 1e-5

    hub.save_policy(tmp_path / "ours", policy, policy.tokenizer)
    back = their_load(tmp_path / "ours")
    assert worst_difference(policy, back) < 1e-5
    assert policy.trunk.config == hub.load_policy(tmp_path / "ours").trunk.config
    tied = options.get("tie_word_embeddings", family == "gpt2")
    assert ("lm_head.weight" in load_file(tmp_path / "ours" / "model.safetensors")) == (not tied)

    if family == "llama":
        config = policy.trunk.config
        spell_as_transformers_4(folder)
        policy = hub.load_policy(folder)
        assert vars(policy.trunk.config) | {"head_dim": config.head_width} == vars(config)
        assert worst_difference(policy, theirs) < 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("llama")])
def test_saved_config_spells_rope_for_both_releases(case, tmp_path):
    # transformers 5 reads the one and 4 the other, so each must say it all without the other
    family, options = CASES[case]
    trunk = scramble(llama.Llama(hub.trunk_config({"model_type": "llama", **LLAMA, **options}, "config.json")[1]))
    hub.save_policy(tmp_path, Policy(trunk), tiny_tokenizer("llama"))
    values = json.loads((tmp_path / "config.json").read_text())
    for others in (["rope_parameters"], ["rope_theta", "rope_scaling"]):
        left = {key: value for key, value in values.items() if key not in others}
        found = hub.trunk_config(left, "config.json")[1]
        assert torch.equal(rope_frequencies(found), rope_frequencies(trunk.config))
        assert (found.rope_type, found.rope_theta, found.rope_factor) == (trunk.config.rope_type, trunk.config.rope_theta, trunk.config.rope_factor)


@pytest.mark.parametrize("case", ["llama-linear", "llama-llama3"])
def test_rope_scaling_matters_here(case, tmp_path):
    # or the two cases above would pass with the scaling left out
    folder, theirs = their_folder(tmp_path, *CASES[case])
    policy = hub.load_policy(folder)
    policy.trunk.frequencies = 1.0 / policy.trunk.config.rope_theta ** (torch.arange(0, 8, 2) / 8)
    assert worst_difference(policy, theirs) > 1e-2


def test_llama3_frequencies_by_hand():
    # LLAMA3_ROPE: frequencies 100^(-i/4) = 1, .316228, .1, .0316228.  i = 0 is kept, i = 2 and 3 divided by 4;
    # i = 1: 40 / (2 pi / .316228) = 2.01317 waves, kept share (2.01317 - 1) / 3 = .337723,
    # frequency .316228 (.662277 / 4 + .337723) = .159155
    _, config = hub.trunk_config({"model_type": "llama", **LLAMA, "rope_parameters": LLAMA3_ROPE}, "config.json")
    torch.testing.assert_close(rope_frequencies(config), torch.tensor([1.0, 0.159155, 0.025, 0.00790569]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sharded_folder(family, tmp_path):
    folder, theirs = their_folder(tmp_path, family, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2 and (folder / "model.safetensors.index.json").exists()
    assert worst_difference(hub.load_policy(folder), theirs) < 1e-5


def test_one_file_comes_before_an_index(tmp_path):
    # as in transformers: an index beside model.safetensors is left from an older save
    folder, theirs = their_folder(tmp_path, "gpt2")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"wte.weight": "gone.safetensors"}}')
    assert worst_difference(hub.load_policy(folder), theirs) < 1e-5


@pytest.mark.parametrize("untied", [False, True])
def test_gpt2_as_first_published(untied, tmp_path):
    # no `transformer.` prefix, and the causal mask stored as buffers of each layer
    folder, theirs = their_folder(tmp_path, "gpt2", dict(tie_word_embeddings=not untied))
    path = folder / "model.safetensors"
    tensors = {key.removeprefix("transformer."): value for key, value in load_file(path).items()}
    for n in range(2):
        tensors[f"h.{n}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors[f"h.{n}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, path)
    assert "wte.weight" in tensors and "h.1.mlp.c_fc.weight" in tensors
    assert worst_difference(hub.load_policy(folder), theirs) < 1e-5


def test_llama_with_old_buffers(tmp_path):
    folder, theirs = their_folder(tmp_path, "llama")
    path = folder / "model.safetensors"
    old = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.full((4,), 7.0) for n in range(2)}    # unlike what is computed
    save_file(load_file(path) | old, path)
    assert worst_difference(hub.load_policy(folder), theirs) < 1e-5


@pytest.mark.parametrize("case", ["gpt2-untied", "llama-grouped"])
def test_bfloat16_file_loads_exactly_as_float32(case, tmp_path):
    family, options = CASES[case]
    theirs = their_model(family, options).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    tiny_tokenizer(family).save(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    policy = hub.load_policy(tmp_path)
    weights = dict(theirs.named_parameters())
    for name, parameter in policy.trunk.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, weights[name if name == "lm_head.weight" else PREFIX[family] + name].float())
    assert worst_difference(policy, their_load(tmp_path)) < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_head_stored_although_tied(family, tmp_path):
    folder, theirs = their_folder(tmp_path, family, dict(tie_word_embeddings=True))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    table = PREFIX[family] + ("wte" if family == "gpt2" else "embed_tokens") + ".weight"
    save_file(tensors | {"lm_head.weight": tensors[table].clone()}, path)
    assert worst_difference(hub.load_policy(folder), theirs) < 1e-5

    other = tensors[table].clone()
    other[-1, -1] += 1e-3
    save_file(tensors | {"lm_head.weight": other}, path)
    for head in (True, False):
        with pytest.raises(InputError, match="lm_head.weight.*tie_word_embeddings") as caught:
            hub.load_trunk(folder, head)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


COUNTS = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
          "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama2-70b": 68_976_648_192, "llama3-8b": 8_030_261_248}


def test_counts_by_hand():
    # gpt2: tables (50257 + 1024) 768; a block 12 D^2 + 13 D (c_attn 3 D^2 + 3 D, c_proj D^2 + D, mlp 8 D^2 + 5 D, norms 4 D); ln_f 2 D
    assert COUNTS["gpt2"] == (50257 + 1024) * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    # llama3-8b: table and head 2 V D; a block q, o 2 D^2, k, v 2 D 1024 (8 groups of 128), mlp 3 D 14336, norms 2 D; norm D
    assert COUNTS["llama3-8b"] == 2 * 128256 * 4096 + 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096) + 4096


@pytest.mark.parametrize("name", COUNTS)
def test_sizes_have_the_published_number_of_parameters(name):
    family, config = hub.SIZES[name]
    with torch.device("meta"):
        assert sum(p.numel() for p in family(config).parameters()) == COUNTS[name]


STORIES = ["Once upon a time", "Lily and Tom went to the park with their dog. The dog", "One day, the big bear was sad because"]


def same_greedy_tokens(folder, prompts, n):
    """n greedy tokens after each prompt: ours with all prompts in one uneven batch, theirs one by one; nothing stops at EOS."""
    policy, theirs = hub.load_policy(folder), their_load(folder)
    encoded = [policy.tokenizer.encode_prompt(text) for text in prompts]
    ours, _ = generate.generate_batch(policy.trunk, encoded, torch.zeros(len(prompts), 1, n, dtype=torch.float64), eos_id=-1, temperature=0)
    theirs.generation_config.eos_token_id = None
    for b, prompt in enumerate(encoded):
        found = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=n)
        assert ours[b, 0].tolist() == found[0, len(prompt):].tolist(), prompts[b]


@pytest.mark.skipif(not DATA.is_dir(), reason="set NANORLHF_DATA to the data folder")
@pytest.mark.parametrize("name, n", [("stories260K", 200), ("stories15M", 40), pytest.param("stories15M", 200, marks=pytest.mark.slow)])
def test_real_weights_continue_as_in_transformers(name, n):
    same_greedy_tokens(DATA / name, STORIES, n)              # stories15M's context is 256


@pytest.mark.skipif("NANORLHF_SMOLLM2" not in os.environ, reason="set NANORLHF_SMOLLM2 to a SmolLM2-135M folder")
def test_smollm2_continues_as_in_transformers():
    same_greedy_tokens(os.environ["NANORLHF_SMOLLM2"], ["The king of the forest was", "Question: Why is the sky blue?\nAnswer:",
                                                        "def quicksort(values):\n"], 200)
