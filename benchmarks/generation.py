"""Four samples of each of four prompts: nanorlhf.generate.sample, which computes a prompt once, against transformers' model.generate. Both keep a cache.

    python -m benchmarks.generation --peers DIR --data DIR
"""
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata

import torch

from benchmarks import side_by_side as bench
from nanorlhf.batching import Row, Stream, pack_rows
from nanorlhf.generate import Sampling, generate
from nanorlhf.io import data, hub
from nanorlhf.io.read import InputError
from nanorlhf.run import dist, kernels, precision, speed
from nanorlhf.run.cli import run_script

PROMPTS, LENGTH, K, NEW = 4, 200, 4, 24
NEVER = -1                                       # as EOS: no token is it, so that every sample has all its tokens, as the peer's have
SAME = 1e-4                                      # how far apart two log-probabilities may be, looked at in float32
PROBES = 64                                      # tokens, spread over the vocabulary, whose log-probability after a prompt is compared


@dataclass(frozen=True)
class Config(bench.Options):
    """The flags of every benchmark."""
    steps: int = 7                               # samplings a run, each of all 16 answers; the first warms up and is not timed


def passages(config, tok, low, high, n):
    """The first n distinct prompts of FairytaleQA with at least `low` and at most `high` tokens.  -> groups without responses"""
    distinct = {group.prompt: replace(group, responses=[]) for group in data.load(f"{config.data}/FairytaleQAData").train}
    found = [group for prompt, group in distinct.items() if low <= len(tok.encode_prompt(prompt)) <= high][:n]
    if len(found) < n:
        raise InputError(f"--data {config.data}: {len(found)} prompts of {low} to {high} tokens in FairytaleQAData, {n} are needed")
    return found


@torch.no_grad()
def sampling(job):
    """Our side, in a process of its own.  job: as the peer's  ->  Side; in the place of losses the log-probabilities that are compared"""
    torch.set_num_threads(bench.THREADS)
    device = dist.setup("cpu", job["seed"])                  # as our scripts do
    policy = hub.load_policy(job["model"])
    kernels.choose_kernels(policy.trunk, device, job["dtype"])
    looked, seconds, share = [], [], []
    for prompt in job["prompts"]:                            # as responses beside each other: the continuation, and every probe by itself
        logprobs = policy(pack_rows([Row(prompt, [job["continuation"], *([token] for token in job["probe"])])])).logprobs[0]
        looked += logprobs[1:, 0].tolist() + logprobs[0].tolist()
    rows = [Row(prompt, [], index) for index, prompt in enumerate(job["prompts"])]
    limit = speed.measured_flops(device, job["dtype"])
    for step in range(job["steps"]):
        began = time.perf_counter()
        with precision.autocast(policy, job["dtype"]):
            sampling = Sampling(job["k"], job["max_new_tokens"], NEVER, job["seed"], Stream.SAMPLE, job["temperature"])
            texts = generate(policy.trunk, rows, sampling, step)
        seconds.append(time.perf_counter() - began)
        assert [[len(ids) for ids in samples] for samples in texts] == [[job["max_new_tokens"]] * job["k"]] * len(rows)
        share.append(speed.forward_flops(policy.trunk, list(map(Row, job["prompts"], texts)), head=True) / seconds[-1] / limit)
    return bench.Side(seconds, looked, bench.peak_gb(), {"torch": metadata.version("torch")}, {"mfu": share})


def ours(job):
    """A fresh process each time: its peak memory is the sampling's own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(sampling, job).result()


def main(config):
    python = bench.python_of(config, "now")
    row = bench.Row(f"sampling, {PROMPTS} prompts of {LENGTH} tokens, {K} samples of {NEW}", "transformers' generate", 4, "tokens", PROMPTS * K * NEW)
    if config.dtype == "bfloat16":
        row.extra["bfloat16"] = "ours: weights float32, forward under autocast; peer: weights in bfloat16"
    with bench.work_folder() as work:
        tok = bench.save_policy(config, work / "policy")
        prompts = [tok.encode_prompt(group.prompt)[:LENGTH] for group in passages(config, tok, LENGTH, 400, PROMPTS)]
        job = {"model": str(work / "policy"), "prompts": prompts, "k": K, "max_new_tokens": NEW, "temperature": 1.0, "dtype": config.dtype, "seed": bench.SEED,
               "steps": config.steps, "probe": list(range(0, tok.vocab_size, -(-tok.vocab_size // PROBES))), "continuation": tok.encode(" Who saw the fox?")}
        return bench.measure(config, row, lambda: ours(job), python and (lambda: bench.run_peer(python, "hf_generate.py", job, work)), SAME, SAME)


if __name__ == "__main__":
    run_script(main, Config)
