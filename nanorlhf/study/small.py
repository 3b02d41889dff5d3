"""Two small models that learn to read a fairy tale within half a minute on one core: a GPT-2 with byte-level BPE, a LLaMA with sentencepiece.

With the usual start a tiny transformer takes very long to find out that it can copy, which a pretrained one can do from the
first step. Here every head starts out looking for columns that hold what it holds itself, and passes on what they hold
(W_k = W_q, W_o = W_v^T). LLaMA's rotations make such a head prefer its neighbourhood; GPT-2 has its positions in dimensions of
their own, and three heads of the first layer look one, two and three columns back. It is a start, not a constraint: every
weight is trained.
"""
import math
from pathlib import Path

import torch
from torch import nn

from .. import gpt2, llama
from ..heads import Policy
from ..io import hub, tokenizer

VOCABULARY = 1024                        # most words of the world become one token
CONTEXT = 128
WIDTH, LAYERS, HEADS = 64, 2, 4
PLACE = WIDTH // HEADS                   # dimensions that hold a position: as many as a head has


def waves(positions):
    """Sines and cosines of `PLACE` / 2 wavelengths, from 2 to 100 columns.  (n,) -> (n, PLACE)"""
    angle = positions[:, None] * 3 / 60 ** (torch.arange(PLACE // 2) / (PLACE // 2))
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def turn(columns):
    """The matrix that makes waves(p) into waves(p + columns): each sine and cosine turned by its own angle.  -> (PLACE, PLACE)"""
    matrix = torch.zeros(PLACE, PLACE)
    for i, (sine, cosine) in enumerate(waves(torch.tensor([columns]))[0].view(-1, 2)):
        matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = torch.tensor([[cosine, -sine], [sine, cosine]])
    return matrix


@torch.no_grad()
def start_gpt2(vocab_size, seed):
    """A small GPT-2: positions in the first dimensions, words in the others, heads that match and copy words or look back."""
    torch.manual_seed(seed)
    trunk = gpt2.GPT2(gpt2.GPT2Config(vocab_size, CONTEXT, WIDTH, LAYERS, HEADS))
    nn.init.normal_(trunk.wte.weight, std=0.1)[:, :PLACE] = 0
    nn.init.zeros_(trunk.wpe.weight)[:, :PLACE] = 0.2 * waves(torch.arange(CONTEXT))
    for layer, block in enumerate(trunk.h):
        query, value = (torch.randn(WIDTH, WIDTH) / math.sqrt(WIDTH) for _ in range(2))
        query[:PLACE], value[:PLACE] = 0, 0                            # words are matched and passed on, not places
        key = query.clone()
        for head in range(1, HEADS if layer == 0 else 1):              # the query at p meets the key at p - head
            part = slice(head * PLACE, (head + 1) * PLACE)
            query[:, part], key[:, part] = 0, 0
            query[:PLACE, part], key[:PLACE, part] = 1.5 * torch.eye(PLACE), 1.5 * turn(head)
        block.attn.c_attn.weight.copy_(torch.cat([query, key, 0.7 * value], 1))
        block.attn.c_proj.weight.copy_(0.7 * value.T)
    return trunk


@torch.no_grad()
def start_llama(vocab_size, seed):
    """A small LLaMA whose heads match and copy words."""
    torch.manual_seed(seed)
    trunk = llama.Llama(llama.LlamaConfig(vocab_size, WIDTH, 3 * WIDTH, LAYERS, HEADS, max_position_embeddings=CONTEXT, tie_word_embeddings=True))
    nn.init.normal_(trunk.embed_tokens.weight, std=0.1)
    for layer in trunk.layers:
        attention = layer.self_attn
        nn.init.normal_(attention.q_proj.weight, std=0.5 / math.sqrt(WIDTH))
        nn.init.normal_(attention.v_proj.weight, std=0.5 / math.sqrt(WIDTH))
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)
    return trunk


def write(folder, family, texts, seed):
    """Tokenizer trained on the texts and started weights, as a Hugging Face folder that --init takes."""
    train, start = {"gpt2": (tokenizer.train_bpe, start_gpt2), "llama": (tokenizer.train_sentencepiece, start_llama)}[family]
    tok = train(texts, VOCABULARY)
    Path(folder).mkdir(parents=True, exist_ok=True)
    hub.save_policy(folder, Policy(start(tok.vocab_size, seed)), tok)
