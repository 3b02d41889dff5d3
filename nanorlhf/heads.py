"""The two models of RLHF: a trunk with what is put on top of it.

B groups, K responses a group, R response tokens, T columns, D width, N outputs. A batch is `batching.Batch`: only its
fields tokens, positions, branch, predictor, responses, mask, last are read here.
"""
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

START = 0.2                # deviation of a new reward head's first scores
CHUNK = 1024               # logits that exist at once: 200 MB in float32 with GPT-2's vocabulary


class PolicyOutput(NamedTuple):
    """All (B,K,R) float, aligned to the predicted token, 0 behind the mask; None where it was not asked for."""
    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    values: torch.Tensor | None


def columns(batch, index):
    """Columns (B, ...), counted within their row, as indices into all B*T columns of the batch."""
    rows = torch.arange(len(index), device=index.device).view(-1, *[1] * (index.ndim - 1))
    return index + rows * batch.tokens.shape[1]


def precise(layer, hidden):
    """A small head in its weights' own number format, also under autocast: a score of 5.9 has steps of 0.03 in bfloat16, which tie."""
    with torch.autocast(hidden.device.type, enabled=False):
        return layer(hidden.to(layer.weight.dtype))


class Policy(nn.Module):
    """A language model, and for PPO a critic: a linear value head on the policy's own trunk ("only the last layer is new").

    The value head starts at zero, so the first advantages are the rewards themselves. detach_value keeps the value
    loss out of the trunk.
    """

    def __init__(self, trunk, value_head=False, detach_value=False):
        super().__init__()
        self.trunk, self.detach_value = trunk, detach_value
        self.value_head = nn.Linear(trunk.width, 1) if value_head else None
        if value_head:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def read(self, hidden, tokens, temperature, entropy):
        """Log-probabilities of `tokens` (n,), and entropies or None, from hidden states (n,D); float32 or better from the softmax on."""
        logits = self.trunk.logits(hidden)                                            # (n,V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        return -F.cross_entropy(logits, tokens, reduction="none"), None if entropy is None else entropy(logits)

    def forward(self, batch, temperature=1.0, entropy=None):
        """Log-probability of every response token at this temperature, its value, and by `entropy(logits)` its entropy.

        Logits are computed for response tokens alone (n of them), CHUNK at a time where there are more: their backward computes
        them again, so that never more than CHUNK x V of them exist.
        """
        at = columns(batch, batch.predictor)[batch.mask]                              # (n,)
        hidden = self.trunk.hidden(batch.tokens, batch.positions, batch.branch, at=at)        # (n,D)
        chunks = list(zip(hidden.split(CHUNK), batch.responses[batch.mask].split(CHUNK)))
        again = len(chunks) > 1 and torch.is_grad_enabled()
        found = [checkpoint(self.read, *chunk, temperature, entropy, use_reentrant=False) if again else self.read(*chunk, temperature, entropy)
                 for chunk in chunks]
        back = lambda x: torch.zeros(batch.mask.shape, dtype=x.dtype, device=x.device).masked_scatter(batch.mask, x)
        logprobs, entropies = (None if parts[0] is None else back(torch.cat(parts)) for parts in zip(*found))
        values = None
        if self.value_head is not None:
            values = back(precise(self.value_head, hidden.detach() if self.detach_value else hidden).squeeze(-1))
        return PolicyOutput(logprobs, entropies, values)


class Scorer(nn.Module):
    """A trunk with a linear layer of N outputs, read at each response's last token: 1 scalar, or N quantiles."""

    def __init__(self, trunk, outputs=1):
        super().__init__()
        self.trunk = trunk
        self.score = nn.Linear(trunk.width, outputs, bias=False)
        nn.init.zeros_(self.score.weight)

    def draw_head(self):
        """Random weights of a new head, so that scores start small whatever the size of the trunk's hidden states.

        Their rms is about that of the last norm's weight (7 in one small LLaMA). A head of order 1 there starts with loud
        noise; a head of zeros lets the trunk learn nothing at first.
        """
        size = self.trunk.final_norm.weight.detach().pow(2).mean().sqrt().clamp(min=1e-6).item()
        nn.init.normal_(self.score.weight, std=START / (size * self.trunk.width ** 0.5))

    def forward(self, batch):
        """Raw outputs (B,K,N); what stands at a response that is not `valid` is meaningless."""
        at = columns(batch, batch.last)                                               # (B,K)
        hidden = self.trunk.hidden(batch.tokens, batch.positions, batch.branch, at=at.flatten())      # (B*K,D)
        return precise(self.score, hidden.view(*at.shape, -1))                      # (B,K,N)
