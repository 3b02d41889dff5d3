"""From text to one number: a reward model with its normalisation and statistic, or a Python function.

A policy and a reward model may be of different families with different tokenizers, so a reward takes *text*:
score_texts(prompts, responses, ended) -> (B,K). B prompts, K responses each, N outputs of the model.
"""
import importlib.util
import math
import re
import sys
from pathlib import Path

import torch

from .batching import encode_all, micro_batches, pack_rows
from .config import InputError
from .data import Group, Response

MAPS = {                                 # from a raw output to a reward, by the loss that trained it
    "identity": lambda z: z,
    "tanh_half": lambda z: torch.tanh(z / 2),       # classification: 2 sigmoid(z) - 1, in (-1, 1)      [paper A, 3.2]
}
STD_FLOOR = 0.1                          # a model at chance has a small deviation: dividing by it would make a unit of reward out of noise


def statistic(outputs, name):
    """One number out of N outputs.  (...,N) -> (...).  mean;  q0 .. q9, a quantile;  cvar:a, the mean of the lowest ceil(a N)

    Outputs are free, so the distribution is read from them sorted.
    """
    if name == "mean":
        return outputs.mean(-1)
    ordered = outputs.sort(-1).values
    if name.startswith("cvar:"):
        return ordered[..., : lowest(name[5:], outputs.shape[-1])].mean(-1)
    return ordered[..., int(name[1:])]


def canonical(name, outputs):
    """One spelling for each statistic of N outputs (cvar by how many are averaged); refuses what does not exist.  -> str"""
    quantile, cvar = re.fullmatch(r"q(\d+)", name), re.fullmatch(r"cvar:(\d*\.?\d+)", name)
    if name != "mean" and outputs == 1:
        raise InputError(f"--statistic {name}: this reward model has one output; only a quantile model has more than its mean")
    if not (name == "mean" or quantile and float(quantile[1]) < outputs or cvar and 0 < float(cvar[1]) <= 1):
        raise InputError(f"--statistic {name}: expected mean, q0 .. q{outputs - 1}, or cvar:A with 0 < A <= 1 (this model has {outputs} outputs)")
    return f"cvar:{lowest(cvar[1], outputs) / outputs:.6g}" if cvar else f"q{int(quantile[1])}" if quantile else name      # q03 is q3, whose moments are known


def lowest(share, outputs):
    """ceil(share N), where .3 * 10 = 3.0000000000000004 counts as 3, and .666667 * 3, a share as `canonical` writes it, as 2."""
    return max(1, math.ceil(float(share) * outputs - 1e-3))


def statistics(outputs):
    """Every statistic of N outputs, by its canonical name."""
    if outputs == 1:
        return ["mean"]
    return ["mean"] + [f"q{i}" for i in range(outputs)] + [f"cvar:{(i + 1) / outputs:.6g}" for i in range(outputs)]


class RewardModel:
    """A `heads.Scorer` with its tokenizer: text in, normalised rewards out. Normalisation is applied here, once."""

    def __init__(self, model, tokenizer, reward_map="identity", moments=None, max_length=None):
        self.model, self.tokenizer, self.map = model, tokenizer, reward_map
        self.max_length = max_length or model.trunk.config.context     # what it was trained on: longer texts are new to it
        self.max_tokens = 8192                   # columns per micro-batch
        self.cut = 0                             # prompts that had to lose their beginning so far
        self.moments = moments or {}             # statistic -> (mean, deviation) over the training mix
        self.use("mean")

    def use(self, name):
        """Chooses the statistic that becomes the reward; each has a normalisation of its own."""
        self.statistic = canonical(name, self.model.score.out_features)
        self.mean, self.std = self.moments.get(self.statistic, (0.0, 1.0))

    @torch.no_grad()
    def outputs(self, rows):
        """Raw outputs for rows (batching.Row) that all have K responses.  -> (B,K,N)"""
        device = next(self.model.parameters()).device
        plan, parts = micro_batches([row.columns for row in rows], self.max_tokens), {}
        for part in plan:
            raw = self.model(pack_rows([rows[i] for i in part]).to(device))
            parts.update(zip(part, raw))
        return torch.stack([parts[i] for i in range(len(rows))])

    def raw(self, outputs):
        """The mapped statistic before normalisation.  (...,N) -> (...)"""
        return MAPS[self.map](statistic(outputs, self.statistic))

    def fit(self, outputs):
        """Mean 0 and variance 1 over outputs (n,N) of the training mix, for every statistic, with a floor under the deviation.

        -> the raw deviation of the mean: under the floor, rewards will deviate by less than 1
        """
        spread = {}
        for name in statistics(outputs.shape[-1]):
            raw = MAPS[self.map](statistic(outputs, name)).double()
            spread[name] = raw.std(unbiased=False).item()
            self.moments[name] = (raw.mean().item(), max(spread[name], STD_FLOOR))
        self.use("mean")
        return spread["mean"]

    def score_texts(self, prompts, responses, ended, normalised=True):
        """Rewards of B x K texts.  prompts: B str;  responses: B lists of K str;  ended: B lists of K bool (EOS appended)  ->  (B,K) float32

        A prompt too long for this model's context loses its beginning (`self.cut` counts them), a response never its end.
        """
        groups = [Group(p, [Response(t, ended=e) for t, e in zip(texts, ends)], cut=True)
                  for p, texts, ends in zip(prompts, responses, ended)]
        rows, reasons = encode_all(groups, self.tokenizer, self.max_length)
        if reasons:                              # each response by itself, so that how much its prompt loses depends on it alone
            groups = [Group(group.prompt, [response], cut=True) for group in groups for response in group.responses]
            rows, reasons = encode_all(groups, self.tokenizer, self.max_length)
            if len(rows) < len(groups):
                raise InputError(f"a response alone fills the reward model's {self.max_length} positions: allow fewer new tokens")
        self.cut += sum(reasons.values())
        raw = self.raw(self.outputs(rows)).float().cpu().view(len(prompts), -1)
        return self.normalise(raw) if normalised else raw

    def normalise(self, raw):
        """(raw - mean) / deviation of the training mix, by the statistic in use."""
        return (raw - self.mean) / self.std


def _import(path):
    """The module in a file, which may import modules that lie beside it."""
    name = f"nanorlhf_user_{Path(path).stem}"                # a file called json.py takes no other module's place
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)                              # last: what is installed goes before what lies beside
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)       # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:                 # a script that parses its own command line exits
        raise InputError(f"{path}: cannot be imported ({type(error).__name__}: {error})") from None
    return module


class FunctionReward:
    """`path.py:function` with (prompts, responses) -> scores, both flat lists of str of one length. Runs the user's code."""

    def __init__(self, spec):
        path, _, name = spec.rpartition(":")
        if not Path(path).is_file():
            raise InputError(f"{spec}: no file {path}")
        self.function, self.spec = getattr(_import(path), name, None), spec
        if not callable(self.function):
            raise InputError(f"{spec}: {path} has no function {name!r}")

    def score_texts(self, prompts, responses, ended, normalised=True):
        """As RewardModel.score_texts; raw and normalised are the same."""
        k = len(responses[0])
        flat = [text for texts in responses for text in texts]
        try:
            scores = [float(score) for score in self.function([p for p in prompts for _ in range(k)], flat)]
        except (Exception, SystemExit) as error:
            raise InputError(f"{self.spec} raised {type(error).__name__}: {str(error)[:200]}") from None
        if len(scores) != len(flat):
            raise InputError(f"{self.spec} returned {len(scores)} scores for {len(flat)} responses")
        bad = next((i for i, score in enumerate(scores) if not math.isfinite(score)), None)
        if bad is not None:
            raise InputError(f"{self.spec} returned {scores[bad]} for the response {flat[bad][:60]!r}")
        return torch.tensor(scores).view(len(prompts), k)

    def normalise(self, raw):
        """A function's scores are taken as they are."""
        return raw


def is_function(spec):
    return bool(re.search(r"\.py:\w+$", spec))
