"""What the study found: averages over seeds with their spread, three sentences, claims, floors.

Sentences, and the verdicts on the papers' claims, are chosen by the numbers: they read otherwise
when the numbers fall otherwise. A list has one value per seed, None where something is missing.
"""
import contextlib

import numpy as np

from ..io.read import InputError, parse_json, read_bytes, read_json
from .evaluate import COVERAGE_MARGIN, wilson
from .figures import num

# Student's t, 97.5 %, by degrees of freedom from 1
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
CORNERS = {
    ("ranking", "places"): "ranking",
    ("ranking", "labels"): "ranking-on-labels",
    ("classification", "places"): "classification-on-places",
    ("classification", "labels"): "classification",
}
# Of a number on the page: nothing that is measured comes near, and drawing 1e308 overflows.
LARGEST = 1e12
ESTIMATORS = ("gaussian", "kde", "histogram")


# ---------------------------------------------------------------------------- reading and averaging

@contextlib.contextmanager
def as_written(out):
    """Files of a study that somebody has changed end in one line, not in a traceback.

    A name is missing, for example, or a list stands where a number is read.
    """
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
    study = read_json(out / "study.json")
    results = []
    metrics = []
    for seed in range(seeds):
        path = out / f"seed{seed}" / "results.json"
        if not path.exists():
            raise InputError(f"{path}: is missing; run the study to its end first")
        results.append(read_json(path))
        runs = [f"ppo-{arm}" for arm in results[-1].get("ways") or ()]
        runs += ["rm-together", "rm-apart"]
        metrics.append({run: read_lines(path.parent / run / "metrics.jsonl") for run in runs})
        if problem := misplaced([results[-1], metrics[-1]]):
            raise InputError(
                f"{path}, or a metrics.jsonl beside it: {problem} is no number for a page; was it "
                "changed?"
            )
    return study, results, metrics


def read_lines(path):
    """The rows of a JSONL file; none where it is missing."""
    lines = read_bytes(path).splitlines() if path.exists() else []
    return [parse_json(line, f"{path}:{n}") for n, line in enumerate(lines, 1)]


def misplaced(value, name=""):
    """The first value that is neither a number to draw, nor null, nor a text where texts are.

    -> str or None
    """
    if isinstance(value, dict):
        problems = (misplaced(x, key) for key, x in value.items())
        return next(filter(None, problems), None)
    if isinstance(value, list):
        problems = (misplaced(x, name) for x in value)
        return next(filter(None, problems), None)
    if isinstance(value, str):
        good = name in ("text", "prompt", "words")
    else:
        good = value is None or abs(value) < LARGEST
    return None if good else f"{name[:60]!r} {value!r:.60}"


def get(tree, *path):
    """tree[path[0]][path[1]]..., None where something is missing."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def each(results, *path):
    """One value per seed."""
    return [get(result, *path) for result in results]


def there(values):
    return [value for value in values if value is not None]


def mean(values):
    return float(np.mean(there(values))) if there(values) else None


def minus(a, b):
    """Seed by seed; None where either is missing."""
    return [None if x is None or y is None else x - y for x, y in zip(a, b)]


def interval(values):
    """95 % interval of the mean over seeds (Student's t), None for one seed.  -> (low, high), None

    The seeds are the experiment's repetitions.
    """
    x = np.array(there(values))
    if len(x) < 2:
        return None
    freedom = len(x) - 1
    t = T[freedom - 1] if freedom <= len(T) else 1.96 + 2.6 / freedom
    half = t * x.std(ddof=1) / len(x) ** 0.5
    return float(x.mean() - half), float(x.mean() + half)


def sign(values):
    """1 or -1 where the interval over seeds leaves 0 out, else 0; None for one seed."""
    ends = interval(values)
    return None if ends is None else (ends[0] > 0) - (ends[1] < 0)


def estimate(values, digits=2, plus=False):
    """mean [low, high]"""
    text = num(mean(values), digits, plus)
    ends = interval(values)
    if ends:
        low, high = (num(end, digits, plus) for end in ends)
        text += f" [{low}, {high}]"
    return text


def spread(values, digits=2, plus=False):
    """mean (least to greatest)"""
    x = there(values)
    text = num(mean(x), digits, plus)
    if x:
        least, greatest = (num(end, digits, plus) for end in (min(x), max(x)))
        if least != greatest:
            text += f" ({least} to {greatest})"
    return text


def many(n, noun="seed"):
    return f"{n} {noun}" + ("" if n == 1 else "s")


def count(flags):
    """How many of the seeds that have the numbers: "4 of 5 seeds"."""
    x = there(flags)
    return f"{sum(map(bool, x))} of {many(len(x))}"


def gold(results, name):
    return each(results, "policies", name, "gold")


def duel(results, pair):
    """Wins, ties, losses of all seeds together.  -> dict"""
    seeds = there(each(results, "wins", pair))
    total = {name: sum(x[name] for x in seeds) for name in ("n", "wins", "ties", "losses")}
    if not total["n"]:
        return None
    k = total["wins"] + total["ties"] / 2
    low, high = wilson(k, total["n"])
    return {
        **total,
        "share": k / total["n"],
        "low": low,
        "high": high,
        "ahead": sum(x["wins"] > x["losses"] for x in seeds),
        "behind": sum(x["wins"] < x["losses"] for x in seeds),
        "shares": [x["wins"] / x["n"] + x["ties"] / x["n"] / 2 for x in seeds],
        "side": sign([(x["wins"] - x["losses"]) / x["n"] for x in seeds]),
    }


def effects(results):
    """What labels and loss do to the panel's score.  -> two lists, one value per seed

    Labels: ranked places instead of expert-or-sample labels, averaged over the losses. Loss: the
    ranking loss instead of classification, averaged over the labels.
    """
    rp, rl, cp, cl = (gold(results, name) for name in CORNERS.values())

    def half(a, b):
        return [None if None in pair else sum(pair) / 2 for pair in zip(a, b)]

    return half(minus(rp, rl), minus(cp, cl)), half(minus(rp, cp), minus(rl, cl))


def moved(results, arm):
    """Entropy of an arm's policy less that of the supervised one, on held-out passages."""
    trained, supervised = (each(results, "policies", name, "entropy") for name in (arm, "sft"))
    return minus(trained, supervised)


# ------------------------------------------------------------------------------ the three sentences

def sentence_wins(results):
    """Which reward makes the better policy?  -> (what is said first, in bold; the numbers)"""
    x = duel(results, "ranking : classification")
    if not x:
        return "The panel compared nothing", "."
    n = x["n"]
    seeds = len(x["shares"])
    first = "PPO on the ranking reward"
    second = "PPO on the classification reward"
    lead = f"The seeds do not tell {first} from {second}"
    if x["behind"] > x["ahead"]:
        first, second = second, first
    if x["side"]:
        lead = f"{first} is preferred to {second}"
    elif seeds == 1 and x["ahead"] != x["behind"]:
        lead = f"{first} is ahead of {second} in the only seed"
    elif max(x["ahead"], x["behind"]) == seeds > 1:
        lead = f"{first} is ahead of {second} in every seed, but so few do not settle it"

    def score(arm):
        gain = minus(gold(results, arm), gold(results, "sft"))
        average = num(mean(gold(results, arm)))
        return f"{average} for {arm} ({estimate(gain, plus=True)} against SFT)"

    return lead, (
        f": ranking wins {x['wins'] / n:.0%}, ties {x['ties'] / n:.0%} and loses "
        f"{x['losses'] / n:.0%} of {n:,} comparisons (wins + ties / 2: {x['share']:.1%}, 95 % "
        f"interval over comparisons {x['low']:.1%} to {x['high']:.1%}), it is ahead in "
        f"{x['ahead']} of {many(seeds)}, and the panel's mean score is {score('ranking')} and "
        f"{score('classification')}."
    )


def lead_why(labels, loss):
    """The bold part: which of the two effects moves the score."""
    if None in (mean(labels), mean(loss)):
        return "The four corners of loss and labels are not all there"
    more = "labels" if abs(mean(labels)) >= abs(mean(loss)) else "loss"
    if sign(labels) is None:
        return f"One seed cannot tell loss from labels; here the {more} moved the score more"
    if sign(labels) and sign(loss):
        return f"Both labels and loss move the score, the {more} more"
    if sign(labels):
        return "The labels move the score; what the loss does cannot be told from the seeds"
    if sign(loss):
        return "The loss moves the score; what the labels do cannot be told from the seeds"
    return "Neither labels nor loss alone move the score by more than the seeds differ"


def sentence_why(results):
    """Loss or labels? Is classification at chance? Does its entropy rise?"""
    labels, loss = effects(results)
    lead = lead_why(labels, loss)
    classification, ranking = (
        each(results, "rewards", name, "ranked", "accuracy")
        for name in ("classification", "ranking")
    )
    coin = {
        1: ", better than a coin",
        -1: ", worse than a coin",
        0: ", which a coin could do",
        None: "",
    }[sign([x and x - 0.5 for x in classification])]
    entropy = moved(results, "classification")
    direction = {
        1: "rises",
        -1: "falls",
        0: "neither rises nor falls by more than the seeds differ",
        None: "rises" if (mean(entropy) or 0) > 0 else "does not rise",
    }[sign(entropy)]
    return lead, (
        ": the panel's places instead of expert-or-sample labels change it by "
        f"{estimate(labels, plus=True)}, the ranking loss instead of classification by "
        f"{estimate(loss, plus=True)}; the classification model orders "
        f"{estimate(classification)} of the panel's pairs right{coin}, the ranking model "
        f"{estimate(ranking)}; classification's policy entropy {direction} "
        f"({estimate(entropy, plus=True)} nats a token against SFT, up in "
        f"{count([x and x > 0 for x in entropy])}; ranking's "
        f"{estimate(moved(results, 'ranking'), plus=True)})."
    )


def both_models(results, *path):
    """The quantile model's numbers and the scalar one's, one value per seed."""
    return [each(results, "rewards", name, "pairs", *path) for name in ("quantile", "scalar")]


def against(results, *path):
    """The quantile model's number less the scalar one's, seed by seed."""
    return minus(*both_models(results, *path))


def lead_quantile(better, larger):
    """The bold part: the sign of the gain in accuracy; does some KL grow beyond the seeds?"""
    if better is None:
        return (
            "One seed cannot say whether the quantile reward discriminates better than the scalar "
            "one"
        )
    if better == 1:
        return "The quantile reward discriminates better than the scalar one"
    if better == -1:
        lead = "The quantile reward discriminates worse than the scalar one"
        return lead + (", though its KL is larger" if larger else "")
    if larger:
        return (
            "The quantile reward has a larger KL than the scalar one; in accuracy they cannot be "
            "told apart"
        )
    return (
        "The seeds show no difference in how well quantile and scalar reward tell chosen from "
        "rejected"
    )


def collapse(before, after):
    """What becomes of the ten outputs' spread in training."""
    if not before or after is None:
        return "–"
    if after < before / 10:
        return "collapses"
    return "shrinks" if after < before / 2 else "does not collapse"


def sentence_quantile(results):
    """Does the quantile reward discriminate better, or only look so?"""
    accuracy = against(results, "accuracy")
    kl = [against(results, "kl", name) for name in ESTIMATORS]
    larger = sum((mean(x) or 0) > 0 for x in kl)
    raw = "larger" if (mean(against(results, "kl", "histogram_raw")) or 0) > 0 else "not larger"

    def both(*path):
        return " against ".join(num(mean(values), 3) for values in both_models(results, *path))

    tables = each(results, "rewards", "scores", "pairs", "quantiles", "coverage", "quantiles")
    ok = [sum(row["ok"] or 0 for row in rows) for rows in there(tables)]
    ok = f"{mean(ok):.3g}" if ok else "–"
    before = mean(each(results, "rewards", "self_mean", "before", "within_deviation"))
    after = mean(each(results, "rewards", "self_mean", "pairs", "quantiles", "within_deviation"))
    return lead_quantile(sign(accuracy), any(sign(x) == 1 for x in kl)), (
        f": accuracy {both('accuracy')} (difference {estimate(accuracy, 3, True)}), AUC "
        f"{both('auc')}, calibration error {both('calibration', 'ece')}, while its KL is larger by "
        f"{larger} of 3 estimators (Gaussian {both('kl', 'gaussian')}, KDE {both('kl', 'kde')}, "
        f"smoothed histogram {both('kl', 'histogram')}) and "
        f"{raw} by the raw 50-bin one; trained on the panel's opinions, {ok} of 10 quantiles cover "
        f"their level within {COVERAGE_MARGIN}; with its own mean as the target the ten outputs' "
        f"spread {collapse(before, after)} ({num(before, 3)} before, {num(after, 3)} after)."
    )


# -------------------------------------------------------------------------------- claims and floors

LEVEL = "no difference beyond the spread over seeds"


def verdict(values, up="yes", down="no, the opposite", level=LEVEL):
    """Words for the sign of a mean over seeds."""
    if not there(values):
        return "–"
    return {None: "one seed cannot say", 1: up, -1: down, 0: level}[sign(values)]


def tenth(rows, name, last):
    """Mean over the last (or first) tenth of a run's steps."""
    x = there([row[name] for row in rows if name in row])
    part = max(1, len(x) // 10)
    return mean(x[-part:] if last else x[:part])


def own_reward(metrics, arm, last=True):
    """The arm's own normalised reward in the last (first) tenth of its steps, one per seed."""
    return [tenth(runs.get(f"ppo-{arm}", []), "score_normalised", last) for runs in metrics]


def passes(results, metrics):
    """Held-out loss and accuracy with pairs together and apart.  -> rows

    By updates and by passes over the pairs.
    """
    rows = []
    for seed, (result, runs) in enumerate(zip(results, metrics)):
        for mode in ("together", "apart"):
            for row in runs.get(f"rm-{mode}", []):
                if "eval_loss" not in row:
                    continue
                updates = row["step"] + 1
                done = updates * (get(result, "passes_a_step", mode) or 0)
                rows.append({
                    "name": mode,
                    "seed": seed,
                    "updates": updates,
                    "passes": round(done, 3),
                    "eval_loss": row["eval_loss"],
                    "eval_accuracy": row.get("eval_accuracy"),
                })
    return rows


def losses_of(rows, seeds, mode):
    """The held-out losses of a mode, in order, with the passes at which they were taken.

    -> one list of (passes, loss) per seed
    """
    runs = [[] for _ in range(seeds)]
    for row in rows:
        if row["name"] == mode:
            runs[row["seed"]].append((row["passes"], row["eval_loss"]))
    return runs


def at_pass(rows, seeds, mode, done):
    """The held-out loss of a mode at (or next to) so many passes, one value per seed."""
    losses = []
    for run in losses_of(rows, seeds, mode):
        _, loss = min(run, key=lambda point: abs(point[0] - done), default=(None, None))
        losses.append(loss)
    return losses


def turns_up(rows, seeds, mode):
    """The held-out loss at the end less that at half of the updates, one value per seed.

    Above 0 it overfits, below 0 it still learns.
    """
    runs = losses_of(rows, seeds, mode)
    return [run[-1][1] - run[len(run) // 2][1] if run else None for run in runs]


def way(result, arm):
    """An arm's way from the supervised policy (KL 0).  -> [(KL, score)] by KL"""
    start = {"kl": 0.0, "gold": get(result, "policies", "sft", "gold")}
    points = [(x.get("kl"), x.get("gold")) for x in [start, *(get(result, "ways", arm) or [])]]
    return sorted(point for point in points if None not in point)


def at_equal_kl(results, a, b):
    """Score of a less score of b at the greatest KL that both ways reached, one value per seed.

    Read on straight lines from the supervised policy (KL 0) through their points.
    """
    gains = []
    for result in results:
        way_a, way_b = (way(result, arm) for arm in (a, b))
        high = min(way_a[-1][0], way_b[-1][0]) if way_a and way_b else 0
        gain = None
        if high > 0:
            gain = float(np.interp(high, *zip(*way_a)) - np.interp(high, *zip(*way_b)))
        gains.append(gain)
    return gains


def claim(statement, paper, here, outcome):
    return {"claim": statement, "the paper": paper, "found here": here, "verdict": outcome}


def claim_preferred(results):
    x = duel(results, "ranking : classification")
    statement = "A: the policy trained on the ranking reward is preferred"
    paper = "preferred by ChatGPT (figure 2, no number in the text)"
    if not x:
        return claim(statement, paper, "–", "–")
    shares = ", ".join(f"{share:.0%}" for share in there(x["shares"]))
    preferred = verdict([share - 0.5 for share in x["shares"]])
    return claim(
        statement,
        paper,
        f"wins + ties / 2: {x['share']:.1%} [{x['low']:.1%}, {x['high']:.1%}]; seeds {shares}",
        f"{preferred}; ahead in {x['ahead']} of {many(len(results))}"
    )


def claim_stays_low(metrics):
    runs = [run.get("ppo-classification", []) for run in metrics]
    early, late = ([tenth(run, "score", last) for run in runs] for last in (False, True))
    rise = minus(late, early)
    end = verdict(late, "above 0", "below 0", "about 0: it calls them neither good nor bad")
    return claim(
        "A: the classification reward stays low during PPO",
        "near −1, the worst, throughout (figure 3)",
        f"tanh(z/2), between −1 and 1: first tenth of the steps {spread(early, plus=True)}, "
        f"last tenth {spread(late, plus=True)}; rise {spread(rise, plus=True)}",
        f"the end: {end}; {verdict(rise, 'it rises', 'it falls', 'no rise to speak of')}"
    )


def claim_overfits(results, metrics):
    n = len(results)
    rows = passes(results, metrics)
    apart, together = (turns_up(rows, n, mode) for mode in ("apart", "together"))
    done = [row["passes"] for row in rows if row["name"] == "together"]
    many_passes = num(mean(done[-1:]), 1)

    def loss_at(mode, done):
        return spread(at_pass(rows, n, mode, done), 3)

    def trend(values):
        return verdict(values, "overfits", "still learns", "is level")

    return claim(
        "A: six pairs of a prompt in different minibatches overfit within an epoch, together "
        "they do not",
        "stated, no number",
        f"held-out loss after one pass: apart {loss_at('apart', 1)}, together "
        f"{loss_at('together', 1)}; after as many updates: together {loss_at('together', 1e9)} "
        f"({many_passes} passes). End less half-way: apart {spread(apart, 3, True)}, together "
        f"{spread(together, 3, True)}",
        f"second half of the updates: apart, in its one pass, {trend(apart)}; together, in "
        f"{many_passes}, {trend(together)}"
    )


def claims_a(results, metrics):
    """Paper A's claims.  -> rows"""
    labels, loss = effects(results)
    entropy = moved(results, "classification")
    return [
        claim_preferred(results),
        claim_stays_low(metrics),
        claim(
            "A: its policy's entropy rises",
            "rises (figure 4)",
            f"{spread(entropy, plus=True)} nats a token against SFT, on held-out passages; up in "
            f"{count([e and e > 0 for e in entropy])}",
            verdict(entropy, "yes", "no: it falls", "cannot be told from the spread over seeds")
        ),
        claim(
            "A: the loss makes the difference",
            "changes loss and labels at once",
            f"panel's score: loss {spread(loss, plus=True)}, labels {spread(labels, plus=True)}",
            f"loss: {verdict(loss, 'ranking is better', 'ranking is worse')}; labels: "
            f"{verdict(labels, 'ranked places are better', 'ranked places are worse')}"
        ),
        claim_overfits(results, metrics),
    ]


def claim_optimistic(results):
    values = each(results, "rewards", "quantile", "values")
    low, high = (
        [mean(sum((get(kinds, name) or {}).values(), [])) for kinds in values]
        for name in ("q0", "q9")
    )
    tables = each(results, "rewards", "quantile", "pairs", "quantiles", "per_quantile", "quantiles")
    first, last = (
        spread([get(table[i], "accuracy") if table else None for table in tables], 3)
        for i in (0, -1)
    )
    return claim(
        "B: quantile 0 is pessimistic, quantile 9 optimistic",
        "distributions shifted left and right (figure 3)",
        f"mean over held-out responses {spread(low)} and {spread(high)}; accuracy {first} and "
        f"{last}",
        "by construction: outputs are read sorted. Whether it means anything is coverage and "
        "accuracy, below"
    )


def claims_b(results, metrics):
    """Paper B's claims, its future work, and over-optimisation.  -> rows"""
    def versus(*path):
        return " against ".join(spread(values, 3) for values in both_models(results, *path))

    cvar = at_equal_kl(results, "scores-cvar", "scores-mean")
    reward = minus(own_reward(metrics, "ranking-loose"), own_reward(metrics, "ranking"))
    score = minus(gold(results, "ranking-loose"), gold(results, "ranking"))
    return [
        claim(
            "B: the quantile model discriminates better (KL of chosen to rejected)",
            "KL 4.914 → 6.779 (helpful), 6.833 → 7.291 (harmless)",
            f"quantile against scalar: KL raw 50 bins {versus('kl', 'histogram_raw')}, Gaussian "
            f"{versus('kl', 'gaussian')}; accuracy {versus('accuracy')}, AUC {versus('auc')}, "
            f"calibration error {versus('calibration', 'ece')}",
            f"KL (Gaussian): {verdict(against(results, 'kl', 'gaussian'), 'larger', 'smaller')}; "
            f"accuracy: {verdict(against(results, 'accuracy'), 'higher', 'lower')}"
        ),
        claim_optimistic(results),
        claim(
            "B, future work: pessimistic PPO (the mean of the lowest three quantiles) on a "
            "quantile reward (that of ten opinions)",
            "not done",
            f"panel's score less that of PPO on the mean, at equal KL: {spread(cvar, plus=True)}",
            verdict(cvar, "pessimism helps", "pessimism harms")
        ),
        claim(
            "Over-optimisation: with a tenth of the KL penalty PPO gains reward and loses quality",
            "not in the papers",
            f"less the same arm with the full penalty: its own reward {spread(reward, plus=True)} "
            f"(one reward model), panel's score {spread(score, plus=True)}; KL "
            f"{spread(each(results, 'policies', 'ranking-loose', 'kl'))} against "
            f"{spread(each(results, 'policies', 'ranking', 'kl'))}",
            f"its own reward: {verdict(reward, 'higher', 'lower')}; panel: "
            f"{verdict(score, 'higher', 'lower')}"
        ),
    ]


def floors(results):
    """What must hold before any of this means something.  -> rows"""
    def above(a, b):
        return minus(gold(results, a), gold(results, b))

    accuracy = each(results, "rewards", "ranking", "ranked", "accuracy")
    tests = [
        ("experts above SFT, by the panel", above("experts", "sft"), 0),
        ("SFT above the control that read another passage", above("sft", "control"), 0),
        ("ranking reward model: accuracy on the panel's pairs at least .65", accuracy, 0.65),
        ("PPO on the judge above PPO on ranking", above("judge", "ranking"), 0),
        ("PPO on ranking above SFT", above("ranking", "sft"), 0),
    ]
    rows = []
    for floor, values, least in tests:
        holds = [x >= least if least else x > 0 for x in there(values)]
        answer = "no"
        if not holds:
            answer = "–"
        elif all(holds):
            answer = "yes"
        elif any(holds):
            answer = "not always"
        seeds = {f"seed {r['seed']}": x for r, x in zip(results, values)}
        rows.append({
            "floor": floor,
            **seeds,
            "mean": mean(values),
            "holds": f"{answer}: {count(holds)}",
        })
    return rows
