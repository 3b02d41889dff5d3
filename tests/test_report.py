"""The page of the study, from invented numbers: no training. What it says must follow from the numbers, whichever way they fall."""
import copy
import csv
import json
import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")

from nanorlhf.io.read import InputError
from nanorlhf.study import figures, findings, report, world

ARMS = ("ranking", "classification", "judge", "scores-mean", "classification-raw", "ranking-on-labels", "classification-on-places", "scores-cvar", "ranking-loose")
GOLD = {"experts": 1.9, "sft": 0.9, "control": -0.6, "ranking": 1.4, "classification": 0.8, "judge": 1.8, "scores-mean": 1.5, "classification-raw": 1.0, "ranking-on-labels": 0.9,
        "classification-on-places": 1.3, "scores-cvar": 1.2, "ranking-loose": 0.7}
EVIL = '<script>alert(1)</script>"&\''


def policy(name, shift):
    return {"gold": GOLD[name] + shift, "judges": {judge.name: GOLD[name] + shift for judge in world.PANEL}, "answerable": 0.9, "missing": 0.1,
            "kinds": {kind: 1 / 6 for kind in world.QUESTION_TYPES}, "n": 100, "distinct": 1.0, "words": 7.0, "kl": 1.0, "entropy": 0.5 if name == "classification" else 0.4, "tokens": 8.0}


def duel(wins, ties, losses):
    n = wins + ties + losses
    return {"n": n, "wins": wins, "ties": ties, "losses": losses, "share": (wins + ties / 2) / n, "share_low": 0.0, "share_high": 1.0, "p": 0.1}


def pairs(accuracy, kl, quantiles=True):
    said = {"accuracy": accuracy, "n": 100, "auc": accuracy, "panel_accuracy": accuracy, "kl": {name: kl for name in (*findings.ESTIMATORS, "histogram_raw", "js")},
            "calibration": {"bins": [{"low": 0.5, "high": 0.55, "n": 100, "predicted": 0.52, "observed": 0.6}], "ece": 0.08, "brier": 0.2, "log_loss": 0.6, "n": 100}}
    if quantiles:
        said["quantiles"] = {"crossing": 0.1, "within_deviation": 0.3, "spread": {"spearman": 0.25, "deciles": [{"spread": 0.1 * i, "accuracy": 0.6, "n": 10} for i in range(10)]},
                             "per_quantile": {"quantiles": [{"accuracy": 0.6, "auc": 0.61}] * 10, "mean": {"accuracy": 0.62, "auc": 0.63}}}
    return said


def made_up(seed, wins=(60, 20, 20), accuracy=(0.7, 0.7), kl=(0.4, 0.2)):
    """results.json of one seed."""
    shift = 0.01 * seed
    ways = {arm: [{**policy(arm, shift - 0.1), "steps": 2, "kl": 0.5}, {**policy(arm, shift), "steps": 4, "kl": 1.0}] for arm in ARMS}
    rewards = {name: {"ranked": {"accuracy": accuracy, "n": 1000, "auc": accuracy}, "labelled": {"accuracy": 0.6, "n": 1000, "auc": 0.6}, "pairs": {"accuracy": 0.7, "n": 100, "auc": 0.7},
                      "raw_deviation": 0.5} for name, accuracy in (("ranking", 0.75), ("classification", 0.51), ("ranking-on-labels", 0.55), ("classification-on-places", 0.7))}
    values = {statistic: {"chosen": [0.1 * i + seed for i in range(20)], "rejected": [0.1 * i - 0.3 for i in range(20)]} for statistic in ("mean", "q0", "q9")}
    for name in ("scalar", *report.QUANTILE_MODELS):
        q = name == "quantile"
        rewards[name] = {"pairs": pairs(accuracy[not q] + shift, kl[not q] + shift, name != "scalar"), "raw_deviation": 0.5, "values": values}
    levels = [{"level": 0.05 + 0.1 * i, "below": 0.04 + 0.1 * i, "at_most": 0.06 + 0.1 * i, "gap": 0.0, "ok": i < 9} for i in range(10)]
    rewards["scores"]["pairs"]["quantiles"]["coverage"] = {"quantiles": levels, "ok": False, "pinball": 0.25, "constant": {"quantiles": levels, "pinball": 0.35}}
    rewards["self_mean"]["before"] = {"within_deviation": 0.2}
    rewards["self_mean"]["pairs"]["quantiles"]["within_deviation"] = 0.01
    rewards["label"]["closed_form"] = {"bins": [{"n": 10, "won": 0.1 * i, "outputs": [0.0] * 10, "closed": [0.1] * 10} for i in range(10)], "mean_deviation": 0.1, "max_deviation": 0.1}
    text = {"prompt": "The fox was glad. " + EVIL, "responses": {name: {"text": f" {EVIL} {name}", "gold": 1.0} for name in ("experts", "sft", *ARMS)}}
    return {"seed": seed, "policies": {name: policy(name, shift) for name in GOLD}, "ways": ways, "rewards": rewards, "texts": [text] * 2, "pairs": {"n": 100, "panel_agrees": 0.95},
            "passes_a_step": {"together": 1.0, "apart": 0.1},
            "wins": {"ranking : classification": duel(*wins), "ranking : sft": duel(50, 25, 25)},
            "row": {"words": ["The", EVIL, "Who", "?", "Why", "_"], "branch": [0, 0, 1, 1, 2, -1], "positions": [0, 1, 2, 3, 2, 0]}}


def write_study(out, results):
    """The files that the stages leave behind."""
    out.mkdir()
    (out / "study.json").write_text(json.dumps({"scale": "smoke", "seconds": 60.0, "workers": 2, "stages": {"seed0/sft": {"seconds": 5.0, "peak_gib": 0.4}}}))
    for i, result in enumerate(results):
        (folder := out / f"seed{i}").mkdir()
        (folder / "results.json").write_text(json.dumps(result))
        for run in [f"ppo-{arm}" for arm in ARMS] + ["rm-together", "rm-apart"]:
            (folder / run).mkdir()
            rows = [{"step": step, "score_normalised": 0.1 * step + i, "entropy": 0.5 - 0.01 * step} for step in range(4)] if run.startswith("ppo") else \
                [{"step": step, "eval_loss": 0.7 - 0.01 * step, "eval_accuracy": 0.6} for step in (-1, 0, 1, 2, 3, 4, 5)]
            (folder / run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Three seeds, written once.  -> (folder, what is printed, html)"""
    out = write_study(tmp_path_factory.mktemp("report") / "study", [made_up(seed) for seed in range(3)])
    said = report.write(out, 3)
    return out, said, (out / "page/index.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.text.append(text)


def rows_of(out, name):
    with open(out / "page" / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_sentences_carry_the_numbers(study):
    _, said, html = study
    first, second, third, path = said.split("\n\n")
    # 180 wins, 60 ties, 60 losses of 300: 60 %, 20 %, 20 %, share (180 + 30) / 300 = 70 %;  ranking is 1.4 - 0.9 above SFT in every seed
    for part in ("60%", "20%", "300", "70.0%", "3 of 3 seeds", "1.41 for ranking (+0.50 [+0.50, +0.50]", "0.81 for classification (−0.10"):
        assert part in first, (part, first)
    # labels: (1.4 - 0.9 + 1.3 - 0.8) / 2 = .5;  loss: (1.4 - 1.3 + 0.9 - 0.8) / 2 = .1;  three seeds at .51 leave the coin's .5 outside
    for part in ("labels change it by +0.50", "classification by +0.10", "orders 0.51 [0.51, 0.51]", "better than a coin", "0.75 [0.75, 0.75]", "entropy rises (+0.10"):
        assert part in second, (part, second)
    for part in ("accuracy 0.710 against 0.710", "3 of 3 estimators", "Gaussian 0.410 against 0.210", "9 of 10 quantiles", "collapses (0.200 before, 0.010 after)"):
        assert part in third, (part, third)
    assert path.endswith("index.html")
    assert all("".join(Tags(html).text).count(sentence) == 1 for sentence in (first, second, third))


def test_sentences_follow_the_numbers():
    lead = lambda wins, seeds=2: findings.sentence_wins([made_up(i, wins=w) for i, w in enumerate([wins] * seeds if isinstance(wins, tuple) else wins)])[0]
    assert lead((60, 20, 20)).startswith("PPO on the ranking reward is preferred to")
    assert lead((20, 20, 60)).startswith("PPO on the classification reward is preferred to")
    assert lead((40, 20, 40)).startswith("The seeds do not tell")
    assert lead([(90, 5, 5), (30, 30, 40)]).startswith("The seeds do not tell")          # 1,200 comparisons more would not make two seeds agree
    # share - 1/2 is .2 and .425: the interval over two seeds, .31 +- 12.71 x .16 / 1.41, holds 0
    assert lead([(60, 20, 20), (90, 5, 5)]).endswith("in every seed, but so few do not settle it")
    assert "only seed" in lead((60, 20, 20), 1)
    third = lambda *accuracies, kl=(0.4, 0.2): findings.sentence_quantile([made_up(i, accuracy=a, kl=kl) for i, a in enumerate(accuracies)])[0]
    assert third((0.8, 0.7), (0.81, 0.7), (0.8, 0.71)).endswith("discriminates better than the scalar one")
    assert "discriminates worse" in third((0.7, 0.8), (0.7, 0.81), (0.71, 0.8))
    assert "cannot be told apart" in third((0.7, 0.72), (0.72, 0.7), (0.7, 0.7))
    assert "no difference" in third((0.7, 0.72), (0.72, 0.7), (0.7, 0.7), kl=(0.2, 0.2))
    assert third((0.9, 0.7)).startswith("One seed cannot say")


def test_loss_or_labels_follows_the_numbers():
    def lead(**moved):
        found = [made_up(seed) for seed in range(3)]
        for seed, result in enumerate(found):
            for arm, gold in moved.items():
                result["policies"][arm.replace("_", "-")]["gold"] = gold + 0.01 * seed * (arm == "ranking")
        return findings.sentence_why(found)[0]
    assert lead(ranking=1.5, ranking_on_labels=0.8, classification_on_places=1.5, classification=0.8).startswith("The labels move the score; what the loss does cannot")
    assert lead(ranking=1.5, ranking_on_labels=1.5, classification_on_places=0.8, classification=0.8).startswith("The loss moves the score; what the labels do cannot")
    assert lead(ranking=1.8, ranking_on_labels=1.0, classification_on_places=1.5, classification=0.7).startswith("Both labels and loss move the score, the labels more")
    assert lead(ranking=1.0, ranking_on_labels=1.0, classification_on_places=1.0, classification=1.0).startswith("Neither")


def test_interval_by_hand():
    # 1, 2, 3: deviation 1, standard error 1 / sqrt 3, t with two degrees of freedom 4.30: half-width 2.4826
    assert findings.interval([1, 2, None, 3]) == pytest.approx((2 - 2.4826, 2 + 2.4826), abs=1e-4)
    assert findings.interval([1]) is None and findings.sign([1]) is None
    assert findings.sign([1, 1.1, 0.9]) == 1 and findings.sign([-1, -1.1, -0.9]) == -1 and findings.sign([1, -1, 0.1]) == 0


def test_equal_kl_is_on_straight_lines_from_the_supervised_policy():
    way = lambda *points: [{"kl": kl, "gold": gold} for kl, gold in points]
    sft = {"policies": {"sft": {"gold": 1}}}
    results = [{**sft, "ways": {"a": way((2, 3)), "b": way((1, 1), (1.5, 2))}}, {**sft, "ways": {"a": way((1, 2)), "b": way((2, 1), (3, 2))}},
               {**sft, "ways": {"a": way((1, 2))}}]
    # at KL 1.5, where b ends: a is at 1 + 1.5 (3 - 1) / 2 = 2.5, b at 2. At KL 1, where a ends: a is at 2, b, from (0, 1) to (2, 1), at 1. No b: nothing.
    assert findings.at_equal_kl(results, "a", "b") == [pytest.approx(0.5), pytest.approx(1.0), None]


def test_every_text_is_escaped(study):
    out, _, html = study
    assert "<script" not in html and EVIL not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&quot;&amp;&#x27;" in html
    assert not any(tag == "script" for tag, _ in Tags(html).tags) and EVIL in "".join(Tags(html).text)
    assert rows_of(out, "texts_table")[0]["question"].startswith(EVIL)


def test_one_csv_a_figure_with_the_numbers(study):
    out, _, html = study
    named = [attributes["id"] for tag, attributes in Tags(html).tags if tag == "figure" and "id" in attributes]
    assert len(named) > 15 and all((out / "page" / f"{name}.csv").exists() for name in named)
    assert {path.name for path in out.glob("page/*.csv")} == {attributes["href"] for tag, attributes in Tags(html).tags if tag == "a" and attributes["href"].endswith(".csv")}
    assert [float(row["gold"]) for row in rows_of(out, "scores") if row["name"] == "ranking"] == pytest.approx([1.4, 1.41, 1.42])
    assert [(row["wins"], row["n"]) for row in rows_of(out, "wins") if row["pair"] == "ranking : classification"] == [("60", "100")] * 3
    assert [float(row["score_normalised"]) for row in rows_of(out, "reward") if row["name"] == "judge" and row["seed"] == "1"] == pytest.approx([1.0, 1.1, 1.2, 1.3])
    assert [float(row["passes"]) for row in rows_of(out, "together") if row["name"] == "together" and row["seed"] == "0"] == [0, 1, 2, 3, 4, 5, 6]
    assert [float(row["value"]) for row in rows_of(out, "histograms") if (row["name"], row["seed"], row["statistic"], row["kind"]) == ("quantile", "2", "q9", "chosen")][:2] == [2.0, 2.1]
    assert len(rows_of(out, "claims_table")) == 9 and all(row["holds"] == "yes: 3 of 3 seeds" for row in rows_of(out, "floors"))


def test_the_page_stands_alone_on_any_ground(study):
    out, _, html = study
    tags = Tags(html).tags
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//|url\(\s*['\"]?http|@import", html)
    assert not any(tag in ("img", "link", "iframe", "script") for tag, _ in tags)
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]+)\)", html)) | {a["href"][1:] for _, a in tags if a.get("href", "").startswith("#")}
    assert used <= set(ids)
    assert "prefers-color-scheme: dark" in html and "viewport" in html
    assert figures.INK not in html and html.count("currentColor") > 100          # drawings have no ground and no ink of their own
    assert (out / "page/overview.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("page/*.tmp"))


def test_same_study_same_bytes(study, tmp_path, monkeypatch):
    out, said, _ = study
    before = {path.name: path.read_bytes() for path in (out / "page").iterdir()}
    assert report.write(out, 3) == said
    assert {path.name: path.read_bytes() for path in (out / "page").iterdir()} == before


def hollow(x):
    """The same with null for every number that is not a count or a name."""
    return {k: hollow(v) for k, v in x.items()} if isinstance(x, dict) else [hollow(v) for v in x] if isinstance(x, list) else None if isinstance(x, float) else x


def test_nulls_are_dashes(tmp_path):
    whole = made_up(0)
    empty = hollow(copy.deepcopy(whole))
    for way in empty["ways"].values():
        del way[0]["kl"]
    out = write_study(tmp_path / "study", [empty])
    (out / "seed0/rm-apart/metrics.jsonl").unlink()
    (out / "seed0/ppo-judge/metrics.jsonl").write_text('{"step": 0, "score_normalised": null, "entropy": null}\n')
    said = report.write(out, 1)
    html = (out / "page/index.html").read_text(encoding="utf-8")
    assert "–" in html and not re.search(r"\bnan\b|\bNone\b", said + "".join(Tags(html).text))


def test_a_study_that_is_not_done(tmp_path):
    with pytest.raises(InputError, match="results.json"):
        report.write(write_study(tmp_path / "study", [made_up(0)]), 2)
