"""Ranking reward model on four ranked questions a passage: train_rm.py, all in one row, against trl's RewardTrainer, six pairs of whole texts.

    python -m benchmarks.reward_fairytale --peers DIR --data DIR [--peer default]
"""
from dataclasses import dataclass, replace
from itertools import combinations

from benchmarks import side_by_side as bench
from nanorlhf.io import data
from nanorlhf.run.cli import run_script

K = 4                                            # questions a passage; one passage a step


@dataclass(frozen=True)
class Config(bench.Trainers):
    """The flags of every benchmark against a trainer."""


def ranked(folder):
    """Passages of FairytaleQA with K ranked questions each. The places are made up: the time does not depend on who is best."""
    passages = data.load(f"{folder}/FairytaleQAData").train
    places = lambda group: [replace(response, place=place, label=None) for place, response in enumerate(group.responses[:K])]
    return [replace(group, responses=places(group)) for group in passages if len(group.responses) >= K]


def pairs(group):
    """Every ordered pair, as two whole texts of the peer's."""
    best_first = sorted(group.responses, key=lambda response: response.place)
    return [{"prompt": group.prompt, "chosen": a.text, "rejected": b.text} for a, b in combinations(best_first, 2)]


def against_trl(config, row, groups, per_step):
    """train_rm.py by ranking against RewardTrainer, from the same weights and head. `groups` is a function, since the flags are checked first."""
    python = bench.python_of(config, "now")
    with bench.work_folder() as work:
        bench.save_policy(config, work / "policy")
        bench.save_scorer(work / "policy", work / "scorer")
        return bench.train_against_trl(config, work, row, groups(), per_step, ("train_rm.py", {"loss": "ranking"}),
                                       (python, "trl_reward.py", work / "scorer", pairs))


def main(config):
    row = bench.Row("reward model, FairytaleQA, four ranked questions a passage", "trl's RewardTrainer", 25, "pairs", K * (K - 1) // 2)
    return against_trl(config, row, lambda: ranked(config.data), 1)


if __name__ == "__main__":
    run_script(main, Config)
