"""A PPO step - rollout, scores, four epochs: train_ppo.py against trl's PPOTrainer, eight responses on both sides.

    python -m benchmarks.ppo_step --k 4 --peers DIR --data DIR

trl samples one response a prompt, so with --k 4 it is given each prompt four times. It trains a value model of its own; our critic is a head on the policy.
"""
from dataclasses import dataclass, replace

import torch

from benchmarks import side_by_side as bench
from benchmarks.generation import passages
from nanorlhf.io import hub
from nanorlhf.io.read import InputError
from nanorlhf.run.cli import run_script

RESPONSES, SHORTEST, LONGEST, NEW = 8, 150, 250, 16          # responses a step; tokens of a prompt; tokens of a response
GOALS, MEMORY_GOAL = {1: 3.5, 4: 12}, 0.6                    # times as fast;  our peak memory over the peer's
SETTINGS = {"max_new_tokens": NEW, "epochs": 4, "temperature": 1.0, "kl_coef": 0.05, "gamma": 1.0, "lam": 0.95, "clip": 0.2, "value_clip": 0.2, "vf_coef": 0.1,
            "lr": bench.LR}
PROBE = " Who saw the fox?"                                  # scored behind each prompt by both reward models
RATIO = {"float32": 1e-3, "bfloat16": 0.2}                   # what the first ratio may be off; trl samples in float32 where it trains in bfloat16
SAME = 1e-3                                                  # how far apart two scores of the same text may be


@dataclass(frozen=True)
class Config(bench.Options):
    """The flags of every benchmark, and one more."""
    steps: int = 3                               # rollouts a run; the first warms up and is not timed
    k: int = 1                                   # responses a prompt, 1 or 4; prompts are 8 / k


@torch.no_grad()
def never_ends(folder, tok):
    """Weights that never sample EOS, or a step would have fewer tokens on one side: LayerNorm's outputs sum to 0, so against a row
    of constants only its bias counts, and EOS has the logit -0.5 width."""
    policy = hub.load_policy(folder)
    policy.trunk.ln_f.bias.fill_(0.1)
    policy.trunk.wte.weight[tok.eos_id] = -5.0
    hub.save_policy(folder, policy, tok)


def checked(side, dtype):
    """Refuses a side whose first rollout is not what it must be."""
    kl, ratio, length = (side.found[name][0] for name in ("kl", "ratio_first", "response_length"))
    for wrong, what in ((not abs(kl) <= 1e-3, f"KL to the reference is {kl:.2g} before the first update, not 0"),
                        (not abs(ratio - 1) <= RATIO[dtype], f"a first ratio is {ratio:.6f}, not 1"),
                        (length != NEW, f"{length:g} tokens a response, not {NEW}: one ended early")):
        if wrong:
            raise InputError(f"not the same work: {what}")
    return side


def main(config):
    python, k = bench.python_of(config, "ppo"), config.k
    if k not in GOALS:
        raise InputError(f"--k {k}: must be 1 or 4")
    row = bench.Row(f"PPO step, {RESPONSES // k} prompts x {k} responses", "trl's PPOTrainer", GOALS[k], "responses", RESPONSES, {"memory_goal": MEMORY_GOAL})
    if config.dtype == "bfloat16":
        row.extra["bfloat16"] = "trl: bf16=True, which is its trained forward alone; it samples, scores and looks at the reference in float32"
    with bench.work_folder() as work:
        tok = bench.save_policy(config, work / "policy")
        never_ends(work / "policy", tok)
        bench.save_scorer(work / "policy", work / "scorer")
        groups = passages(config, tok, SHORTEST, LONGEST, RESPONSES // k)
        bench.save_groups(groups, work / "data")
        scorer = hub.load_reward_model(work / "scorer")
        texts, n = [group.prompt for group in groups], len(groups)
        scores = scorer.score_texts(texts, [[PROBE]] * n, [[False]] * n, normalised=False)[:, 0].tolist()
        flags = SETTINGS | {"data": work / "data", "policy": work / "policy", "reward": work / "scorer", "out": work / "run", "steps": config.steps,
                            "groups": len(groups), "k": k, "minibatches": 1, "eos_penalty": 0.0, "warmup": 0, "schedule": "constant", "seed": bench.SEED,
                            "dtype": config.dtype, "device": "cpu"}
        prompts = [tok.encode_prompt(group.prompt) for group in groups]
        job = SETTINGS | {"policy": str(work / "policy"), "reward": str(work / "scorer"), "out": str(work / "peer"), "steps": config.steps, "betas": [0.9, 0.95],
                          "eps": 1e-5, "prompts": [ids for ids in prompts for _ in range(k)], "scored": [ids + tok.encode(PROBE) for ids in prompts],
                          "dtype": config.dtype, "seed": bench.SEED}
        ours = lambda: replace(bench.run_ours("train_ppo.py", flags, "kl"), losses=scores)       # what both sides' rewards say of given texts is compared
        peer = lambda: checked(bench.run_peer(python, "trl_ppo.py", job, work), config.dtype)
        return bench.measure(config, row, lambda: checked(ours(), config.dtype), python and peer, SAME, SAME)


if __name__ == "__main__":
    run_script(main, Config)
