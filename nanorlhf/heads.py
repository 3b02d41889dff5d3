"""The two models of RLHF: a trunk with what is put on top of it.

B groups, K responses per group, R response tokens, T columns, D width, V vocabulary, N outputs.
A batch is `batching.Batch`: only the fields that describe the row are read here.
"""
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from . import ppo

INIT_SCORE_STD = 0.2       # deviation of a new reward head's first scores
LOGITS_CHUNK = 1024        # logits that exist at once: 200 MB in float32 with GPT-2's vocabulary


class PolicyOutput(NamedTuple):
    """All (B,K,R) float, aligned to the predicted token, 0 behind the mask; None: not asked for."""
    logprobs: Tensor
    entropy: Tensor | None
    values: Tensor | None


def flat_columns(batch, index: Tensor) -> Tensor:
    """Columns (B, ...), counted within their row, as indices into all B*T columns of the batch."""
    row = torch.arange(len(index), device=index.device).view(-1, *[1] * (index.ndim - 1))
    return index + row * batch.tokens.shape[1]


def in_weight_dtype(layer: nn.Linear, hidden: Tensor) -> Tensor:
    """A small head in its weights' own number format, also under autocast: in bfloat16 scores near
    5.9 differ by steps of 0.03, which tie.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return layer(hidden.to(layer.weight.dtype))


class Policy(nn.Module):
    """A language model, and for PPO a critic: a linear value head on the policy's own trunk.

    "Only the last layer is new" [paper A, 3.3]. It starts at zero, so the first advantages are the
    rewards themselves. detach_value keeps the value loss out of the trunk.
    """

    def __init__(self, trunk: nn.Module, value_head: bool = False, detach_value: bool = False):
        super().__init__()
        self.trunk = trunk
        self.detach_value = detach_value
        self.value_head = nn.Linear(trunk.width, 1) if value_head else None
        if value_head:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def token_logprobs(self, hidden, tokens, temperature, return_entropy):
        """Log-softmax of the logits, read at `tokens`; float32 or better from the softmax on.

        hidden (n,D), tokens (n,)  ->  log-probabilities (n,), entropies (n,) or None
        """
        logits = self.trunk.logits(hidden)                                         # (n,V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        logprobs = -F.cross_entropy(logits, tokens, reduction="none")
        return logprobs, ppo.entropy(logits) if return_entropy else None

    def forward(
        self, batch, temperature: float = 1.0, return_entropy: bool = False
    ) -> PolicyOutput:
        """Log-probability of every response token at this temperature, its entropy and value.

        Logits are computed for response tokens alone (n of them), LOGITS_CHUNK at a time where
        there are more: the backward computes them again, so that never more than LOGITS_CHUNK x V
        of them exist.
        """
        mask = batch.response_mask
        at = flat_columns(batch, batch.logit_index)[mask]                          # (n,)
        hidden = self.trunk.hidden(
            batch.tokens, batch.positions, batch.branch, at=at, lengths=batch.lengths
        )                                                                          # (n,D)
        chunks = list(zip(hidden.split(LOGITS_CHUNK), batch.responses[mask].split(LOGITS_CHUNK)))
        checkpointed = len(chunks) > 1 and torch.is_grad_enabled()
        logprobs, entropies = [], []
        for chunk in chunks:
            inputs = (*chunk, temperature, return_entropy)
            if checkpointed:
                output = checkpoint(self.token_logprobs, *inputs, use_reentrant=False)
            else:
                output = self.token_logprobs(*inputs)
            logprobs.append(output[0])
            entropies.append(output[1])
        entropy = values = None
        if return_entropy:
            entropy = scatter_back(torch.cat(entropies), mask)
        if self.value_head is not None:
            value_input = hidden.detach() if self.detach_value else hidden
            values = scatter_back(in_weight_dtype(self.value_head, value_input).squeeze(-1), mask)
        return PolicyOutput(scatter_back(torch.cat(logprobs), mask), entropy, values)


def scatter_back(x: Tensor, mask: Tensor) -> Tensor:
    """(n,) -> (B,K,R), 0 behind the mask"""
    return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x)


class RewardModel(nn.Module):
    """A trunk with a linear layer of N outputs, read at each response's last token: 1 scalar, or N
    quantiles.
    """

    def __init__(self, trunk: nn.Module, outputs: int = 1):
        super().__init__()
        self.trunk = trunk
        self.score = nn.Linear(trunk.width, outputs, bias=False)
        nn.init.zeros_(self.score.weight)

    def init_head(self):
        """Random weights of a new head, so that scores start small whatever the size of the trunk's
        hidden states.

        Their rms is about that of the last norm's weight (7 in one small LLaMA). A head of order 1
        there starts with loud noise; a head of zeros lets the trunk learn nothing at first.
        """
        size = self.trunk.final_norm.weight.detach().pow(2).mean().sqrt().clamp(min=1e-6).item()
        nn.init.normal_(self.score.weight, std=INIT_SCORE_STD / (size * self.trunk.width**0.5))

    def forward(self, batch) -> Tensor:
        """Raw outputs (B,K,N); without meaning at a response that is not `valid`."""
        at = flat_columns(batch, batch.last_index)                                 # (B,K)
        hidden = self.trunk.hidden(
            batch.tokens, batch.positions, batch.branch, at=at.flatten(), lengths=batch.lengths
        )                                                                          # (B*K,D)
        return in_weight_dtype(self.score, hidden.view(*at.shape, -1))             # (B,K,N)
