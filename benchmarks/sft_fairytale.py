"""A supervised policy on FairytaleQA: train_sft.py, all questions of a passage in one row, against trl's SFTTrainer, each with its passage.

    python -m benchmarks.sft_fairytale --peers DIR --data DIR [--as_is] [--peer default]
"""
from dataclasses import dataclass, replace

from benchmarks import side_by_side as bench
from nanorlhf.io import data
from nanorlhf.run.cli import run_script

K = 4                                            # questions of the one passage of a step
PASSAGES = 2                                     # a step, with --as_is


@dataclass(frozen=True)
class Config(bench.Trainers):
    """The flags of every benchmark against a trainer, and one more."""
    as_is: bool = False                          # two passages a step with the questions that they have, 2.5 on average, instead of four of one


def main(config):
    python = bench.python_of(config, "now")
    groups = data.load(f"{config.data}/FairytaleQAData").train
    against = "trl's SFTTrainer"
    if config.as_is:
        row = bench.Row("supervised, FairytaleQA as it is", against, 5, "questions", None)
    else:
        groups = [replace(group, responses=group.responses[:K]) for group in groups if len(group.responses) >= K]
        row = bench.Row("supervised, FairytaleQA, four questions a passage", against, 8, "questions", K)
    with bench.work_folder() as work:
        bench.save_policy(config, work / "policy")
        questions = lambda group: [{"prompt": group.prompt, "completion": response.text} for response in group.responses]
        return bench.train_against_trl(config, work, row, groups, PASSAGES if config.as_is else 1, ("train_sft.py", {}),
                                       (python, "trl_sft.py", work / "policy", questions))


if __name__ == "__main__":
    run_script(main, Config)
