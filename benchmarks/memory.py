"""Memory of a process in each stage, by calculation: a GPT-2 large policy with a LLaMA-7B reward model; and what smaller runs took beside it.

    python -m benchmarks.memory                       the table; some 5 GB for a few layers of the real widths
    python -m benchmarks.memory --measure true        the scripts with GPT-2 124M in float32 on a CPU, beside the same calculation

Weights, gradients and moments are counted from the models' shapes; frozen models under bfloat16 hold their blocks' matrices in bfloat16
(nanorlhf/run/precision.py). What the backward keeps is measured: every tensor that a forward over two and
three layers saves, at two lengths, gives the bytes a layer and column; the rest is multiplication. GB are 2^30 bytes.
"""
import contextlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanorlhf import gpt2
from nanorlhf.batching import Row, pack_rows
from nanorlhf.heads import LOGITS_CHUNK, Policy, RewardModel
from nanorlhf.io import hub, tokenizer
from nanorlhf.run import precision
from nanorlhf.run.cli import check_bounds, run_script

TRAINED = 16                 # bytes per trained parameter: weight, gradient and two moments in float32
GB = 2**30
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Config:
    """The flags."""
    policy: str = "gpt2-large"                   # a size
    reward: str = "llama-7b"                     # a size
    dtype: str = "bfloat16"                      # of the forward
    max_tokens: int = 8192                       # columns a micro-batch
    measure: bool = False                        # run the scripts with GPT-2 124M, float32, and compare


def parameters(family, config, head=True):
    with torch.device("meta"):
        trunk = family(config)
    return sum(p.numel() for name, p in trunk.named_parameters() if head or not name.startswith("lm_head"))


def frozen_bytes(family, config, dtype, head=True):
    """Bytes of a model that is not trained, on the device, as the scripts freeze it."""
    with torch.device("meta"):
        model = RewardModel(family(config))
    trunk = precision.freeze(model, torch.device("meta"), dtype).trunk
    return sum(p.nbytes for name, p in trunk.named_parameters() if head or not name.startswith("lm_head"))


def with_layers(config, n):
    return replace(config, **({"n_layer": n} if isinstance(config, gpt2.GPT2Config) else {"num_hidden_layers": n}), vocab_size=64)


@contextlib.contextmanager
def counted(model):
    """A dict that grows by the memory of each tensor that a forward keeps for its backward, by address; weights and views do not count again."""
    own, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()       # held, so that its address is not given to another; the tensor would hold the graph that holds it
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        yield found


def a_layer(family, config, dtype, columns, activation_checkpointing):
    """Bytes that the backward of `columns` columns needs, without logits.  -> (of two layers, of each more); rows of a 256-token prompt, four times 64"""
    found = {}
    for layers in (2, 3):
        model = RewardModel(family(with_layers(config, layers)))
        model.trunk.activation_checkpointing = activation_checkpointing
        model.init_head()
        for rows in (1, 2):
            batch = pack_rows([Row([1] * 256, [[2] * 64] * 4)] * rows)
            with counted(model) as held, precision.autocast(model, dtype):
                model(batch)
            found[layers, rows] = sum(storage.nbytes() for storage in held.values())
        del model, held                          # before the next one is made
    once = {layers: 2 * found[layers, 1] - found[layers, 2] for layers in (2, 3)}      # whatever the length: the weights' copies in bfloat16
    two, three = (once[layers] + columns / 512 * (found[layers, 2] - found[layers, 1]) for layers in (2, 3))
    return two, three - two


def kept(family, config, dtype, columns, activation_checkpointing):
    """Bytes of the whole model. With activation_checkpointing, blocks keep their inputs, and one at a time all the rest."""
    more = (config.n_layer if family is gpt2.GPT2 else config.num_hidden_layers) - 2
    two, each = a_layer(family, config, dtype, columns, activation_checkpointing)
    return two + more * each + (a_layer(family, config, dtype, columns, False)[1] if activation_checkpointing else 0)


def stage(name, trained, frozen, backward, logits):
    """A line of the table, in GB, from trained parameters and bytes of the rest. In the backward everything is there at once, so that the sum is what a process needs at most."""
    parts = {"weights, gradients, moments": TRAINED * trained, "frozen weights": frozen, "kept for the backward": backward, "logits": logits}
    return {"stage": name, **{key: value / GB for key, value in parts.items()}, "sum": sum(parts.values()) / GB}


def stages(policy, reward, dtype, max_tokens, activation_checkpointing=False):
    """policy, reward: (class, config)  ->  a line for each of the three scripts"""
    wide = 3 * 4 * LOGITS_CHUNK * policy[1].vocab_size          # one chunk's logits, their softmax and gradient in float32
    p, r = parameters(*policy), parameters(*reward, head=False)
    own, theirs = (kept(*model, dtype, max_tokens, activation_checkpointing) for model in (policy, reward))
    frozen = frozen_bytes(*policy, dtype) + frozen_bytes(*reward, dtype, head=False)
    return [stage("train_sft.py", p, 0, own, wide), stage("train_rm.py", r, 0, theirs, 0), stage("train_ppo.py", p, frozen, own, wide)]


def show(lines):
    names = list(lines[0])
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for line in lines:
        print("| " + " | ".join(value if isinstance(value, str) else f"{value:.1f}" for value in line.values()) + " |")


def measured(config):
    """The three scripts for a step or two, each a process: memory_gb of their logs, less what a process holds before it has a model."""
    with tempfile.TemporaryDirectory(prefix="nanorlhf-benchmark-") as folder:
        folder = Path(folder)
        prompt = "the king saw the old house by the river "
        tok = tokenizer.train_bpe([prompt], 270)
        shape = replace(gpt2.SIZES["gpt2"], vocab_size=50257)
        hub.save_policy(folder / "policy", Policy(gpt2.GPT2(shape)), tok)
        ids = len(tok.encode(prompt))
        lines = [{"prompt": prompt * (256 // ids), "responses": [{"text": " house" * 12, "place": place} for place in range(4)]} for _ in range(32)]
        (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        common = ["--data", "data.jsonl", "--max_tokens", str(config.max_tokens), "--groups", "16", "--steps", "2", "--device", "cpu", "--eval_every", "9"]
        runs = {"train_sft.py": ["--init", "policy"], "train_rm.py": ["--init", "policy"],
                "train_ppo.py": ["--policy", "policy", "--reward", "train_rm.py-run", "--max_new_tokens", "32", "--minibatches", "1", "--epochs", "1"]}
        idle = "from nanorlhf.run import speed; import torch, train_ppo; torch.randn(64, 64) @ torch.randn(64, 64); print(speed.peak_memory(torch.device('cpu')))"
        base = float(subprocess.run([sys.executable, "-c", idle], capture_output=True, text=True, check=True, cwd=ROOT).stdout)
        found = {}
        for script, flags in runs.items():
            subprocess.run([sys.executable, str(ROOT / script), *common, *flags, "--out", f"{script}-run"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            rows = [json.loads(row) for row in (folder / f"{script}-run" / "metrics.jsonl").read_text().splitlines()]
            found[script] = max(row.get("memory_gb", 0) for row in rows) - base
    return found


def main(config):
    check_bounds(config, max_tokens=512)
    if config.measure:
        small = (gpt2.GPT2, gpt2.SIZES["gpt2"])
        took = measured(config)
        show([{**line, "measured": took[line["stage"]]} for line in stages(small, small, "float32", config.max_tokens)])
        return
    models = [hub.SIZES[name] for name in (config.policy, config.reward)]
    for activation_checkpointing in (False, True):
        print(f"{config.policy} with {config.reward}, {config.dtype}, micro-batches of {config.max_tokens} columns{', --activation_checkpointing true' if activation_checkpointing else ''}\n")
        show(stages(*models, config.dtype, config.max_tokens, activation_checkpointing))
        print()


if __name__ == "__main__":
    run_script(main, Config)
