"""Command lines of this repository, run in the process that is there: starting Python and torch
takes longer than many a stage of the study.
"""
import importlib
import shlex

from ..run.cli import parse


def command(program, **flags):
    """The words of a command line: "train_ppo.py" or "-m nanorlhf.sample", then --name value."""
    words = program.split()
    for name, value in flags.items():
        words += [f"--{name}", str(value)]
    return words


def run_command(words):
    """Prints the command, then does what `python WORDS` would do, in this process.

    words: ["train_ppo.py", "--data", ...] or ["-m", "nanorlhf.sample", "--policy", ...]. A script
    is found beside the package or, installed, as a module of its name. Errors are the caller's.
    """
    print(shlex.join(["python", *words]), flush=True)
    program, *arguments = words[1:] if words[0] == "-m" else words
    module = importlib.import_module(program.removesuffix(".py"))
    module.main(parse(module.Config, arguments))
