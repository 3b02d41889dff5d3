"""Try a policy on a prompt, or write K responses to every prompt of some data, judged or not.

    python -m nanorlhf.sample --policy runs/sft --prompt "Once upon a time" [--compare_with
    runs/ppo] python -m nanorlhf.sample --policy runs/sft --data FairytaleQAData --k 4 --out
    samples.jsonl \\
        [--judge judge.py:score] [--include_originals]
    torchrun --nproc_per_node=8 -m nanorlhf.sample ...     the same file by eight GPUs
"""
import dataclasses
from pathlib import Path
from typing import Literal

from .batching import Stream, encode_all, partition
from .generate import Sampling, generate, room
from .io import data, hub
from .io.data import Response
from .io.files import replace
from .io.read import InputError
from .run import dist, kernels, precision
from .run.cli import check_bounds, context_limit, run_script

MAX_REDRAWS = 3            # how often a sample that says the same as another is drawn again


@dataclasses.dataclass(frozen=True)
class Config:
    policy: str                # a run or a model folder
    compare_with: str = ""     # a second policy, shown beside the first
    prompt: str = ""           # one prompt to continue
    # or many: FairytaleQA or HH folder, groups JSONL, or a folder with train.jsonl
    data: str = ""
    out: str = ""              # groups JSONL to write for --data; must not exist
    split: Literal["train", "held_out"] = "train"   # which part of --data
    max_prompts: int = 0       # prompts to take from the beginning; 0: all
    k: int = 4                 # responses per prompt
    max_new_tokens: int = 48   # response tokens at most, EOS included
    temperature: float = 1.0   # 0 takes the likeliest token
    top_p: float = 1.0         # keep the fewest tokens that hold this much of the mass
    judge: str = ""            # path.py:function or reward model: writes scores and places
    # write the data's own responses too, with label 1 beside the samples' 0
    include_originals: bool = False
    max_tokens: int = 8192     # columns per batch
    max_length: int = 0        # positions of prompt + response; 0: the model's context
    seed: int = 0              # of the draws
    dtype: Literal["float32", "bfloat16"] = "float32"   # of the forward
    device: str = "auto"       # cpu, cuda, cuda:1


def load_policy(folder, config, device):
    policy = hub.load_policy(folder).to(device)
    kernels.choose_kernels(policy.trunk, device, config.dtype)
    return policy


def draw(policy, rows, config, first_sample=0):
    """K continuations of each row.  -> for each a list of (text, ended)"""
    tokenizer = policy.tokenizer
    sampling = Sampling(
        config.k, config.max_new_tokens, tokenizer.eos_id, config.seed, Stream.SAMPLE,
        config.temperature, config.top_p, config.max_tokens
    )
    with precision.autocast(policy, config.dtype):
        responses = generate(policy.trunk, rows, sampling, 0, first_sample)

    def answer(ids):                             # EOS is no text
        return tokenizer.decode(ids), ids[-1] == tokenizer.eos_id

    return [list(map(answer, samples)) for samples in responses]


def draw_distinct(policy, rows, config):
    """As `draw`; a text that its prompt has already is drawn again, a bounded number of times."""
    drawn = draw(policy, rows, config)
    for attempt in range(1, MAX_REDRAWS + 1):
        # dict: one key per text
        repeated = [i for i, answers in enumerate(drawn) if len(dict(answers)) < config.k]
        if not repeated or config.temperature == 0:
            break
        redrawn = draw(policy, [rows[i] for i in repeated], config, attempt * config.k)
        for i, answers in zip(repeated, redrawn):
            seen = set()
            for j, (text, _) in enumerate(drawn[i]):
                if text in seen:
                    drawn[i][j] = answers[j]
                seen.add(drawn[i][j][0])
    return drawn


def add_judgement(groups, judge):
    """Adds the judge's score and the places that follow from it (equal scores tie)."""
    for group in groups:
        texts = [response.text for response in group.responses]
        ended = [response.ended for response in group.responses]
        scores = judge.score_texts([group.prompt], [texts], [ended], normalised=False)[0].tolist()
        for response, score in zip(group.responses, scores):
            response.scores = [score]
            response.place = sum(other > score for other in scores)


def distinct_prompts(dataset, config):
    """One group per prompt of the split, with all responses that the data has for it."""
    distinct = {}
    for group in getattr(dataset, config.split):
        empty = dataclasses.replace(group, responses=[])
        distinct.setdefault(group.prompt, empty).responses.extend(group.responses)
    return list(distinct.values())[: config.max_prompts or None]


def sampled_group(group, answers, config):
    """The group with its samples, label 0, and with --include_originals its own responses, label 1
    unless they have one.
    """
    responses = []
    if config.include_originals:
        for r in group.responses:
            label = 1 if r.label is None else r.label
            responses.append(Response(r.text, label=label, ended=r.ended))
    responses += [Response(text, label=0, ended=ended) for text, ended in answers]
    return dataclasses.replace(group, responses=responses)


def write(policy, config, device):
    """K responses to each prompt of --data, into --out; each process draws its share."""
    dataset = data.load(config.data)
    out = Path(config.out)
    if not config.out or dist.on_rank_zero(lambda: out.exists() or not out.parent.is_dir()):
        raise InputError(
            f"--out {config.out or '(missing)'}: "
            "name a file that does not exist yet, in a folder that does"
        )
    judge = hub.load_reward(config.judge).to(device, config.dtype) if config.judge else None
    groups = distinct_prompts(dataset, config)
    prompts = [dataclasses.replace(group, responses=[]) for group in groups]
    max_length = context_limit(config.max_length, policy.trunk.config.context)
    rows, dropped = encode_all(prompts, policy.tokenizer, max_length, config.max_new_tokens)
    if not rows:
        raise InputError(
            f"--data {config.data}: no prompt left ({dict(dropped) or 'the split is empty'})"
        )
    plan = partition(room(rows, config.k, config.max_new_tokens), dist.world_size())
    local_rows = [rows[i] for i in plan[dist.rank()]]
    drawn = draw_distinct(policy, local_rows, config)
    local_ids = [row.index for row in local_rows]
    local_groups = [
        sampled_group(groups[i], answers, config) for i, answers in zip(local_ids, drawn)
    ]
    if judge:
        add_judgement(local_groups, judge)
    local_responses = [[dataclasses.asdict(r) for r in group.responses] for group in local_groups]
    gathered = dist.all_gather_by_index(len(groups), local_ids, local_responses)
    written = []
    for group, responses in zip(groups, gathered):
        if responses:                            # else its prompt was dropped
            group.responses = [Response(**fields) for fields in responses]
            written.append(group)
    try:
        dist.on_rank_zero(lambda: replace(out, data.write_groups(written)))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from None
    report(written, dropped, config)


def report(groups, dropped, config):
    """What was written, and the first few groups of it."""
    distinct = sum(len({r.text for r in group.responses if r.label == 0}) for group in groups)
    print(
        f"{config.out}: {len(groups)} prompts, {config.k} samples each, "
        f"{distinct / (len(groups) * config.k):.3f} distinct; dropped: {dict(dropped) or 'nothing'}"
    )
    for group in groups[:3]:
        print(f"...{group.prompt[-60:]!r}")
        for r in group.responses:
            place = "" if r.place is None else f"place {r.place:g}  score {r.scores[0]:.3f}  "
            own = "own " if r.label else ""
            print(f"    {place}{own}{r.text!r}{'' if r.ended else '  (cut off)'}")


def show(folder, config, device):
    """A policy's continuations of --prompt."""
    policy = load_policy(folder, config, device)
    context = policy.trunk.config.context
    prompts = [data.make_group(config.prompt, [])]
    rows, _ = encode_all(prompts, policy.tokenizer, context, config.max_new_tokens)
    if not rows:
        raise InputError(
            f"{folder} has {context} positions: "
            f"--prompt and --max_new_tokens {config.max_new_tokens} need more"
        )
    print(f"{folder}:")
    for text, ended in draw(policy, rows, config)[0]:
        print(f"  {text!r}{'' if ended else '  (cut off)'}")


def main(config):
    check_bounds(config, top_p=(1e-6, 1))
    if bool(config.prompt) == bool(config.data):
        raise InputError("give either --prompt or --data")
    if config.data and config.compare_with:
        raise InputError("--compare_with goes with --prompt")
    if config.prompt and (config.out or config.judge or config.include_originals):
        raise InputError("--out, --judge and --include_originals go with --data")
    device = dist.setup(config.device, config.seed)
    if config.data:
        write(load_policy(config.policy, config, device), config, device)
        return
    for folder in filter(None, (config.policy, config.compare_with)):
        show(folder, config, device)


if __name__ == "__main__":
    run_script(main, Config)
