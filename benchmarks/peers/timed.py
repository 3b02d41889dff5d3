"""What the peers share: the job they are given, the answer they print, and a clock around a Trainer's steps. Runs in the peers' own environment."""
import json
import re
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from transformers import TrainerCallback

# AdamW and the learning rate of our scripts; whatever reports, saves or evaluates is off.
SAME = {"optim": "adamw_torch_fused", "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "report_to": "none", "logging_strategy": "no", "save_strategy": "no", "eval_strategy": "no",
        "disable_tqdm": True, "use_cpu": True}
TUNED = {"gradient_checkpointing": False}        # trl's default is True: activations are computed twice


def job():
    """The JSON file that the command line names; sets the number of threads."""
    values = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(values["threads"])
    return values


def answer(seconds, losses, **found):
    """The last line that a peer prints: benchmarks.side_by_side.Side as JSON."""
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps({"seconds": seconds, "losses": losses, "memory_gb": int(peak[1]) / 2**20, "found": found,
                      "versions": {name: metadata.version(name) for name in ("torch", "transformers", "trl") if name in sys.modules}}))


def arguments(values):
    """What a trainer's configuration is made with, by the job's `peer`, tuned or default."""
    return SAME | (TUNED if values["peer"] == "tuned" else {}) | {"output_dir": values["out"], "learning_rate": values["lr"],
                                                                  "max_steps": len(values["batches"]), "bf16": values["dtype"] == "bfloat16"}


class Clock(TrainerCallback):
    """From the start of a step to the end of its update. Collating comes before and is not counted against the peer; ours counts its packing."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.began)


def timed(trainer_class, batches, **how):
    """Trains once over the batches (lists of examples) and answers.  how: what trainer_class is made with"""
    from datasets import Dataset

    class Timed(trainer_class):
        losses, padding = [], []

        def get_train_dataloader(self):
            """The batches as they were given, with the trainer's own dataset and padding collator."""
            ends = [sum(map(len, batches[: i + 1])) for i in range(len(batches))]
            plan = [list(range(end - len(batch), end)) for batch, end in zip(batches, ends)]
            return torch.utils.data.DataLoader(self._remove_unused_columns(self.train_dataset), batch_sampler=plan, collate_fn=self.data_collator)

        def training_step(self, model, inputs, *more):
            self.padding.append(1 - inputs["attention_mask"].float().mean().item())
            loss = super().training_step(model, inputs, *more)
            self.losses.append(loss.item())              # not from the log, which rounds
            return loss

    clock = Clock()
    trainer = Timed(train_dataset=Dataset.from_list([example for batch in batches for example in batch]), callbacks=[clock], **how)
    assert len(trainer.train_dataset) == sum(map(len, batches)), "the peer left examples out"
    trainer.train()
    for group in trainer.optimizer.param_groups:         # the loss of a few steps would not show another beta
        assert (group["betas"], group["eps"], group["weight_decay"], group["lr"]) == ((0.9, 0.95), 1e-8, 0.0, how["args"].learning_rate), group
    answer(clock.seconds, Timed.losses, padding=Timed.padding)
