"""Try a policy on a prompt, or write K responses to every prompt of some data as groups JSONL, judged or not.

    python -m nanorlhf.sample --policy runs/sft --prompt "Once upon a time" [--other runs/ppo]
    python -m nanorlhf.sample --policy runs/sft --data FairytaleQAData --k 4 --out samples.jsonl [--judge judge.py:score] [--keep]
    torchrun --nproc_per_node=8 -m nanorlhf.sample ...          the same file, the prompts shared among eight GPUs
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from . import checkpoint, data, dist, generate, speed
from .batching import context_limit, deal, encode_all
from .config import InputError, check, run
from .files import replace
from .reward import FunctionReward, is_function

REDRAWS = 3                # how often a sample that says the same as another is drawn again


@dataclass(frozen=True)
class Config:
    policy: str                                     # a run or a model folder
    other: str = ""                                 # a second policy, shown beside the first
    prompt: str = ""                                # one prompt to continue
    data: str = ""                                  # or many: FairytaleQA or HH folder, groups JSONL, or a folder with train.jsonl
    out: str = ""                                   # groups JSONL to write for --data; must not exist
    split: Literal["train", "held_out"] = "train"   # which part of --data
    limit: int = 0                                  # prompts to take from the beginning; 0: all
    k: int = 4                                      # responses per prompt
    max_new: int = 48                               # response tokens at most, EOS included
    temperature: float = 1.0                        # 0 takes the likeliest token
    top_p: float = 1.0                              # keep the fewest tokens that hold this much of the mass
    judge: str = ""                                 # path.py:function or reward model: writes scores and places
    keep: bool = False                              # write the data's own responses too, with label 1 beside the samples' 0
    max_tokens: int = 8192                          # columns per batch
    max_length: int = 0                             # positions of prompt + response; 0: the model's context
    seed: int = 0                                   # of the draws
    dtype: Literal["float32", "bfloat16"] = "float32"   # of the forward
    device: str = "auto"                            # cpu, cuda, cuda:1


def draw(policy, rows, config, first=0):
    """K continuations of each row.  -> for each a list of (text, ended)"""
    tok = policy.tokenizer
    with dist.autocast(policy, config.dtype):
        found = generate.sample(policy.trunk, [row.prompt for row in rows], [row.index for row in rows], config.k, config.max_new, tok.eos_id,
                                config.seed, generate.SAMPLE, 0, config.temperature, config.top_p, config.max_tokens, first)
    return [[(tok.decode(ids[:-1]), True) if ids[-1] == tok.eos_id else (tok.decode(ids), False) for ids in responses] for responses in found]


def draw_distinct(policy, rows, config):
    """As `draw`; a text that an earlier sample of the prompt has said is drawn again, a bounded number of times."""
    found = draw(policy, rows, config)
    for attempt in range(1, REDRAWS + 1):
        repeated = [i for i, answers in enumerate(found) if len({text for text, _ in answers}) < config.k]
        if not repeated or config.temperature == 0:
            break
        fresh = draw(policy, [rows[i] for i in repeated], config, first=attempt * config.k)
        for i, answers in zip(repeated, fresh):
            seen = set()
            for j, (text, _) in enumerate(found[i]):
                if text in seen:
                    found[i][j] = answers[j]
                seen.add(found[i][j][0])
    return found


def judged(groups, judge, policy, config):
    """Adds the judge's score and the places that follow from it (equal scores tie)."""
    for group in groups:
        ended = [response.ended for response in group.responses]
        with dist.autocast(policy if isinstance(judge, FunctionReward) else judge.model, config.dtype):
            scores = judge.score_texts([group.prompt], [[response.text for response in group.responses]], [ended], normalised=False)[0].tolist()
        for response, score in zip(group.responses, scores):
            response.scores, response.place = [score], sum(other > score for other in scores)


def write(policy, config, device):
    """K responses to each prompt of --data, into --out."""
    found, out = data.load(config.data), Path(config.out)
    if not config.out or dist.first(lambda: out.exists() or not out.parent.is_dir()):
        raise InputError(f"--out {config.out or '(missing)'}: name a file that does not exist yet, in a folder that does")
    judge = config.judge and (FunctionReward(config.judge) if is_function(config.judge) else checkpoint.load_reward_model(config.judge))
    if config.judge and not is_function(config.judge):
        judge.model.to(device)
    distinct = {}
    for group in getattr(found, config.split):
        distinct.setdefault(group.prompt, data.Group(group.prompt, [], group.cut, group.extra))
        distinct[group.prompt].responses += group.responses
    groups = list(distinct.values())[: config.limit or None]
    bare = [data.Group(group.prompt, [], group.cut) for group in groups]
    limit = context_limit(config.max_length, policy.trunk.config.context)
    rows, reasons = encode_all(bare, policy.tokenizer, limit, config.max_new)
    if not rows:
        raise InputError(f"--data {config.data}: no prompt left ({dict(reasons) or 'the split is empty'})")
    mine = [rows[i] for i in deal([len(row.prompt) + config.k * config.max_new for row in rows], dist.world())[dist.rank()]]
    drawn = []
    for row, answers in zip(mine, draw_distinct(policy, mine, config) if mine else []):
        group = groups[row.index]
        own = [data.Response(r.text, label=1 if r.label is None else r.label, ended=r.ended) for r in group.responses] if config.keep else []
        drawn.append(data.Group(group.prompt, own + [data.Response(text, label=0, ended=ended) for text, ended in answers], group.cut, group.extra))
    if judge:
        judged(drawn, judge, policy, config)
    told = dist.everyone([[row.index, [dataclasses.asdict(r) for r in group.responses]] for row, group in zip(mine, drawn)])
    written = [data.Group(groups[i].prompt, [data.Response(**r) for r in responses], groups[i].cut, groups[i].extra)
               for i, responses in sorted((pair for pairs in told for pair in pairs), key=lambda pair: pair[0])]
    try:
        dist.first(lambda: replace(out, data.write_groups(written)))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from None
    said = [text for group in written for text in {r.text for r in group.responses if r.label == 0}]
    print(f"{out}: {len(written)} prompts, {config.k} samples each, {len(said) / (len(written) * config.k):.3f} distinct; dropped: {dict(reasons) or 'nothing'}")
    for group in written[:3]:
        print(f"...{group.prompt[-60:]!r}")
        for r in group.responses:
            print(f"    {'' if r.place is None else f'place {r.place:g}  score {r.scores[0]:.3f}  '}{'own ' if r.label else ''}{r.text!r}{'' if r.ended else '  (cut off)'}")


def main(config):
    check(config, limit=(0, None), k=(1, None), max_new=(1, None), temperature=(0, None), top_p=(1e-6, 1), max_tokens=(1, None), max_length=(0, None), seed=(0, 2**63 - 1))
    if bool(config.prompt) == bool(config.data):
        raise InputError("give either --prompt or --data")
    if config.data and config.other or config.prompt and (config.out or config.judge or config.keep):
        raise InputError("--other goes with --prompt; --out, --judge and --keep go with --data")
    device = dist.setup(config.device, config.seed)
    if config.data:
        policy = checkpoint.load_policy(config.policy).to(device)
        speed.tune(policy.trunk, device, config.dtype)
        return write(policy, config, device)
    for folder in filter(None, (config.policy, config.other)):
        policy = checkpoint.load_policy(folder).to(device)
        speed.tune(policy.trunk, device, config.dtype)
        rows, reasons = encode_all([data.make_group(config.prompt, [])], policy.tokenizer, policy.trunk.config.context, config.max_new)
        if not rows:
            raise InputError(f"{folder} has {policy.trunk.config.context} positions: --prompt and --max_new {config.max_new} need more")
        print(f"{folder}:")
        for text, ended in draw(policy, rows, config)[0]:
            print(f"  {text!r}{'' if ended else '  (cut off)'}")


if __name__ == "__main__":
    run(main, Config)
