"""Reward models against transformers; what a folder must hold; a save that is whole."""
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_models import LLAMA, scramble, their_folder, their_model, tiny_tokenizer

from nanorlhf.batching import Row
from nanorlhf.heads import Policy, RewardModel
from nanorlhf.io import hub
from nanorlhf.io.read import InputError
from nanorlhf.reward import TextReward

PROMPT = "the king said"
RESPONSES = [" what is this", " who met the queen in the woods?", ""]
ENDED = [True, False, True]              # the last one is EOS alone: were EOS padding, it would be read at the prompt
FAMILIES = ["gpt2", "llama"]


def our_trunk(family, tok, **options):
    """As small as tests/test_models.py's; one row a token, so that GPT-2's padding id is one beyond the table."""
    kind = hub.FAMILIES[family].Trunk
    sizes = dict(n_positions=64, n_embd=32, n_layer=2, n_head=4) if family == "gpt2" else {**LLAMA, "num_key_value_heads": 2}
    return scramble(kind(kind.Config(**{**sizes, "vocab_size": tok.vocab_size, **options})))


def our_reward_model(family, outputs, **options):
    tok = tiny_tokenizer(family)
    return TextReward(scramble(RewardModel(our_trunk(family, tok, **options), outputs)), tok)


def our_policy(family, **options):
    tok = tiny_tokenizer(family)
    policy = Policy(our_trunk(family, tok, **options))
    policy.tokenizer = tok
    return policy


def their_scorer(folder):
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info              # no tensor missing, left over or of another shape
    return model.eval()


def a_row(tok):
    return Row(tok.encode_prompt(PROMPT), [tok.encode(text) + [tok.eos_id] * ended for text, ended in zip(RESPONSES, ENDED)])


@torch.no_grad()
def padded_scores(theirs, row, side):
    """Their outputs for prompt + response, all in one batch padded with their pad id.  -> (K,N)"""
    texts = [row.prompt + response for response in row.responses]
    longest, pad = max(map(len, texts)), theirs.config.pad_token_id
    ids, seen = torch.full((len(texts), longest), pad), torch.zeros(len(texts), longest, dtype=torch.long)
    for b, text in enumerate(texts):
        here = slice(0, len(text)) if side == "right" else slice(longest - len(text), longest)
        ids[b, here], seen[b, here] = torch.tensor(text), 1
    # GPT-2's positions are absolute, and its classifier does not count them from the mask
    return theirs(input_ids=ids, attention_mask=seen, position_ids=(seen.cumsum(-1) - 1).clamp(min=0)).logits


# ---------------------------------------------------------------------------------------------------------- reward models

@pytest.mark.parametrize("outputs", [1, 10])
@pytest.mark.parametrize("family", FAMILIES)
def test_reward_model_is_read_by_transformers(family, outputs, tmp_path):
    ours = our_reward_model(family, outputs)
    hub.save_reward_model(tmp_path, ours)
    theirs, row, tok = their_scorer(tmp_path), a_row(ours.tokenizer), ours.tokenizer
    assert theirs.config.num_labels == outputs and theirs.config.eos_token_id == tok.eos_id != theirs.config.pad_token_id
    assert theirs.config.pad_token_id == (0 if family == "llama" else tok.vocab_size)         # <unk>, or the extra row
    assert theirs.get_input_embeddings().num_embeddings == tok.vocab_size + (family == "gpt2")
    raw = ours.outputs([row])[0]                     # (K,N), three texts in one row
    assert raw.std(0).min() > 0.01
    for side in ("left", "right"):
        torch.testing.assert_close(padded_scores(theirs, row, side), raw, atol=1e-5, rtol=0)

    again = hub.load_reward_model(tmp_path)   # with the extra row: a row nobody looks at changes nothing
    assert torch.equal(again.outputs([row])[0], raw)
    hub.save_reward_model(tmp_path / "again", again)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()     # the table grows once


@pytest.mark.parametrize("outputs", [1, 2, 10])
@pytest.mark.parametrize("family", FAMILIES)
def test_their_reward_model_is_read_here(family, outputs, tmp_path):
    theirs = their_model(family, dict(num_labels=outputs), "ForSequenceClassification")
    theirs.save_pretrained(tmp_path)
    tiny_tokenizer(family).save(tmp_path)
    ours = hub.load_reward_model(tmp_path)
    row = a_row(ours.tokenizer)
    with torch.no_grad():                            # one text a call needs no padding
        expected = torch.cat([theirs(input_ids=torch.tensor([row.prompt + response])).logits for response in row.responses])
    torch.testing.assert_close(ours.outputs([row])[0], expected, atol=1e-5, rtol=0)
    assert (ours.transform, ours.mean, ours.std) == ("identity", 0.0, 1.0)


def test_untied_trunk_loses_its_head_as_a_reward_model(tmp_path):
    # started from an untied folder, and made by hand with the head still on
    hub.save_policy(tmp_path / "policy", our_policy("llama"), tiny_tokenizer("llama"))
    trunk, tok = hub.load_trunk(tmp_path / "policy", head=False)
    assert trunk.lm_head is None and not trunk.config.tie_word_embeddings
    by_hand = our_reward_model("llama", 1)
    assert by_hand.model.trunk.lm_head is not None
    for name, model in {"started": TextReward(RewardModel(trunk, 1), tok), "by hand": by_hand}.items():
        hub.save_reward_model(tmp_path / name, model)
        assert "lm_head.weight" not in load_file(tmp_path / name / "model.safetensors")
        row, again = a_row(tok), hub.load_reward_model(tmp_path / name)
        assert torch.equal(again.outputs([row]), model.outputs([row]))
        torch.testing.assert_close(padded_scores(their_scorer(tmp_path / name), row, "right"), model.outputs([row])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trunk_is_taken_from_a_reward_model(family, tmp_path):
    # of an untied trunk and of one whose table grew by a padding row; its head stays behind
    ours = our_reward_model(family, 10)
    hub.save_reward_model(tmp_path / "model", ours)
    trunk, tok, source = hub.init_or_load(str(tmp_path), "", None, head=False)
    assert trunk.lm_head is None and source == f"weights from {tmp_path / 'model'}"
    ours.model.trunk = trunk
    row = a_row(tok)
    assert torch.equal(ours.outputs([row]), hub.load_reward_model(tmp_path).outputs([row]))
    with pytest.raises(InputError, match="a reward model; a language model is wanted here"):
        hub.init_or_load(str(tmp_path), "", None)


def score(model, normalised=True):
    return model.score_texts([PROMPT], [RESPONSES], [ENDED], normalised)[0]


@pytest.mark.parametrize("outputs,reward_map", [(1, "tanh_half"), (1, "identity"), (10, "identity")])
def test_normalisation_is_saved_and_applied_once(outputs, reward_map, tmp_path):
    ours = our_reward_model("gpt2", outputs)
    raw = ours.outputs([a_row(ours.tokenizer)])[0]                     # (K,N)
    ours.transform = reward_map
    ours.norm_stats = {"mean": (0.3, 0.7)} | ({"q0": (-0.1, 0.4), "cvar:0.2": (0.25, 1.5)} if outputs == 10 else {})
    ours.select("mean")
    hub.save_reward_model(tmp_path, ours)
    again = hub.load_reward_model(tmp_path)
    assert (again.transform, again.norm_stats, again.mean, again.std) == (reward_map, ours.norm_stats, 0.3, 0.7)
    assert torch.equal(again.outputs([a_row(again.tokenizer)])[0], raw)         # raw outputs know nothing of it
    torch.testing.assert_close(padded_scores(their_scorer(tmp_path), a_row(again.tokenizer), "right"), raw, atol=1e-5, rtol=0)

    mapped = torch.tanh(raw.mean(-1) / 2) if reward_map == "tanh_half" else raw.mean(-1)
    torch.testing.assert_close(score(again), (mapped - 0.3) / 0.7)
    torch.testing.assert_close(score(again, normalised=False), mapped)
    if outputs == 10:                                # each statistic is normalised by its own moments
        again.select("q0")
        torch.testing.assert_close(score(again), (raw.min(-1).values + 0.1) / 0.4)
        again.select("cvar:0.2")                        # the mean of the lowest two of ten
        torch.testing.assert_close(score(again), (raw.sort(-1).values[:, :2].mean(-1) - 0.25) / 1.5)


# ------------------------------------------------------------------------------------------------- every tensor accounted for

@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Folders to damage: a tied policy of each family, a reward model."""
    root = tmp_path_factory.mktemp("sound")
    for family in FAMILIES:
        policy = our_policy(family, tie_word_embeddings=True)
        hub.save_policy(root / family, policy, policy.tokenizer)
    hub.save_reward_model(root / "reward", our_reward_model("llama", 10))
    for sums in root.glob("*/SHA256SUMS"):
        sums.unlink()                                # they would notice any damage before it is read: a folder from elsewhere has none
    return root


def tensors(change):
    def damage(folder):
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")
    return damage


def config(**change):
    def damage(folder):
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | change))
    return damage


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def rename(old, new):
    return lambda folder: (folder / old).rename(folder / new)


def index(**weight_map):
    def damage(folder):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return damage


def nan(found):
    found["transformer.h.1.mlp.c_fc.weight"][3, 5] = float("nan")


def truncate(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def rope(**parameters):
    return config(rope_parameters={"rope_theta": 10000.0, **parameters})


WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
DAMAGE = {                               # which folder, what is done to it, what the line must say
    "missing tensor": ("gpt2", tensors(lambda f: f.pop("transformer.h.1.ln_2.bias")), ["transformer.h.1.ln_2.bias", "missing"]),
    "left-over tensor": ("llama", tensors(lambda f: f.update({"model.layers.2.mlp.up_proj.weight": torch.ones(56, 32)})), [WEIGHTS, "model.layers.2.mlp.up_proj.weight"]),
    "attention bias tensor": ("llama", tensors(lambda f: f.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})), [WEIGHTS, "q_proj.bias"]),
    "same tensor twice": ("gpt2", tensors(lambda f: f.update({"wpe.weight": torch.ones(64, 32)})), [WEIGHTS, "wpe.weight"]),
    "wrong shape": ("gpt2", tensors(lambda f: f.update({"transformer.h.0.mlp.c_fc.weight": torch.ones(128, 32)})), [WEIGHTS, "transformer.h.0.mlp.c_fc.weight", "(128, 32)", "(32, 128)"]),
    "shape that would broadcast": ("llama", tensors(lambda f: f.update({"model.norm.weight": torch.ones(1)})), [WEIGHTS, "model.norm.weight", "(1,)", "(32,)"]),
    "NaN": ("gpt2", tensors(nan), [WEIGHTS, "transformer.h.1.mlp.c_fc.weight", "NaN"]),
    "infinity": ("llama", tensors(lambda f: f["model.norm.weight"].fill_(float("inf"))), [WEIGHTS, "model.norm.weight", "infinity"]),
    "integers": ("llama", tensors(lambda f: f.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})), [WEIGHTS, "model.norm.weight", "int8"]),
    "eight-bit floats": ("llama", tensors(lambda f: f.update({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)})), [WEIGHTS, "model.norm.weight", "float8"]),
    "untied, no head": ("gpt2", config(tie_word_embeddings=False), ["lm_head.weight", "missing"]),
    "model_type": ("gpt2", config(model_type="mistral"), [CONFIG, "mistral"]),
    "no model_type": ("gpt2", config(model_type=None), [CONFIG, "model_type"]),
    "model_type list": ("gpt2", config(model_type=["gpt2"]), [CONFIG, "model_type"]),
    "hidden_act": ("llama", config(hidden_act="gelu"), [CONFIG, "hidden_act", "gelu"]),
    "activation_function": ("gpt2", config(activation_function="gelu"), [CONFIG, "activation_function", "gelu"]),
    "attention_bias": ("llama", config(attention_bias=True), [CONFIG, "attention_bias", "True"]),
    "mlp_bias": ("llama", config(mlp_bias=True), [CONFIG, "mlp_bias", "True"]),
    "scale_attn_weights": ("gpt2", config(scale_attn_weights=False), [CONFIG, "scale_attn_weights"]),
    "rope type": ("llama", rope(rope_type="yarn", factor=4.0), [CONFIG, "yarn"]),
    "rope type of transformers 4": ("llama", config(rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}), [CONFIG, "dynamic"]),
    "rope not an object": ("llama", config(rope_parameters="llama3"), [CONFIG, "rope_parameters"]),
    "rope without factor": ("llama", rope(rope_type="linear"), [CONFIG, "linear", "factor"]),
    "rope of a part": ("llama", rope(rope_type="default", partial_rotary_factor=0.5), [CONFIG, "partial_rotary_factor", "0.5"]),
    "rope factor": ("llama", rope(rope_type="linear", factor="2"), [CONFIG, "factor", "'2'"]),
    "rope theta": ("llama", rope(rope_theta=None), [CONFIG, "rope_theta", "None"]),
    "negative size": ("gpt2", config(n_embd=-32), [CONFIG, "n_embd", "-32"]),
    "zero size": ("llama", config(num_attention_heads=0), [CONFIG, "num_attention_heads", "0"]),
    "size in quotes": ("llama", config(hidden_size="32"), [CONFIG, "hidden_size", "'32'"]),
    "fractional size": ("llama", config(hidden_size=32.0), [CONFIG, "hidden_size", "32.0"]),
    "true for a size": ("gpt2", config(n_layer=True), [CONFIG, "n_layer", "True"]),
    "true for a number": ("gpt2", config(layer_norm_epsilon=True), [CONFIG, "layer_norm_epsilon", "True"]),
    "NaN for a number": ("llama", config(rms_norm_eps=float("nan")), [CONFIG, "rms_norm_eps", "nan"]),
    "billions of parameters": ("gpt2", config(vocab_size=900_000_000, n_embd=64_000), [WEIGHTS, "c_attn.bias", "(96,)", "(192000,)"]),
    "more than 64 bits": ("gpt2", config(vocab_size=999_999_999, n_embd=999_999_996), [CONFIG, "memory"]),
    "a billion layers": ("gpt2", config(n_layer=999_999_999), [CONFIG, "999,999,999 layers", "28 tensors"]),       # 2 x 12, two embeddings, ln_f
    "a billion layers of LLaMA": ("llama", config(num_hidden_layers=999_999_999), [CONFIG, "999,999,999 layers"]),
    "rotations that are no numbers": ("llama", rope(rope_type="linear", factor=1e-45), [CONFIG, "rope"]),          # a frequency of 1, divided by it, is infinity
    "beyond float32": ("llama", tensors(lambda f: f.update({"model.norm.weight": torch.full((32,), 1e300, dtype=torch.float64)})), [WEIGHTS, "model.norm.weight", "float32"]),
    "nested deeper than a message can say": ("gpt2", write(CONFIG, b'{"model_type": ' + b"[" * 300 + b"]" * 300 + b"}"), [CONFIG, "100 levels"]),
    "null size": ("gpt2", config(n_head=None), [CONFIG, "n_head", "None"]),
    "tied in words": ("gpt2", config(tie_word_embeddings="no"), [CONFIG, "tie_word_embeddings", "'no'"]),
    "uneven heads": ("gpt2", config(n_head=5), [CONFIG, "n_head", "5"]),
    "uneven groups": ("llama", config(num_key_value_heads=3), [CONFIG, "num_key_value_heads", "3"]),
    "odd head_dim": ("llama", config(head_dim=7), [CONFIG, "head_dim", "7"]),
    "tokenizer too large": ("gpt2", config(vocab_size=200), ["tokenizer", "200"]),
    "no config": ("gpt2", rename(CONFIG, "old.json"), [CONFIG, "no such file"]),
    "broken config": ("gpt2", write(CONFIG, b'{"model_type":\n "gpt2",\n'), [CONFIG, "JSON"]),
    "config not UTF-8": ("gpt2", write(CONFIG, b'{"model_type": "\xff"}'), [CONFIG, "JSON"]),
    "config is a list": ("gpt2", write(CONFIG, b"[1]"), [CONFIG, "object"]),
    "pickled only": ("llama", rename(WEIGHTS, "pytorch_model.bin"), ["pytorch_model.bin", "pickled"]),
    "no weights": ("llama", rename(WEIGHTS, "weights"), ["model.safetensors"]),
    "truncated": ("llama", truncate, [WEIGHTS, "safetensors"]),
    "empty file": ("llama", write(WEIGHTS, b""), [WEIGHTS, "safetensors"]),
    "index outside": ("gpt2", index(**{"transformer.wte.weight": "../x"}), [INDEX, "../x"]),
    "index outside, safetensors": ("gpt2", index(**{"transformer.wte.weight": "../x.safetensors"}), [INDEX, "../x.safetensors"]),
    "index of pickles": ("gpt2", index(**{"transformer.wte.weight": "pytorch_model-00001-of-00002.bin"}), [INDEX, "pytorch_model-00001-of-00002.bin"]),
    "index of a missing shard": ("gpt2", index(**{"transformer.wte.weight": "model-00002-of-00002.safetensors"}), ["model-00002-of-00002.safetensors"]),
    "index of an empty name": ("gpt2", index(**{"transformer.wte.weight": ""}), [INDEX, "''"]),
    "index without a map": ("gpt2", index(), [INDEX, "weight_map", "{}"]),
    "index of a list": ("gpt2", lambda f: (index()(f), (f / INDEX).write_text('{"weight_map": [1]}')), [INDEX, "weight_map"]),
    "no tokenizer": ("llama", rename("tokenizer.model", "x"), ["tokenizer"]),
    "broken tokenizer": ("llama", write("tokenizer.model", b"not one\n" * 9), ["tokenizer.model"]),
    "reward model instead": ("reward", lambda folder: None, ["reward model"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_ends_in_one_line(case, sound, tmp_path):
    which, damage, words = DAMAGE[case]
    folder = shutil.copytree(sound / which, tmp_path / "folder")
    damage(folder)
    with pytest.raises(InputError) as caught:
        hub.load_policy(folder)
    line = str(caught.value)
    assert "\n" not in line and str(folder) in line and all(word in line for word in words), line


REWARD_DAMAGE = {
    "policy instead": (config(architectures=["LlamaForCausalLM"]), ["LlamaForCausalLM"]),
    "no score": (tensors(lambda f: f.pop("score.weight")), ["score.weight", "missing"]),
    "other width": (tensors(lambda f: f.update({"score.weight": torch.ones(3, 32)})), [WEIGHTS, "score.weight", "(3, 32)", "(10, 32)"]),
    "left-over head": (tensors(lambda f: f.update({"lm_head.weight": torch.ones(300, 32)})), [WEIGHTS, "lm_head.weight"]),
    "labels": (config(id2label=[1]), [CONFIG, "id2label"]),
    "unknown map": (config(nanorlhf_reward={"map": "cube", "moments": {}}), [CONFIG, "nanorlhf_reward", "cube"]),
    "map of a strange kind": (config(nanorlhf_reward={"map": [], "moments": {}}), [CONFIG, "nanorlhf_reward"]),
    "normalisation in words": (config(nanorlhf_reward="identity"), [CONFIG, "nanorlhf_reward"]),
    "no deviation": (config(nanorlhf_reward={"map": "identity", "moments": {"mean": [0.0]}}), [CONFIG, "nanorlhf_reward"]),
    "zero deviation": (config(nanorlhf_reward={"map": "identity", "moments": {"mean": [0.0, 0.0]}}), [CONFIG, "nanorlhf_reward"]),
    "null mean": (config(nanorlhf_reward={"map": "identity", "moments": {"mean": [None, 1.0]}}), [CONFIG, "nanorlhf_reward"]),
}


@pytest.mark.parametrize("case", REWARD_DAMAGE)
def test_a_damaged_reward_model_ends_in_one_line(case, sound, tmp_path):
    damage, words = REWARD_DAMAGE[case]
    folder = shutil.copytree(sound / "reward", tmp_path / "folder")
    damage(folder)
    with pytest.raises(InputError) as caught:
        hub.load_reward_model(folder)
    line = str(caught.value)
    assert "\n" not in line and str(folder) in line and all(word in line for word in words), line


def test_a_pickle_is_never_opened(sound, tmp_path):
    # the file would run code on loading, here in its place under the name of a safetensors file too
    import pickle

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    folder = shutil.copytree(sound / "gpt2", tmp_path / "folder")
    for name in ("pytorch_model.bin", WEIGHTS):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(InputError):
        hub.load_policy(folder)
    assert not (tmp_path / "sprung").exists()


# ------------------------------------------------------------------------------------------------------------------ saving

@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_exact_and_saving_twice_gives_the_same_bytes(family, tmp_path):
    their_folder(tmp_path / "theirs", family)
    one = hub.load_policy(tmp_path / "theirs")
    for name in ("a", "b", "b"):                     # b a second time over itself
        hub.save_policy(tmp_path / name, one, one.tokenizer)
    two = hub.load_policy(tmp_path / "a")
    assert one.trunk.config == two.trunk.config
    weights, before = dict(two.trunk.named_parameters()), load_file(tmp_path / "theirs" / WEIGHTS)
    after = load_file(tmp_path / "a" / WEIGHTS)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    for name, parameter in one.trunk.named_parameters():
        assert torch.equal(parameter, weights[name])
    hub.save_policy(tmp_path / "c", two, two.tokenizer)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert not [name for name in files if name.endswith(".tmp")] and {CONFIG, WEIGHTS} <= set(files)
    for other in ("b", "c"):
        assert sorted(path.name for path in (tmp_path / other).iterdir()) == files
        assert all((tmp_path / other / name).read_bytes() == (tmp_path / "a" / name).read_bytes() for name in files)


def test_a_folder_that_was_written_and_changed_is_refused(tmp_path):
    hub.save_policy(tmp_path / "policy", our_policy("gpt2"), tiny_tokenizer("gpt2"))
    hub.save_reward_model(tmp_path / "reward", our_reward_model("gpt2", 1))
    for folder, load in ((tmp_path / "policy", hub.load_policy), (tmp_path / "reward", hub.load_reward_model)):
        for path in folder.iterdir():
            whole = path.read_bytes()
            for at in (0, len(whole) // 2, len(whole) - 1):            # one bit of one byte
                path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
                if path.name != "SHA256SUMS":
                    with pytest.raises(InputError, match=path.name):
                        load(folder)
            path.write_bytes(whole)
        load(folder)


def test_a_model_is_not_saved_over_one_with_another_tokenizer(tmp_path):
    # its weights would stand beside the other's tokenizer, and load without a word
    for family in FAMILIES:
        hub.save_policy(tmp_path / family, our_policy(family), tiny_tokenizer(family))
        before = {path.name: path.read_bytes() for path in (tmp_path / family).iterdir()}
        other = our_policy("llama" if family == "gpt2" else "gpt2")
        with pytest.raises(InputError, match="another tokenizer"):
            hub.save_policy(tmp_path / family, other, other.tokenizer)
        assert {path.name: path.read_bytes() for path in (tmp_path / family).iterdir()} == before


def test_metadata_that_transformers_asks_for(sound):
    with safe_open(sound / "gpt2" / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_run_folder_stands_for_its_model(sound, tmp_path):
    shutil.copytree(sound / "gpt2", tmp_path / "run" / "model")
    (tmp_path / "run" / CONFIG).write_text('{"flags": {}}')
    assert hub.load_policy(tmp_path / "run").trunk.family == "gpt2"
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(InputError, match="not saved a model yet"):
        hub.load_policy(tmp_path / "run")
    with pytest.raises(InputError, match="no such folder"):
        hub.load_policy(tmp_path / "nowhere")
