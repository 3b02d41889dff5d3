"""Steps whose loss or gradient is not finite: left out, counted, and reported reproducibly."""
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..batching import Row
from ..io.files import replace_all, save_tensors
from . import dist
from .run_folder import read_metadata

MAX_SKIPS_IN_A_ROW = 3         # steps in a row that are not finite, until the run stops
MAX_REPORTS = 3                # files per run: each is as large as the model


@dataclass
class NonFiniteGuard:
    """Are a step's loss and gradient finite, at all processes?

    If not, the step is not taken, and a file is written that reproduces it.
    """

    config: object
    script: str
    model: torch.nn.Module
    skipped: int = 0
    in_a_row: int = 0
    began: str = "a step before this start"

    def numbers(self):
        """For the state: a resumed run goes on counting."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def all_finite(self, step, rows, plan, losses, norms, **tensors):
        """May the step be taken?

        rows: of the step;  plan[process][micro_batch]: indices into rows
        losses[process][micro_batch], norms[process]: loss, and norm of the gradient
        tensors: what else the loss depends on, each (rows, ...)
        Raises FloatingPointError after MAX_SKIPS_IN_A_ROW in a row.
        """
        if all(map(math.isfinite, sum(losses, []) + list(norms))):
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        message = f"step {step}: not finite, first {self._locate(rows, plan, losses)}"
        if self.in_a_row == 1:
            message += dist.on_rank_zero(lambda: self._write_report(step, rows, message, tensors))
            self.began = message
        if self.in_a_row >= MAX_SKIPS_IN_A_ROW:
            raise FloatingPointError(
                f"{MAX_SKIPS_IN_A_ROW} steps in a row are not finite, and were not taken; "
                f"they began at {self.began}"
            )
        print(f"  warning: {message}; the step is not taken")
        self.model.zero_grad(set_to_none=True)
        return False

    def _locate(self, rows, plan, losses):
        """Where it began, in words: in the forward of some rows, or later, in the backward."""
        for process, local_losses in enumerate(losses):
            for micro_batch, loss in enumerate(local_losses):
                if not math.isfinite(loss):
                    indices = [rows[i].index for i in plan[process][micro_batch]]
                    return (
                        f"the loss of rows {indices} of the data, "
                        f"micro-batch {micro_batch} of process {process}"
                    )
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"the gradient of {name}, all losses are finite"
        return "the gradient's norm, each gradient is finite"

    def _write_report(self, step, rows, message, tensors):
        """-> words for the message that name the file; empty after MAX_REPORTS files"""
        out = Path(self.config.out)
        if len(list(out.glob("nonfinite-*.safetensors"))) >= MAX_REPORTS:
            return ""
        metadata = {
            "script": self.script,
            "step": step,
            "message": message,
            "flags": asdict(self.config),
            "rows": [asdict(row) for row in rows]
        }
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach().cpu()
        content = save_tensors(tensors, {"run": json.dumps(metadata)})
        file = f"nonfinite-{step:06}.safetensors"
        replace_all(out, {file: content})
        return f"; reproduced by {out / file}"


@torch.no_grad()
def reproduce(path, model):
    """Fills a model of the same kind with the weights of a NonFiniteGuard's report.

    -> (rows, tensors that the loss depends on, {script, step, message, flags})
    """
    metadata = read_metadata(path)
    tensors = load_file(path)
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors.pop(f"model.{name}"))
    return [Row(**row) for row in metadata.pop("rows")], tensors, metadata
