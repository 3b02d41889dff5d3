"""The page of the study, OUT/page/: index.html (one file, nothing loaded) and what goes with it.

A CSV for every figure and table, overview.png for the README. Numbers come from results.json and
metrics.jsonl of each seed alone. A drawing gets rows (dicts), the same that its CSV holds, so that
what is seen can be checked. Whatever a model wrote passes through html.escape. The same study on
the same machine gives the same bytes.
"""
import os
import platform
from html import escape
from pathlib import Path

from ..io.files import replace
from ..io.read import read_json
from . import figures, world
from .evaluate import COVERAGE_MARGIN
from .figures import num
from .findings import (
    CORNERS,
    as_written,
    claims_a,
    claims_b,
    each,
    floors,
    get,
    load,
    many,
    mean,
    passes,
    sentence_quantile,
    sentence_why,
    sentence_wins,
    spread,
)

PAPER_A = ("ranking", "classification", "classification-raw", "judge")
OTHERS = (
    "ranking",
    "ranking-on-labels",
    "classification-on-places",
    "scores-mean",
    "scores-cvar",
    "ranking-loose",
)
ORDER = (
    "experts",
    "judge",
    "scores-mean",
    "scores-cvar",
    "ranking",
    "ranking-loose",
    "ranking-on-labels",
    "classification-on-places",
    "classification",
    "classification-raw",
    "sft",
    "control",
)
TALL = (5.5, 4.5)
QUANTILE_MODELS = ("quantile", "label", "scores", "self_mean")


# ------------------------------------------------------------------------------ rows of the figures

def ordered(results):
    """Names of the policies, best known first."""
    names = {name for result in results for name in result["policies"]}
    return [name for name in ORDER if name in names] + sorted(names - set(ORDER))


def policy_rows(results):
    keys = ("gold", "entropy", "kl", "answerable", "missing", "distinct", "words")
    return [
        {"name": name, "seed": r["seed"], **{key: get(r, "policies", name, key) for key in keys}}
        for name in ordered(results)
        for r in results
    ]


def kind_rows(results):
    rows = []
    for name in ordered(results):
        for r in results:
            for kind, share in (get(r, "policies", name, "kinds") or {}).items():
                rows.append({"name": name, "seed": r["seed"], "kind": kind, "share": share})
    return rows


def win_rows(results):
    keys = ("n", "wins", "ties", "losses", "share", "share_low", "share_high", "p")
    rows = []
    for pair in results[0]["wins"]:
        for r in results:
            if duel := get(r, "wins", pair):
                rows.append({"pair": pair, "seed": r["seed"], **{key: duel[key] for key in keys}})
    return rows


def step_rows(results, metrics, value):
    rows = []
    for r, runs in zip(results, metrics):
        for run, lines in runs.items():
            if not run.startswith("ppo-"):
                continue
            arm = {"name": run.removeprefix("ppo-"), "seed": r["seed"]}
            for row in lines:
                if value in row:
                    rows.append({**arm, "step": row["step"], value: row[value]})
    return rows


def way_rows(results, metrics):
    """Each arm along its way, from the supervised policy on.

    own: its reward model's normalised reward in the ten steps around.
    """
    rows = []
    for r, runs in zip(results, metrics):
        start = {"steps": 0, "kl": 0.0, "gold": get(r, "policies", "sft", "gold")}
        for arm, points in r["ways"].items():
            lines = [row for row in runs.get(f"ppo-{arm}", []) if "score_normalised" in row]
            for point in [start, *points]:
                first = point["steps"] - 5
                near = [row for row in lines if first <= row["step"] < first + 10]
                rows.append({
                    "name": arm,
                    "seed": r["seed"],
                    **{key: point.get(key) for key in ("steps", "kl", "gold")},
                    "own": mean([row["score_normalised"] for row in near]),
                })
    return rows


def corner_rows(results):
    """Loss and labels, exchanged: each corner's reward model and the policy that it trained.

    -> (means, seed by seed)
    """
    keys = {
        "accuracy on the panel's pairs": ("rewards", "ranked", "accuracy"),
        "AUC expert against sample": ("rewards", "labelled", "auc"),
        "PPO: score by the panel": ("policies", "gold"),
        "PPO: entropy": ("policies", "entropy"),
        "PPO: KL": ("policies", "kl"),
    }
    shown = []
    raw = []
    for (loss, labels), name in CORNERS.items():
        corner = {"loss": loss, "labels": labels}
        columns = {key: each(results, kind, name, *path) for key, (kind, *path) in keys.items()}
        shown.append({**corner, **{key: spread(values) for key, values in columns.items()}})
        for i, r in enumerate(results):
            values = {key: columns[key][i] for key in keys}
            raw.append({**corner, "seed": r["seed"], **values})
    return shown, raw


def reward_rows(results):
    """Paper B's models on the held-out pairs.  -> (means, seed by seed)"""
    keys = {
        "accuracy": ("accuracy",),
        "AUC": ("auc",),
        "calibration error (ECE)": ("calibration", "ece"),
        "log-loss": ("calibration", "log_loss"),
        "KL Gaussian": ("kl", "gaussian"),
        "KL KDE": ("kl", "kde"),
        "KL smoothed histogram": ("kl", "histogram"),
        "KL raw 50 bins": ("kl", "histogram_raw"),
        "Jensen-Shannon": ("kl", "js"),
        "accuracy on the panel's mean": ("panel_accuracy",),
    }
    names = ("scalar", *QUANTILE_MODELS)
    names = [name for name in names if get(results[0], "rewards", name, "pairs", "kl")]
    raw = []
    for name in names:
        for r in results:
            values = {path[-1]: get(r, "rewards", name, "pairs", *path) for path in keys.values()}
            raw.append({"name": name, "seed": r["seed"], **values})
    shown = []
    for key, path in keys.items():
        models = {name: each(results, "rewards", name, "pairs", *path) for name in names}
        means = {name: spread(values, 3) for name, values in models.items()}
        shown.append({"held-out pairs": key, **means})
    return shown, raw


def value_rows(results):
    rows = []
    for r in results:
        for name in ("scalar", "quantile"):
            for statistic, kinds in (get(r, "rewards", name, "values") or {}).items():
                model = {"name": name, "seed": r["seed"], "statistic": statistic}
                for kind, values in kinds.items():
                    rows += [{**model, "kind": kind, "value": x} for x in values]
    return rows


def middle(i, n):
    """Level of quantile i of n."""
    return round((i + 0.5) / n, 4)


def quantile_rows(results):
    """Accuracy and AUC of each quantile and of their mean."""
    rows = []
    for name in QUANTILE_MODELS[:3]:
        for r in results:
            table = get(r, "rewards", name, "pairs", "quantiles", "per_quantile") or {}
            model = {"name": name, "seed": r["seed"]}
            quantiles = table.get("quantiles", [])
            for i, quantile in enumerate(quantiles):
                rows.append({**model, "level": middle(i, len(quantiles)), **quantile})
            mean_of_ten = {"accuracy": None, "auc": None, **table.get("mean", {})}
            rows.append({**model, "level": "mean", **mean_of_ten})
    return rows


def coverage_rows(results):
    rows = []
    for r in results:
        model = get(r, "rewards", "scores", "pairs", "quantiles", "coverage") or {}
        for name, table in (("scores", model), ("constant", model.get("constant") or {})):
            for row in table.get("quantiles", []):
                rows.append({"name": name, "seed": r["seed"], **row, "pinball": table["pinball"]})
    return rows


def collapse_rows(results):
    """Deviation among a response's own ten outputs, and between responses' means.

    Both, because the models' scales differ.
    """
    deviations = []
    for r in results:
        before = get(r, "rewards", "self_mean", "before", "within_deviation")
        deviations.append(("self_mean, before", r["seed"], before, None))
    for name in ("self_mean", "quantile", "label", "scores"):
        for r in results:
            within = get(r, "rewards", name, "pairs", "quantiles", "within_deviation")
            between = get(r, "rewards", name, "raw_deviation")
            deviations.append((name, r["seed"], within, between))
    return [dict(zip(("name", "seed", "within", "between"), row)) for row in deviations]


def closed_rows(results):
    """Target +1 and -1: outputs beside the minimum of the loss, by bins of responses."""
    rows = []
    for r in results:
        for i, row in enumerate(get(r, "rewards", "label", "closed_form", "bins") or []):
            n = len(row["outputs"])
            for j, (output, closed) in enumerate(zip(row["outputs"], row["closed"])):
                rows.append({
                    "seed": r["seed"],
                    "bin": i,
                    "n": row["n"],
                    "won": row["won"],
                    "level": middle(j, n),
                    "output": output,
                    "closed": closed,
                })
    return rows


def bin_rows(results, names, key, *path):
    """Rows of a table in the results, numbered."""
    rows = []
    for name in names:
        for r in results:
            for i, row in enumerate(get(r, "rewards", name, "pairs", *path) or []):
                rows.append({"name": name, "seed": r["seed"], key: i, **row})
    return rows


# ------------------------------------------------------------------------------------- the sections

def panel(draw, rows, title="", **options):
    """A panel of `figures.Page.figure`."""
    return draw, rows, title, options


def section_claims(page, results, metrics):
    page.section("claims", "What each paper claims, what was found here")
    warning = {
        1: "One seed has no such interval: nothing here is more than an example. ",
        2: "Two seeds make a very wide interval: hardly anything can be told. ",
    }
    page.table(
        "claims_table",
        "Claims",
        f"Mean over seeds (least to greatest); seeds {', '.join(str(r['seed']) for r in results)}. "
        "A verdict takes a side where the 95 % interval of the mean over seeds (Student's t) "
        f"leaves 0 out. {warning.get(len(results), '')}This is an invented world and these are "
        "tiny models: what is found here is found <em>here</em>.",
        claims_a(results, metrics) + claims_b(results, metrics),
        cards=True
    )
    page.table(
        "floors",
        "Floors: what must hold before the rest means anything",
        "Differences are of the panel's mean score.",
        floors(results),
        cards=True
    )


def pipeline():
    steps = (
        ("Passages", "invented tales, experts' questions"),
        ("SFT", "a small GPT-2 learns to ask"),
        ("4 samples", "a passage, temperature 1"),
        ("Judge", "a panel of ten ranks them"),
        ("Reward model", "a small LLaMA: ranking, classification, quantiles"),
        ("PPO", "reward less KL to SFT"),
        ("Panel", "scores new passages"),
    )
    boxes = "<i>→</i>".join(f"<div><b>{name}</b>{text}</div>" for name, text in steps)
    return f'<div class="flow">{boxes}</div>'


def row_cells(row):
    """The row of one forward pass: a cell per column in its branch's colour, its position below."""
    cells = []
    for word, branch, position in zip(row["words"], row["branch"], row["positions"]):
        colour = figures.BRANCHES[branch % len(figures.BRANCHES)] if branch >= 0 else "#000000"
        word = escape(word.strip(" ").replace("\n", "⏎") or "␣")
        cells.append(
            f'<span style="border-color:{colour};background:{colour}38">{word}'
            f"<small>{position}</small></span>"
        )
    return f'<div class="row">{"".join(cells)}</div>'


def section_setup(page, results):
    page.section("idea", "The experiment and its one idea")
    row = results[0]["row"]
    columns = zip(row["words"], row["branch"], row["positions"])
    rows = []
    for i, (word, branch, position) in enumerate(columns):
        rows.append({"column": i, "word": word, "branch": branch, "position": position})
    page.text(
        f"<figure><h3>From text to PPO</h3>{pipeline()}<figcaption>Everything is written from "
        "scratch and trained here. The panel is a program that\nparses a question and looks its "
        "answer up, so the panel's scores are exact. Tales, policy, samples, reward models and PPO "
        "are drawn anew for each\nseed; the trunk that the reward models start from, a LLaMA that "
        "has learnt to answer questions about tales, is one for all seeds.</figcaption></figure>\n"
        "<figure><h3>A prompt and its four responses are one row of one forward pass</h3>"
        f"{row_cells(row)}<figcaption>A real row: the passage (grey), then four\nsampled "
        "questions, each in its colour; the number below a token is its position. Every response "
        "continues where the prompt ended. A token sees a column\nthat is not after it if that "
        "column belongs to the prompt or to its own response; so the prompt is computed once, and "
        "all six pairs are in one\nminibatch.</figcaption></figure>"
    )
    page.figure(
        "row",
        "Who sees whom",
        "Each response sees the whole prompt and its own past, never another response: the result "
        "equals that of four separate rows.",
        rows,
        panel(figures.mask, rows, size=(5.5, 4.4))
    )


def section_policies(page, results):
    page.section("paper-a", "Paper A: ranking against classification")
    rows = policy_rows(results)
    page.figure(
        "scores",
        "Score by the panel",
        "A dot is a seed, a bar and the number the mean. Experts above SFT above the control "
        "(SFT's questions set beside another passage) must hold. The judge's own arm shows how "
        "much PPO can gain when the reward is right. scores-mean and scores-cvar: PPO on the "
        "quantile model of ten opinions a sample, which say more than the order that the ranking "
        "model has seen.",
        rows,
        panel(figures.dots, rows, value="gold", label="score by the panel", size=(5.5, 4.9))
    )
    rows = win_rows(results)
    page.figure(
        "wins",
        "Win rates before the panel",
        "All seeds together; a triangle is one seed. Scores that round to the same multiple of "
        "0.05 tie.",
        rows,
        panel(figures.wins, rows, size=(5.5, 6.9))
    )
    shown, raw = corner_rows(results)
    page.table(
        "corners",
        "Loss or labels? The 2x2 that the paper leaves out",
        "Paper A changes the loss and the labels at once (first and last line). Hold one of them "
        "fixed and read what the other does. With the labels change the texts: labels are on two "
        "experts' questions and the samples, places on the samples; with the loss the map to a "
        "reward. Mean over seeds (least to greatest); 0.5 is a coin.",
        shown,
        raw
    )
    rows = kind_rows(results)
    page.figure(
        "kinds",
        "What the policies ask",
        "The panel likes <em>why</em> and <em>how did it feel</em> best (its tastes are below): "
        "part of a gain can be a change of the kind of question, not of its quality.",
        rows,
        panel(figures.kinds, rows, order=world.QUESTION_TYPES, size=(5.5, 4.7))
    )


def two_panels(draw, rows, **options):
    """Paper A's arms beside the others."""
    return (
        panel(draw, rows, "paper A's arms, and controls", names=PAPER_A, size=TALL, **options),
        panel(draw, rows, "the other arms", names=OTHERS, size=TALL, **options),
    )


def section_training(page, results, metrics):
    """Curves along PPO."""
    rows = step_rows(results, metrics, "score_normalised")
    panels = []
    for arm in PAPER_A:
        if f"ppo-{arm}" in metrics[0]:
            panels.append(panel(
                figures.curves, rows, arm,
                value="score_normalised", label="normalised reward",
                names=[arm], least=0.8, size=(5.5, 3.1)
            ))
    page.figure(
        "reward",
        "Reward during PPO",
        "Each in the deviations of its own reward model's training mix (classification-raw: not "
        "normalised): heights of two reward models say nothing beside each other, only a curve's "
        "own rise does. Line: mean over seeds, smoothed; band: least to greatest.",
        rows,
        *panels
    )
    rows = step_rows(results, metrics, "entropy")
    page.figure(
        "entropy",
        "Entropy during PPO",
        "Full-vocabulary Shannon entropy of the policy on its own samples. Paper A reports a rise "
        "under the classification reward.",
        rows,
        *two_panels(figures.curves, rows, value="entropy", label="nats a token")
    )


def section_ways(page, results, metrics):
    """Where PPO's arms go; held-out loss along a reward model's training."""
    rows = way_rows(results, metrics)
    page.figure(
        "ways",
        "How far each arm goes, and what it is worth",
        "From the supervised policy (KL 0) along the steps of PPO; thin lines are seeds, the large "
        "dot is the end. Compare arms at equal KL. Last panel: the reward model's own opinion of "
        "its policy (broken) beside the panel's (full); where the first rises and the second does "
        "not, the reward is gamed.",
        rows,
        *two_panels(figures.ways, rows),
        panel(
            figures.own, rows, "a tenth of the KL penalty", names=["ranking", "ranking-loose"],
            size=TALL
        )
    )
    rows = passes(results, metrics)
    panels = []
    for value, label in (
        ("eval_loss", "held-out loss, nats"),
        ("eval_accuracy", "held-out pair accuracy"),
    ):
        panels.append(panel(figures.modes, rows, label, value=value, label=label))
    page.figure(
        "together",
        "Six pairs of a passage together, or apart",
        "Few passages, ranking loss, as many updates for both. Apart: each pair is a row of its "
        "own, one pass in all. Together: as many updates are several passes. A held-out loss that "
        "turns up again is overfitting.",
        rows,
        *panels
    )


def section_quantiles(page, results):
    page.section("paper-b", "Paper B: quantiles instead of one number")
    n = spread(each(results, "pairs", "n"), 0)
    agrees = spread(each(results, "pairs", "panel_agrees"), 3)
    page.text(
        f'<p class="lead">Held-out pairs: {escape(n)} a seed. One judge, drawn for each pair, says '
        "which is chosen, as a crowd does; its\nchoice is the panel's in a share of "
        f"{escape(agrees)}, and where they differ no model that reads the text alone can know.</p>"
    )
    rows = value_rows(results)
    seed = results[0]["seed"]
    first = [row for row in rows if row["seed"] == seed]
    panels = []
    for title, name, statistic in (
        ("scalar", "scalar", "mean"),
        ("quantile: mean of ten", "quantile", "mean"),
        ("quantile 0", "quantile", "q0"),
        ("quantile 9", "quantile", "q9"),
    ):
        drawn = [row for row in figures.named(first, name) if row["statistic"] == statistic]
        panels.append(panel(figures.histogram, drawn, title, label="raw output", size=(5.5, 3.4)))
    page.figure(
        "histograms",
        "Chosen and rejected",
        f"Seed {seed}. Level and scale of a reward are free: look at how the two colours overlap, "
        "not at where they are. Quantile 0 lies left of quantile 9 by construction, because "
        "outputs are read sorted.",
        first,
        *panels,
        raw=rows
    )
    shown, raw = reward_rows(results)
    page.table(
        "kl_table",
        "How far apart, and how often right",
        "KL(chosen, rejected) in nats, three ways, and the raw 50-bin histogram with a floor of "
        "1e-10, which measures the sample's size too. Accuracy and AUC do not change when a reward "
        "is stretched. Mean over seeds (least to greatest).",
        shown,
        raw
    )
    page.figure(
        "discrimination",
        "Is a larger KL a better reward?",
        "Further right is more often right. Filled: Gaussian KL; open: raw 50-bin KL of "
        "the same models; what lies between the two is bins and floor, not the model.",
        raw,
        panel(figures.discrimination, raw, size=(5.5, 4.6))
    )


def section_calibration(page, results):
    """Is the reward sure for a reason, and which quantile is good for what?"""
    rows = bin_rows(results, ("scalar", *QUANTILE_MODELS[:3]), "bin", "calibration", "bins")
    page.figure(
        "reliability",
        "When it is sure, is it right?",
        "Confidence is the sigmoid of the difference of two means. Only losses with a ranking term "
        "(scalar, quantile) train it to be a probability; on the diagonal it can be believed.",
        rows,
        panel(figures.reliability, rows, size=(5.5, 4.3))
    )
    rows = quantile_rows(results)
    page.figure(
        "per_quantile",
        "What each quantile is good for",
        "The broken line is the mean of the ten. Where a curve lies on it, that quantile "
        "tells chosen from rejected as well as the mean does.",
        rows,
        panel(figures.per_quantile, rows, "pair accuracy", value="accuracy", label="accuracy"),
        panel(figures.per_quantile, rows, "AUC", value="auc", label="AUC")
    )


def section_distribution(page, results):
    """Are the ten outputs a distribution?"""
    rows = coverage_rows(results)
    path = ("rewards", "scores", "pairs", "quantiles", "coverage")
    loss = spread(each(results, *path, "pinball"), 3)
    constant = spread(each(results, *path, "constant", "pinball"), 3)
    page.figure(
        "coverage",
        "Coverage: do quantiles keep their word?",
        "Target: the panel's ten opinions, pinball loss. A bar runs from P(z &lt; q) to "
        "P(z ≤ q); where it touches the band the quantile is right within "
        f"{COVERAGE_MARGIN}. A constant can cover as well; what reading adds is a smaller pinball "
        f"loss: {loss} against the best constant's {constant}.",
        rows,
        panel(figures.coverage, rows, size=(5.5, 4.6))
    )
    rows = collapse_rows(results)
    page.figure(
        "collapse",
        "A target that is its own answer",
        "Deviation among the ten outputs of one response. Regressed on the response's own mean "
        "(self_mean), the best that the ten can do is to be equal: then no distribution is left.",
        rows,
        panel(
            figures.dots, rows, value="within", label="deviation within a response (log)",
            log=True, size=(5.5, 3.2)
        )
    )


def section_optimum(page, results):
    """What the ten outputs learn from +1 and -1, and what their spread says."""
    rows = closed_rows(results)
    off = spread(each(results, "rewards", "label", "closed_form", "mean_deviation"), 3)
    page.figure(
        "closed",
        "What the quantile Huber loss learns from +1 and −1",
        "Where errors stay under kappa the loss is a square: its optimum (lines) is an "
        "expectile's, not a quantile's, and known in closed form. Training pairs; mean distance "
        f"{off}.",
        rows,
        panel(figures.closed, rows, size=(5.5, 4.4))
    )
    rows = bin_rows(results, QUANTILE_MODELS[:3], "decile", "quantiles", "spread", "deciles")
    path = ("pairs", "quantiles", "spread", "spearman")
    rho = {name: spread(each(results, "rewards", name, *path)) for name in QUANTILE_MODELS}
    rho = "; ".join(f"{name} {value}" for name, value in rho.items())
    page.figure(
        "spread",
        "Does a wide spread mean doubt?",
        "Spearman correlation of quantile 9 − quantile 0 with the deviation of the ten opinions: "
        f"{rho}. A line that falls means: wide is less often right.",
        rows,
        panel(figures.deciles, rows)
    )


def section_texts(page, results, most=4):
    page.section("texts", "What they ask")
    rows = []
    for i, text in enumerate(results[0]["texts"]):
        for name in ordered([{"policies": text["responses"]}]):
            response = text["responses"][name]
            rows.append({
                "passage": i,
                "prompt": text["prompt"],
                "policy": name,
                "question": response["text"].strip(),
                "panel": response["gold"],
            })
    link = page.keep("texts_table", rows)
    page.text(
        f'<p class="lead">The first held-out passages of seed {results[0]["seed"]}, each policy\'s '
        f"first sample, the panel's mean. {link}</p>"
    )
    for i, text in enumerate(results[0]["texts"][:most]):
        passage = escape(text["prompt"].removesuffix("Question:"))
        shown = [row for row in rows if row["passage"] == i]
        shown = [{key: row[key] for key in ("policy", "question", "panel")} for row in shown]
        page.text(
            f"<figure><blockquote>{passage}</blockquote>{figures.table(shown)}</figure>"
        )


def section_panel(page, results):
    page.section("panel", "The panel")
    keys = ("name", "why", "feel", "who", "what", "where", "vague", "missing", "broken", "fondness")
    tastes = []
    for judge in world.PANEL:
        fond = ", ".join(judge.fond[:4]) + (" …" if judge.fond else "")
        tastes.append({**{key: getattr(judge, key) for key in keys}, "fond of": fond})
    page.table(
        "tastes",
        "What each judge likes",
        "What an answerable question of each kind is worth. vague: well formed, but the passage "
        "does not answer it; missing: taken away for each name that the passage lacks; broken: not "
        "a question of this world.",
        tastes
    )
    rows = []
    raw = []
    for name in ordered(results):
        scores = {}
        for judge in world.PANEL:
            scores[judge.name] = mean(each(results, "policies", name, "judges", judge.name))
        rows.append({"policy": name, **scores})
        for r in results:
            scores = get(r, "policies", name, "judges") or {}
            raw.append({"policy": name, "seed": r["seed"], **scores})
    page.table("judges", "Mean score of each policy by each judge", "Mean over seeds.", rows, raw)


def section_made(page, out, study, seeds):
    page.section("made", "How it was made")
    path = out / "seed0" / "sft" / "config.json"
    versions = (get(read_json(path), "versions") if path.exists() else None) or {}
    versions = ", ".join(f"{name} {version}" for name, version in versions.items())
    done = {}
    seconds = {}
    for name, stage in study["stages"].items():
        kind = name
        if name.startswith("seed"):
            seed, kind = name[4:].split("/")
            if int(seed) >= seeds:
                continue
        done[name] = stage
        seconds.setdefault(kind, []).append(stage["seconds"])
    peak = max([stage["peak_gib"] for stage in done.values()], default=None)
    scale = escape(str(study["scale"]))
    workers = escape(many(study.get("workers", 1), "worker"))
    folder = escape(str(out))
    page.text(
        f"<pre>python -m nanorlhf.study --scale {scale} --seeds {seeds} --out {folder}</pre>\n"
        f"<p>Scale {scale}, {many(seeds)}, {many(len(done), 'stage')} in "
        f"{study['seconds'] / 60:.1f} minutes on {workers} of one thread\n"
        f"each; most memory of a worker {num(peak)} GiB. {escape(versions)}.</p>\n"
        f'<p class="machine">Page written on {escape(platform.system())} '
        f"{escape(platform.machine())}, {os.cpu_count()} cores, Python\n"
        f"{platform.python_version()}.</p>\n"
        f"<p>Every run has its folder in {folder} (seed0/sft, seed0/rm-ranking, "
        "seed0/ppo-ranking …), with its flags, metrics and samples.</p>"
    )
    page.table(
        "stages",
        "Stages",
        "Seconds of the last attempt, mean over seeds (least to greatest).",
        [{"stage": name, "seconds": spread(x, 1)} for name, x in sorted(seconds.items())],
        [{"stage": name, "seconds": stage["seconds"]} for name, stage in done.items()]
    )
    links = " ".join(f'<a href="{name}">{name}</a>' for name in sorted(page.csv))
    page.text(f"<p>All numbers: {links}</p>")


def overview(results, metrics):
    """The four most telling figures, for a README.  -> PNG bytes"""
    scores = policy_rows(results)
    steps = step_rows(results, metrics, "entropy")
    ways = way_rows(results, metrics)
    _, rewards = reward_rows(results)
    return figures.overview([
        panel(
            figures.dots, scores, "Score by the panel: a dot a seed", value="gold",
            label="score by the panel"
        ),
        panel(
            figures.curves, steps, "Entropy during PPO",
            value="entropy", label="nats a token", names=PAPER_A
        ),
        panel(figures.ways, ways, "Score by the panel against KL", names=PAPER_A),
        panel(figures.discrimination, rewards, "Reward models: KL and accuracy"),
    ])


def write(out, seeds):
    """Writes OUT/page/.  -> the three sentences and the path, to be printed"""
    with as_written(out):
        return _write(Path(out), seeds, *load(Path(out), seeds))


def _write(out, seeds, study, results, metrics):
    page = figures.Page()
    folder = out / "page"
    sentences = [sentence_wins(results), sentence_why(results), sentence_quantile(results)]
    section_claims(page, results, metrics)
    section_setup(page, results)
    section_policies(page, results)
    section_training(page, results, metrics)
    section_ways(page, results, metrics)
    section_quantiles(page, results)
    section_calibration(page, results)
    section_distribution(page, results)
    section_optimum(page, results)
    section_texts(page, results)
    section_panel(page, results)
    section_made(page, out, study, seeds)
    warning = {
        1: " One seed is an example, not a result.",
        2: " Two seeds show that something varies, not by how much.",
    }.get(seeds, "")
    head = (
        '<p class="lead">Two papers done again from scratch in an invented world of fairy tales, '
        "whose judges can be asked anything: which reward\nmodel makes the better policy, and what "
        f"do quantiles add? {many(seeds)}, scale {escape(str(study['scale']))}.{warning}</p>\n"
    )
    head += "\n".join(
        f'<p class="answer"><b>{escape(lead)}</b>{escape(rest)}</p>' for lead, rest in sentences
    )
    folder.mkdir(exist_ok=True)
    for name, data in page.csv.items():
        replace(folder / name, data)
    replace(folder / "overview.png", overview(results, metrics))
    replace(folder / "index.html", page.whole("nanorlhf: two papers, done again", head).encode())
    answers = "\n\n".join(lead + rest for lead, rest in sentences)
    return f"{answers}\n\nThe page: {folder / 'index.html'}"
