"""What Hugging Face's folders say of GPT-2: all that hub.py asks of a family."""
from .. import gpt2
from .tokenizer import train_bpe

Trunk = gpt2.GPT2
SIZES = gpt2.SIZES
CAUSAL_LM = "GPT2LMHeadModel"                    # transformers' names of policy and reward model
CLASSIFIER = "GPT2ForSequenceClassification"
EMBEDDING = "wte.weight"                         # the parameter that a tied head shares
NUM_LAYERS = "n_layer"                           # the field of the config
train_tokenizer = train_bpe                      # a nano size trains its tokenizer on its data
FIXED = {                                        # implemented for these values alone, default first
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,)
}


def values_from_hub(values):
    """config.json -> the same with our config's fields: here they have the same names."""
    return values


def check_config(config):
    """Raises ValueError where fields do not fit together."""
    if config.n_embd % config.n_head:
        raise ValueError(f"n_head {config.n_head} does not divide n_embd {config.n_embd}")


def values_for_hub(config, tokenizer):
    """Our config -> the family's part of config.json."""
    return {
        **vars(config),
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    }


def after_load(trunk):
    """Everything of GPT-2 is in its file."""
