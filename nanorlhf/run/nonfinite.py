"""Steps whose loss or gradient is not finite: left out, counted, and written so that they can be reproduced."""
import dataclasses
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..batching import Row
from ..io.files import replace_all
from ..io.hub import save_tensors
from . import dist
from .run_folder import read_metadata

MAX_SKIPS_IN_A_ROW = 3               # steps in a row that are not finite, until the run stops
MAX_REPORTS = 3                # of them, how many are written: each is as large as the model


class NonFiniteGuard:
    """Is a step's loss and gradient finite, at all processes? If not, the step is not taken, and a file is written that reproduces it."""

    def __init__(self, config, script, model, skipped=0, in_a_row=0):
        self.config, self.script, self.model, self.skipped, self.in_a_row = config, script, model, skipped, in_a_row
        self.began = "a step before this start"

    def numbers(self):
        """For the state: a run that goes on counts on."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def all_finite(self, step, rows, plans, losses, norms, **tensors):
        """rows of the step, each process's micro-batches of them, losses of these, gradient norms of the processes; tensors (rows, ...): what else
        the loss depends on.  -> may the step be taken?  Raises FloatingPointError after PATIENCE in a row.
        """
        if all(map(math.isfinite, sum(losses, []) + list(norms))):
            self.in_a_row = 0
            return True
        first = self._first(rows, plans, losses)
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        message = f"step {step}: not finite, first {first}"
        if self.in_a_row == 1:
            message += dist.on_rank_zero(lambda: self._report(step, rows, message, tensors))
            self.began = message
        if self.in_a_row >= MAX_SKIPS_IN_A_ROW:
            raise FloatingPointError(f"{MAX_SKIPS_IN_A_ROW} steps in a row are not finite, and were not taken; they began at {self.began}")
        print(f"  warning: {message}; the step is not taken")
        self.model.zero_grad(set_to_none=True)
        return False

    def _first(self, rows, plans, losses):
        """Where it began, in words: in the forward of some rows, or later, in the backward."""
        for process, (parts, of_parts) in enumerate(zip(plans, losses)):
            for micro_batch, (part, loss) in enumerate(zip(parts, of_parts)):
                if not math.isfinite(loss):
                    return f"the loss of rows {[rows[i].index for i in part]} of the data, micro-batch {micro_batch} of process {process}"
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"the gradient of {name}, all losses are finite"
        return "the gradient's norm, each gradient is finite"

    def _report(self, step, rows, message, tensors):
        out = Path(self.config.out)
        if len(list(out.glob("nonfinite-*.safetensors"))) >= MAX_REPORTS:
            return ""
        file = f"nonfinite-{step:06}.safetensors"
        about = {"script": self.script, "step": step, "message": message, "flags": dataclasses.asdict(self.config), "rows": [dataclasses.asdict(row) for row in rows]}
        weights = {f"model.{name}": parameter.detach().cpu() for name, parameter in self.model.named_parameters()}
        replace_all(out, {file: save_tensors(weights | tensors, {"run": json.dumps(about)})})
        return f"; reproduced by {out / file}"


@torch.no_grad()
def reproduce(path, model):
    """Fills a model of the same kind with the weights of a report of `Finite`.  -> (rows, tensors of the loss, what was said and with which flags)"""
    about, tensors = read_metadata(path), load_file(path)
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors.pop(f"model.{name}"))
    return [Row(**row) for row in about.pop("rows")], tensors, about
