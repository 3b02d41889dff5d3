"""Model folders in Hugging Face's format, in and out. safetensors only: nothing is ever unpickled.

A folder holds config.json, model.safetensors and the tokenizer's files; transformers' classes
AutoModelForCausalLM and AutoModelForSequenceClassification load it. What is particular to one
family of models stands in hub_gpt2.py and hub_llama.py, under the same names in each.
"""
import dataclasses
import json
import math
import re
from contextlib import contextmanager
from os.path import dirname, realpath
from pathlib import Path

import torch

from ..heads import Policy, RewardModel
from ..reward import REWARD_TRANSFORMS, FunctionReward, TextReward, is_function
from . import hub_gpt2, hub_llama
from .files import file_damage, open_tensors, read_checksums, replace_all, save_tensors
from .read import InputError, read_json
from .tokenizer import load as read_tokenizer

FAMILIES = {"gpt2": hub_gpt2, "llama": hub_llama}        # model_type in config.json -> its module
SIZES = {
    name: (family.Trunk, config)
    for family in FAMILIES.values()
    for name, config in family.SIZES.items()
}
# constants that old releases stored
OLD_BUFFERS = re.compile(r"(^|\.)(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@contextmanager
def _errors_at(place):
    """A ValueError becomes the user's mistake, with the place in front of its message."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{place}: {error}") from None


# --------------------------------------------------------------------------------- config.json

def trunk_config(values, path):
    """Hugging Face's config.json (a dict) -> (the family's module, our config).

    A setting that is not implemented is refused by its name.
    """
    name = values.get("model_type")
    family = FAMILIES.get(str(name))
    if family is None:
        raise InputError(f"{path}: model_type {name!r:.80} is neither {' nor '.join(FAMILIES)}")
    with _errors_at(path):
        for key, allowed in family.FIXED.items():
            if values.get(key, allowed[0]) not in allowed:
                raise ValueError(
                    f"{key} {values[key]!r:.80} is not implemented (only {allowed[0]!r})"
                )
        Config = family.Trunk.Config
        values = family.values_from_hub(values)
        fields = {field.name: _field_value(field, values) for field in dataclasses.fields(Config)}
        config = Config(**fields)
        family.check_config(config)
    return family, config


def _field_value(field, values):
    """A config's field as config.json has it. What is left out there has the family's default."""
    value = values.get(field.name, field.default)
    if value is None and field.default is None:
        return None
    kind = int if field.default is None else type(field.default)
    allowed = (int, float) if kind is float else (kind,)
    # type(), not isinstance(): True is an int to Python
    if type(value) not in allowed or (kind in (int, float) and not 0 < value < 1e9):
        raise ValueError(f"{field.name} {value!r:.80} is not a valid {kind.__name__}")
    return value


def _reward_keys(values, path):
    """What save_reward_model adds to Hugging Face's keys; other reward models have none of it.

    -> (transform, moments, max_length)
    """
    keys = values.get("nanorlhf_reward") or {}
    try:
        transform = keys.get("map", "identity")
        max_length = keys.get("max_length")
        moments = {}
        for name, (mean, std) in keys.get("moments", {}).items():
            moments[name] = (mean / 1, std / 1)                        # "0.5" is no number
            if not (math.isfinite(mean) and 0 < std < math.inf):
                raise ValueError
        is_length = max_length is None or (type(max_length) is int and max_length > 0)
        if transform not in REWARD_TRANSFORMS or not is_length:
            raise ValueError
    except (AttributeError, OverflowError, TypeError, ValueError):
        raise InputError(
            f"{path}: nanorlhf_reward {keys!r:.80} is not a map ({', '.join(REWARD_TRANSFORMS)}) "
            "with a mean and deviation for each statistic"
        ) from None
    return transform, moments, max_length


# ------------------------------------------------------------------------------------- tensors

def _weight_files(folder):
    """The safetensors files of a folder: model.safetensors, or without it, as in transformers, the
    shards that its index names, in this folder and nowhere else.
    """
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
        hint = ""
        if pickled:
            hint = f" ({pickled[0].name} is pickled and never loaded; convert it to safetensors)"
        raise InputError(f"{folder}: no model.safetensors{hint}")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(
            f"{index}: weight_map {names!r:.40} does not say which tensor is in which file"
        )
    # in the hub's cache a file in snapshots/REVISION is a link into blobs
    allowed = (realpath(folder), realpath(folder / "../../blobs"))
    for name in names.values():
        plain = name == Path(str(name)).name and name.isprintable()
        if not plain or not name.endswith(".safetensors") or len(name) > 255:
            raise InputError(
                f"{index}: {name!r:.80} is not the name of a safetensors file in this folder"
            )
        real = realpath(folder / name)
        if dirname(real) not in allowed:
            raise InputError(
                f"{index}: {name!r:.80} is a link to {real}, outside this folder; "
                "put the file itself here"
            )
    return [folder / name for name in sorted(set(names.values()))]


def _read_headers(folder):
    """What the files claim to hold, before anything is allocated for it.

    -> {(path, tensor name): shape}
    """
    headers = {}
    for path in _weight_files(folder):
        with open_tensors(path) as file:
            for key in file.keys():
                headers[path, key] = tuple(file.get_slice(key).get_shape())
    return headers


def _match_tensors(folder, module, names, headers, optional):
    """Compares headers and model: all tensors and parameters are accounted for, all shapes agree.

    -> {(path, tensor name): parameter name}, optional tensors last
    """
    missing = dict(names)
    sources = {}
    copies = {}
    prefix = next(iter(names)).split(".")[0]     # the trunk's: its embedding comes first
    for (path, key), shape in headers.items():
        if optional.get(key):
            copies[path, key] = optional[key]
        if OLD_BUFFERS.search(key) or key in optional:
            continue
        # GPT-2 was published without its prefix
        name = key if key in names else f"{prefix}.{key}"
        if name not in missing:
            raise InputError(f"{path}: tensor {key!r:.80} is not part of this model")
        sources[path, key] = missing.pop(name)
        expected = tuple(module.get_parameter(names[name]).shape)
        if shape != expected:
            raise InputError(
                f"{path}: tensor {key!r:.80} has shape {shape!s:.80}, config.json says {expected}"
            )
    if missing:
        raise InputError(
            f"{folder}: tensor {next(iter(missing))!r} is missing ({len(missing)} in all)"
        )
    return sources | copies


@torch.no_grad()
def _load_weights(folder, module, trunk, names, headers, optional):
    """Gives a module on the meta device memory, and its parameters their values from the files.

    trunk: the module itself, or the one inside it
    names: tensor name in the file -> parameter name
    optional: a tensor that may be in the file without a parameter of its own -> the parameter that
        it must equal (a tied head), or None where the tensor is not needed
    """
    sources = _match_tensors(folder, module, names, headers, optional)
    try:
        module.to_empty(device="cpu")
    except RuntimeError:
        n = sum(p.numel() for p in module.parameters())
        raise InputError(
            f"{folder}: {n:,} parameters, {4 * n / 2**30:.0f} GiB in float32, "
            "do not fit into memory"
        ) from None
    for (path, key), name in sources.items():
        place = f"{path}: tensor {key!r}"
        with open_tensors(path) as file:
            tensor = file.get_tensor(key)
        parameter = module.get_parameter(name)
        if key in optional and not torch.equal(tensor.float(), parameter):
            raise InputError(
                f"{place} is not the embedding, but config.json has tie_word_embeddings true; "
                "which is right?"
            )
        if tensor.dtype not in FLOATS:
            raise InputError(f"{place} holds {tensor.dtype}; quantised weights are not implemented")
        parameter.copy_(tensor)
        # only now: float64's 1e300 is float32's infinity
        if not torch.isfinite(parameter).all():
            raise InputError(f"{place} holds NaN or infinity, or numbers beyond float32")
    with _errors_at(folder / "config.json"):
        FAMILIES[trunk.family].after_load(trunk)


def _hub_names(trunk):
    """Tensor name in a hub file -> parameter name of the trunk."""
    names = {}
    for key in trunk.state_dict():
        names[key if key == "lm_head.weight" else trunk.prefix + key] = key
    return names


# ------------------------------------------------------------------------------------- loading

def model_folder(path):
    """A model folder itself, or the one inside a run's folder."""
    path = Path(path)
    if (path / "model" / "config.json").exists():
        return path / "model"
    if not path.is_dir():
        hint = f"sizes of random weights: {', '.join(SIZES)}"
        if path.suffix == ".py":
            hint = "a function is named path.py:function"
        raise InputError(f"{path}: no such folder ({hint})")
    if (path / "config.json").exists() and "flags" in read_json(path / "config.json"):
        raise InputError(f"{path}: a run that has not saved a model yet")
    return path


def _open_folder(path):
    """-> (model folder, its config.json, whether that is a reward model's)"""
    folder = model_folder(path)
    for name in read_checksums(folder):          # our folders have SHA256SUMS, others need not
        if problem := file_damage(folder / name):
            raise InputError(
                f"{folder}: {problem} (the run that wrote it writes it again; "
                "if you changed it yourself, remove that line)"
            )
    values = read_json(folder / "config.json")
    return folder, values, "ForSequenceClassification" in str(values.get("architectures"))


def load_tokenizer(folder):
    try:
        return read_tokenizer(folder)
    except (OSError, ValueError) as error:
        raise InputError(" ".join(str(error).splitlines())) from None


def _meta_trunk(folder, values):
    """A trunk of shapes alone, without memory, to be compared with the headers before it is loaded.

    -> (trunk, its family's module, tokenizer, headers)
    """
    path = folder / "config.json"
    family, config = trunk_config(values, path)
    headers = _read_headers(folder)
    num_layers = getattr(config, family.NUM_LAYERS)
    if num_layers > len(headers):
        raise InputError(
            f"{path}: {num_layers:,} layers, but {len(headers):,} tensors beside it: "
            "they do not belong together"
        )
    try:
        with torch.device("meta"):
            trunk = family.Trunk(config)
    except RuntimeError:                         # a tensor's size does not fit into 64 bits
        raise InputError(f"{path}: no machine has memory for tensors of these sizes") from None
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"the model {config.vocab_size}: they do not belong together"
        )
    return trunk, family, tokenizer, headers


def load_trunk(path, head=True):
    """Trunk and tokenizer of a folder of any family.

    head=False leaves the head out: a language model's, or that of a reward model, which is refused
    otherwise.

    -> (trunk, tokenizer)
    """
    folder, values, is_reward_model = _open_folder(path)
    if is_reward_model and head:
        raise InputError(f"{folder}: a reward model; a language model is wanted here")
    trunk, family, tokenizer, headers = _meta_trunk(folder, values)
    if not head:
        trunk.lm_head = None
    optional = {"score.weight": None} if is_reward_model else {}
    tied = trunk.config.tie_word_embeddings
    if trunk.lm_head is None:
        optional["lm_head.weight"] = family.EMBEDDING if tied else None
    _load_weights(folder, trunk, trunk, _hub_names(trunk), headers, optional)
    return trunk, tokenizer


def load_policy(path):
    """A policy with its `.tokenizer`, from a run or a model folder."""
    trunk, tokenizer = load_trunk(path)
    policy = Policy(trunk)
    policy.tokenizer = tokenizer
    return policy


def load_reward_model(path):
    """A TextReward (with tokenizer, transform and normalisation), from a run or a model folder."""
    folder, values, is_reward_model = _open_folder(path)
    if not is_reward_model:
        raise InputError(
            f"{folder}: not a reward model (architectures {values.get('architectures')!s:.80}); "
            "train one with train_rm.py"
        )
    config_path = folder / "config.json"
    labels = values.get("id2label") or {"0": "", "1": ""}    # transformers' default is two labels
    if not isinstance(labels, dict):
        raise InputError(f"{config_path}: id2label {labels!r:.40} is not an object")
    transform, moments, max_length = _reward_keys(values, config_path)
    trunk, family, tokenizer, headers = _meta_trunk(folder, values)
    trunk.lm_head = None
    with torch.device("meta"):
        model = RewardModel(trunk, len(labels))
    names = {name: f"trunk.{key}" for name, key in _hub_names(trunk).items()}
    names["score.weight"] = "score.weight"
    _load_weights(folder, model, trunk, names, headers, {})
    max_length = min(max_length or trunk.config.context, trunk.config.context)
    return TextReward(model, tokenizer, transform, moments, max_length)


def load_reward(spec, statistic="mean", max_tokens=8192):
    """What --reward names: `path.py:function`, or a reward model's run or folder."""
    if is_function(spec):
        return FunctionReward(spec)
    reward = load_reward_model(spec)
    reward.select(statistic)
    reward.max_tokens = max_tokens
    return reward


def init_or_load(init, tokenizer_folder, texts, head=True):
    """What --init names: a folder's weights, or random ones of a size's name, with their tokenizer.

    texts: a function that returns the data's texts, called where a nano size trains its tokenizer
    -> (trunk, tokenizer, words for the header)
    """
    if init not in SIZES:
        if tokenizer_folder:
            raise InputError(f"--tokenizer goes with random weights; {init} has its own")
        trunk, tokenizer = load_trunk(init, head)
        return trunk, tokenizer, f"weights from {model_folder(init)}"
    Trunk, config = SIZES[init]
    is_nano = init.endswith("-nano")
    if tokenizer_folder:
        tokenizer = load_tokenizer(model_folder(tokenizer_folder))
    elif is_nano:
        with _errors_at(f"--init {init}"):
            tokenizer = FAMILIES[Trunk.family].train_tokenizer(texts(), config.vocab_size)
    else:
        raise InputError(
            f"--init {init} is random weights of a real size: "
            "name its tokenizer's folder with --tokenizer"
        )
    if is_nano or tokenizer.vocab_size > config.vocab_size:
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    trunk = Trunk(config)
    if not head:
        trunk.lm_head = None
    return trunk, tokenizer, f"random weights of size {init}"


# -------------------------------------------------------------------------------------- saving

def _hub_tensors(trunk):
    """The trunk's weights by their names in a hub file, float32 on the CPU."""
    names = _hub_names(trunk).items()
    return {name: trunk.get_parameter(key).detach().float().cpu() for name, key in names}


def _save_model(folder, trunk, tokenizer, tensors, extra_values):
    """Tokenizer, weights, then config.json, each renamed into place: always a whole model."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    holds_model = (folder / "config.json").exists()
    for name, raw in tokenizer.files.items():
        path = folder / name
        same = path.is_file() and path.read_bytes() == raw
        if holds_model and not same and not file_damage(path):
            raise InputError(f"{folder}: holds a model with another tokenizer; name another folder")
    family = FAMILIES[trunk.family]
    vocab_size = len(tensors[trunk.prefix + family.EMBEDDING])
    values = {
        **family.values_for_hub(trunk.config, tokenizer),
        "model_type": trunk.family,
        "vocab_size": vocab_size,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id if tokenizer.pad_id < vocab_size else None,
        "dtype": "float32",
        "torch_dtype": "float32",
        **extra_values
    }
    replace_all(folder, {
        **tokenizer.files,
        "model.safetensors": save_tensors(tensors, {"format": "pt"}),
        "config.json": (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()
    })


def save_policy(folder, policy, tokenizer):
    trunk = policy.trunk
    architectures = [FAMILIES[trunk.family].CAUSAL_LM]
    _save_model(folder, trunk, tokenizer, _hub_tensors(trunk), {"architectures": architectures})


def save_reward_model(folder, reward):
    """The head itself in score.weight; transform, mean and deviation as keys of config.json."""
    trunk = reward.model.trunk
    score = reward.model.score
    family = FAMILIES[trunk.family]
    tensors = _hub_tensors(trunk)
    tensors.pop("lm_head.weight", None)
    tensors["score.weight"] = score.weight.detach().float().cpu()
    embedding = trunk.prefix + family.EMBEDDING
    # a padding id of its own, beyond the table: one more row, unused here, for transformers
    new_rows = max(0, reward.tokenizer.pad_id + 1 - trunk.config.vocab_size)
    tensors[embedding] = torch.cat([tensors[embedding], torch.zeros(new_rows, trunk.width)])
    labels = [f"LABEL_{i}" for i in range(score.out_features)]
    extra_values = {
        "architectures": [family.CLASSIFIER],
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "nanorlhf_reward": {
            "map": reward.transform,
            "moments": reward.norm_stats,
            "max_length": reward.max_length
        }
    }
    _save_model(folder, trunk, reward.tokenizer, tensors, extra_values)
