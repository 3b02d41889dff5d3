"""Two small models that learn to read a fairy tale within half a minute on one core: a GPT-2 with
byte-level BPE, a LLaMA with sentencepiece.

With the usual start a tiny transformer takes very long to find out that it can copy, which a
pretrained one can do from the first step. Here every head starts out looking for columns that hold
what its own column holds, and passes on what they hold (W_k = W_q, W_o = W_v^T). LLaMA's rotations
make such a head prefer its neighbourhood; GPT-2 has its positions in dimensions of their own, and
three heads of the first layer look one, two and three columns back. It is a start, not a
constraint: every weight is trained.
"""
import math
from pathlib import Path

import torch
from torch import nn

from .. import gpt2, llama
from ..heads import Policy
from ..io import hub, tokenizer

VOCAB_SIZE = 1024                        # most words of the world become one token
CONTEXT = 128
WIDTH = 64
LAYERS = 2
HEADS = 4
HEAD_DIM = WIDTH // HEADS
POSITION_DIMS = HEAD_DIM                 # dimensions that hold a position: as many as a head has


def position_waves(positions):
    """Sines and cosines of wavelengths from 2 to 100 columns.  (n,) -> (n, POSITION_DIMS)"""
    n = POSITION_DIMS // 2
    angle = positions[:, None] * 3 / 60 ** (torch.arange(n) / n)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def shift_matrix(columns):
    """The matrix that makes position_waves(p) into position_waves(p + columns): each sine and
    cosine turned by its own angle.  -> (POSITION_DIMS, POSITION_DIMS)
    """
    matrix = torch.zeros(POSITION_DIMS, POSITION_DIMS)
    waves = position_waves(torch.tensor([columns]))[0]
    for i, (sine, cosine) in enumerate(waves.view(-1, 2)):
        part = slice(2 * i, 2 * i + 2)
        matrix[part, part] = torch.tensor([[cosine, -sine], [sine, cosine]])
    return matrix


@torch.no_grad()
def start_gpt2(vocab_size, seed):
    """A small GPT-2: positions in the first dimensions, words in the others, heads that match and
    copy words or look back.
    """
    torch.manual_seed(seed)
    trunk = gpt2.GPT2(gpt2.GPT2Config(vocab_size, CONTEXT, WIDTH, LAYERS, HEADS))
    words = nn.init.normal_(trunk.wte.weight, std=0.1)
    words[:, :POSITION_DIMS] = 0
    positions = nn.init.zeros_(trunk.wpe.weight)
    positions[:, :POSITION_DIMS] = 0.2 * position_waves(torch.arange(CONTEXT))
    for layer, block in enumerate(trunk.h):
        query = torch.randn(WIDTH, WIDTH) / math.sqrt(WIDTH)
        value = torch.randn(WIDTH, WIDTH) / math.sqrt(WIDTH)
        query[:POSITION_DIMS] = 0                # words are matched and passed on, not positions
        value[:POSITION_DIMS] = 0
        key = query.clone()
        for head in range(1, HEADS if layer == 0 else 1):
            part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            query[:, part] = 0
            key[:, part] = 0
            # the query at p meets the key at p - head
            query[:POSITION_DIMS, part] = 1.5 * torch.eye(POSITION_DIMS)
            key[:POSITION_DIMS, part] = 1.5 * shift_matrix(head)
        block.attn.c_attn.weight.copy_(torch.cat([query, key, 0.7 * value], 1))
        block.attn.c_proj.weight.copy_(0.7 * value.T)
    return trunk


@torch.no_grad()
def start_llama(vocab_size, seed):
    """A small LLaMA whose heads match and copy words."""
    torch.manual_seed(seed)
    trunk = llama.Llama(llama.LlamaConfig(
        vocab_size, WIDTH, 3 * WIDTH, LAYERS, HEADS,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True,
    ))
    nn.init.normal_(trunk.embed_tokens.weight, std=0.1)
    for layer in trunk.layers:
        attention = layer.self_attn
        nn.init.normal_(attention.q_proj.weight, std=0.5 / math.sqrt(WIDTH))
        nn.init.normal_(attention.v_proj.weight, std=0.5 / math.sqrt(WIDTH))
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)
    return trunk


FAMILIES = {
    "gpt2": (tokenizer.train_bpe, start_gpt2),
    "llama": (tokenizer.train_sentencepiece, start_llama),
}


def write(folder, family, texts, seed):
    """A tokenizer trained on the texts and the weights to start from, as a Hugging Face folder that
    --init takes.
    """
    train_tokenizer, start = FAMILIES[family]
    trained = train_tokenizer(texts, VOCAB_SIZE)
    Path(folder).mkdir(parents=True, exist_ok=True)
    hub.save_policy(folder, Policy(start(trained.vocab_size, seed)), trained)
