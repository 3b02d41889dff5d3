"""From text to one number: a reward model with its normalisation, or a Python function.

    text -> tokens -> N outputs -> statistic (mean, a quantile, cvar) -> transform -> normalise
    reward

A policy and a reward model may be of different families with different tokenizers, so a reward
takes *text*. Both kinds answer the same questions:

    score_texts(prompts, responses, ended, normalised)  ->  (B,K)
    normalise(raw)      describe()      forward_flops(rows)      to(device, dtype, compile)

B prompts, K responses each, N outputs of the model.
"""
import math
import re
from pathlib import Path

import torch
from torch import Tensor

from .batching import Row, encode_all, micro_batches, prefetch
from .heads import RewardModel
from .io.data import Group, Response
from .io.read import InputError, import_file
from .run import kernels, precision, speed

REWARD_TRANSFORMS = {            # by the loss that trained the model
    "identity": lambda z: z,
    # classification: 2 sigmoid(z) - 1, in (-1, 1)  [paper A, 3.2]
    "tanh_half": lambda z: torch.tanh(z / 2),
}
STD_FLOOR = 0.1                  # a smaller deviation is noise: no unit of reward is made of it


def reduce_quantiles(outputs: Tensor, statistic: str) -> Tensor:
    """One number out of N outputs.  (...,N) -> (...)

    mean;  q0 .. q9, a quantile;  cvar:a, the mean of the lowest ceil(a N).
    Outputs are free, so the distribution is read from them sorted.
    """
    if statistic == "mean":
        return outputs.mean(-1)
    ordered = outputs.sort(-1).values
    if statistic.startswith("cvar:"):
        return ordered[..., : cvar_count(statistic[5:], outputs.shape[-1])].mean(-1)
    return ordered[..., int(statistic[1:])]


def parse_statistic(name: str, outputs: int) -> str:
    """One spelling for each statistic of N outputs; InputError for what does not exist."""
    quantile = re.fullmatch(r"q(\d+)", name)
    cvar = re.fullmatch(r"cvar:(\d*\.?\d+)", name)
    if name != "mean" and outputs == 1:
        raise InputError(
            f"--statistic {name}: this reward model has one output; "
            "only a quantile model has more than its mean"
        )
    if name == "mean":
        return name
    if quantile and float(quantile[1]) < outputs:
        return f"q{int(quantile[1])}"            # q03 is q3, whose normalisation is known
    if cvar and 0 < float(cvar[1]) <= 1:
        return f"cvar:{cvar_count(cvar[1], outputs) / outputs:.6g}"
    raise InputError(
        f"--statistic {name}: expected mean, q0 .. q{outputs - 1}, or cvar:A with 0 < A <= 1 "
        f"(this model has {outputs} outputs)"
    )


def cvar_count(share: str | float, outputs: int) -> int:
    """ceil(share N), where .3 * 10 = 3.0000000000000004 counts as 3, and .666667 * 3, as
    `parse_statistic` writes it, as 2.
    """
    return max(1, math.ceil(float(share) * outputs - 1e-3))


def all_statistics(outputs: int) -> list[str]:
    """Every statistic of N outputs, in the spelling of `parse_statistic`."""
    if outputs == 1:
        return ["mean"]
    quantiles = [f"q{i}" for i in range(outputs)]
    cvars = [f"cvar:{(i + 1) / outputs:.6g}" for i in range(outputs)]
    return ["mean", *quantiles, *cvars]


def deviation_within(scores: list[Tensor]) -> float:
    """sqrt(sum (x - mean of its prompt)^2 / (n - prompts)), pooled over the n scores x of prompts

    scores: (K,) per prompt. A prompt with one score counts neither above nor below; if all are such
    prompts, NaN.
    """
    squares = sum(((x - x.mean()) ** 2).sum().item() for x in scores)
    freedom = sum(len(x) - 1 for x in scores)
    return math.sqrt(squares / freedom) if freedom else math.nan


class TextReward:
    """A `heads.RewardModel` with its tokenizer: text in, rewards out, normalised once, here."""

    def __init__(
        self, model: RewardModel, tokenizer, transform="identity", norm_stats=None, max_length=None
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.transform = transform
        # longer texts than it was trained on are new to it
        self.max_length = max_length or model.trunk.config.context
        self.max_tokens = 8192                   # columns per micro-batch
        self.num_truncated = 0                   # prompts that had to lose their beginning so far
        self.norm_stats = norm_stats or {}       # statistic -> (mean, deviation) over training
        self.dtype = "float32"
        self.select("mean")

    def select(self, statistic: str):
        """Chooses the statistic that becomes the reward; each has a normalisation of its own."""
        self.statistic = parse_statistic(statistic, self.model.score.out_features)
        self.mean, self.std = self.norm_stats.get(self.statistic, (0.0, 1.0))

    def to(self, device: torch.device, dtype: str, compile: bool = False) -> "TextReward":
        """Onto the device, frozen, for forwards in this number format."""
        precision.freeze(self.model, device, dtype)
        kernels.choose_kernels(self.model.trunk, device, dtype, compile)
        self.dtype = dtype
        return self

    def describe(self) -> str:
        """Words for a run's header."""
        model = self.model
        floor = " (the floor)" if self.std == STD_FLOOR else ""
        normalised = f"less {self.mean:.4f}, over {self.std:.4f}{floor}"
        if not self.norm_stats:
            normalised = "raw: it has no normalisation, as its run did not finish"
        statistic = f"{self.statistic} of {model.score.out_features} outputs"
        return f"{model.trunk.family}, {statistic}, transform {self.transform}, {normalised}"

    def forward_flops(self, rows: list[Row]) -> int:
        """Operations that scoring these rows takes."""
        return speed.forward_flops(self.model.trunk, rows, head=False)

    @torch.no_grad()
    def outputs(self, rows: list[Row]) -> Tensor:
        """Raw outputs for rows that all have K responses.  -> (B,K,N)"""
        device = next(self.model.parameters()).device
        outputs = [None] * len(rows)
        plan = micro_batches([row.num_tokens for row in rows], self.max_tokens)
        for indices, batch in zip(plan, prefetch(rows, plan, device)):
            with precision.autocast(self.model, self.dtype):
                raw = self.model(batch)
            for i, output in zip(indices, raw):
                outputs[i] = output
        return torch.stack(outputs)

    def raw(self, outputs: Tensor) -> Tensor:
        """The transformed statistic before normalisation.  (...,N) -> (...)"""
        return REWARD_TRANSFORMS[self.transform](reduce_quantiles(outputs, self.statistic))

    def fit_normalisation(self, outputs: list[Tensor], within: bool = True) -> tuple[float, bool]:
        """Mean and deviation of the training mix, for every statistic.  outputs: (K,N) per prompt

        The mean is that of all responses. The deviation is `deviation_within` prompts, because the
        ranking loss leaves a prompt's level free, but at least STD_FLOOR. within=False takes paper
        A's own, over all responses; so does a mix in which no prompt has two.

        -> (deviation of the mean before the floor, whether it is within prompts)
        """
        within = within and any(len(output) > 1 for output in outputs)
        deviations = {}
        for statistic in all_statistics(outputs[0].shape[-1]):
            self.select(statistic)
            raw = [self.raw(output).double() for output in outputs]
            mix = torch.cat(raw)
            deviation = deviation_within(raw) if within else mix.std(unbiased=False).item()
            deviations[statistic] = deviation
            self.norm_stats[statistic] = (mix.mean().item(), max(deviation, STD_FLOOR))
        self.select("mean")
        return deviations["mean"], within

    def score_texts(
        self,
        prompts: list[str],
        responses: list[list[str]],
        ended: list[list[bool]],
        normalised: bool = True,
    ) -> Tensor:
        """Rewards of B x K texts.  ended: was EOS appended?  ->  (B,K) float32

        A prompt too long for this model's context loses its beginning (counted in num_truncated), a
        response never its end.
        """
        groups = []
        for prompt, texts, ends in zip(prompts, responses, ended):
            answers = [Response(text, ended=end) for text, end in zip(texts, ends)]
            groups.append(Group(prompt, answers, truncatable=True))
        rows, truncated = encode_all(groups, self.tokenizer, self.max_length)
        if truncated:
            # each response by itself: how much its prompt loses depends on it alone
            groups = [Group(g.prompt, [r], truncatable=True) for g in groups for r in g.responses]
            rows, truncated = encode_all(groups, self.tokenizer, self.max_length)
            if len(rows) < len(groups):
                raise InputError(
                    f"a response alone fills the reward model's {self.max_length} positions: "
                    "allow fewer new tokens"
                )
        self.num_truncated += sum(truncated.values())
        raw = self.raw(self.outputs(rows)).float().cpu().view(len(prompts), -1)
        return self.normalise(raw) if normalised else raw

    def normalise(self, raw: Tensor) -> Tensor:
        """(raw - mean) / deviation, which the selected statistic had on the training mix."""
        return (raw - self.mean) / self.std


class FunctionReward:
    """`path.py:function` with (prompts, responses) -> scores, both flat lists of str of one length.
    Runs the user's code.
    """

    def __init__(self, spec: str):
        path, _, name = spec.rpartition(":")
        if not Path(path).is_file():
            raise InputError(f"{spec}: no file {path}")
        self.function = getattr(import_file(path), name, None)
        self.spec = spec
        if not callable(self.function):
            raise InputError(f"{spec}: {path} has no function {name!r}")

    def to(self, device, dtype, compile=False):
        return self

    def describe(self):
        return f"function {self.spec}, taken as it is"

    def forward_flops(self, rows):
        return 0

    def score_texts(self, prompts, responses, ended, normalised=True):
        """As TextReward.score_texts; raw and normalised are the same."""
        k = len(responses[0])
        flat_prompts = [prompt for prompt in prompts for _ in range(k)]
        flat = [text for texts in responses for text in texts]
        try:
            scores = [float(score) for score in self.function(flat_prompts, flat)]
        except (Exception, SystemExit) as error:
            problem = f"{type(error).__name__}: {str(error)[:200]}"
            raise InputError(f"{self.spec} raised {problem}") from None
        if len(scores) != len(flat):
            raise InputError(f"{self.spec} returned {len(scores)} scores for {len(flat)} responses")
        for score, text in zip(scores, flat):
            if not math.isfinite(score):
                raise InputError(f"{self.spec} returned {score} for the response {text[:60]!r}")
        return torch.tensor(scores).view(len(prompts), k)

    def normalise(self, raw):
        """A function's scores are taken as they are."""
        return raw


def is_function(spec: str) -> bool:
    return bool(re.search(r"\.py:\w+$", spec))
