"""What is measured: two policies before a judge, a reward model against places, labels and opinions. Pure functions, numbers in, plain dicts out.

    python -m nanorlhf.study.evaluate --a ranking.jsonl --b classification.jsonl --judge nanorlhf/study/world.py:gold
    python -m nanorlhf.study.evaluate --reward runs/rm --data ranked.jsonl

The two files are what `python -m nanorlhf.sample --split held_out --out FILE` writes. Shapes: n responses, N quantiles of level tau (N,), M opinions
of one response (M may differ between responses). "Groups" are lists with one list a prompt: scores[g][i] of response i, places[g][i], 0 the best.
Outputs of a reward model are raw: before map and normalisation. What has no value (an accuracy of no pairs) is NaN.
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
from ..io.read import InputError
from ..losses import quantile_levels
from ..metrics import auc
from ..run import dist
from ..run.cli import check_bounds, run_script
from .judge import Config as JudgeConfig
from .judge import load_judge

NAN = float("nan")
COVERAGE_MARGIN = 0.05           # how far from its level a quantile may cover and still be called right
KDE_POINTS, KDE_FLOOR = 1024, 1e-6       # grid; least density, per pooled deviation
RELEVANT = ("loss", "labels", "quantile_target", "kappa", "rank_coef", "quantile_coef")   # flags of train_rm.py that say what outputs mean
RAW_BINS, RAW_FLOOR = 50, 1e-10          # the histogram that is often seen, kept to show what it does


# ------------------------------------------------------------------------------------------------------------ win rate

def wilson(k, n, z=1.96):
    """Interval of a share from k successes out of n: the p with |k/n - p| <= z sqrt(p (1-p) / n).  -> (low, high)   [Wilson 1927]"""
    if n == 0:
        return 0.0, 1.0
    share, unit = k / n, z * z / n
    middle, half = share + unit / 2, math.sqrt(unit * (share * (1 - share) + unit / 4))
    return max(0.0, (middle - half) / (1 + unit)), min(1.0, (middle + half) / (1 + unit))


def sign_test(wins, losses):
    """Exact two-sided p of a fair coin: 2 P(X <= min(wins, losses)), X ~ Binomial(wins + losses, 1/2); ties are left out before.  -> float"""
    n = wins + losses
    log_terms = (math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(min(wins, losses) + 1))
    return min(1.0, 2 * math.fsum(map(math.exp, log_terms)))


def win_rate(judge, prompts, a, b):
    """How often a's response beats b's. The judge sees both orders: compare(prompt, x, y) -> 1 (x, shown first, is better), -1, 0 or None (skipped).

    A win or a loss is what both orders say; else it is a tie. disagreed: the share of prompts where each order names another winner, so
    that the place, not the text, has won.  ->  three shares, each with its 95 % Wilson interval:
    share (wins + ties / 2) / n, where the interval is a little too wide (a tie varies less than a coin);  decided wins / (wins + losses);
    paper wins / n, as paper A's figure 2 has it;  p of the sign test on the decided ones
    """
    wins = ties = losses = skipped = disagreed = 0
    for prompt, x, y in zip(prompts, a, b, strict=True):
        first, second = judge.compare(prompt, x, y), judge.compare(prompt, y, x)
        if first is None or second is None:
            skipped += 1
            continue
        disagreed += first * second > 0
        won = first if first == -second else 0
        wins, ties, losses = wins + (won > 0), ties + (won == 0), losses + (won < 0)
    n, decided = wins + ties + losses, wins + losses
    found = {"n": n, "wins": wins, "ties": ties, "losses": losses, "skipped": skipped, "disagreed": disagreed / n if n else NAN}
    for name, k, of in (("share", wins + ties / 2, n), ("decided", wins, decided), ("paper", wins, n)):
        found[name], (found[f"{name}_low"], found[f"{name}_high"]) = k / of if of else NAN, wilson(k, of)
    return {**found, "p": sign_test(wins, losses)}


def distinct(texts):
    """How much a policy repeats itself: share of different texts, mean length in words."""
    return {"n": len(texts), "distinct": len(set(texts)) / len(texts), "words": sum(len(text.split()) for text in texts) / len(texts)}


# ------------------------------------------------------------------------------------------------- scores against places

def ordered_pairs(places):
    """Every pair of unequal place within a group, once.  -> [(group, better, worse)]"""
    return [(g, i, j) for g, place in enumerate(places) for i, j in permutations(range(len(place)), 2) if place[i] < place[j]]


def margins(scores, places):
    """s_better - s_worse of each ordered pair.  groups of (K) or (K,N) -> (pairs,) or (pairs,N)"""
    return np.array([np.subtract(scores[g][i], scores[g][j]) for g, i, j in ordered_pairs(places)], dtype=float)


def _share_right(margin):
    """Share of margins above 0, ties half."""
    return ((margin > 0).mean() + (margin == 0).mean() / 2).item() if margin.size else NAN


def pair_accuracy(scores, places):
    """Share of pairs of unequal place that the scores order the same way; equal scores count half."""
    margin = margins(scores, places)
    return {"accuracy": _share_right(margin), "n": len(margin)}


def label_auc(scores, labels):
    """`train_rm.auc` across groups; a response with label None is left out.  groups, groups of 1, 0 or None -> float"""
    found = [(float(s), y == 1) for group, marks in zip(scores, labels, strict=True) for s, y in zip(group, marks, strict=True) if y is not None]
    return auc(torch.tensor([s for s, _ in found], dtype=torch.float64), torch.tensor([y for _, y in found], dtype=torch.bool))


def calibration(scores, places, bins=10):
    """Is P(i beats j) = sigmoid(s_i - s_j) true? Equal slices of the confidence c = sigmoid(|s_i - s_j|) in [1/2, 1], in which the predicted winner wins.

    (i, j) and (j, i) say the same, so a pair counts once, read from its predicted winner; both readings would mirror the table about 1/2 and
    make a model look calibrated there for nothing. Equal scores predict 1/2 and are half right.
    ece = sum over bins of share |mean c - share right|;  brier = mean (1 - P(better beats worse))^2;  log_loss = mean -log P(better beats worse), nats:
    neither depends on the reading, and log_loss is the ranking loss. The difference of two logits of a classification model is the log-odds too.
    """
    margin = margins(scores, places)
    if not len(margin):
        return {"bins": [], "ece": NAN, "brier": NAN, "log_loss": NAN, "n": 0}
    loss = np.logaddexp(0, -margin)                                          # -log sigmoid(margin)
    confidence, right = np.exp(-np.logaddexp(0, -np.abs(margin))), (margin > 0) + (margin == 0) / 2
    which = np.minimum((2 * (confidence - 0.5) * bins).astype(int), bins - 1)
    table = []
    for b in np.unique(which):
        inside = which == b
        table.append({"low": 0.5 + b.item() / (2 * bins), "high": 0.5 + (b.item() + 1) / (2 * bins), "n": int(inside.sum()),
                      "predicted": confidence[inside].mean().item(), "observed": right[inside].mean().item()})
    ece = sum(row["n"] * abs(row["predicted"] - row["observed"]) for row in table) / len(margin)
    return {"bins": table, "ece": ece, "brier": ((1 - np.exp(-loss)) ** 2).mean().item(), "log_loss": loss.mean().item(), "n": len(margin)}


# ------------------------------------------------------------------------------------- how far apart chosen and rejected are
# KL(chosen || rejected) in nats, from two samples p and q of rewards. Level and scale of a reward are not identified, so every estimate here
# is the same for a s + b, and none says which side is better: read it beside accuracy and AUC.

def _samples(p, q):
    """Both as float64 on the scale of the pooled sample (mean 0, deviation 1), and that deviation."""
    p, q = np.asarray(p, dtype=float), np.asarray(q, dtype=float)
    for name, x in (("chosen", p), ("rejected", q)):
        if len(x) < 2 or x.min() == x.max():
            raise InputError(f"the {len(x)} {name} rewards do not differ from each other: there is no distribution to compare")
    pooled = np.concatenate([p, q])
    return (p - pooled.mean()) / pooled.std(), (q - pooled.mean()) / pooled.std(), pooled.std().item()


def kl_gaussian(p, q):
    """log(sd_q / sd_p) + (var_p + (mean_p - mean_q)^2) / (2 var_q) - 1/2: the closed form for two normals with the samples' moments."""
    p, q, _ = _samples(p, q)
    return (np.log(q.std() / p.std()) + (p.var() + (p.mean() - q.mean()) ** 2) / (2 * q.var()) - 0.5).item()


def _scott(x):
    """Bandwidth sd n^(-1/5).   [Scott 1992]"""
    return x.std(ddof=1) * len(x) ** -0.2


def _on_grid(p, q):
    """Gaussian kernel densities on one grid, four bandwidths past the ends, not under KDE_FLOOR per pooled deviation.  -> two (KDE_POINTS,) that sum to 1"""
    p, q, _ = _samples(p, q)
    reach, found = 4 * max(_scott(p), _scott(q)), []
    grid = np.linspace(min(p.min(), q.min()) - reach, max(p.max(), q.max()) + reach, KDE_POINTS)
    for x in (p, q):
        h = _scott(x)
        density = np.array([np.exp(-((x - point) / h) ** 2 / 2).mean() for point in grid]) / (h * math.sqrt(2 * math.pi))
        density = np.maximum(density, KDE_FLOOR)
        found.append(density / density.sum())
    return found


def _kl(p, q):
    return (p * np.log(p / q)).sum().item()


def kl_kde(p, q):
    """KL of the two kernel densities. Kernels widen a normal's variance by 1 + n^(-2/5), so it reads low: by a tenth at n = 250."""
    return _kl(*_on_grid(p, q))


def js(p, q):
    """Jensen-Shannon divergence of the two kernel densities: KL of each to their average, halved and added; symmetric, 0 to log 2 nats."""
    p, q = _on_grid(p, q)
    return (_kl(p, (p + q) / 2) + _kl(q, (p + q) / 2)) / 2


def kl_histogram(p, q, bins=10, floor=None):
    """KL of shares in common equal bins from least to largest. floor is added to each bin's share; by default half a count, 1 / (2 n).

    An empty bin of q costs p's share there times log(1 / floor): with 50 bins and 1e-10 the tails alone make 1.1 nats out of 0.15 with 250 samples
    a side, 4.5 with 70. So that number measures the sample size.
    """
    p, q, _ = _samples(p, q)
    edges = np.histogram_bin_edges(np.concatenate([p, q]), bins)
    shares = [np.histogram(x, edges)[0] / len(x) + (0.5 / len(x) if floor is None else floor) for x in (p, q)]
    return _kl(*(share / share.sum() for share in shares))


def kl_table(chosen, rejected, bins=10):
    """All of them, with what they were computed with; bandwidths in units of the reward."""
    p, q, scale = _samples(chosen, rejected)
    return {"n_chosen": len(p), "n_rejected": len(q), "gaussian": kl_gaussian(p, q), "kde": kl_kde(p, q), "histogram": kl_histogram(p, q, bins),
            "histogram_raw": kl_histogram(p, q, RAW_BINS, RAW_FLOOR), "js": js(p, q),
            "settings": {"bins": bins, "floor_chosen": 0.5 / len(p), "floor_rejected": 0.5 / len(q), "raw_bins": RAW_BINS, "raw_floor": RAW_FLOOR,
                         "kde_points": KDE_POINTS, "kde_floor": KDE_FLOOR / scale,
                         "bandwidth_chosen": (_scott(p) * scale).item(), "bandwidth_rejected": (_scott(q) * scale).item()}}


# --------------------------------------------------------------------------------------------- what the quantiles say

def _flat(opinions):
    """n lists of opinions -> (z (S,), the response of each (S,), weight (S,)): responses weigh the same, whatever their number of opinions."""
    count = np.array([len(z) for z in opinions])
    assert count.min() > 0, "a response without an opinion"
    return np.concatenate([np.asarray(z, dtype=float) for z in opinions]), np.repeat(np.arange(len(count)), count), np.repeat(1 / (len(count) * count), count)


def constant_quantiles(opinions, levels):
    """The best that can be said without reading: the quantiles of all opinions together, which minimise their mean pinball loss.  -> (N,)"""
    z, _, weight = _flat(opinions)
    order = np.argsort(z)
    below = np.cumsum(weight[order])
    return z[order][np.minimum(np.searchsorted(below, np.asarray(levels) - 1e-9), len(z) - 1)]


def pinball(quantiles, opinions, levels):
    """mean over responses, their opinions z and the levels tau of |tau - 1{z < q}| |z - q|.  quantiles (n,N)  ->  float, in the opinions' unit"""
    z, row, weight = _flat(opinions)
    u = z[:, None] - np.asarray(quantiles, dtype=float)[row]                                          # (S,N)
    return (weight @ (np.abs(np.asarray(levels) - (u < 0)) * np.abs(u))).mean().item()


def crossing(quantiles):
    """Share of neighbouring outputs out of order, before they are sorted.  (n,N) -> float"""
    return (np.diff(quantiles, axis=-1) < 0).mean().item()


def coverage(quantiles, opinions, levels, training=None):
    """Does quantile tau leave a share tau of the opinions below it? Each row is sorted first: outputs are free.

    below = mean P(z < q), at_most = mean P(z <= q) over responses;  a quantile must have below <= tau <= at_most, and gap is by how much it misses;
    ok: by .05 at most.  Claimed for kappa 0 and rank_coef 0 alone: kappa 1 learns expectiles, the ranking loss moves the mean.
    training: opinions of training responses; their constant quantiles cover just as well, so what the model adds is a smaller pinball loss.
    """
    levels, ordered, (z, row, weight) = np.asarray(levels), np.sort(np.asarray(quantiles, dtype=float), axis=-1), _flat(opinions)
    below, at_most = (weight @ compare(z[:, None], ordered[row]) for compare in (np.less, np.less_equal))
    gap = np.maximum(0, np.maximum(below - levels, levels - at_most))
    table = [{"level": t.item(), "below": lo.item(), "at_most": hi.item(), "gap": g.item(), "ok": bool(g <= COVERAGE_MARGIN + 1e-9)}
             for t, lo, hi, g in zip(levels, below, at_most, gap)]
    found = {"quantiles": table, "ok": all(r["ok"] for r in table), "gap": gap.mean().item(),
             "crossing": crossing(quantiles), "pinball": pinball(ordered, opinions, levels)}
    if training is not None:
        constant = np.tile(constant_quantiles(training, levels), (len(ordered), 1))
        found["constant"] = coverage(constant, opinions, levels)
    return found


def within_deviation(quantiles):
    """Mean over responses of the deviation between a response's own N outputs: the target self_mean drives it to 0.  (n,N) -> float"""
    return np.asarray(quantiles, dtype=float).std(axis=-1).mean().item()


def label_optimum(p, tau, kappa=1.0):
    """Where the quantile Huber loss has its minimum when the target is +1 with probability p, else -1.  p, tau: any shapes that broadcast  ->  q

    On [-1, 1] the derivative is  -a min(1 - q, kappa) + b min(1 + q, kappa),  a = p tau,  b = (1-p)(1-tau),  r = a / b.
    kappa = 1:  r >= 1 makes q >= 0, the error to -1 is linear:  a (1 - q) = b,  q = 1 - 1/r;   r < 1, mirrored:  a = b (1 + q),  q = r - 1.
    Any kappa, r >= 1:  1 - q = min(1 + q, kappa) / r,  so q = 1 - min(2 / (r + 1), kappa / r).  Where kappa < 1 and r = 1, or kappa = 0, a stretch of q is as good.
    """
    a, b = np.multiply(p, tau), np.multiply(np.subtract(1, p), np.subtract(1, tau))
    high, low = np.maximum(a, b), np.minimum(a, b)
    short = np.minimum(2 * low / (low + high), kappa * low / high)                # distance from the likelier end
    return np.where(a >= b, 1 - short, short - 1)


def label_against_closed_form(quantiles, won, levels, bins=10, kappa=1.0):
    """A model trained on targets +1 and -1 beside what it should say: responses in equal-count bins of their mean output, the share p won in each bin,
    and `label_optimum(p, tau)` beside the bin's mean sorted outputs. Exact for rank_coef 0 and p alike within a bin.

    quantiles (n,N);  won (n,) in [0,1]: 1 chosen, 0 rejected, or the share of comparisons won
    """
    ordered, won, table = np.sort(np.asarray(quantiles, dtype=float), axis=-1), np.asarray(won, dtype=float), []
    for part in np.array_split(np.argsort(ordered.mean(-1), kind="stable"), min(bins, len(ordered))):
        p = won[part].mean().item()
        table.append({"n": len(part), "won": p, "outputs": ordered[part].mean(0).tolist(), "closed": label_optimum(p, np.asarray(levels), kappa).tolist()})
    off = np.array([np.abs(np.subtract(row["outputs"], row["closed"])) for row in table])
    return {"bins": table, "mean_deviation": off.mean().item(), "max_deviation": off.max().item()}


def per_quantile(outputs, places, labels=None):
    """Which quantile tells chosen from rejected best? Pair accuracy within groups and AUC across them, of each of N sorted outputs and of their mean.

    outputs: groups of (K,N);  labels: groups of 1, 0 or None, by default the better half of the places good, the worse half bad
    """
    if labels is None:
        labels = [data.derive_labels([data.Response("", place=p) for p in place], "place").label for place in places]
    def both(scores):
        return {"accuracy": pair_accuracy(scores, places)["accuracy"], "auc": label_auc(scores, labels)}
    ordered = [np.sort(np.asarray(group, dtype=float), axis=-1) for group in outputs]
    return {"quantiles": [both([group[:, i] for group in ordered]) for i in range(ordered[0].shape[-1])], "mean": both([group.mean(-1) for group in ordered])}


def spearman(x, y):
    """Correlation of ranks; equal values share the mean of their ranks; NaN where one side does not vary."""
    ranks = []
    for values in (x, y):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    a, b = (r - r.mean() for r in ranks)
    scale = math.sqrt((a @ a) * (b @ b))
    return (a @ b).item() / scale if scale else NAN


def spread_analysis(outputs, opinions, places, bins=10):
    """Does the spread of the outputs (largest - least: q9 - q0 sorted) mean anything?

    outputs: groups of (K,N);  opinions: groups of K lists, or None  ->  spearman: of spread with the deviation of the response's opinions;
    deciles: pair accuracy by the pair's mean spread, in equal-count bins from narrow to wide
    """
    spread = [np.ptp(np.asarray(group, dtype=float), axis=-1) for group in outputs]
    disagreement = [round(float(np.std(z)), 12) for group in opinions or () for z in group]      # three opinions of .1 deviate by 1e-17: a tie, not a rank
    pairs, margin = ordered_pairs(places), margins([np.mean(group, axis=-1) for group in outputs], places)
    of_pair, table = np.array([(spread[g][i] + spread[g][j]) / 2 for g, i, j in pairs]), []
    for part in np.array_split(np.argsort(of_pair, kind="stable"), min(bins, len(pairs)) or 1):
        table += [{"spread": of_pair[part].mean().item(), "accuracy": _share_right(margin[part]), "n": len(part)}] if len(part) else []
    return {"spearman": spearman(np.concatenate(spread), disagreement) if opinions else None, "deciles": table}


# ------------------------------------------------------------------------------------------------------ from files to numbers

@dataclass(frozen=True)
class Config:
    a: str = ""                                     # groups JSONL with one policy's responses ...
    b: str = ""                                     # ... and with the other's; prompts that both have are compared
    k: int = 1                                      # samples of a prompt to compare: first with first, second with second
    judge: str = ""                                 # reference, replay, openai, or path.py:function with (prompts, responses) -> scores
    reference: str = ""                             # reference, replay: as nanorlhf.study.judge has it
    url: str = ""                                   # openai: base of the endpoint
    model: str = ""                                 # openai: a dated name
    cache: str = ""                                 # openai: JSONL of answers, kept and reused
    reward: str = ""                                # or: a reward model (run or model folder) to measure ...
    data: str = ""                                  # ... on the held-out part of this data, which train_rm.py would hold out too
    device: str = "auto"                            # cpu, cuda, cuda:1


def matched(a, b, k=1):
    """The first k samples of each prompt in two files of groups, in pairs; an expert's response (label 1), where there are others, is no sample.

    -> (prompts, texts of a, texts of b, how many prompts only one file has, what was dropped in reading)
    """
    sampled, dropped = [], Counter()
    for path in (a, b):
        sampled.append(found := {})
        groups, reasons = data.read_groups(path)
        dropped += reasons
        for group in groups:
            texts = [r.text for r in group.responses if r.label != 1] or [r.text for r in group.responses]
            found.setdefault(group.prompt, []).extend(texts)
    both = [prompt for prompt in sampled[0] if prompt in sampled[1]]
    found = [(prompt, x, y) for prompt in both for x, y in zip(sampled[0][prompt][:k], sampled[1][prompt])]
    if not found:
        raise InputError(f"--a {a} --b {b}: no prompt has a response in both")
    return *map(list, zip(*found)), len(sampled[0]) + len(sampled[1]) - 2 * len(both), dropped


def raw_outputs(reward, rows):
    """Raw outputs of a `reward.RewardModel` for rows of any K, the work shared among the processes.  -> a (K,N) array a row"""
    mine, found = partition([row.num_tokens for row in rows], dist.world_size())[dist.rank()], []
    for k in {len(rows[i].responses) for i in mine}:
        same = [i for i in mine if len(rows[i].responses) == k]
        found += zip(same, reward.outputs([rows[i] for i in same]).double().tolist())
    return [np.array(outputs) for _, outputs in sorted(pair for pairs in dist.all_gather_object(found) for pair in pairs)]


def measure(outputs, rows, kappa=None, opinions=None, training=None):
    """Everything above about one reward model.  outputs: groups of (K,N), raw;  rows: place, label, targets of each group (batching.Row, data.Judgement)

    N > 1 adds "quantiles". kappa: of a model trained on target label, adds the closed form;  opinions: groups of K lists, or None;
    training: lists of opinions of training responses, for a model trained on target scores, adds the coverage.
    """
    means, places, labels = [group.mean(-1) for group in outputs], [row.place for row in rows], [row.label for row in rows]
    chosen, rejected = ([s for group, marks in zip(means, labels) for s, mark in zip(group, marks) if mark == y] for y in (1, 0))
    found = {**pair_accuracy(means, places), "auc": label_auc(means, labels), "calibration": calibration(means, places), "kl": kl_table(chosen, rejected)}
    if outputs[0].shape[-1] == 1:
        return found
    flat, levels, targets = np.concatenate(outputs), quantile_levels(outputs[0].shape[-1]).numpy(), [t for row in rows for t in row.targets]
    found["quantiles"] = said = {"crossing": crossing(flat), "within_deviation": within_deviation(flat), "per_quantile": per_quantile(outputs, places, labels),
                                 "spread": spread_analysis(outputs, opinions, places)}
    if kappa is not None:
        compared = [i for i, t in enumerate(targets) if t]
        said["label"] = label_against_closed_form(flat[compared], [np.mean(targets[i]) / 2 + 0.5 for i in compared], levels, kappa=kappa)
    if opinions and training:
        said["coverage"] = coverage(flat, [z for group in opinions for z in group], levels, training)
    return found


def show(found, indent="  "):
    """Prints numbers by name; a dict is indented under its name, a list of dicts is a table."""
    def word(x):
        return " ".join(map(word, x)) if isinstance(x, list) else f"{x:.4g}" if isinstance(x, float) else str(x)
    for name, value in found.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            show(value, indent + "  ")
        elif isinstance(value, list) and value:
            lines = [list(value[0]), *([word(x) for x in row.values()] for row in value)]
            widths = [max(map(len, column)) for column in zip(*lines)]
            print(f"{indent}{name}", *("  ".join(w.rjust(n) for w, n in zip(line, widths)) for line in lines), sep=f"\n{indent}  ")
        else:
            print(f"{indent}{name:<20}{word(value)}")


def compare_files(config):
    """Win rate of the responses in --a over those in --b."""
    judge = load_judge(JudgeConfig(config.judge, config.a, reference=config.reference, url=config.url, model=config.model, cache=config.cache))
    prompts, a, b, alone, dropped = matched(config.a, config.b, config.k)
    found = win_rate(judge, prompts, a, b)
    if not found["n"]:
        raise InputError(f"--judge {config.judge}: skipped all of {len(prompts)} pairs")
    print(f"{config.a} against {config.b}: {found['n']} pairs judged in both orders, {found['skipped']} skipped; {alone} prompts are in one file only; "
          f"dropped: {dict(dropped) or 'nothing'}")
    print(f"  wins {found['wins']}  ties {found['ties']}  losses {found['losses']}   the two orders name different winners in {found['disagreed']:.1%}")
    for name, what in (("share", "wins + ties / 2"), ("decided", "wins / decided"), ("paper", "wins / all (paper A)")):
        print(f"  {what:<22}{found[name]:7.1%}   95 % [{found[name + '_low']:.1%}, {found[name + '_high']:.1%}]")
    print(f"  sign test p = {found['p']:.3g}")
    for name, texts in (("a", a), ("b", b)):
        print("  {}: {n} texts, {distinct:.1%} distinct, {words:.1f} words".format(name, **distinct(texts)))


def measure_reward(config):
    """What a reward model says of the held-out part of --data, beside its places, labels and opinions."""
    device = dist.setup(config.device, 0)
    reward, path = hub.load_reward_model(config.reward), Path(config.reward) / "config.json"
    flags = hub.read_json(path).get("flags", {}) if path.exists() else {}     # a bare model folder does not say how it was trained
    kappa = flags.get("kappa", 1.0) if isinstance(flags, dict) else None
    if type(kappa) not in (int, float) or not 0 <= kappa < math.inf or flags.get("labels", "auto") not in ("auto", "place", "label", "scores"):
        raise InputError(f"{path}: flags {flags!r:.80} are not those of train_rm.py")
    source = data.load(config.data)
    reward.model.to(device)
    encoded, dropped = encode_all(source.held_out, reward.tokenizer, reward.max_length, labels=flags.get("labels", "auto"))
    rows, dropped = [row for row in encoded if len(set(row.place)) > 1], dict(source.dropped + dropped) or "nothing"
    if not rows:
        raise InputError(f"--data {config.data}: none of {len(source.held_out)} held-out groups has a pair to tell apart; dropped: {dropped}")
    opinions = [[r.scores for r in source.held_out[row.index].responses] for row in rows]
    training = [r.scores for group in source.train for r in group.responses if r.scores]
    target = flags.get("quantile_target", "label")
    try:
        found = measure(raw_outputs(reward, rows), rows, kappa if target == "label" else None,
                        opinions if all(z for group in opinions for z in group) else None, training if target == "scores" else None)
    except InputError as error:
        raise InputError(f"--reward {config.reward} --data {config.data}: {error}") from None
    print(f"{config.reward} on {config.data}: {len(rows)} held-out groups; dropped: {dropped}")
    print("  trained with " + (" ".join(f"--{name} {flags.get(name)}" for name in RELEVANT) if flags else "flags that a model folder does not tell (the defaults, then)"))
    show(found)


def main(config):
    check_bounds(config, k=(1, None))
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
        dist.on_rank_zero(lambda: compare_files(config))        # a judge that is asked over the network is asked once


if __name__ == "__main__":
    run_script(main, Config)
