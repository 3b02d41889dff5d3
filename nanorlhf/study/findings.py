"""What the study found: averages over seeds with their spread, the three sentences, the papers' claims and what became of them, the floors.

Sentences and verdicts are chosen by the numbers: they read otherwise when the numbers fall otherwise. A list has one value a seed, None where
something is missing.
"""

import contextlib

import numpy as np

from ..io.read import MAX_JSON_BYTES, InputError, parse_json, read_bytes
from .evaluate import COVERAGE_MARGIN, wilson
from .figures import num

T = (
    12.71,
    4.30,
    3.18,
    2.78,
    2.57,
    2.45,
    2.36,
    2.31,
    2.26,
)  # Student's t, 97.5 %, by degrees of freedom from 1
CORNERS = {
    ("ranking", "places"): "ranking",
    ("ranking", "labels"): "ranking-on-labels",
    ("classification", "places"): "classification-on-places",
    ("classification", "labels"): "classification",
}
LARGEST = 1e12  # of a number on the page: nothing that is measured comes near, and drawing 1e308 overflows
ESTIMATORS = ("gaussian", "kde", "histogram")


# -------------------------------------------------------------------------------------------------- reading and averaging


def read(path):
    return parse_json(read_bytes(path, MAX_JSON_BYTES), path)


@contextlib.contextmanager
def as_written(out):
    """Files of a study that somebody has changed: a name is missing, a list stands where a number is read. One line, not a traceback."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{out}: study.json, or a results.json or metrics.jsonl, is not as the study wrote it "
            f"({error!r:.120}); was it changed?"
        ) from error


def load(out, seeds):
    """-> (study.json, [results of each seed], [{run: rows of its metrics.jsonl} of each seed])"""
    study, results, metrics = read(out / "study.json"), [], []
    for seed in range(seeds):
        path = out / f"seed{seed}" / "results.json"
        if not path.exists():
            raise InputError(f"{path}: is missing; run the study to its end first")
        results.append(read(path))
        runs = [f"ppo-{arm}" for arm in results[-1].get("ways") or ()] + ["rm-together", "rm-apart"]
        files = {run: path.parent / run / "metrics.jsonl" for run in runs}
        lines = {
            run: enumerate(read_bytes(file).splitlines(), 1) if file.exists() else ()
            for run, file in files.items()
        }
        metrics.append(
            {
                run: [parse_json(line, f"{files[run]}:{n}") for n, line in found]
                for run, found in lines.items()
            }
        )
        if wrong := misplaced([results[-1], metrics[-1]]):
            raise InputError(
                f"{path}, or a metrics.jsonl beside it: {wrong} is no number for a page; was it "
                "changed?"
            )
    return study, results, metrics


def misplaced(value, name=""):
    """The first value that is neither a number that can be drawn, nor null, nor a text where texts are.  -> str or None"""
    if isinstance(value, (dict, list)):
        return next(
            filter(
                None,
                (
                    misplaced(x, key)
                    for key, x in (
                        value.items() if isinstance(value, dict) else ((name, x) for x in value)
                    )
                ),
            ),
            None,
        )
    good = (
        name in ("text", "prompt", "words")
        if isinstance(value, str)
        else value is None or abs(value) < LARGEST
    )
    return None if good else f"{name[:60]!r} {value!r:.60}"


def get(tree, *path):
    """tree[path[0]][path[1]]..., None where something is missing."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def each(results, *path):
    """One value a seed."""
    return [get(result, *path) for result in results]


def there(values):
    return [value for value in values if value is not None]


def mean(values):
    return float(np.mean(there(values))) if there(values) else None


def minus(a, b):
    """Seed by seed; None where either is missing."""
    return [None if x is None or y is None else x - y for x, y in zip(a, b)]


def interval(values):
    """95 % interval of the mean over seeds (Student's t), None for one seed: the seeds are the experiment's repetitions.  -> (low, high) or None"""
    x = np.array(there(values))
    if len(x) < 2:
        return None
    half = (
        (T[len(x) - 2] if len(x) - 2 < len(T) else 1.96 + 2.6 / (len(x) - 1))
        * x.std(ddof=1)
        / len(x) ** 0.5
    )
    return float(x.mean() - half), float(x.mean() + half)


def sign(values):
    """1 or -1 where the interval over seeds leaves 0 out, else 0; None for one seed, which cannot say."""
    found = interval(values)
    return None if found is None else (found[0] > 0) - (found[1] < 0)


def estimate(values, digits=2, plus=False):
    """mean [low, high]"""
    found = interval(values)
    return num(mean(values), digits, plus) + (
        f" [{num(found[0], digits, plus)}, {num(found[1], digits, plus)}]" if found else ""
    )


def spread(values, digits=2, plus=False):
    """mean (least to greatest)"""
    x = there(values)
    least, greatest = (num(f(x), digits, plus) if x else "" for f in (min, max))
    return num(mean(x), digits, plus) + (f" ({least} to {greatest})" if least != greatest else "")


def many(n, word="seed"):
    return f"{n} {word}" + ("" if n == 1 else "s")


def count(flags):
    """How many of the seeds that have the numbers: "4 of 5 seeds"."""
    x = there(flags)
    return f"{sum(map(bool, x))} of {many(len(x))}"


def gold(results, name):
    return each(results, "policies", name, "gold")


def duel(results, pair):
    """Wins, ties, losses of all seeds together.  -> dict"""
    found = there(each(results, "wins", pair))
    total = {name: sum(x[name] for x in found) for name in ("n", "wins", "ties", "losses")}
    if not total["n"]:
        return None
    k = total["wins"] + total["ties"] / 2
    low, high = wilson(k, total["n"])
    return {
        **total,
        "share": k / total["n"],
        "low": low,
        "high": high,
        "ahead": sum(x["wins"] > x["losses"] for x in found),
        "behind": sum(x["wins"] < x["losses"] for x in found),
        "shares": [x["wins"] / x["n"] + x["ties"] / x["n"] / 2 for x in found],
        "side": sign([(x["wins"] - x["losses"]) / x["n"] for x in found]),
    }


def effects(results):
    """What ranked places instead of expert-or-sample labels do to the panel's score, averaged over the losses; and the ranking loss instead of
    classification, averaged over the labels.  -> two lists, one value a seed"""
    rp, rl, cp, cl = (gold(results, name) for name in CORNERS.values())
    half = lambda a, b: [None if None in pair else sum(pair) / 2 for pair in zip(a, b)]
    return half(minus(rp, rl), minus(cp, cl)), half(minus(rp, cp), minus(rl, cl))


def moved(results, arm):
    """Entropy of an arm's policy less that of the supervised one, on held-out passages."""
    return minus(
        each(results, "policies", arm, "entropy"), each(results, "policies", "sft", "entropy")
    )


# -------------------------------------------------------------------------------------------------- the three sentences


def sentence_wins(results):
    """Which reward makes the better policy?  -> (what is said first, in bold; the numbers)"""
    x = duel(results, "ranking : classification")
    if not x:
        return "The panel compared nothing", "."
    n, seeds, first, second = (
        x["n"],
        len(x["shares"]),
        "PPO on the ranking reward",
        "PPO on the classification reward",
    )
    if x["behind"] > x["ahead"]:
        first, second = second, first
    lead = (
        f"{first} is preferred to {second}"
        if x["side"]
        else f"{first} is ahead of {second} in the only seed"
        if seeds == 1 and x["ahead"] != x["behind"]
        else f"{first} is ahead of {second} in every seed, but so few do not settle it"
        if max(x["ahead"], x["behind"]) == seeds > 1
        else "The seeds do not tell PPO on the ranking reward from PPO on the classification reward"
    )

    def score(arm):
        gain = minus(gold(results, arm), gold(results, "sft"))
        return f"{num(mean(gold(results, arm)))} for {arm} ({estimate(gain, plus=True)} against SFT)"

    return lead, (
        f": ranking wins {x['wins'] / n:.0%}, ties {x['ties'] / n:.0%} and loses "
        f"{x['losses'] / n:.0%} of {n:,} comparisons (wins + ties / 2: {x['share']:.1%}, 95 % "
        f"interval over comparisons {x['low']:.1%} to {x['high']:.1%}), it is ahead in "
        f"{x['ahead']} of {many(seeds)}, and the panel's mean score is {score('ranking')} and "
        f"{score('classification')}."
    )


def sentence_why(results):
    """Loss or labels? Is classification at chance? Does its entropy rise?"""
    labels, loss = effects(results)
    known, a, b = None not in (mean(labels), mean(loss)), sign(labels), sign(loss)
    more = "labels" if known and abs(mean(labels)) >= abs(mean(loss)) else "loss"
    lead = (
        "The four corners of loss and labels are not all there"
        if not known
        else f"One seed cannot tell loss from labels; here the {more} moved the score more"
        if a is None
        else f"Both labels and loss move the score, the {more} more"
        if a and b
        else "The labels move the score; what the loss does cannot be told from the seeds"
        if a
        else "The loss moves the score; what the labels do cannot be told from the seeds"
        if b
        else "Neither labels nor loss alone move the score by more than the seeds differ"
    )
    mine, theirs = (
        each(results, "rewards", name, "ranked", "accuracy")
        for name in ("classification", "ranking")
    )
    coin = {
        1: ", better than a coin",
        -1: ", worse than a coin",
        0: ", which a coin could do",
        None: "",
    }[sign([x and x - 0.5 for x in mine])]
    entropy = moved(results, "classification")
    word = {
        1: "rises",
        -1: "falls",
        0: "neither rises nor falls by more than the seeds differ",
        None: "rises" if (mean(entropy) or 0) > 0 else "does not rise",
    }[sign(entropy)]
    return lead, (
        ": the panel's places instead of expert-or-sample labels change it by "
        f"{estimate(labels, plus=True)}, the ranking loss instead of classification by "
        f"{estimate(loss, plus=True)}; the classification model orders {estimate(mine)} of the "
        f"panel's pairs right{coin}, the ranking model {estimate(theirs)}; classification's policy "
        f"entropy {word} ({estimate(entropy, plus=True)} nats a token against SFT, up in "
        f"{count([x and x > 0 for x in entropy])}; ranking's "
        f"{estimate(moved(results, 'ranking'), plus=True)})."
    )


def against(results, *path):
    """The quantile model's number less the scalar one's, seed by seed."""
    return minus(
        each(results, "rewards", "quantile", "pairs", *path),
        each(results, "rewards", "scalar", "pairs", *path),
    )


def sentence_quantile(results):
    """Does the quantile reward discriminate better, or only look so?"""
    accuracy, raw = against(results, "accuracy"), mean(against(results, "kl", "histogram_raw"))
    kl = [against(results, "kl", name) for name in ESTIMATORS]
    larger, surely = sum((mean(x) or 0) > 0 for x in kl), any(sign(x) == 1 for x in kl)
    lead = {
        None: "One seed cannot say whether the quantile reward discriminates better than the "
              "scalar one",
        1: "The quantile reward discriminates better than the scalar one",
        -1: "The quantile reward discriminates worse than the scalar one"
        + (", though its KL is larger" if surely else ""),
        0: "The quantile reward has a larger KL than the scalar one; in accuracy they cannot be "
           "told apart"
        if surely
        else "The seeds show no difference in how well quantile and scalar reward tell chosen from "
             "rejected",
    }[sign(accuracy)]
    both = lambda *path: " against ".join(
        num(mean(each(results, "rewards", name, "pairs", *path)), 3)
        for name in ("quantile", "scalar")
    )
    ok = [
        sum(row["ok"] or 0 for row in rows)
        for rows in there(
            each(results, "rewards", "scores", "pairs", "quantiles", "coverage", "quantiles")
        )
    ]
    before, after = (
        mean(each(results, "rewards", "self_mean", *path, "within_deviation"))
        for path in (("before",), ("pairs", "quantiles"))
    )
    spread = (
        "–"
        if not before or after is None
        else "collapses"
        if after < before / 10
        else "shrinks"
        if after < before / 2
        else "does not collapse"
    )
    return lead, (
        f": accuracy {both('accuracy')} (difference {estimate(accuracy, 3, True)}), AUC "
        f"{both('auc')}, calibration error {both('calibration', 'ece')}, while its KL is larger by "
        f"{larger} of 3 estimators (Gaussian {both('kl', 'gaussian')}, KDE {both('kl', 'kde')}, "
        f"smoothed histogram {both('kl', 'histogram')}) and "
        f"{'larger' if (raw or 0) > 0 else 'not larger'} by the raw 50-bin one; trained on the "
        f"panel's opinions, {f'{mean(ok):.3g}' if ok else '–'} of 10 quantiles cover their level "
        f"within {COVERAGE_MARGIN}; with its own mean as the target the ten outputs' spread "
        f"{spread} ({num(before, 3)} before, {num(after, 3)} after)."
    )


# -------------------------------------------------------------------------------------------------- claims and floors


def verdict(
    values, up="yes", down="no, the opposite", level="no difference beyond the spread over seeds"
):
    """Words for the sign of a mean over seeds."""
    return (
        "–"
        if not there(values)
        else {None: "one seed cannot say", 1: up, -1: down, 0: level}[sign(values)]
    )


def tenth(rows, name, last):
    """Mean over the last (or first) tenth of a run's steps."""
    x = there([row[name] for row in rows if name in row])
    part = max(1, len(x) // 10)
    return mean(x[-part:] if last else x[:part])


def own_reward(metrics, arm, last=True):
    """The arm's own normalised reward in the last (first) tenth of its steps, one value a seed."""
    return [tenth(runs.get(f"ppo-{arm}", []), "score_normalised", last) for runs in metrics]


def passes(results, metrics):
    """Held-out loss and accuracy with pairs together and apart, by updates and by passes over the pairs.  -> rows"""
    found = []
    for seed, (result, runs) in enumerate(zip(results, metrics)):
        for mode in ("together", "apart"):
            for row in runs.get(f"rm-{mode}", []):
                if "eval_loss" in row:
                    done = (row["step"] + 1) * (get(result, "passes_a_step", mode) or 0)
                    found.append(
                        {
                            "name": mode,
                            "seed": seed,
                            "updates": row["step"] + 1,
                            "passes": round(done, 3),
                            "eval_loss": row["eval_loss"],
                            "eval_accuracy": row.get("eval_accuracy"),
                        }
                    )
    return found


def losses_of(rows, seeds, mode):
    """The held-out losses of a mode, in order, with the passes at which they were taken.  -> a list of (passes, loss) a seed"""
    return [
        [
            (row["passes"], row["eval_loss"])
            for row in rows
            if row["name"] == mode and row["seed"] == seed
        ]
        for seed in range(seeds)
    ]


def at_pass(rows, seeds, mode, done):
    """The held-out loss of a mode at (or next to) so many passes, one value a seed."""
    return [
        min(run, key=lambda point: abs(point[0] - done))[1] if run else None
        for run in losses_of(rows, seeds, mode)
    ]


def turns_up(rows, seeds, mode):
    """The held-out loss at the end less that at half of the updates: above 0 it overfits, below 0 it still learns. One value a seed."""
    return [
        run[-1][1] - run[len(run) // 2][1] if run else None for run in losses_of(rows, seeds, mode)
    ]


def at_equal_kl(results, a, b):
    """Score of a less score of b at the greatest KL that both ways reached, on straight lines from the supervised policy (KL 0) through their points."""
    found, has = [], lambda x: x.get("kl") is not None and x.get("gold") is not None
    for result in results:
        start = {"kl": 0.0, "gold": get(result, "policies", "sft", "gold")}
        one, other = (
            sorted(
                (x["kl"], x["gold"]) for x in [start, *(get(result, "ways", arm) or [])] if has(x)
            )
            for arm in (a, b)
        )
        high = min(one[-1][0], other[-1][0]) if one and other else 0
        found.append(
            float(np.interp(high, *zip(*one)) - np.interp(high, *zip(*other))) if high > 0 else None
        )
    return found


def claim(what, paper, found, verdict):
    return {"claim": what, "the paper": paper, "found here": found, "verdict": verdict}


def claims_a(results, metrics):
    """Paper A's claims.  -> rows"""
    x, (labels, loss), n, plus = (
        duel(results, "ranking : classification"),
        effects(results),
        len(results),
        {"plus": True},
    )
    early, late = (
        [tenth(runs.get("ppo-classification", []), "score", last) for runs in metrics]
        for last in (False, True)
    )
    entropy, rows = moved(results, "classification"), passes(results, metrics)
    loss_at = lambda mode, done: spread(at_pass(rows, n, mode, done), 3)
    apart, together = (turns_up(rows, n, mode) for mode in ("apart", "together"))
    many_passes = num(mean([row["passes"] for row in rows if row["name"] == "together"][-1:]), 1)
    shares = ", ".join(f"{share:.0%}" for share in there(x["shares"])) if x else ""
    preferred = verdict([share - 0.5 for share in x["shares"]] if x else [])
    says = lambda values: verdict(values, "overfits", "still learns", "is level")
    return [
        claim(
            "A: the policy trained on the ranking reward is preferred",
            "preferred by ChatGPT (figure 2, no number in the text)",
            f"wins + ties / 2: {x['share']:.1%} [{x['low']:.1%}, {x['high']:.1%}]; seeds {shares}"
            if x
            else "–",
            f"{preferred}; ahead in {x['ahead']} of {many(n)}" if x else "–",
        ),
        claim(
            "A: the classification reward stays low during PPO",
            "near −1, the worst, throughout (figure 3)",
            f"tanh(z/2), between −1 and 1: first tenth of the steps {spread(early, plus=True)}, "
            f"last tenth {spread(late, plus=True)}; rise {spread(minus(late, early), plus=True)}",
            "the end: "
            f"{verdict(late, 'above 0', 'below 0', 'about 0: it calls them neither good nor bad')}; "
            f"{verdict(minus(late, early), 'it rises', 'it falls', 'no rise to speak of')}",
        ),
        claim(
            "A: its policy's entropy rises",
            "rises (figure 4)",
            f"{spread(entropy, **plus)} nats a token against SFT, on held-out passages; up in "
            f"{count([e and e > 0 for e in entropy])}",
            verdict(entropy, "yes", "no: it falls", "cannot be told from the spread over seeds"),
        ),
        claim(
            "A: the loss makes the difference",
            "changes loss and labels at once",
            f"panel's score: loss {spread(loss, **plus)}, labels {spread(labels, **plus)}",
            f"loss: {verdict(loss, 'ranking is better', 'ranking is worse')}; labels: "
            f"{verdict(labels, 'ranked places are better', 'ranked places are worse')}",
        ),
        claim(
            "A: six pairs of a prompt in different minibatches overfit within an epoch, together "
            "they do not",
            "stated, no number",
            f"held-out loss after one pass: apart {loss_at('apart', 1)}, together "
            f"{loss_at('together', 1)}; after as many updates: together {loss_at('together', 1e9)} "
            f"({many_passes} passes). End less half-way: apart {spread(apart, 3, True)}, together "
            f"{spread(together, 3, True)}",
            f"second half of the updates: apart, in its one pass, {says(apart)}; together, in "
            f"{many_passes}, {says(together)}",
        ),
    ]


def claims_b(results, metrics):
    """Paper B's claims, its future work, and over-optimisation.  -> rows"""
    pick = lambda name, *path: spread(each(results, "rewards", name, "pairs", *path), 3)
    versus = lambda *path: f"{pick('quantile', *path)} against {pick('scalar', *path)}"
    cvar = at_equal_kl(results, "scores-cvar", "scores-mean")
    per = each(results, "rewards", "quantile", "pairs", "quantiles", "per_quantile", "quantiles")
    low, high = (
        [
            mean(sum((get(r, "rewards", "quantile", "values", name) or {}).values(), []))
            for r in results
        ]
        for name in ("q0", "q9")
    )
    more = minus(own_reward(metrics, "ranking-loose"), own_reward(metrics, "ranking"))
    score = minus(gold(results, "ranking-loose"), gold(results, "ranking"))
    return [
        claim(
            "B: the quantile model discriminates better (KL of chosen to rejected)",
            "KL 4.914 → 6.779 (helpful), 6.833 → 7.291 (harmless)",
            f"quantile against scalar: KL raw 50 bins {versus('kl', 'histogram_raw')}, Gaussian "
            f"{versus('kl', 'gaussian')}; accuracy {versus('accuracy')}, AUC {versus('auc')}, "
            f"calibration error {versus('calibration', 'ece')}",
            f"KL (Gaussian): {verdict(against(results, 'kl', 'gaussian'), 'larger', 'smaller')}; "
            f"accuracy: {verdict(against(results, 'accuracy'), 'higher', 'lower')}",
        ),
        claim(
            "B: quantile 0 is pessimistic, quantile 9 optimistic",
            "distributions shifted left and right (figure 3)",
            f"mean over held-out responses {spread(low)} and {spread(high)}; accuracy "
            + " and ".join(
                spread([get(rows[i], "accuracy") if rows else None for rows in per], 3)
                for i in (0, -1)
            ),
            "by construction: outputs are read sorted. Whether it means anything is coverage and "
            "accuracy, below",
        ),
        claim(
            "B, future work: pessimistic PPO (the mean of the lowest three quantiles) on a "
            "quantile reward (that of ten opinions)",
            "not done",
            f"panel's score less that of PPO on the mean, at equal KL: {spread(cvar, plus=True)}",
            verdict(cvar, "pessimism helps", "pessimism harms"),
        ),
        claim(
            "Over-optimisation: with a tenth of the KL penalty PPO gains reward and loses quality",
            "not in the papers",
            f"less the same arm with the full penalty: its own reward {spread(more, plus=True)} "
            f"(one reward model), panel's score {spread(score, plus=True)}; KL "
            f"{spread(each(results, 'policies', 'ranking-loose', 'kl'))} against "
            f"{spread(each(results, 'policies', 'ranking', 'kl'))}",
            f"its own reward: {verdict(more, 'higher', 'lower')}; panel: "
            f"{verdict(score, 'higher', 'lower')}",
        ),
    ]


def floors(results):
    """What must hold before any of this means something.  -> rows"""
    above = lambda a, b: minus(gold(results, a), gold(results, b))
    tests = [
        ("experts above SFT, by the panel", above("experts", "sft"), 0),
        ("SFT above the control that read another passage", above("sft", "control"), 0),
        (
            "ranking reward model: accuracy on the panel's pairs at least .65",
            each(results, "rewards", "ranking", "ranked", "accuracy"),
            0.65,
        ),
        ("PPO on the judge above PPO on ranking", above("judge", "ranking"), 0),
        ("PPO on ranking above SFT", above("ranking", "sft"), 0),
    ]
    found = []
    for what, values, least in tests:
        held = [x >= least if least else x > 0 for x in there(values)]
        word = "–" if not held else "yes" if all(held) else "not always" if any(held) else "no"
        found.append(
            {
                "floor": what,
                **{f"seed {r['seed']}": x for r, x in zip(results, values)},
                "mean": mean(values),
                "holds": f"{word}: {count(held)}",
            }
        )
    return found
