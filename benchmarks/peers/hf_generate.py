"""Sampling with transformers: `model.generate` and its key-value cache, one row a sample.

job: model (folder), prompts (lists of ids, all of one length), k, max_new_tokens, temperature, dtype, seed, steps (the first warms up), threads, and what is
compared: probe (ids whose log-probability after each prompt is asked for), continuation (ids that follow each prompt)
"""
import time

import torch
from timed import answer, job
from transformers import AutoModelForCausalLM, GenerationConfig


def looks(model, prompts, probe, continuation):
    """Log-probabilities of `probe` at each prompt's last column, and of each token of `continuation` behind it, prompt by prompt."""
    rows, following = torch.tensor([prompt + continuation for prompt in prompts]), torch.tensor(continuation)[:, None]
    logprobs = torch.log_softmax(model(rows).logits[:, -len(continuation) - 1 : -1], -1)
    return [x for row in logprobs for x in row[0, probe].tolist() + row.gather(-1, following).flatten().tolist()]


@torch.inference_mode()
def main(values):
    model = AutoModelForCausalLM.from_pretrained(values["model"], attn_implementation="sdpa", dtype=torch.float32).eval()
    found = looks(model, values["prompts"], values["probe"], values["continuation"])         # in float32, whatever is timed
    if values["dtype"] == "bfloat16":                        # transformers' own way: the weights themselves
        model.to(torch.bfloat16)
    model.generation_config.eos_token_id = None              # nothing ends early, and nothing is computed to forbid it
    # top_k 0: transformers' default would draw from the 50 likeliest tokens
    how = GenerationConfig(do_sample=True, temperature=values["temperature"], top_k=0, top_p=1.0, num_return_sequences=values["k"],
                           max_new_tokens=values["max_new_tokens"], use_cache=True)
    prompts, seconds = torch.tensor(values["prompts"]), []
    torch.manual_seed(values["seed"])
    for _ in range(values["steps"]):
        began = time.perf_counter()
        texts = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=how)
        seconds.append(time.perf_counter() - began)
        assert texts.shape == (len(prompts) * values["k"], prompts.shape[1] + values["max_new_tokens"]), texts.shape
    answer(seconds, found)


main(job())
