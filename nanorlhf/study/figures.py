"""How the page looks: its style, its drawings, its tables.

A drawing function puts rows (dicts, those of the CSV beside the page) on one pair of axes. Every
panel is a small picture of its own, so that a phone can stack them and a projector can enlarge
them. Ink is a colour that `svg` turns into `currentColor`: a drawing is legible on a light and on
a dark ground.
"""
import csv
import io
import re
from html import escape

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the choice of the backend
from matplotlib.patches import Polygon

INK = "#010203"
# Colour is the reward's kind: blue ranking, orange classification, purple quantile, green the
# judge itself. Shade and dash are its variant.
COLOURS = {
    "ranking": "#2f7fd6",
    "ranking-on-labels": "#58b4ea",
    "ranking-loose": "#5b6fe0",
    "classification": "#dd6b10",
    "classification-raw": "#c98f00",
    "classification-on-places": "#e5695f",
    "judge": "#12996b",
    "scores-mean": "#a855c7",
    "scores-cvar": "#d05f9e",
    "sft": "#878d96",
    "experts": "#12996b",
    "control": "#878d96",
    "scalar": "#2f7fd6",
    "quantile": "#a855c7",
    "label": "#c98f00",
    "scores": "#12996b",
    "self_mean": "#dd6b10",
    "self_mean, before": "#878d96",
    "chosen": "#2f7fd6",
    "rejected": "#dd6b10",
    "together": "#2f7fd6",
    "apart": "#dd6b10",
    "win": "#2f7fd6",
    "loss": "#dd6b10",
    "why": "#2f7fd6",
    "feel": "#a855c7",
    "who": "#12996b",
    "what": "#58b4ea",
    "where": "#c98f00",
    "ill formed": "#878d96",
}
BRANCHES = ("#878d96", "#2f7fd6", "#dd6b10", "#12996b", "#a855c7")
DASHES = {
    "ranking-on-labels": "--",
    "ranking-loose": ":",
    "classification-raw": ":",
    "classification-on-places": "--",
    "scores-cvar": "--",
}
MARKS = {
    "ranking-on-labels": "s",
    "ranking-loose": "D",
    "classification-raw": "D",
    "classification-on-places": "s",
    "scores-cvar": "s",
    "label": "s",
    "scores": "D",
    "self_mean": "^",
}
STYLE = {
    "font.size": 12,
    "font.family": "DejaVu Sans",
    "svg.fonttype": "none",
    "svg.hashsalt": "nanorlhf",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.8,
    "lines.linewidth": 2,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


CSS = """
:root { color-scheme: light dark; --ink: #1d2025; --soft: #5b626d; --ground: #fff; \
--card: #f6f7f9; --line: #d9dce2; --link: #1d63b3 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --soft: #a0a7b3; --ground: #14161a; \
--card: #1d2025; --line: #373c45;
  --link: #7db7f5 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1.2rem clamp(.8rem, 3vw, 2.4rem) 3rem; \
color: var(--ink); background: var(--ground);
  font: 1.06rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: clamp(1.6rem, 4vw, 2.4rem); line-height: 1.2; margin: .4rem 0 }
h2 { margin: 3rem 0 .6rem; padding-top: .6rem; border-top: 2px solid var(--line); \
font-size: 1.6rem }
h3 { margin: 0 0 .5rem; font-size: 1.12rem } a { color: var(--link) }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .95rem; \
margin: .6rem 0 1.4rem }
.lead { color: var(--soft); max-width: 58rem }
.answer { font-size: 1.16rem; border-left: 4px solid #2f7fd6; padding: .1rem 0 .1rem 1rem; \
margin: 1rem 0; max-width: 66rem }
figure { margin: 1.6rem 0; padding: 1rem clamp(.6rem, 2vw, 1.3rem); background: var(--card); \
border-radius: .6rem }
figcaption { color: var(--soft); margin: .5rem 0; max-width: 64rem } .csv { white-space: nowrap; \
font-size: .9rem } details { font-size: .92rem }
summary { cursor: pointer; color: var(--soft) }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); \
gap: 1rem } .panels.p1 { max-width: 41rem }
svg { width: 100%; height: auto; color: var(--ink); display: block }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .92rem; \
margin: .4rem 0; line-height: 1.35 }
th, td { text-align: left; padding: .32rem .7rem; border-bottom: 1px solid var(--line); \
vertical-align: top }
th { color: var(--soft); font-weight: 600 } .n { text-align: right } td.n { \
font-variant-numeric: tabular-nums; white-space: nowrap }
.flow { display: flex; flex-wrap: wrap; gap: .5rem 0; align-items: stretch; margin: 1rem 0 }
.flow div { flex: 1 1 6.9rem; padding: .5rem .6rem; border: 2px solid var(--line); \
border-radius: .5rem; font-size: .93rem; line-height: 1.35 }
.flow i { align-self: center; padding: 0 .3rem; font-style: normal; color: var(--soft); \
font-size: 1.4rem } .flow b { display: block }
.row { display: flex; flex-wrap: wrap; gap: 3px; \
font: .86rem/1.3 ui-monospace, "DejaVu Sans Mono", monospace }
.row span { padding: .12rem .34rem; border-radius: .25rem; text-align: center; \
border-bottom: 4px solid; background: var(--ground) }
.row small { display: block; color: var(--soft); font-size: .72rem }
pre { overflow-x: auto; background: var(--card); padding: .7rem 1rem; border-radius: .5rem; \
font-size: .9rem }
@media (min-width: 1000px) { figure.one { display: grid; \
grid-template-columns: minmax(0, 40rem) minmax(0, 1fr); gap: 0 1.6rem;
  align-items: start } figure.one > h3, figure.one > details { grid-column: 1 / -1 } }
@media (max-width: 700px) { .cards, .cards tbody, .cards tr, .cards td { display: block } \
.cards thead { display: none }
  .cards tr { border-bottom: 2px solid var(--line); padding: .4rem 0 }
  .cards td { border: 0; padding: .15rem 0; text-align: left } .cards td::before { \
content: attr(data-label) ": "; color: var(--soft) }
  .cards td:first-child { font-weight: 600 } }
blockquote { margin: .4rem 0 .8rem; font-style: italic }
"""


def svg(name, draw, rows, size=(5.5, 3.9), title="", **options):
    """One panel as inline SVG: scales with its column, holds no date, shares no id with others."""
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=size, layout="constrained")
        draw(ax, rows, **options)
        ax.set_title(title)
        file = io.StringIO()
        figure.savefig(
            file,
            format="svg",
            metadata={"Date": None, "Creator": None, "Type": None, "Format": None}
        )
        plt.close(figure)
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg"):], flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text).replace(INK, "currentColor")
    text = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{name}">',
        text,
        count=1,
        flags=re.DOTALL,
    )
    return text.replace("xlink:href", "href")


def overview(panels):
    """(draw, rows, title, options) four times, two by two on white.  -> PNG bytes"""
    with plt.rc_context({**STYLE, "figure.facecolor": "white", "savefig.facecolor": "white"}):
        figure = plt.figure(figsize=(12, 9.6), layout="constrained")
        parts = figure.subfigures(2, 2, wspace=0.03, hspace=0.03).flat
        for part, (draw, rows, title, options) in zip(parts, panels):
            ax = part.subplots()
            draw(ax, rows, **options)
            ax.set_title(title)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
        plt.close(figure)
    return file.getvalue()


def known(rows, *names):
    """Rows in which nothing that is drawn is missing."""
    return [row for row in rows if all(row[name] is not None for name in names)]


def named(rows, name):
    return [row for row in rows if row["name"] == name]


def column(rows, name):
    return [row[name] for row in rows]


def by(rows, name):
    """Rows under each value of `name`, in the order of appearance.  -> {value: rows}"""
    groups = {}
    for row in rows:
        groups.setdefault(row[name], []).append(row)
    return groups


def mean_of(rows, name):
    return float(np.mean(column(rows, name))) if rows else float("nan")


def below(ax, columns=2, **more):
    """The legend under the axes, where it hides nothing."""
    if ax.get_legend_handles_labels()[0]:
        ax.figure.legend(loc="outside lower center", ncols=columns, **more)


def line(ax, name, points, **more):
    """A line through the points (x, y) in the colour and with the marks of `name`."""
    if points:
        look = {"marker": MARKS.get(name, "o"), "markersize": 5, "label": name, **more}
        ax.plot(*zip(*points), color=COLOURS[name], **look)


def thin_lines(ax, name, rows, x, y):
    """A thin line per seed."""
    for seed in by(rows, "seed").values():
        ax.plot(column(seed, x), column(seed, y), color=COLOURS[name], linewidth=0.8, alpha=0.4)


# ------------------------------------------------------------------------------------------ paper A

def dots(ax, rows, value, label, log=False):
    """One line per name: a dot per seed, a bar at their mean with the number."""
    names = list(by(rows, "name"))
    for y, name in enumerate(names):
        seeds = known(named(rows, name), value)
        colour = COLOURS.get(name, INK)
        ax.scatter(
            column(seeds, value), [y] * len(seeds),
            s=34, alpha=0.55, color=colour, marker=MARKS.get(name, "o"), linewidths=0
        )
        if seeds:
            middle = mean_of(seeds, value)
            ax.plot([middle, middle], [y - 0.32, y + 0.32], color=colour, linewidth=3)
            ax.text(
                1.01, y, f"{middle:.2g}" if log else num(middle),
                transform=ax.get_yaxis_transform(), va="center", fontsize=11
            )
    ax.set_yticks(range(len(names)), names)
    # Nothing above 0: matplotlib has no log axis for that.
    log = log and any((row[value] or 0) > 0 for row in rows)
    ax.set(ylim=(len(names) - 0.4, -0.9), xlabel=label, xscale="log" if log else "linear")
    ax.margins(x=0.08)


def _shares(ax, y, rows):
    """One bar: wins, ties and losses as shares of all comparisons."""
    total = sum(column(rows, "n"))
    left = 0.0
    for kind, name, colour, alpha, ink in (
        ("wins", "win", COLOURS["win"], 0.9, "white"),
        ("ties", "tie", INK, 0.16, INK),
        ("losses", "loss", COLOURS["loss"], 0.9, "white"),
    ):
        share = sum(column(rows, kind)) / total if total else 0
        ax.barh(
            y, share,
            left=left, height=0.66, color=colour, alpha=alpha,
            label=name if y == 0 else None, linewidth=0
        )
        if share > 0.07:
            middle = left + share / 2
            text = f"{share:.0%}"
            ax.text(middle, y + 0.01, text, ha="center", va="center", fontsize=10, color=ink)
        left += share


def wins(ax, rows):
    """Wins, ties, losses of the first against the second, all seeds together.

    A triangle per seed at wins + ties / 2.
    """
    pairs = by(rows, "pair")
    for y, seeds in enumerate(pairs.values()):
        _shares(ax, y, seeds)
        shares = column(known(seeds, "share"), "share")
        ax.scatter(
            shares, [y - 0.33] * len(shares),
            s=22, marker="v", color=INK, linewidths=0, zorder=3,
            label=None if y else "a seed: wins + ties / 2"
        )
    ax.axvline(0.5, color=INK, linewidth=1, linestyle=":")
    labels = []
    for pair in pairs:
        labels.append(pair.replace(" : ", "\nagainst " if len(pair) > 26 else " against "))
    ax.set_yticks(range(len(pairs)), labels, fontsize=10)
    ax.set(
        ylim=(len(pairs) - 0.4, -0.7), xlim=(0, 1), xticks=(0, 0.5, 1),
        xticklabels=("0", "half", "all")
    )
    ax.grid(False)
    ax.legend(
        loc="lower center", bbox_to_anchor=(0.3, 1.0), ncols=4, fontsize=10,
        handlelength=1, columnspacing=0.9
    )


def smooth(values, width):
    """Mean over a window that shrinks at the ends."""
    half = width // 2
    return [float(np.mean(values[max(0, i - half):i + half + 1])) for i in range(len(values))]


def curves(ax, rows, value, label, names, least=0.1):
    """A line per arm: mean over seeds of the smoothed curve; the band runs from least to greatest.

    The axis spans at least `least`: noise is not to look like a trend.
    """
    for name in names:
        seeds = by(known(named(rows, name), value), "seed").values()
        if not seeds:
            continue
        length = min(map(len, seeds))
        width = max(1, length // 20)
        lines = np.array([smooth(column(seed, value), width)[:length] for seed in seeds])
        steps = [row["step"] + 1 for row in next(iter(seeds))][:length]
        colour = COLOURS[name]
        ax.plot(
            steps, lines.mean(0),
            color=colour, linestyle=DASHES.get(name, "-"), label=name
        )
        if len(lines) > 1:
            ax.fill_between(
                steps, lines.min(0), lines.max(0),
                color=colour, alpha=0.18, linewidth=0
            )
    low, high = ax.get_ylim()
    ax.set(
        xlabel="step of PPO", ylabel=label,
        ylim=(min(low, (low + high - least) / 2), max(high, (low + high + least) / 2))
    )
    if len(names) > 1:
        below(ax, fontsize=10.5)


def kinds(ax, rows, order):
    """Stacked bars: which share of a policy's questions is of which kind."""
    names = list(by(rows, "name"))
    for y, name in enumerate(names):
        left = 0.0
        for kind in order:
            seeds = [row for row in named(rows, name) if row["kind"] == kind]
            seeds = known(seeds, "share")
            share = mean_of(seeds, "share") if seeds else 0.0
            ax.barh(
                y, share,
                left=left, height=0.7, color=COLOURS[kind],
                label=kind if y == 0 else None, linewidth=0, alpha=0.9
            )
            left += share
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.4, -0.6), xlim=(0, 1), xlabel="share of the questions")
    ax.grid(False)
    ax.legend(
        loc="lower center", bbox_to_anchor=(0.36, 1.0), ncols=6, fontsize=10,
        handlelength=0.9, columnspacing=0.8, handletextpad=0.4
    )


def ways(ax, rows, names):
    """Score by the panel against KL to the supervised policy, along an arm's steps.

    Thin: a seed. Thick: the mean; the large dot is the end.
    """
    for name in names:
        arm = known(named(rows, name), "kl", "gold")
        thin_lines(ax, name, arm, "kl", "gold")
        points = [(mean_of(at, "kl"), mean_of(at, "gold")) for at in by(arm, "steps").values()]
        line(ax, name, points, linestyle=DASHES.get(name, "-"), markersize=4.5)
        line(ax, name, points[-1:], label=None, markersize=9, markeredgewidth=0)
    ax.set(xlabel="KL to the supervised policy, nats a response", ylabel="score by the panel")
    below(ax, fontsize=10.5)


def own(ax, rows, names):
    """The panel's score (full line) and the reward model's own (broken line) against KL.

    Where they part, the reward is being gamed.
    """
    for name in names:
        trained = [row for row in named(rows, name) if row["steps"]]
        trained = by(known(trained, "kl", "gold", "own"), "steps").values()
        for value, dash, label in (("gold", "-", "the panel"), ("own", "--", "its reward")):
            points = [(mean_of(at, "kl"), mean_of(at, value)) for at in trained]
            line(ax, name, points, linestyle=dash, label=f"{name}: {label}")
    ax.set(xlabel="KL to the supervised policy, nats a response", ylabel="score")
    below(ax, fontsize=10, handlelength=3)


def modes(ax, rows, value, label):
    """Held-out loss or accuracy on the way through few passages, pairs together and apart."""
    for name, mode in by(known(rows, value), "name").items():
        thin_lines(ax, name, mode, "updates", value)
        by_updates = sorted(by(mode, "updates").items())
        points = [(updates, mean_of(at, value)) for updates, at in by_updates]
        line(ax, name, points)
        for updates, at in by_updates:
            if name == "together" and abs(at[0]["passes"] - 1) < 0.26:
                ax.axvline(
                    updates,
                    color=COLOURS[name], linestyle=":", linewidth=1.2,
                    label="together: one pass done"
                )
    ax.set(xlabel="updates (apart: one pass over the pairs in all)", ylabel=label)
    below(ax, columns=3, fontsize=10, columnspacing=0.8)


def mask(ax, rows):
    """Which column (across) each token (down) sees."""
    edges = []
    for i, row in enumerate(rows):
        if i == 0 or row["branch"] != rows[i - 1]["branch"]:
            edges.append(i)
    edges.append(len(rows))
    prompt = edges[1]
    for start, end in zip(edges, edges[1:]):
        branch = rows[start]["branch"]
        if branch < 0:
            continue
        colour = BRANCHES[branch % len(BRANCHES)]
        if branch:
            corners = [(0, start), (prompt, start), (prompt, end), (0, end)]
            ax.add_patch(Polygon(corners, color=BRANCHES[0], alpha=0.45, linewidth=0))
        stairs = [(i + 1, i + down) for i in range(start, end) for down in (0, 1)]
        corners = [(start, start), *stairs, (start, end)]
        ax.add_patch(Polygon(corners, color=colour, alpha=0.85, linewidth=0))
        ax.text(
            len(rows) * 1.01, (start + end) / 2,
            f"response {branch}" if branch else "prompt",
            va="center", fontsize=10.5
        )
    ax.set(
        xlim=(0, len(rows)), ylim=(len(rows), 0), xlabel="column that is seen",
        ylabel="token that sees", aspect="equal"
    )
    ax.grid(False)


# ------------------------------------------------------------------------------------------ paper B

def histogram(ax, rows, label):
    """Chosen and rejected: shares in common bins and kernel densities (Scott's bandwidth)."""
    rows = known(rows, "value")
    low = min(column(rows, "value"), default=0.0)
    high = max(column(rows, "value"), default=0.0)
    if high > low:
        grid = np.linspace(low - 0.08 * (high - low), high + 0.08 * (high - low), 200)
        for kind, rewards in by(rows, "kind").items():
            x = np.array(column(rewards, "value"))
            ax.hist(
                x, np.linspace(low, high, 31),
                density=True, color=COLOURS[kind], alpha=0.3, label=f"{kind} ({len(x)})"
            )
            if width := x.std() * len(x) ** -0.2:
                kernels = np.exp(-(((grid[:, None] - x) / width) ** 2) / 2)
                density = kernels.mean(1) / width / np.sqrt(2 * np.pi)
                ax.plot(grid, density, color=COLOURS[kind])
    ax.set(xlabel=label, yticks=[])
    ax.spines["left"].set_visible(False)
    below(ax)


def discrimination(ax, rows):
    """KL of chosen to rejected against accuracy: what a paper's KL promises, what is delivered."""
    for name, seeds in by(known(rows, "accuracy"), "name").items():
        for value, filled in (("gaussian", True), ("histogram_raw", False)):
            seeds = known(seeds, value)
            ax.scatter(
                column(seeds, "accuracy"), [max(row[value], 1e-4) for row in seeds],
                s=52, marker=MARKS.get(name, "o"), linewidths=1.6,
                edgecolors=COLOURS[name],
                facecolors=COLOURS[name] if filled else "none",
                label=name if filled else None
            )
    ax.scatter([], [], s=52, facecolors=INK, edgecolors=INK, label="filled: Gaussian KL")
    ax.scatter([], [], s=52, facecolors="none", edgecolors=INK, label="open: raw, 50 bins")
    scale = "log" if known(rows, "accuracy", "gaussian") else "linear"
    ax.set(
        xlabel="pair accuracy on held-out pairs", ylabel="KL(chosen, rejected), nats",
        yscale=scale
    )
    low, high = ax.get_ylim()
    ticks = (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
    ticks = [tick for tick in ticks if low <= tick <= high]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    below(ax, columns=3, fontsize=10.5)


def per_quantile(ax, rows, value, label):
    """Accuracy or AUC of each quantile; the broken line is the mean of the ten."""
    for name, model in by(known(rows, value), "name").items():
        levels = by(model, "level")
        mean = levels.pop("mean", [])
        points = [(level, mean_of(at, value)) for level, at in levels.items()]
        line(ax, name, points)
        if mean:
            ax.axhline(mean_of(mean, value), color=COLOURS[name], linestyle="--", linewidth=1.2)
    ax.set(xlabel="quantile's level", ylabel=label)
    below(ax, columns=4)


def coverage(ax, rows):
    """The share of opinions below each quantile: a bar from P(z < q) to P(z <= q).

    It must touch its level; the band is what is still called right.
    """
    ax.fill_between([0, 1], [-0.05, 0.95], [0.05, 1.05], color=INK, alpha=0.1, linewidth=0)
    ax.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=":")
    for name, colour, shift, label in (
        ("scores", COLOURS["scores"], -0.011, "the model"),
        ("constant", "#878d96", 0.011, "best constant"),
    ):
        levels = by(known(named(rows, name), "below", "at_most"), "level")
        for level, at in levels.items():
            ax.plot(
                [level + shift] * 2, [mean_of(at, "below"), mean_of(at, "at_most")],
                color=colour, linewidth=5, solid_capstyle="round", label=label
            )
            label = None    # one line of the legend for all bars
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="quantile's level", ylabel="share of opinions below it")
    below(ax)


def closed(ax, rows):
    """Ten outputs (dots) beside the loss's optimum (lines), by how often a response wins."""
    rows = known(rows, "won", "output", "closed")
    levels = list(by(rows, "level"))
    for i, level in enumerate(levels):
        bins = [row for row in rows if row["level"] == level]
        bins.sort(key=lambda row: row["won"])
        colour = plt.get_cmap("viridis")(0.25 + 0.52 * i / max(1, len(levels) - 1))
        label = f"{level:.2f}" if i in (0, len(levels) - 1) else None
        ax.plot(
            column(bins, "won"), column(bins, "closed"),
            color=colour, linewidth=1.3, label=label
        )
        ax.scatter(
            column(bins, "won"), column(bins, "output"),
            s=14, color=colour, linewidths=0
        )
    ax.set(xlabel="share of comparisons won in the bin", ylabel="output", ylim=(-1.08, 1.08))
    below(ax, title="line: closed form, dot: model; level")


def deciles(ax, rows):
    """Accuracy of the pairs from narrow to wide spread."""
    for name, model in by(known(rows, "accuracy"), "name").items():
        by_decile = sorted(by(model, "decile").items())
        points = [(decile, mean_of(at, "accuracy")) for decile, at in by_decile]
        line(ax, name, points)
    ax.axhline(0.5, color=INK, linewidth=1, linestyle=":")
    ax.set(xlabel="pairs by spread, tenths from narrow to wide", ylabel="pair accuracy")
    below(ax, columns=4)


def reliability(ax, rows):
    """How often the predicted winner wins, against how sure the model was.

    On the diagonal it can be believed. Dot size: pairs.
    """
    ax.plot([0.5, 1], [0.5, 1], color=INK, linewidth=1, linestyle=":")
    most = max(column(rows, "n"), default=1)
    for name, bins in by(known(rows, "predicted", "observed"), "name").items():
        sizes = [10 + 90 * row["n"] / most for row in bins]
        ax.scatter(
            column(bins, "predicted"), column(bins, "observed"),
            s=sizes, color=COLOURS[name], alpha=0.6, linewidths=0,
            marker=MARKS.get(name, "o"), label=name
        )
    ax.set(xlabel="confidence", ylabel="share right", xlim=(0.48, 1.02))
    below(ax, columns=4, markerscale=0.8)


# -------------------------------------------------------------------------------- the page's pieces

def num(x, digits=2, plus=False):
    """A number for a text; a dash where there is none."""
    return "–" if x is None else f"{x:{'+' if plus else ''}.{digits}f}".replace("-", "−")


def cell(x):
    """A table's cell as text."""
    if x is None:
        return "–"
    if isinstance(x, float):
        return num(x, 3 if abs(x) < 100 else 0)
    return str(x)


def table(rows, most=60, cards=False):
    """Rows (dicts) as a table that scrolls by itself, or that a phone shows as cards.

    Every cell is escaped.
    """
    if not rows:
        return "<p>no numbers</p>"

    def html(tag, name, text, value):
        digits = str(value)
        number = value is None or isinstance(value, (int, float))
        number = number or value != "" and digits[0] in "0123456789−+–" and len(digits) < 28
        align = " class=n" if number else ""
        return f'<{tag}{align} data-label="{escape(str(name))}">{escape(text)}</{tag}>'

    head = "".join(html("th", name, str(name), value) for name, value in rows[0].items())
    lines = []
    for row in rows[:most]:
        cells = (html("td", name, cell(value), value) for name, value in row.items())
        lines.append("<tr>" + "".join(cells) + "</tr>")
    body = "\n".join(lines)
    more = ""
    if len(rows) > most:
        more = f"<p>The first {most} of {len(rows):,} rows; all of them are in the CSV.</p>"
    kind = "cards" if cards else "plain"
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>{more}"
    )


class Page:
    """HTML in order of appearance, and the CSV files beside it."""

    def __init__(self):
        self.html = []
        self.csv = {}
        self.contents = []

    def section(self, name, title):
        self.contents.append(f'<a href="#{name}">{escape(title)}</a>')
        self.html.append(f'<h2 id="{name}">{escape(title)}</h2>')

    def keep(self, name, rows):
        """A CSV, and the words that lead to it."""
        file = io.StringIO()
        names = list(dict.fromkeys(key for row in rows for key in row)) or ["nothing"]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.csv[f"{name}.csv"] = file.getvalue().encode()
        return f'<a href="{name}.csv">{name}.csv</a>'

    def figure(self, name, title, see, rows, *panels, raw=None):
        """Panels that share a CSV; what to see; the numbers, folded away.

        panels: (draw, rows, title of the panel, options) each
        """
        pictures = ""
        for i, (draw, panel_rows, head, options) in enumerate(panels):
            pictures += svg(f"{name}-{i}", draw, panel_rows, title=head, **options)
        one = " class=one" if len(panels) == 1 else ""
        link = self.keep(name, raw or rows)
        self.html.append(
            f'<figure id="{name}"{one}><h3>{escape(title)}</h3>'
            f'<div class="panels p{min(len(panels), 2)}">{pictures}</div>\n'
            f'<figcaption>{see} <span class="csv">{link}</span></figcaption>'
            f"<details><summary>The numbers</summary>{table(rows)}</details></figure>"
        )

    def table(self, name, title, see, rows, raw=None, cards=False):
        """A table that is meant to be read; its CSV holds `raw`, or the same rows."""
        link = self.keep(name, raw or rows)
        self.html.append(f"""<figure id="{name}"><h3>{escape(title)}</h3>{table(rows, cards=cards)}
<figcaption>{see} <span class="csv">{link}</span></figcaption></figure>""")

    def text(self, html):
        self.html.append(html)

    def whole(self, title, head):
        """The file: head (title, sentences) before the contents and the sections."""
        return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">\
<meta name="viewport" content="width=device-width, initial-scale=1">\
<title>{escape(title)}</title>
<style>{CSS}</style></head><body>
<h1>{escape(title)}</h1>
{head}
<nav>{" ".join(self.contents)}</nav>
{chr(10).join(self.html)}
</body></html>
"""
