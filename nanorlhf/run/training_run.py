"""What the three training loops share beside the method: their start, evaluations, saves, end."""

from pathlib import Path

import torch

from . import dist, optim, run_folder, speed
from .log import Log
from .nonfinite import NonFiniteGuard
from .signals import GracefulStop, Preempted


class TrainingRun:
    """A run in its folder: a new one, or the same one again.

    first_step: where the loop begins
    numbers: what changes from step to step besides the model, as of the last save: `step`, the
        NonFiniteGuard's counts, and what the script adds, such as the KL coefficient
    """

    def __init__(
        self, config, script, model, optimizer, parent, progress, resuming, **numbers
    ):
        """parent: the model that it starts from;  progress: keys of the progress line

        numbers: the initial values of what the script adds
        """
        numbers = {"step": 0, "skipped": 0, "in_a_row": 0, **numbers}
        if resuming:
            numbers = run_folder.load(config, model, optimizer, numbers)
        dist.broadcast(model.parameters())
        self.config = config
        self.model_folder = Path(config.out) / "model"
        self.script = script
        self.model = model
        self.device = next(model.parameters()).device
        self.optimizer = optimizer
        self.numbers = numbers
        self.first_step = numbers["step"]
        self.guard = NonFiniteGuard(
            config, script, model, numbers["skipped"], numbers["in_a_row"]
        )
        # also where it resumes: --steps may be more than before
        run_folder.write_config(config, script, parent)
        self.log = Log(config.out, self.first_step, config.steps, progress, dist.rank() == 0)
        self.stop = GracefulStop()
        self.signum = 0

    def poll_signals(self):
        """Has a signal come, at any process? save_or_stop will know."""
        self.signum = max(dist.all_gather_object(self.stop.signum))

    def log_step(self, step, **numbers):
        """Adds the steps left out so far, and the greatest memory of a process so far, GB."""
        memory = dist.all_gather_object(speed.peak_memory(self.device))
        self.log.step(step, **numbers, skipped=self.guard.skipped, memory_gb=max(memory))

    def is_last(self, step):
        return step + 1 == self.config.steps

    def evaluates(self, step):
        return self.is_last(step) or (step + 1) % self.config.eval_every == 0

    def save_or_stop(self, step, export, **numbers):
        """Saves by --save_every, at the end, and after a signal, which then raises Preempted.

        export: writes the model folder;  numbers: what the script adds, as in the constructor
        """
        is_last = self.is_last(step)
        if is_last or self.signum or (step + 1) % self.config.save_every == 0:
            run_folder.save(
                self.config, self.script, self.model, self.optimizer,
                step + 1, export, **numbers, **self.guard.numbers()
            )
        if self.signum and not is_last:
            raise Preempted(self.signum)


# ----------------------------------------------------------------------------- lines of the header

def describe_dropped(dropped):
    return f"{dict(+dropped) or 'nothing'}"


def describe_run(config, rows, dropped, device, optimizer, meter):
    """The lines that a supervised and a reward model have in common."""
    columns = config.groups * sum(row.num_tokens for row in rows) // len(rows)
    epochs = config.steps * config.groups / len(rows)
    return {
        "dropped": describe_dropped(dropped),
        "step": f"{config.groups} groups, about {columns} columns; "
                f"{config.steps} steps = {epochs:.2f} epochs",
        "numbers": describe_numbers(config, device, optimizer),
        "machine": meter
    }


def describe_numbers(config, device, optimizer):
    processes = f"{dist.world_size()} process{'es' * (dist.world_size() > 1)}"
    return (
        f"{config.dtype} on {device}, {processes} of {torch.get_num_threads()} threads, "
        f"AdamW lr {config.lr} {config.schedule}, warmup {config.warmup}, "
        f"eps {optimizer.defaults['eps']:g}, "
        f"gradient norm clipped at {optim.MAX_GRAD_NORM}, dropout 0"
    )
