"""PPO with trl's PPOTrainer: policy, reference, reward and value model are four models, a response is a row with its prompt.

job: policy, reward, out (folders), prompts (lists of ids: a rollout), scored (lists of ids, whole texts), steps, max_new_tokens, epochs, temperature, kl_coef,
gamma, lam, clip, value_clip, vf_coef, lr, betas, eps, dtype, seed, threads
"""
import contextlib
import sys
import time

import torch
from datasets import Dataset
from timed import answer, job
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    TrainerCallback,
)
from trl import PPOConfig, PPOTrainer
from trl.trainer.utils import batch_generation, forward, get_reward, selective_log_softmax


class Clock(TrainerCallback):
    """Between the ends of two rollouts: PPOTrainer announces no beginning of a step."""
    def on_train_begin(self, *_, **__):
        self.at = [time.perf_counter()]

    def on_step_end(self, *_, **__):
        self.at.append(time.perf_counter())


def arguments(values):
    """Where trl's defaults would be other work than ours it is said otherwise, and only there."""
    n = len(values["prompts"])
    return PPOConfig(
        output_dir=values["out"], report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, seed=values["seed"],
        num_sample_generations=0,                            # 10: samples, decodes and prints
        gradient_checkpointing=False, bf16=values["dtype"] == "bfloat16",        # both on: slower, and other numbers
        per_device_train_batch_size=n, num_mini_batches=1, num_ppo_epochs=values["epochs"], total_episodes=n * values["steps"],
        local_rollout_forward_batch_size=n,                  # the whole rollout in one forward
        response_length=values["max_new_tokens"], temperature=values["temperature"],    # 53 and 0.7
        stop_token=None, missing_eos_penalty=None,           # EOS is a token like others: every response has max_new_tokens
        whiten_rewards=False, kl_estimator="k1", kl_coef=values["kl_coef"], gamma=values["gamma"], lam=values["lam"], cliprange=values["clip"],
        cliprange_value=values["value_clip"], vf_coef=values["vf_coef"], learning_rate=values["lr"], lr_scheduler_type="constant",
        adam_beta1=values["betas"][0], adam_beta2=values["betas"][1], adam_epsilon=values["eps"], weight_decay=0.0)


@torch.no_grad()
def first_look(trainer, values, pad):
    """Before the first update, by trl's own functions: the ratio that is farthest from 1, tokens a response, and the scores of given texts."""
    queries = trainer.data_collator([{"input_ids": ids} for ids in values["prompts"]])["input_ids"]
    how = GenerationConfig(max_new_tokens=values["max_new_tokens"], temperature=values["temperature"] + 1e-7, top_k=0.0, top_p=1.0, do_sample=True)
    rows, logits = batch_generation(trainer.policy_model, queries, len(queries), pad, how)
    responses = rows[:, queries.shape[1] :]
    again = forward(trainer.model, rows, pad)[0].logits[:, queries.shape[1] - 1 : -1] / (values["temperature"] + 1e-7)
    ratio = (selective_log_softmax(again, responses) - selective_log_softmax(logits, responses)).exp().flatten()
    scores = [get_reward(trainer.reward_model, torch.tensor([ids]), pad, 0)[1].item() for ids in values["scored"]]
    return ratio[(ratio - 1).abs().argmax()].item(), responses.shape[1], scores


def main(values):
    tok = AutoTokenizer.from_pretrained(values["policy"], padding_side="left")
    tok.add_special_tokens({"pad_token": "<|pad|>"})         # behind the vocabulary: no token of a text is taken for padding
    policy, reference = (AutoModelForCausalLM.from_pretrained(values["policy"], dtype=torch.float32) for _ in range(2))
    reward, value = (AutoModelForSequenceClassification.from_pretrained(values["reward"], dtype=torch.float32) for _ in range(2))
    prompts, clock = Dataset.from_dict({"input_ids": values["prompts"]}), Clock()
    trainer = PPOTrainer(arguments(values), tok, policy, reference, reward, prompts, value, eval_dataset=prompts, callbacks=[clock])
    ratio, length, scores = first_look(trainer, values, tok.pad_token_id)
    trainer.train()
    for group in trainer.optimizer.param_groups:
        settings = (*group["betas"], group["eps"], group["weight_decay"], group["lr"])
        assert settings == (*values["betas"], values["eps"], 0.0, values["lr"]), settings
    kl = next(row["objective/kl"] for row in trainer.state.log_history if "objective/kl" in row)       # of the first rollout
    return {"seconds": [end - began for began, end in zip(clock.at, clock.at[1:])], "losses": scores, "kl": [kl], "ratio_first": [ratio],
            "response_length": [length]}


with contextlib.redirect_stdout(sys.stderr):                 # the trainer prints; the answer is the last line of what we print
    found = main(job())
answer(**found)
