"""What is measured: policies before a judge; a reward model against places, labels and opinions.

    python -m nanorlhf.study.evaluate --a ranking.jsonl --b classification.jsonl \\
        --judge nanorlhf/study/world.py:gold
    python -m nanorlhf.study.evaluate --reward runs/rm --data ranked.jsonl

The two files are what `python -m nanorlhf.sample --split held_out --out FILE` writes. Apart from
the command line these are pure functions: numbers in, plain dicts out.

Shapes: n responses, N quantiles of level tau (N,), M opinions per response (M may differ between
responses). "Groups" are lists with one list per prompt: scores[g][i] belongs to response i of
group g, places[g][i] is its place, 0 the best. Outputs of a reward model are raw: before map and
normalisation. What has no value (an accuracy of no pairs) is NaN.
"""
import math
from collections import Counter
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import torch

from ..batching import encode_all, partition
from ..io import data, hub
from ..io.read import InputError, read_json
from ..losses import quantile_levels
from ..metrics import auc
from ..run import dist
from ..run.cli import check_bounds, run_script
from .judge import Config as JudgeConfig
from .judge import load_judge

NAN = float("nan")
COVERAGE_MARGIN = 0.05    # how far from its level a quantile may cover and still be called right
KDE_POINTS = 1024         # points of the grid for kernel densities
KDE_FLOOR = 1e-6          # least density, per pooled deviation
RAW_BINS = 50             # the histogram that is often seen, kept to show what it does ...
RAW_FLOOR = 1e-10         # ... with its floor
# Flags of train_rm.py that say what the outputs mean.
RELEVANT = ("loss", "labels", "quantile_target", "kappa", "rank_coef", "quantile_coef")


# ---------------------------------------------------------------------------------- win rate

def wilson(k, n, z=1.96):
    """Interval of a share from k successes out of n.  -> (low, high)   [Wilson 1927]

    It holds every p with |k/n - p| <= z sqrt(p (1-p) / n).
    """
    if n == 0:
        return 0.0, 1.0
    share = k / n
    unit = z * z / n
    middle = share + unit / 2
    half = math.sqrt(unit * (share * (1 - share) + unit / 4))
    return max(0.0, (middle - half) / (1 + unit)), min(1.0, (middle + half) / (1 + unit))


def sign_test(wins, losses):
    """Exact two-sided p of a fair coin, ties left out before.  -> float

    2 P(X <= min(wins, losses)),  X ~ Binomial(wins + losses, 1/2)
    """
    n = wins + losses
    log_terms = (
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2)
        for i in range(min(wins, losses) + 1)
    )
    return min(1.0, 2 * math.fsum(map(math.exp, log_terms)))


def win_rate(judge, prompts, a, b):
    """How often a's response beats b's. The judge sees both orders of each pair.

    judge.compare(prompt, x, y) -> 1 (x, which is shown first, is better), -1, 0 or None (skipped)

    A pair is a win or a loss where both orders agree on it, else a tie. disagreed: the share of
    pairs where each order names another winner, so that the place has won, not the text.

    -> three shares, each with its 95 % Wilson interval, and p of the sign test on decided pairs:
    share    (wins + ties / 2) / n; its interval is a little wide (a tie varies less than a coin)
    decided  wins / (wins + losses)
    paper    wins / n, as paper A's figure 2 has it
    """
    wins = 0
    ties = 0
    losses = 0
    skipped = 0
    disagreed = 0
    for prompt, x, y in zip(prompts, a, b, strict=True):
        first = judge.compare(prompt, x, y)
        second = judge.compare(prompt, y, x)
        if first is None or second is None:
            skipped += 1
            continue
        disagreed += first * second > 0
        outcome = first if first == -second else 0
        wins += outcome > 0
        ties += outcome == 0
        losses += outcome < 0
    n = wins + ties + losses
    decided = wins + losses
    result = {
        "n": n,
        "wins": wins,
        "ties": ties,
        "losses": losses,
        "skipped": skipped,
        "disagreed": disagreed / n if n else NAN,
    }
    for name, k, total in (
        ("share", wins + ties / 2, n),
        ("decided", wins, decided),
        ("paper", wins, n),
    ):
        result[name] = k / total if total else NAN
        result[f"{name}_low"], result[f"{name}_high"] = wilson(k, total)
    return {**result, "p": sign_test(wins, losses)}


def distinct(texts):
    """How much a policy repeats itself: share of different texts, mean length in words."""
    n = len(texts)
    words = sum(len(text.split()) for text in texts)
    return {"n": n, "distinct": len(set(texts)) / n, "words": words / n}


# --------------------------------------------------------------------- scores against places

def ordered_pairs(places):
    """Every pair of unequal place within a group, once.  -> [(group, better, worse)]"""
    pairs = []
    for g, place in enumerate(places):
        for i, j in permutations(range(len(place)), 2):
            if place[i] < place[j]:
                pairs.append((g, i, j))
    return pairs


def margins(scores, places):
    """s_better - s_worse of each ordered pair.  groups of (K) or (K,N) -> (pairs,) or (pairs,N)"""
    pairs = ordered_pairs(places)
    return np.array([np.subtract(scores[g][i], scores[g][j]) for g, i, j in pairs], dtype=float)


def _share_right(margin):
    """Share of margins above 0, ties half."""
    if not margin.size:
        return NAN
    return ((margin > 0).mean() + (margin == 0).mean() / 2).item()


def pair_accuracy(scores, places):
    """Share of pairs of unequal place that the scores order the same way; ties count half.

    Plain groups in, and NaN for no pairs: `metrics.pair_accuracy` wants rows of tokens, because it
    compares lengths too, and calls no pairs 0.
    """
    margin = margins(scores, places)
    return {"accuracy": _share_right(margin), "n": len(margin)}


def label_auc(scores, labels):
    """`metrics.auc` across groups; a response with label None is left out.

    groups, groups of 1, 0 or None -> float
    """
    labelled = []
    for group, group_labels in zip(scores, labels, strict=True):
        for score, label in zip(group, group_labels, strict=True):
            if label is not None:
                labelled.append((float(score), label == 1))
    return auc(
        torch.tensor([score for score, _ in labelled], dtype=torch.float64),
        torch.tensor([good for _, good in labelled], dtype=torch.bool),
    )


def calibration(scores, places, bins=10):
    """Is P(i beats j) = sigmoid(s_i - s_j) true?  -> dict

    bins: equal slices of the confidence c = sigmoid(|s_i - s_j|) in [1/2, 1] with the share of
    pairs in which the predicted winner wins. (i, j) and (j, i) say the same, so a pair counts
    once, read from its predicted winner; both readings would mirror the table about 1/2 and make
    a model look calibrated there for nothing. Equal scores predict 1/2 and are half right.

    ece       sum over bins of (share of pairs) |mean c - share right|
    brier     mean (1 - P(better beats worse))^2
    log_loss  mean -log P(better beats worse), nats

    brier and log_loss do not depend on the reading, and log_loss is the ranking loss. The
    difference of two logits of a classification model is the log-odds too.
    """
    margin = margins(scores, places)
    if not len(margin):
        return {"bins": [], "ece": NAN, "brier": NAN, "log_loss": NAN, "n": 0}
    loss = np.logaddexp(0, -margin)    # -log sigmoid(margin)
    confidence = np.exp(-np.logaddexp(0, -np.abs(margin)))
    right = (margin > 0) + (margin == 0) / 2
    bin_of_pair = np.minimum((2 * (confidence - 0.5) * bins).astype(int), bins - 1)
    table = []
    for b in np.unique(bin_of_pair).tolist():
        inside = bin_of_pair == b
        table.append({
            "low": 0.5 + b / (2 * bins),
            "high": 0.5 + (b + 1) / (2 * bins),
            "n": int(inside.sum()),
            "predicted": confidence[inside].mean().item(),
            "observed": right[inside].mean().item(),
        })
    misses = sum(row["n"] * abs(row["predicted"] - row["observed"]) for row in table)
    return {
        "bins": table,
        "ece": misses / len(margin),
        "brier": ((1 - np.exp(-loss)) ** 2).mean().item(),
        "log_loss": loss.mean().item(),
        "n": len(margin),
    }


# ---------------------------------------------------------- how far apart chosen and rejected are
# KL(chosen || rejected) in nats, from two samples p and q of rewards. Level and scale of a reward
# are not identified, so every estimate here is the same for a s + b. None says which side is
# better: read it beside accuracy and AUC.

def _samples(p, q):
    """Both as float64 on the scale of the pooled sample (mean 0, deviation 1), and that deviation.

    InputError: a side has less than two different values
    """
    p = np.asarray(p, dtype=float)
    q = np.asarray(q, dtype=float)
    for name, x in (("chosen", p), ("rejected", q)):
        if len(x) < 2 or x.min() == x.max():
            raise InputError(f"the {len(x)} {name} rewards do not differ from each other: "
                             "there is no distribution to compare")
    pooled = np.concatenate([p, q])
    mean = pooled.mean()
    deviation = pooled.std()
    return (p - mean) / deviation, (q - mean) / deviation, deviation.item()


def kl_gaussian(p, q):
    """The closed form for two normals with the samples' moments.

    log(sd_q / sd_p) + (var_p + (mean_p - mean_q)^2) / (2 var_q) - 1/2
    """
    p, q, _ = _samples(p, q)
    square = p.var() + (p.mean() - q.mean()) ** 2
    return (np.log(q.std() / p.std()) + square / (2 * q.var()) - 0.5).item()


def _scott(x):
    """Bandwidth sd n^(-1/5).   [Scott 1992]"""
    return x.std(ddof=1) * len(x) ** -0.2


def _on_grid(p, q):
    """Gaussian kernel densities of both on one grid.  -> two (KDE_POINTS,) that sum to 1

    The grid ends four bandwidths past the samples. No density is under KDE_FLOOR per pooled
    deviation.
    """
    p, q, _ = _samples(p, q)
    reach = 4 * max(_scott(p), _scott(q))
    low = min(p.min(), q.min()) - reach
    high = max(p.max(), q.max()) + reach
    grid = np.linspace(low, high, KDE_POINTS)
    densities = []
    for x in (p, q):
        bandwidth = _scott(x)
        kernels = [np.exp(-((x - point) / bandwidth) ** 2 / 2).mean() for point in grid]
        density = np.array(kernels) / (bandwidth * math.sqrt(2 * math.pi))
        density = np.maximum(density, KDE_FLOOR)
        densities.append(density / density.sum())
    return densities


def _kl(p, q):
    return (p * np.log(p / q)).sum().item()


def kl_kde(p, q):
    """KL of the two kernel densities.

    Kernels widen a normal's variance by 1 + n^(-2/5), so it reads low: by a tenth at n = 250.
    """
    return _kl(*_on_grid(p, q))


def js(p, q):
    """Jensen-Shannon divergence of the two kernel densities; symmetric, 0 to log 2 nats.

    KL of each to their average, halved and added.
    """
    p, q = _on_grid(p, q)
    return (_kl(p, (p + q) / 2) + _kl(q, (p + q) / 2)) / 2


def kl_histogram(p, q, bins=10, floor=None):
    """KL of shares in common equal bins from least to largest.

    floor is added to each bin's share; by default half a count, 1 / (2 n). An empty bin of q costs
    p's share there times log(1 / floor): with 50 bins and 1e-10 the tails alone make 1.1 nats out
    of 0.15 with 250 samples per side, 4.5 with 70. So that number measures the sample size.
    """
    p, q, _ = _samples(p, q)
    edges = np.histogram_bin_edges(np.concatenate([p, q]), bins)
    shares = []
    for x in (p, q):
        counts, _ = np.histogram(x, edges)
        share = counts / len(x) + (0.5 / len(x) if floor is None else floor)
        shares.append(share / share.sum())
    return _kl(*shares)


def kl_table(chosen, rejected, bins=10):
    """All estimates, with the settings that they were computed with; bandwidths in reward units."""
    p, q, deviation = _samples(chosen, rejected)
    settings = {
        "bins": bins,
        "floor_chosen": 0.5 / len(p),
        "floor_rejected": 0.5 / len(q),
        "raw_bins": RAW_BINS,
        "raw_floor": RAW_FLOOR,
        "kde_points": KDE_POINTS,
        "kde_floor": KDE_FLOOR / deviation,
        "bandwidth_chosen": (_scott(p) * deviation).item(),
        "bandwidth_rejected": (_scott(q) * deviation).item(),
    }
    return {
        "n_chosen": len(p),
        "n_rejected": len(q),
        "gaussian": kl_gaussian(p, q),
        "kde": kl_kde(p, q),
        "histogram": kl_histogram(p, q, bins),
        "histogram_raw": kl_histogram(p, q, RAW_BINS, RAW_FLOOR),
        "js": js(p, q),
        "settings": settings,
    }


# ---------------------------------------------------------------------- what the quantiles say

def _flat(opinions):
    """n lists of opinions -> (z (S,), the response of each (S,), weight (S,))

    Responses weigh the same, whatever their number of opinions.
    """
    count = np.array([len(z) for z in opinions])
    assert count.min() > 0, "a response without an opinion"
    z = np.concatenate([np.asarray(z, dtype=float) for z in opinions])
    response = np.repeat(np.arange(len(count)), count)
    return z, response, np.repeat(1 / (len(count) * count), count)


def constant_quantiles(opinions, levels):
    """The best that can be said without reading: the quantiles of all opinions together.  -> (N,)

    They minimise the opinions' mean pinball loss.
    """
    z, _, weight = _flat(opinions)
    order = np.argsort(z)
    cumulative = np.cumsum(weight[order])
    index = np.searchsorted(cumulative, np.asarray(levels) - 1e-9)
    return z[order][np.minimum(index, len(z) - 1)]


def pinball(quantiles, opinions, levels):
    """mean over responses, their opinions z and the levels tau of |tau - 1{z < q}| |z - q|

    quantiles (n,N)  ->  float, in the opinions' unit
    """
    z, response, weight = _flat(opinions)
    error = z[:, None] - np.asarray(quantiles, dtype=float)[response]    # (S,N)
    slope = np.abs(np.asarray(levels) - (error < 0))
    return (weight @ (slope * np.abs(error))).mean().item()


def crossing(quantiles):
    """Share of neighbouring outputs out of order, before they are sorted.  (n,N) -> float"""
    return (np.diff(quantiles, axis=-1) < 0).mean().item()


def coverage(quantiles, opinions, levels, training=None):
    """Does quantile tau leave a share tau of the opinions below it?  quantiles (n,N) -> dict

    Each response's outputs are sorted first: their order is free.

    below    mean over responses of P(z < q)
    at_most  mean over responses of P(z <= q);  a quantile must have below <= tau <= at_most
    gap      by how much it misses
    ok       it misses by COVERAGE_MARGIN at most

    Claimed for kappa 0 and rank_coef 0 alone: kappa 1 learns expectiles, and the ranking loss
    moves the mean.
    training: opinions of training responses. Their constant quantiles cover just as well, so what
    the model adds is a smaller pinball loss.
    """
    levels = np.asarray(levels)
    ordered = np.sort(np.asarray(quantiles, dtype=float), axis=-1)
    z, response, weight = _flat(opinions)
    below = weight @ (z[:, None] < ordered[response])
    at_most = weight @ (z[:, None] <= ordered[response])
    gap = np.maximum(0, np.maximum(below - levels, levels - at_most))
    table = []
    for i, level in enumerate(levels):
        table.append({
            "level": level.item(),
            "below": below[i].item(),
            "at_most": at_most[i].item(),
            "gap": gap[i].item(),
            "ok": bool(gap[i] <= COVERAGE_MARGIN + 1e-9),
        })
    result = {
        "quantiles": table,
        "ok": all(row["ok"] for row in table),
        "gap": gap.mean().item(),
        "crossing": crossing(quantiles),
        "pinball": pinball(ordered, opinions, levels),
    }
    if training is not None:
        constant = np.tile(constant_quantiles(training, levels), (len(ordered), 1))
        result["constant"] = coverage(constant, opinions, levels)
    return result


def within_deviation(quantiles):
    """Mean over responses of the deviation between a response's own N outputs.  (n,N) -> float

    The target self_mean drives it to 0.
    """
    return np.asarray(quantiles, dtype=float).std(axis=-1).mean().item()


def label_optimum(p, tau, kappa=1.0):
    """Where the quantile Huber loss has its minimum when the target is +1 or -1.

    p: probability of +1
    p, tau: any shapes that broadcast  ->  q

    On [-1, 1] the derivative is  -a min(1 - q, kappa) + b min(1 + q, kappa)
    with  a = p tau,  b = (1-p)(1-tau),  r = a / b.
    kappa = 1:  r >= 1 makes q >= 0, the error to -1 is linear:  a (1 - q) = b,  q = 1 - 1/r
                r < 1, mirrored:  a = b (1 + q),  q = r - 1
    Any kappa, r >= 1:  1 - q = min(1 + q, kappa) / r,  so q = 1 - min(2 / (r + 1), kappa / r)
    Where kappa < 1 and r = 1, or kappa = 0, a stretch of q is as good.
    """
    a = np.multiply(p, tau)
    b = np.multiply(np.subtract(1, p), np.subtract(1, tau))
    high = np.maximum(a, b)
    low = np.minimum(a, b)
    distance = np.minimum(2 * low / (low + high), kappa * low / high)    # from the likelier end
    return np.where(a >= b, 1 - distance, distance - 1)


def label_against_closed_form(quantiles, won, levels, bins=10, kappa=1.0):
    """A model trained on targets +1 and -1 beside the minimum of its loss.  -> dict

    Responses in equal-count bins of their mean output; in each bin the share p that won, the mean
    sorted outputs, and beside them `label_optimum(p, tau)`. Exact for rank_coef 0 and p alike
    within a bin.

    quantiles (n,N);  won (n,) in [0,1]: 1 chosen, 0 rejected, or the share of comparisons won
    """
    ordered = np.sort(np.asarray(quantiles, dtype=float), axis=-1)
    won = np.asarray(won, dtype=float)
    by_mean = np.argsort(ordered.mean(-1), kind="stable")
    table = []
    deviations = []
    for part in np.array_split(by_mean, min(bins, len(ordered))):
        p = won[part].mean().item()
        outputs = ordered[part].mean(0)
        closed = label_optimum(p, np.asarray(levels), kappa)
        deviations.append(np.abs(outputs - closed))
        table.append({
            "n": len(part),
            "won": p,
            "outputs": outputs.tolist(),
            "closed": closed.tolist(),
        })
    return {
        "bins": table,
        "mean_deviation": np.mean(deviations).item(),
        "max_deviation": np.max(deviations).item(),
    }


def per_quantile(outputs, places, labels=None):
    """Which quantile tells chosen from rejected best?  -> dict

    Pair accuracy within groups and AUC across them, of each of N sorted outputs and of their mean.

    outputs: groups of (K,N)
    labels: groups of 1, 0 or None, by default good for the better half of places, else bad
    """
    if labels is None:
        labels = []
        for group in places:
            responses = [data.Response("", place=place) for place in group]
            labels.append(data.derive_labels(responses, "place").label)

    def accuracy_and_auc(scores):
        accuracy = pair_accuracy(scores, places)["accuracy"]
        return {"accuracy": accuracy, "auc": label_auc(scores, labels)}

    ordered = [np.sort(np.asarray(group, dtype=float), axis=-1) for group in outputs]
    quantiles = []
    for i in range(ordered[0].shape[-1]):
        quantiles.append(accuracy_and_auc([group[:, i] for group in ordered]))
    return {
        "quantiles": quantiles,
        "mean": accuracy_and_auc([group.mean(-1) for group in ordered]),
    }


def _centred_ranks(values):
    """Ranks less their mean; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks - ranks.mean()


def spearman(x, y):
    """Correlation of ranks; NaN where one side does not vary."""
    a = _centred_ranks(x)
    b = _centred_ranks(y)
    scale = math.sqrt((a @ a) * (b @ b))
    return (a @ b).item() / scale if scale else NAN


def spread_analysis(outputs, opinions, places, bins=10):
    """Does the spread of the outputs (largest - least: q9 - q0 sorted) mean anything?  -> dict

    outputs: groups of (K,N);  opinions: groups of K lists, or None

    spearman  of spread with the deviation of the response's opinions
    deciles   pair accuracy by the pair's mean spread, in equal-count bins from narrow to wide
    """
    spread = [np.ptp(np.asarray(group, dtype=float), axis=-1) for group in outputs]
    correlation = None
    if opinions:
        # Three opinions of .1 deviate by 1e-17: a tie, not a rank.
        disagreement = [round(float(np.std(z)), 12) for group in opinions for z in group]
        correlation = spearman(np.concatenate(spread), disagreement)
    margin = margins([np.mean(group, axis=-1) for group in outputs], places)
    pairs = ordered_pairs(places)
    pair_spread = np.array([(spread[g][i] + spread[g][j]) / 2 for g, i, j in pairs])
    deciles = []
    narrow_to_wide = np.argsort(pair_spread, kind="stable")
    for part in np.array_split(narrow_to_wide, max(1, min(bins, len(pairs)))):
        if len(part):
            deciles.append({
                "spread": pair_spread[part].mean().item(),
                "accuracy": _share_right(margin[part]),
                "n": len(part),
            })
    return {"spearman": correlation, "deciles": deciles}


# ----------------------------------------------------------------------- from files to numbers

@dataclass(frozen=True)
class Config:
    a: str = ""           # groups JSONL with one policy's responses ...
    b: str = ""           # ... and with the other's; prompts that both have are compared
    k: int = 1            # samples of a prompt to compare: first with first, second with second
    judge: str = ""  # reference, replay, openai or path.py:function: (prompts, responses) -> scores
    reference: str = ""   # reference, replay: as nanorlhf.study.judge has it
    url: str = ""         # openai: base of the endpoint
    model: str = ""       # openai: a dated name
    cache: str = ""       # openai: JSONL of answers, kept and reused
    reward: str = ""      # or: a reward model (run or model folder) to measure ...
    data: str = ""    # ... on the held-out part of this data, which train_rm.py would hold out too
    device: str = "auto"  # cpu, cuda, cuda:1


def _read_samples(path):
    """-> ({prompt: its sampled texts}, what was dropped in reading)

    An expert's response (label 1), where there are others, is no sample.
    """
    groups, dropped = data.read_groups(path)
    samples = {}
    for group in groups:
        texts = [r.text for r in group.responses if r.label != 1]
        texts = texts or [r.text for r in group.responses]
        samples.setdefault(group.prompt, []).extend(texts)
    return samples, Counter(dropped)


def matched(a, b, k=1):
    """The first k samples of each prompt in two files of groups, in pairs.

    -> (prompts, texts of a, texts of b, how many prompts only one file has, Counter of dropped)
    InputError: no prompt has a response in both
    """
    samples_a, dropped_a = _read_samples(a)
    samples_b, dropped_b = _read_samples(b)
    prompts = []
    texts_a = []
    texts_b = []
    for prompt, samples in samples_a.items():
        for x, y in zip(samples[:k], samples_b.get(prompt, [])):
            prompts.append(prompt)
            texts_a.append(x)
            texts_b.append(y)
    if not prompts:
        raise InputError(f"--a {a} --b {b}: no prompt has a response in both")
    alone = len(samples_a.keys() ^ samples_b.keys())
    return prompts, texts_a, texts_b, alone, dropped_a + dropped_b


def raw_outputs(reward, rows):
    """Raw outputs of a `reward.RewardModel` for rows of any K, shared among the processes.

    -> one (K,N) array per row
    """
    num_tokens = [row.num_tokens for row in rows]
    local_rows = partition(num_tokens, dist.world_size())[dist.rank()]
    local_outputs = []
    for k in {len(rows[i].responses) for i in local_rows}:
        same_k = [i for i in local_rows if len(rows[i].responses) == k]
        outputs = reward.outputs([rows[i] for i in same_k]).double().tolist()
        local_outputs += zip(same_k, outputs)
    outputs_of_row = {}
    for gathered in dist.all_gather_object(local_outputs):
        outputs_of_row.update(gathered)
    return [np.array(outputs_of_row[i]) for i in range(len(rows))]


def measure(outputs, rows, kappa=None, opinions=None, training=None):
    """Everything above about one reward model.  -> dict

    outputs: groups of (K,N), raw
    rows: place, label, targets of each group (batching.Row, data.Judgement)
    kappa: of a model trained on target label, adds the closed form
    opinions: groups of K lists, or None
    training: lists of opinions of training responses, for a model trained on target scores, adds
    the coverage

    N > 1 adds "quantiles".
    """
    means = [group.mean(-1) for group in outputs]
    places = [row.place for row in rows]
    labels = [row.label for row in rows]
    flat_means = np.concatenate(means)
    flat_labels = [label for group in labels for label in group]
    chosen = [s for s, label in zip(flat_means, flat_labels) if label == 1]
    rejected = [s for s, label in zip(flat_means, flat_labels) if label == 0]
    result = {
        **pair_accuracy(means, places),
        "auc": label_auc(means, labels),
        "calibration": calibration(means, places),
        "kl": kl_table(chosen, rejected),
    }
    num_quantiles = outputs[0].shape[-1]
    if num_quantiles == 1:
        return result
    flat = np.concatenate(outputs)
    levels = quantile_levels(num_quantiles).numpy()
    quantiles = {
        "crossing": crossing(flat),
        "within_deviation": within_deviation(flat),
        "per_quantile": per_quantile(outputs, places, labels),
        "spread": spread_analysis(outputs, opinions, places),
    }
    if kappa is not None:
        targets = [target for row in rows for target in row.targets]
        compared = [i for i, target in enumerate(targets) if target]
        won = [np.mean(targets[i]) / 2 + 0.5 for i in compared]
        quantiles["label"] = label_against_closed_form(flat[compared], won, levels, kappa=kappa)
    if opinions and training:
        flat_opinions = [z for group in opinions for z in group]
        quantiles["coverage"] = coverage(flat, flat_opinions, levels, training)
    return {**result, "quantiles": quantiles}


def _text(value):
    """A number as it is printed; the numbers of a list beside each other."""
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show(result, indent="  "):
    """Prints numbers by name; a dict is indented under its name, a list of dicts is a table."""
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            show(value, indent + "  ")
        elif isinstance(value, list) and value:
            lines = [list(value[0])]
            lines += [[_text(x) for x in row.values()] for row in value]
            widths = [max(map(len, column)) for column in zip(*lines)]
            print(f"{indent}{name}")
            for line in lines:
                cells = (cell.rjust(width) for cell, width in zip(line, widths))
                print(f"{indent}  " + "  ".join(cells))
        else:
            print(f"{indent}{name:<20}{_text(value)}")


def compare_files(config):
    """Win rate of the responses in --a over those in --b."""
    judge = load_judge(JudgeConfig(
        judge=config.judge,
        data=config.a,
        reference=config.reference,
        url=config.url,
        model=config.model,
        cache=config.cache,
    ))
    prompts, a, b, alone, dropped = matched(config.a, config.b, config.k)
    result = win_rate(judge, prompts, a, b)
    if not result["n"]:
        raise InputError(f"--judge {config.judge}: skipped all of {len(prompts)} pairs")
    print("{} against {}: {n} pairs judged in both orders, {skipped} skipped; "
          "{} prompts are in one file only; dropped: {}"
          .format(config.a, config.b, alone, dict(dropped) or "nothing", **result))
    print("  wins {wins}  ties {ties}  losses {losses}   "
          "the two orders name different winners in {disagreed:.1%}".format(**result))
    for name, formula in (
        ("share", "wins + ties / 2"),
        ("decided", "wins / decided"),
        ("paper", "wins / all (paper A)"),
    ):
        low = result[f"{name}_low"]
        high = result[f"{name}_high"]
        print(f"  {formula:<22}{result[name]:7.1%}   95 % [{low:.1%}, {high:.1%}]")
    print(f"  sign test p = {result['p']:.3g}")
    for name, texts in (("a", a), ("b", b)):
        print("  {}: {n} texts, {distinct:.1%} distinct, {words:.1f} words"
              .format(name, **distinct(texts)))


def _training_flags(folder):
    """Flags of train_rm.py that a run folder records; {} for a model folder, which has none."""
    path = Path(folder) / "config.json"
    flags = read_json(path).get("flags", {}) if path.exists() else {}
    kappa = flags.get("kappa", 1.0) if isinstance(flags, dict) else None
    good = type(kappa) in (int, float) and 0 <= kappa < math.inf
    if not good or flags.get("labels", "auto") not in ("auto", "place", "label", "scores"):
        raise InputError(f"{path}: flags {flags!r:.80} are not those of train_rm.py")
    return flags


def measure_reward(config):
    """A reward model on the held-out part of --data, beside its places, labels and opinions."""
    device = dist.setup(config.device, 0)
    reward = hub.load_reward_model(config.reward)
    flags = _training_flags(config.reward)
    source = data.load(config.data)
    reward.model.to(device)
    encoded, dropped = encode_all(
        source.held_out,
        reward.tokenizer,
        reward.max_length,
        labels=flags.get("labels", "auto"),
    )
    rows = [row for row in encoded if len(set(row.place)) > 1]
    dropped = dict(source.dropped + dropped) or "nothing"
    if not rows:
        raise InputError(f"--data {config.data}: none of {len(source.held_out)} held-out groups "
                         f"has a pair to tell apart; dropped: {dropped}")
    opinions = [[r.scores for r in source.held_out[row.index].responses] for row in rows]
    complete = all(z for group in opinions for z in group)
    training = [r.scores for group in source.train for r in group.responses if r.scores]
    target = flags.get("quantile_target", "label")
    try:
        result = measure(
            raw_outputs(reward, rows),
            rows,
            kappa=flags.get("kappa", 1.0) if target == "label" else None,
            opinions=opinions if complete else None,
            training=training if target == "scores" else None,
        )
    except InputError as error:
        problem = f"--reward {config.reward} --data {config.data}: {error}"
        raise InputError(problem) from None
    print(f"{config.reward} on {config.data}: {len(rows)} held-out groups; dropped: {dropped}")
    settings = "flags that a model folder does not tell (the defaults, then)"
    if flags:
        settings = " ".join(f"--{name} {flags.get(name)}" for name in RELEVANT)
    print(f"  trained with {settings}")
    show(result)


def main(config):
    check_bounds(config)
    modes = [("reward", "data"), ("a", "b", "judge")]
    named = [any(getattr(config, name) for name in mode) for mode in modes]
    if sum(named) != 1:
        raise InputError("give either --a, --b and --judge, or --reward and --data")
    missing = [name for name in modes[named.index(True)] if not getattr(config, name)]
    if missing:
        raise InputError(f"--{missing[0]} is missing")
    if config.reward:
        measure_reward(config)
    else:
        dist.setup("cpu", 0)
        # A judge that is asked over the network is asked once.
        dist.on_rank_zero(lambda: compare_files(config))


if __name__ == "__main__":
    run_script(main, Config)
