"""From text to one number: a reward model with its normalisation and statistic, or a Python function.

A policy and a reward model may be of different families with different tokenizers, so a reward takes *text*:
score_texts(prompts, responses, ended) -> (B,K). B prompts, K responses each, N outputs of the model.
"""
import importlib.util
import math
import re
from pathlib import Path

import torch

from .batching import encode_all, micro_batches, pack_rows
from .config import InputError
from .data import Group, Response

MAPS = {                                 # from a raw output to a reward, by the loss that trained it
    "identity": lambda z: z,
    "tanh_half": lambda z: torch.tanh(z / 2),       # classification: 2 sigmoid(z) - 1, in (-1, 1)      [paper A, 3.2]
}
STD_FLOOR = 0.1                          # raw outputs that differ by less carry no signal worth a unit of reward


def statistic(outputs, name):
    """One number out of N outputs.  (...,N) -> (...).  mean;  q0 .. q9, a quantile;  cvar:a, the mean of the lowest ceil(a N)

    Outputs are free, so the distribution is read from them sorted.
    """
    if name == "mean":
        return outputs.mean(-1)
    ordered = outputs.sort(-1).values
    if name.startswith("cvar:"):
        return ordered[..., : max(1, math.ceil(float(name[5:]) * outputs.shape[-1] - 1e-9))].mean(-1)
    return ordered[..., int(name[1:])]


def check_statistic(name, outputs):
    """Refuses a statistic that does not exist for this number of outputs."""
    quantile, cvar = re.fullmatch(r"q(\d+)", name), re.fullmatch(r"cvar:(\d*\.?\d+)", name)
    if not (name == "mean" or quantile and int(quantile[1]) < outputs or cvar and 0 < float(cvar[1]) <= 1):
        raise InputError(f"--statistic {name}: expected mean, q0 .. q{outputs - 1}, or cvar:A with 0 < A <= 1 (this model has {outputs} outputs)")
    if name != "mean" and outputs == 1:
        raise InputError(f"--statistic {name}: this reward model has one output; only a quantile model has more than its mean")


class RewardModel:
    """A `heads.Scorer` with its tokenizer: text in, normalised rewards out. Normalisation is applied here, once."""

    def __init__(self, model, tokenizer, reward_map="identity", mean=0.0, std=1.0):
        self.model, self.tokenizer = model, tokenizer
        self.map, self.mean, self.std, self.statistic = reward_map, mean, std, "mean"

    @property
    def context(self):
        return self.model.trunk.config.context

    @torch.no_grad()
    def outputs(self, rows, max_tokens=8192):
        """Raw outputs for rows (batching.Row) that all have K responses.  -> (B,K,N)"""
        device = next(self.model.parameters()).device
        plan, parts = micro_batches([row.columns for row in rows], max_tokens), {}
        for part in plan:
            raw = self.model(pack_rows([rows[i] for i in part]).to(device))
            parts.update(zip(part, raw))
        return torch.stack([parts[i] for i in range(len(rows))])

    def raw(self, outputs):
        """The mapped statistic before normalisation.  (...,N) -> (...)"""
        return MAPS[self.map](statistic(outputs, self.statistic))

    def fit(self, raw):
        """Sets mean 0 and variance 1 over raw rewards (n,), with a floor under the deviation.  -> (mean, std before the floor)"""
        self.mean, spread = raw.mean().item(), raw.std(unbiased=False).item()
        self.std = max(spread, STD_FLOOR)
        return self.mean, spread

    def score_texts(self, prompts, responses, ended, normalised=True):
        """Rewards of B x K texts.  prompts: B str;  responses: B lists of K str;  ended: B lists of K bool (EOS appended)  ->  (B,K) float32

        A passage that is too long for this model's context is refused; a response's end is never cut.
        """
        groups = [Group(p, [Response(t, ended=e) for t, e in zip(texts, ends)], cut=True)
                  for p, texts, ends in zip(prompts, responses, ended)]
        rows, reasons = encode_all(groups, self.tokenizer, self.context)
        if len(rows) < len(groups):
            raise InputError(f"the reward model's context of {self.context} tokens is too short: {dict(reasons)}")
        raw = self.raw(self.outputs(rows)).float().cpu()
        return (raw - self.mean) / self.std if normalised else raw


class FunctionReward:
    """`path.py:function` with (prompts, responses) -> scores, both flat lists of str of one length. Runs the user's code."""

    def __init__(self, spec):
        path, _, name = spec.rpartition(":")
        if not Path(path).is_file():
            raise InputError(f"{spec}: no file {path}")
        try:
            module = importlib.util.module_from_spec(found := importlib.util.spec_from_file_location(Path(path).stem, path))
            found.loader.exec_module(module)
        except Exception as error:
            raise InputError(f"{path}: cannot be imported ({type(error).__name__}: {error})") from None
        self.function, self.spec = getattr(module, name, None), spec
        if not callable(self.function):
            raise InputError(f"{spec}: {path} has no function {name!r}")

    def score_texts(self, prompts, responses, ended, normalised=True):
        """As RewardModel.score_texts; a function's scores are taken as they are."""
        k = len(responses[0])
        flat = [text for texts in responses for text in texts]
        try:
            scores = [float(score) for score in self.function([p for p in prompts for _ in range(k)], flat)]
        except Exception as error:
            raise InputError(f"{self.spec} raised {type(error).__name__}: {str(error)[:200]}") from None
        if len(scores) != len(flat):
            raise InputError(f"{self.spec} returned {len(scores)} scores for {len(flat)} responses")
        bad = next((i for i, score in enumerate(scores) if not math.isfinite(score)), None)
        if bad is not None:
            raise InputError(f"{self.spec} returned {scores[bad]} for the response {flat[bad][:60]!r}")
        return torch.tensor(scores).view(len(prompts), k)


def is_function(spec):
    return bool(re.search(r"\.py:\w+$", spec))
