"""Ranking reward model on HH's pairs: train_rm.py against trl's RewardTrainer.

    python -m benchmarks.reward_hh --peers DIR --data DIR [--peer default]
"""
from dataclasses import dataclass

from benchmarks import side_by_side as bench
from benchmarks.reward_fairytale import against_trl
from nanorlhf.io import data
from nanorlhf.run.cli import run_script

PAIRS = 8                                        # a step


@dataclass(frozen=True)
class Config(bench.Trainers):
    """The flags of every benchmark against a trainer."""


def main(config):
    row = bench.Row("reward model, HH helpful-base", "trl's RewardTrainer", 4, "pairs", PAIRS)
    return against_trl(config, row, lambda: data.load(f"{config.data}/hh-rlhf/helpful-base").train, PAIRS)


if __name__ == "__main__":
    run_script(main, Config)
