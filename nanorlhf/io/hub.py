"""Model folders in Hugging Face's format, in and out. safetensors only: nothing is ever unpickled.

config.json, model.safetensors, tokenizer files: loads with transformers' AutoModelForCausalLM / ForSequenceClassification.
"""
import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import gpt2, llama
from ..heads import Policy, RewardModel
from ..reward import REWARD_TRANSFORMS, FunctionReward, TextReward, is_function
from . import tokenizer
from .files import file_damage, read_checksums, replace_all
from .read import MAX_JSON_BYTES, InputError, parse_json, read_bytes

FAMILIES = {"gpt2": gpt2.GPT2, "llama": llama.Llama}
SIZES = {**{name: (gpt2.GPT2, config) for name, config in gpt2.SIZES.items()},
         **{name: (llama.Llama, config) for name, config in llama.SIZES.items()}}
OLD_BUFFERS = re.compile(r"(^|\.)(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")       # constants that old releases stored
GPT2_FIXED = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
              "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)}
LLAMA_FIXED = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROPE = {"rope_factor": "factor", "rope_low_freq_factor": "low_freq_factor", "rope_high_freq_factor": "high_freq_factor",
        "rope_original_context": "original_max_position_embeddings"}


def read_json(path):
    return parse_json(read_bytes(path, MAX_JSON_BYTES), path)


# ------------------------------------------------------------------------------------------------- config.json, both ways

def trunk_config(values, path):
    """Hugging Face's config.json (a dict) -> (model class, our config). What we do not implement is refused by name."""
    family = FAMILIES.get(str(values.get("model_type")))
    if family is None:
        raise InputError(f"{path}: model_type {values.get('model_type')!r:.80} is neither gpt2 nor llama")
    for key, allowed in (GPT2_FIXED if family is gpt2.GPT2 else LLAMA_FIXED).items():
        if values.get(key, allowed[0]) not in allowed:
            raise InputError(f"{path}: {key} {values[key]!r:.80} is not implemented (only {allowed[0]!r})")
    values = dict(values)
    # what equals transformers' default may be left out: GPT-2 ties its head, LLaMA does not
    values.setdefault("tie_word_embeddings", family is gpt2.GPT2)
    if family is llama.Llama:
        values.update(_rope(values, path))
    found = {}
    for field in dataclasses.fields(family.Config):
        value = values.get(field.name, field.default)
        kind = type(field.default) if field.default is not None else int
        fits = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
        if not (value is None and field.default is None) and not (fits and (kind in (bool, str) or 0 < value < 1e9)):
            raise InputError(f"{path}: {field.name} {value!r:.80} is not a valid {kind.__name__}")
        found[field.name] = value
    config = family.Config(**found)
    if family is gpt2.GPT2 and config.n_embd % config.n_head:
        raise InputError(f"{path}: n_head {config.n_head} does not divide n_embd {config.n_embd}")
    if family is llama.Llama and config.num_attention_heads % config.key_value_heads:
        raise InputError(f"{path}: num_key_value_heads {config.key_value_heads} does not divide num_attention_heads {config.num_attention_heads}")
    if family is llama.Llama and (config.head_width % 2 or not config.head_width):
        raise InputError(f"{path}: head_dim {config.head_width} is odd or 0; dimensions are rotated in pairs")
    return family, config


def _rope(values, path):
    """LLaMA's rotations as transformers 4 spells them (rope_theta, rope_scaling) or 5 (rope_parameters)  ->  our fields"""
    rope = {"rope_theta": values.get("rope_theta", 10000.0)}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(values.get(key) or {}, dict):
            raise InputError(f"{path}: {key} {values[key]!r:.80} is not an object")
        rope.update(values.get(key) or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise InputError(f"{path}: rope type {kind!r:.80} is not implemented (default, linear, llama3)")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise InputError(f"{path}: partial_rotary_factor {rope['partial_rotary_factor']!r:.80} is not implemented (only 1)")
    if kind == "llama3":                         # left out, it is the context, as in transformers
        rope.setdefault("original_max_position_embeddings", values.get("max_position_embeddings", 2048))
    absent = [key for key in ROPE.values() if key not in rope and (kind == "llama3" or kind == "linear" and key == "factor")]
    if absent:
        raise InputError(f"{path}: rope type {kind!r} needs {absent[0]}")
    return {"rope_type": kind, "rope_theta": rope["rope_theta"], **{ours: rope[theirs] for ours, theirs in ROPE.items() if theirs in rope}}


def _hub_config(trunk, tok, architecture, vocab_size):
    """Our config -> Hugging Face's config.json, with rope in the spelling of transformers 4 and of 5."""
    values = {key: value for key, value in dataclasses.asdict(trunk.config).items() if not key.startswith("rope_")}
    values.update(model_type=trunk.family, architectures=[architecture], vocab_size=vocab_size, bos_token_id=tok.bos_id,
                  eos_token_id=tok.eos_id, pad_token_id=tok.pad_id if tok.pad_id < vocab_size else None, dtype="float32", torch_dtype="float32")
    if trunk.family == "gpt2":
        values.update(activation_function="gelu_new", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        values["bos_token_id"] = tok.eos_id if tok.bos_id is None else tok.bos_id
    else:
        config = trunk.config
        rope = {theirs: getattr(config, ours) for ours, theirs in ROPE.items()} if config.rope_type == "llama3" else \
            {"factor": config.rope_factor} if config.rope_type == "linear" else {}
        values.update(hidden_act="silu", num_key_value_heads=config.key_value_heads, head_dim=config.head_width, rope_theta=config.rope_theta,
                      rope_scaling={"rope_type": config.rope_type, **rope} if rope else None,
                      rope_parameters={"rope_theta": config.rope_theta, "rope_type": config.rope_type, **rope})
    return values


# ------------------------------------------------------------------------------------------------------------- tensors

def _weight_files(folder):
    """The safetensors files of a folder: one, or, without it (as in transformers), the shards that its index names, in this folder and nowhere else."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        other = next((p.name for p in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))), None)
        raise InputError(f"{folder}: no model.safetensors" + (f" ({other} is pickled and never loaded; convert it to safetensors)" if other else ""))
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{index}: weight_map {names!r:.40} does not say which tensor is in which file")
    for name in names.values():
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors") or not name.isprintable() or len(name) > 255:
            raise InputError(f"{index}: {name!r:.80} is not the name of a safetensors file in this folder")
        home, real = os.path.realpath(folder), os.path.realpath(folder / name)
        if os.path.dirname(real) not in (home, os.path.realpath(f"{home}/../../blobs")):       # the hub's cache: snapshots/REVISION links to blobs
            raise InputError(f"{index}: {name!r:.80} is a link to {real}, outside this folder; put the file itself here")
    return [folder / name for name in sorted(set(names.values()))]


@contextlib.contextmanager
def _tensors(path):
    """An open safetensors file: its header has been read and checked against the file's size, tensors have not."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({' '.join(str(error).split())[:100]})") from None


def _headers(folder):
    """What the files say that they hold, before anything is allocated for it.  -> {path: {tensor name: shape}}"""
    found = {}
    for path in _weight_files(folder):
        with _tensors(path) as file:
            found[path] = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    return found


def _match_tensors(parameters, names, headers, spare):
    """Holds the headers against the model. Every tensor is accounted for, every shape is the model's.  -> [(path, tensor, parameter, copy?)]"""
    missing, steps = dict(names), []
    prefix = next((name.split(".")[0] + "." for name in names if "." in name), "")
    for path, header in headers.items():
        for key, shape in header.items():
            name = key if key in names else prefix + key               # GPT-2 was published without `transformer.`
            if spare.get(key):
                steps.append((path, key, spare[key], True))
            if OLD_BUFFERS.search(key) or key in spare:
                continue
            if name not in missing:
                raise InputError(f"{path}: tensor {key!r:.80} is not part of this model")
            steps.append((path, key, missing.pop(name), False))
            if shape != tuple(parameters[steps[-1][2]].shape):
                raise InputError(f"{path}: tensor {key!r:.80} has shape {shape!s:.80}, config.json says {tuple(parameters[steps[-1][2]].shape)}")
    if missing:
        raise InputError(f"{next(iter(headers)).parent}: tensor {next(iter(missing))!r} is missing ({len(missing)} in all)")
    return sorted(steps, key=lambda step: step[3])                     # copies are compared at the end


@torch.no_grad()
def _load_weights(module, names, headers, spare=None):
    """Gives a module on the meta device memory, and its parameters values from the files.

    names: tensor name in the file -> parameter name;  spare: tensor that may be in the file but has no parameter of its
    own -> the parameter that it must equal (a tied head), or None where it is not wanted
    """
    steps, path = _match_tensors(dict(module.named_parameters()), names, headers, spare or {}), next(iter(headers))
    try:
        parameters = dict(module.to_empty(device="cpu").named_parameters())
    except RuntimeError:
        n = sum(p.numel() for p in module.parameters())
        raise InputError(f"{path}: {n:,} parameters, {4 * n / 2**30:.0f} GiB in float32, do not fit into memory") from None
    for path, mine in itertools.groupby(steps, key=lambda step: step[0]):
        with _tensors(path) as file:
            for _, key, name, copy in mine:
                tensor = file.get_tensor(key)
                if copy and not torch.equal(tensor.float(), parameters[name]):
                    raise InputError(f"{path}: tensor {key!r} is not the embedding, but config.json has tie_word_embeddings true; which is right?")
                if tensor.dtype not in FLOATS:
                    raise InputError(f"{path}: tensor {key!r} holds {tensor.dtype}; quantised weights are not implemented")
                parameters[name].copy_(tensor)
                if not torch.isfinite(parameters[name]).all():         # here, not before: float64's 1e300 is float32's infinity
                    raise InputError(f"{path}: tensor {key!r} holds NaN or infinity, or numbers beyond float32")


def _hub_names(trunk):
    """Tensor name in a hub file -> parameter name of the trunk."""
    return {key if key.startswith("lm_head") else trunk.prefix + key: key for key, _ in trunk.named_parameters()}


def _embedding_name(trunk):
    """Parameter name of the token embedding."""
    return "wte.weight" if trunk.family == "gpt2" else "embed_tokens.weight"


# -------------------------------------------------------------------------------------------------------------- loading

def model_folder(path):
    """A model folder itself, or the one of a run."""
    path = Path(path)
    if (path / "model" / "config.json").exists():
        return path / "model"
    if not path.is_dir():
        hint = "a function is named path.py:function" if path.suffix == ".py" else f"sizes of random weights: {', '.join(SIZES)}"
        raise InputError(f"{path}: no such folder ({hint})")
    if (path / "config.json").exists() and "flags" in read_json(path / "config.json"):
        raise InputError(f"{path}: a run that has not saved a model yet")
    return path


def _check_sums(folder):
    """A folder that came with SHA256SUMS, as ours do, is what was written."""
    for name in read_checksums(folder):
        if wrong := file_damage(folder / name):
            raise InputError(f"{folder}: {wrong} (the run that wrote it writes it again; if you changed it yourself, remove that line)")


def load_tokenizer(folder):
    try:
        return tokenizer.load(folder)
    except (OSError, ValueError) as error:
        raise InputError(" ".join(str(error).splitlines())) from None


def _check_fit(trunk, tok, folder):
    if tok.vocab_size > trunk.config.vocab_size:
        raise InputError(f"{folder}: the tokenizer has {tok.vocab_size} tokens, the model {trunk.config.vocab_size}: they do not belong together")


def _meta_model(family, config, headers, path):
    """A model of shapes alone, without memory: about to be held against the files' headers, then loaded."""
    layers, tensors = config.n_layer if family is gpt2.GPT2 else config.num_hidden_layers, sum(map(len, headers.values()))
    if layers > tensors:
        raise InputError(f"{path}: {layers:,} layers, but {tensors:,} tensors beside it: they do not belong together")
    try:
        with torch.device("meta"):
            return family(config)
    except RuntimeError:                         # a tensor's size does not fit into 64 bits
        raise InputError(f"{path}: no machine has memory for tensors of these sizes") from None


def _set_rope(trunk, path):
    """LLaMA's rotations, which are in no file. Only now is the head's width known to be that of the weights."""
    if trunk.family == "llama":
        trunk.frequencies = llama.rope_frequencies(trunk.config)
        if not torch.isfinite(trunk.frequencies).all():
            raise InputError(f"{path}: the rope parameters give rotations that are no numbers")


def load_trunk(path, head=True):
    """Trunk and tokenizer of any GPT-2 or LLaMA folder; head=False leaves a language-model head out.  -> (trunk, tokenizer)"""
    folder = model_folder(path)
    _check_sums(folder)
    values = read_json(folder / "config.json")
    family, config = trunk_config(values, folder / "config.json")
    if "ForSequenceClassification" in str(values.get("architectures")):
        raise InputError(f"{folder}: a reward model; a language model is wanted here")
    headers = _headers(folder)
    trunk, tok = _meta_model(family, config, headers, folder / "config.json"), load_tokenizer(folder)
    if not head:
        trunk.lm_head = None
    _check_fit(trunk, tok, folder)
    _load_weights(trunk, _hub_names(trunk), headers, {} if trunk.lm_head is not None else {"lm_head.weight": _embedding_name(trunk) if config.tie_word_embeddings else None})
    _set_rope(trunk, folder / "config.json")
    return trunk, tok


def load_policy(path):
    """A policy with its `.tokenizer`, from a run or a model folder."""
    trunk, tok = load_trunk(path)
    policy = Policy(trunk)
    policy.tokenizer = tok
    return policy


def load_reward_model(path):
    """A RewardModel (tokenizer, map, mean and deviation within), from a run or a model folder."""
    folder = model_folder(path)
    _check_sums(folder)
    values = read_json(folder / "config.json")
    if "ForSequenceClassification" not in str(values.get("architectures")):
        raise InputError(f"{folder}: not a reward model (architectures {values.get('architectures')!s:.80}); train one with train_rm.py")
    family, config = trunk_config(values, folder / "config.json")
    labels = values.get("id2label") or {"0": "", "1": ""}              # transformers' default is two labels
    if not isinstance(labels, dict):
        raise InputError(f"{folder / 'config.json'}: id2label {labels!r:.40} is not an object")
    reward_map, moments, max_length = _reward_keys(values, folder / "config.json")
    headers = _headers(folder)
    trunk, tok = _meta_model(family, config, headers, folder / "config.json"), load_tokenizer(folder)
    trunk.lm_head = None
    _check_fit(trunk, tok, folder)
    with torch.device("meta"):
        model = RewardModel(trunk, len(labels))
    names = {name: f"trunk.{key}" for name, key in _hub_names(trunk).items()}
    _load_weights(model, {**names, "score.weight": "score.weight"}, headers)
    _set_rope(trunk, folder / "config.json")
    return TextReward(model, tok, reward_map, moments, min(max_length or config.context, config.context))


def load_reward(spec, statistic="mean", max_tokens=8192):
    """What --reward names: `path.py:function`, or a reward model's run or folder."""
    if is_function(spec):
        return FunctionReward(spec)
    reward = load_reward_model(spec)
    reward.select(statistic)
    reward.max_tokens = max_tokens
    return reward


def _reward_keys(values, path):
    """What save_reward_model wrote beside Hugging Face's keys; somebody else's reward model has none.  -> (map, moments, max_length)"""
    found = values.get("nanorlhf_reward") or {}
    try:
        reward_map, max_length = found.get("map", "identity"), found.get("max_length")
        moments = {name: (mean / 1, std / 1) for name, (mean, std) in found.get("moments", {}).items()}        # "0.5" is no number
        good = reward_map in REWARD_TRANSFORMS and (max_length is None or type(max_length) is int and max_length > 0) and all(math.isfinite(mean) and 0 < std < math.inf for mean, std in moments.values())
    except (AttributeError, OverflowError, TypeError, ValueError):
        good = False
    if not good:
        raise InputError(f"{path}: nanorlhf_reward {found!r:.80} is not a map ({', '.join(REWARD_TRANSFORMS)}) with a mean and deviation for each statistic")
    return reward_map, moments, max_length


def init_or_load(init, tokenizer_folder, texts, head=True):
    """What --init names: a folder's weights, or random ones of a size's name, with their tokenizer.  -> (trunk, tokenizer, words for the header)

    texts: a function that gives the data's texts, called where a nano size trains its small tokenizer on them.
    """
    if init not in SIZES:
        if tokenizer_folder:
            raise InputError(f"--tokenizer goes with random weights; {init} has its own")
        trunk, tok = load_trunk(init, head)
        return trunk, tok, f"weights from {model_folder(init)}"
    family, config = SIZES[init]
    if tokenizer_folder:
        tok = load_tokenizer(model_folder(tokenizer_folder))
    elif init.endswith("-nano"):
        train = tokenizer.train_bpe if family is gpt2.GPT2 else tokenizer.train_sentencepiece
        try:
            tok = train(texts(), config.vocab_size)
        except ValueError as error:
            raise InputError(f"--init {init}: {error}") from None
    else:
        raise InputError(f"--init {init} is random weights of a real size: name its tokenizer's folder with --tokenizer")
    if init.endswith("-nano") or tok.vocab_size > config.vocab_size:
        config = dataclasses.replace(config, vocab_size=tok.vocab_size)
    trunk = family(config)
    if not head:
        trunk.lm_head = None
    return trunk, tok, f"random weights of size {init}"


# --------------------------------------------------------------------------------------------------------------- saving

def save_tensors(tensors, metadata):
    """A function that writes a safetensors file to the path it is given; a full disk is an OSError, as elsewhere."""
    def write(path):
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if not number:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    return write


def _save_model(folder, trunk, tok, architecture, extra_tensors, extra_config):
    """Tokenizer and weights, then config.json, each by a rename: the folder is a whole model at every instant."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parameters, names = dict(trunk.named_parameters()), _hub_names(trunk)
    if extra_tensors:                                                  # a reward model: no language-model head in its folder
        names.pop("lm_head.weight", None)
    tensors = {name: parameters[key].detach().float().cpu() for name, key in names.items()}
    vocab_size, table = trunk.config.vocab_size, trunk.prefix + _embedding_name(trunk)
    if extra_tensors and tok.pad_id >= vocab_size:                     # a pad that is not EOS: one more row, unused here
        tensors[table] = torch.cat([tensors[table], torch.zeros(tok.pad_id + 1 - vocab_size, trunk.width)])
        vocab_size = tok.pad_id + 1
    tensors.update({name: tensor.detach().float().cpu() for name, tensor in extra_tensors.items()})
    if (folder / "config.json").exists() and any(not file_damage(folder / name) and (not (folder / name).is_file() or (folder / name).read_bytes() != raw)
                                                 for name, raw in tok.files.items()):
        raise InputError(f"{folder}: holds a model with another tokenizer; name another folder")
    config = {**_hub_config(trunk, tok, architecture, vocab_size), **extra_config}
    replace_all(folder, {**tok.files, "model.safetensors": save_tensors(tensors, {"format": "pt"}),
                         "config.json": (json.dumps(config, indent=1, sort_keys=True) + "\n").encode()})


def save_policy(folder, policy, tok):
    name = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[policy.trunk.family]
    _save_model(folder, policy.trunk, tok, name, {}, {})


def save_reward_model(folder, reward_model):
    """Raw head output in score.weight; our map, mean and deviation as named keys in config.json."""
    model, n = reward_model.model, reward_model.model.score.out_features
    name = {"gpt2": "GPT2ForSequenceClassification", "llama": "LlamaForSequenceClassification"}[model.trunk.family]
    labels = [f"LABEL_{i}" for i in range(n)]
    _save_model(folder, model.trunk, reward_model.tokenizer, name, {"score.weight": model.score.weight}, {
        "id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)},
        "nanorlhf_reward": {"map": reward_model.transform, "moments": reward_model.norm_stats, "max_length": reward_model.max_length}})
