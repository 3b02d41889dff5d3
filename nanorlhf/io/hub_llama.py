"""What Hugging Face's folders say of LLaMA: all that hub.py asks of a family."""
import torch

from .. import llama
from .tokenizer import train_sentencepiece

Trunk = llama.Llama
SIZES = llama.SIZES
CAUSAL_LM = "LlamaForCausalLM"                   # transformers' names of policy and reward model
CLASSIFIER = "LlamaForSequenceClassification"
EMBEDDING = "embed_tokens.weight"                # the parameter that a tied head shares
NUM_LAYERS = "num_hidden_layers"                 # the field of the config
train_tokenizer = train_sentencepiece            # a nano size trains its tokenizer on its data
FIXED = {                                        # implemented for these values alone, default first
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,)
}
ROPE = {                                         # name in config.json -> field of LlamaConfig
    "factor": "rope_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_context"
}
ROPE_NEEDS = {"default": [], "linear": ["factor"], "llama3": [*ROPE]}


def values_from_hub(values):
    """config.json -> the same with our config's fields, which differ for the rotations.

    transformers 4 has them in rope_theta and rope_scaling, transformers 5 in rope_parameters.
    """
    rope = {"rope_theta": values.get("rope_theta", 10000.0)}
    for key in ("rope_scaling", "rope_parameters"):
        parameters = values.get(key) or {}
        if not isinstance(parameters, dict):
            raise ValueError(f"{key} {parameters!r:.80} is not an object")
        rope.update(parameters)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if str(kind) not in ROPE_NEEDS:
        raise ValueError(f"rope type {kind!r:.80} is not implemented ({', '.join(ROPE_NEEDS)})")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(
            f"partial_rotary_factor {rope['partial_rotary_factor']!r:.80} "
            "is not implemented (only 1)"
        )
    if kind == "llama3":                         # left out, it is the context, as in transformers
        rope.setdefault(
            "original_max_position_embeddings", values.get("max_position_embeddings", 2048)
        )
    for key in ROPE_NEEDS[kind]:
        if key not in rope:
            raise ValueError(f"rope type {kind!r} needs {key}")
    fields = {field: rope[key] for key, field in ROPE.items() if key in rope}
    return values | fields | {"rope_type": kind, "rope_theta": rope["rope_theta"]}


def check_config(config):
    """Raises ValueError where fields do not fit together."""
    if config.num_attention_heads % config.key_value_heads:
        raise ValueError(
            f"num_key_value_heads {config.key_value_heads} does not divide "
            f"num_attention_heads {config.num_attention_heads}"
        )
    d = config.head_width
    if d % 2 or not d:
        raise ValueError(f"head_dim {d} is odd or 0; dimensions are rotated in pairs")


def values_for_hub(config, tokenizer):
    """Our config -> the family's part of config.json; rotations for transformers 4 and 5."""
    kind = config.rope_type
    scaling = {key: getattr(config, ROPE[key]) for key in ROPE_NEEDS[kind]}
    values = {key: value for key, value in vars(config).items() if not key.startswith("rope_")}
    return {
        **values,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": {"rope_type": kind, **scaling} if scaling else None,
        "rope_parameters": {"rope_type": kind, "rope_theta": config.rope_theta, **scaling},
        "bos_token_id": tokenizer.bos_id
    }


def after_load(trunk):
    """Computes the rotations, which are in no file. Only now the weights confirm d."""
    trunk.frequencies = llama.rope_frequencies(trunk.config)
    if not torch.isfinite(trunk.frequencies).all():
        raise ValueError("the rope parameters give rotations that are no numbers")
