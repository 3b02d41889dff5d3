"""Mistakes that people make in this code, and for each the cheapest test that notices it.

test_faults.py puts each into a copy of the code, where its test must fail.

One is left out, since no test can see it: policy_loss takes the log-ratio before it masks it. The
advantages there are masked too, and the clamp at 80 passes no gradient of what is NaN or infinite,
so neither a value nor a gradient changes.
"""
from typing import NamedTuple

ATTENTION = "nanorlhf/attention.py"
BATCHING = "nanorlhf/batching.py"
DATA = "nanorlhf/io/data.py"
DIST = "nanorlhf/run/dist.py"
GENERATE = "nanorlhf/generate.py"
GPT2 = "nanorlhf/gpt2.py"
HEADS = "nanorlhf/heads.py"
LLAMA = "nanorlhf/llama.py"
LOSSES = "nanorlhf/losses.py"
KERNELS = "nanorlhf/run/kernels.py"
NONFINITE = "nanorlhf/run/nonfinite.py"
OPTIM = "nanorlhf/run/optim.py"
PPO = "nanorlhf/ppo.py"
REWARD = "nanorlhf/reward.py"
RUN_FOLDER = "nanorlhf/run/run_folder.py"
SPEED = "nanorlhf/run/speed.py"
TRAIN_PPO = "train_ppo.py"
TRAIN_SFT = "train_sft.py"


class Mistake(NamedTuple):
    """An edit of one file that makes it wrong."""

    name: str
    file: str                   # from the root of the repository
    old: str                    # stands there exactly once
    new: str                    # what is put in its place
    test: str                   # in tests/, and must fail
    says: str = ""              # the misconception, in a sentence


MISTAKES = [
    # ------------------------------------------------- The row: which column belongs to which token
    Mistake(
        name="predictor off by one",
        file=BATCHING,
        old="[P - 1, *range(start, end - 1)]",
        new="range(start, end)",
        test="test_faults.py::test_a_row_equals_its_responses_one_by_one",
        says=(
            "Logits at a column predict the next token; the column that holds a token already "
            "knows it."
        ),
    ),
    Mistake(
        name="first token predicted by the column before",
        file=BATCHING,
        old="[P - 1, *range(start, end - 1)]",
        new="range(start - 1, end - 1)",
        test="test_faults.py::test_a_row_equals_its_responses_one_by_one",
        says=(
            "The last prompt column predicts the first token of every response, not the end of the "
            "response before it."
        ),
    ),
    Mistake(
        name="logits at the token, not before it",
        file=HEADS,
        old="batch.logit_index)[mask]",
        new="batch.logit_index)[mask] + 1",
        test="test_faults.py::test_a_row_equals_its_responses_one_by_one",
    ),
    Mistake(
        name="positions run on through the row",
        file=BATCHING,
        old="np.arange(P, P + n)",
        new="np.arange(start, end)",
        test="test_faults.py::test_a_row_equals_its_responses_one_by_one",
        says="Every response continues where the prompt ended, not where its neighbour ended.",
    ),
    Mistake(
        name="positions start again at 0",
        file=BATCHING,
        old="np.arange(P, P + n)",
        new="np.arange(n)",
        test="test_faults.py::test_a_row_equals_its_responses_one_by_one",
        says=(
            "A response goes on from its prompt, so its first position is the prompt's length, not "
            "0."
        ),
    ),
    Mistake(
        name="branches counted from 0",
        file=BATCHING,
        old="k + 1",
        new="k",
        test="test_faults.py::test_a_row_equals_its_responses_one_by_one",
        says=(
            "Branch 0 is the prompt, which all may see; a response numbered 0 is seen by the "
            "others."
        ),
    ),
    Mistake(
        name="padding is branch 0",
        file=BATCHING,
        old="np.full((B, T), -1)",
        new="np.full((B, T), 0)",
        test="test_batching.py::test_batch_by_hand",
        says="Padding numbered as the prompt is seen by every response.",
    ),
    Mistake(
        name="mask over the padding",
        file=BATCHING,
        old="mask[b, k, :n] =",
        new="mask[b, k] =",
        test="test_batching.py::test_batch_by_hand",
        says="The mask says which places hold a token, not which responses exist.",
    ),
    Mistake(
        name="pad = EOS, so EOS is masked away",
        file=BATCHING,
        old="response_mask[b, k, :n] = True",
        new="response_mask[b, k, :n] = [token != response[-1] for token in response]",
        test="test_faults.py::test_eos_is_a_token_like_any_other",
        says="EOS is a token that the policy chooses; masked away, nobody learns to stop.",
    ),
    Mistake(
        name="score read at the row's last column",
        file=BATCHING,
        old="end - 1 if n else P - 1",
        new="T - 1",
        test="test_faults.py::test_a_row_equals_its_responses_one_by_one",
        says=(
            "The score of a response is read at its own last token, not at the last column of the "
            "row."
        ),
    ),
    Mistake(
        name="score read one column late",
        file=BATCHING,
        old="end - 1 if n else P - 1",
        new="min(end, T - 1)",
        test="test_faults.py::test_a_row_equals_its_responses_one_by_one",
    ),
    Mistake(
        name="an empty response ends in its neighbour",
        file=BATCHING,
        old="end - 1 if n else P - 1",
        new="end - 1",
        test="test_batching.py::test_empty_response_reads_the_prompt",
        says=(
            "A response without a token ends where the prompt does, not where its neighbour ended."
        ),
    ),
    Mistake(
        name="`last_index` accepted and ignored",
        file=HEADS,
        old="flat_columns(batch, batch.last_index)",
        new="flat_columns(batch, torch.zeros_like(batch.last_index))",
        test="test_faults.py::test_a_row_equals_its_responses_one_by_one",
    ),
    Mistake(
        name="an absent response is valid",
        file=BATCHING,
        old="valid=np.zeros((B, K), bool)",
        new="valid=np.ones((B, K), bool)",
        test="test_batching.py::test_batch_by_hand",
        says=(
            "A group with fewer responses than the others has places that stand for "
            "nothing."
        ),
    ),
    # -------------------------------------------------------------------------------- Who sees whom
    Mistake(
        name="responses see each other",
        file=ATTENTION,
        old="(key_branch[:, None] == 0) |",
        new="(key_branch[:, None] >= 0) |",
        test="test_faults.py::test_a_row_equals_its_responses_one_by_one[gpt2]",
        says=(
            "A response sees its prompt and itself; seeing its neighbours, it is judged in "
            "their company."
        ),
    ),
    Mistake(
        name="an attention mask accepted and ignored",
        file=ATTENTION,
        old="attn_mask=mask",
        new="attn_mask=None",
        test="test_faults.py::test_a_row_equals_its_responses_one_by_one[gpt2]",
    ),
    Mistake(
        name="detach_value ignored",
        file=HEADS,
        old="hidden.detach() if self.detach_value else hidden",
        new="hidden",
        test="test_faults.py::test_detach_value_keeps_the_value_loss_out_of_the_trunk",
    ),
    # ------------------------------------------- The supervised loss, and what a mean is taken over
    Mistake(
        name="mean over responses of means over tokens",
        file=LOSSES,
        old="-masked_mean(logprobs, mask, count)",
        new="-masked(logprobs, mask).sum(-1).div(mask.sum(-1).clamp(min=1)).mean()",
        test="test_losses.py::test_sft_loss_is_a_mean_over_tokens",
        says=(
            "In a mean of means a token of a short response weighs more than one of a long "
            "response."
        ),
    ),
    Mistake(
        name="losses averaged over padding",
        file=LOSSES,
        old="mask.sum().clamp(min=1) if",
        new="mask.numel() if",
        test="test_losses.py::test_sft_loss_is_a_mean_over_tokens",
        says="Divided by all places, the loss depends on how long the longest response is.",
    ),
    Mistake(
        name="mean of means in the losses",
        file=LOSSES,
        old=" if count is None else count",
        new="",
        test="test_losses.py::test_micro_batches_with_the_whole_count_are_the_whole",
        says=(
            "A micro-batch that divides by its own tokens gives a mean of means, not the mean over "
            "the step."
        ),
    ),
    Mistake(
        name="a sum for a mean",
        file=LOSSES,
        old="masked(x, mask).sum() / (mask.sum().clamp(min=1) if count is None else count)",
        new="masked(x, mask).sum()",
        test="test_losses.py::test_sft_loss_is_a_mean_over_tokens",
        says="With a sum the gradient grows with the batch.",
    ),
    Mistake(
        name="supervised loss of the wrong sign",
        file=LOSSES,
        old="-masked_mean(",
        new="masked_mean(",
        test="test_losses.py::test_sft_loss_is_a_mean_over_tokens",
        says="Log-probabilities are to go up, and a loss goes down.",
    ),
    Mistake(
        name="a mask multiplied in the losses: 0 * NaN",
        file=LOSSES,
        old="torch.where(mask, x, torch.zeros_like(x))",
        new="(x * mask)",
        test="test_losses.py::test_sft_loss_is_a_mean_over_tokens",
        says="0 * NaN is NaN, so a mask must choose and not multiply.",
    ),
    Mistake(
        name="a mask accepted and ignored, losses",
        file=LOSSES,
        old="torch.where(mask, x, torch.zeros_like(x))",
        new="x",
        test="test_losses.py::test_sft_loss_is_a_mean_over_tokens",
    ),
    Mistake(
        name="losses in bfloat16",
        file=LOSSES,
        old="x = x.to(torch.promote_types(x.dtype, torch.float32))",
        new="pass",
        test="test_losses.py::test_float32_or_better",
        says="bfloat16 has three digits; sums of log-probabilities need float32.",
    ),
    Mistake(
        name="float64 squeezed through float32",
        file=LOSSES,
        old="x.to(torch.promote_types(x.dtype, torch.float32))",
        new="x.float()",
        test="test_losses.py::test_float32_or_better",
        says="What is float64 must stay float64, or finite differences no longer fit the gradient.",
    ),
    Mistake(
        name="an empty batch divides by zero",
        file=LOSSES,
        old="mask.sum().clamp(min=1) if",
        new="mask.sum() if",
        test="test_losses.py::test_no_pair_at_all_is_zero",
        says="A batch with nothing to average over is 0 / 0.",
    ),
    # ----------------------------------------------------------------------------- The ranking loss
    Mistake(
        name="a tie makes a pair",
        file=LOSSES,
        old="unsqueeze(-1) < place",
        new="unsqueeze(-1) <= place",
        test="test_losses.py::test_ranked_pairs",
        says="Equal places say nothing; <= makes two pairs of them that contradict each other.",
    ),
    Mistake(
        name="the worst place preferred",
        file=LOSSES,
        old="unsqueeze(-1) < place",
        new="unsqueeze(-1) > place",
        test="test_losses.py::test_ranking_loss_by_hand",
        says="Place 0 is the best; a larger place is worse.",
    ),
    Mistake(
        name="columns taken for the ranking",
        file=LOSSES,
        old="place.unsqueeze(-1) < place.unsqueeze(-2)",
        new="torch.ones_like(place.unsqueeze(-1) < place.unsqueeze(-2)).triu(1)",
        test="test_losses.py::test_ranking_loss_follows_places_not_columns",
        says="The first column need not be the best; `place` says who is.",
    ),
    Mistake(
        name="neighbours in the ranking only",
        file=LOSSES,
        old="unsqueeze(-1) < place",
        new="unsqueeze(-1) + 1 == place",
        test="test_losses.py::test_ranking_loss_by_hand",
        says="All K (K - 1) / 2 pairs say something, not only neighbours in the ranking.",
    ),
    Mistake(
        name="an absent response ranked",
        file=LOSSES,
        old="better & valid.unsqueeze(-1) & valid.unsqueeze(-2)",
        new="better",
        test="test_losses.py::test_ranked_pairs",
        says="A place that holds no response makes no pair.",
    ),
    Mistake(
        name="an absent response is the worse of a pair",
        file=LOSSES,
        old=" & valid.unsqueeze(-2)",
        new="",
        test="test_losses.py::test_ranked_pairs",
        says="Both responses of a pair must be there.",
    ),
    Mistake(
        name="an absent response is the better of a pair",
        file=LOSSES,
        old="valid.unsqueeze(-1) & ",
        new="",
        test="test_losses.py::test_ranked_pairs",
        says="Both responses of a pair must be there.",
    ),
    Mistake(
        name="mean over all pairs at once",
        file=LOSSES,
        old="masked_mean(per_group, pairs_in_group > 0, count)",
        new="per_pair.sum() / (pairs.sum().clamp(min=1) if count is None else count)",
        test="test_losses.py::test_ranking_means_over_pairs_then_over_groups",
        says=(
            "A group of four has 6 pairs, a group of two has 1: take the mean over pairs first, "
            "then over groups."
        ),
    ),
    Mistake(
        name="groups without a pair counted",
        file=LOSSES,
        old="pairs_in_group > 0",
        new="pairs_in_group >= 0",
        test="test_losses.py::test_ranking_means_over_pairs_then_over_groups",
        says="A group whose responses all tie has no opinion, and must not shrink the mean.",
    ),
    Mistake(
        name="divided by C(K,2) whatever the ties",
        file=LOSSES,
        old="/ pairs_in_group.clamp(min=1)",
        new="/ (place.shape[-1] * (place.shape[-1] - 1) / 2)",
        test="test_losses.py::test_ranking_means_over_pairs_then_over_groups",
        says="K (K - 1) / 2 is the number of pairs only where nobody ties and nobody is absent.",
    ),
    Mistake(
        name="pairs divided by C(K,2) twice",
        file=LOSSES,
        old="/ pairs_in_group.clamp(min=1)",
        new="/ pairs_in_group.clamp(min=1) ** 2",
        test="test_losses.py::test_ranking_loss_by_hand",
        says="The mean over pairs is taken once.",
    ),
    Mistake(
        name="sigmoid without its log",
        file=LOSSES,
        old="-logsigmoid(margin)",
        new="-torch.sigmoid(margin)",
        test="test_losses.py::test_ranking_loss_by_hand",
        says=(
            "Minus the probability is not minus its logarithm: pairs that are badly wrong lose "
            "their gradient."
        ),
    ),
    Mistake(
        name="log(sigmoid(d) + 1e-5)",
        file=LOSSES,
        old="-logsigmoid(margin)",
        new="-torch.log(torch.sigmoid(margin) + 1e-5)",
        test="test_losses.py::test_ranking_gradient_of_badly_wrong_pairs_does_not_die",
        says="An epsilon inside the log kills the gradient exactly where the pair is badly wrong.",
    ),
    Mistake(
        name="margin reversed",
        file=LOSSES,
        old="scores.unsqueeze(-1) - scores.unsqueeze(-2)",
        new="scores.unsqueeze(-2) - scores.unsqueeze(-1)",
        test="test_losses.py::test_ranking_loss_by_hand",
        says="The margin is s_better - s_worse; reversed, the model learns to prefer the worse.",
    ),
    Mistake(
        name="a hinge for the ranking loss",
        file=LOSSES,
        old="-logsigmoid(margin)",
        new="torch.relu(1 - margin)",
        test="test_losses.py::test_ranking_loss_by_hand",
        says="A hinge is not the Bradley-Terry likelihood: beyond a margin of 1 it stops learning.",
    ),
    # ---------------------------------------------------------------------- The classification loss
    Mistake(
        name="labels swapped",
        file=LOSSES,
        old="where(label == 1,",
        new="where(label == 0,",
        test="test_losses.py::test_classification_loss_by_hand",
        says="Label 1 is good.",
    ),
    Mistake(
        name="bad responses forgotten",
        file=LOSSES,
        old="logsigmoid(-z)",
        new="torch.zeros_like(z)",
        test="test_losses.py::test_classification_loss_by_hand",
        says="Without the term (1 - y) log sigmoid(-z) every score just grows.",
    ),
    Mistake(
        name="log(1 - sigmoid(z))",
        file=LOSSES,
        old="logsigmoid(-z)",
        new="torch.log(1 - torch.sigmoid(z))",
        test="test_losses.py::test_classification_at_extremes",
        says="1 - sigmoid(100) is 0 in floating point, and its log is -infinity.",
    ),
    Mistake(
        name="least squares on +-1",
        file=LOSSES,
        old="-torch.where(label == 1, logsigmoid(z), logsigmoid(-z))",
        new="(torch.tanh(z / 2) - (2 * (label == 1) - 1)) ** 2",
        test="test_losses.py::test_classification_loss_by_hand",
        says="Regression on +-1 is another loss: its gradient dies where tanh saturates.",
    ),
    Mistake(
        name="balanced weights without their half",
        file=LOSSES,
        old=(
            "weight_good = n / (2 * n_good.clamp(min=1))\n    weight_bad = n / (2 * "
            "n_bad.clamp(min=1))"
        ),
        new="weight_good = n / n_good.clamp(min=1)\n    weight_bad = n / n_bad.clamp(min=1)",
        test="test_losses.py::test_balanced_weights",
        says=(
            "The weights of a group must add up to its number of responses, not to twice "
            "that."
        ),
    ),
    Mistake(
        name="each kind has the other's weight",
        file=LOSSES,
        old="where(good, weight_good, weight_bad)",
        new="where(good, weight_bad, weight_good)",
        test="test_losses.py::test_balanced_weights",
        says="The rare kind must weigh more.",
    ),
    Mistake(
        name="no label counts as bad",
        file=LOSSES,
        old="(label == 0)",
        new="(label != 1)",
        test="test_losses.py::test_balanced_weights",
        says="Label -1 means that nobody said anything.",
    ),
    Mistake(
        name="one kind alone weighs nothing",
        file=LOSSES,
        old="torch.ones_like(weight)",
        new="torch.zeros_like(weight)",
        test="test_losses.py::test_balanced_weights",
        says="A group with good responses alone still says something.",
    ),
    Mistake(
        name="a weight accepted and ignored",
        file=LOSSES,
        old="weight is not None",
        new="False",
        test="test_losses.py::test_balanced_classification_is_the_mean_over_pairs",
        says="Without weights four samples beside one expert count four times as much.",
    ),
    Mistake(
        name="tanh(z) for tanh(z/2)",
        file=REWARD,
        old="torch.tanh(z / 2)",
        new="torch.tanh(z)",
        test="test_losses.py::test_the_reward_of_a_classifier_is_tanh",
        says="2 sigmoid(z) - 1 is tanh(z/2).",
    ),
    Mistake(
        name="sigmoid(z) as the reward",
        file=REWARD,
        old="torch.tanh(z / 2)",
        new="torch.sigmoid(z)",
        test="test_losses.py::test_the_reward_of_a_classifier_is_tanh",
        says="A reward in (0, 1) pays 1/2 to an answer that nobody likes or dislikes.",
    ),
    Mistake(
        name="a middle tie called bad",
        file=DATA,
        old="label.append(None)",
        new="label.append(0)",
        test="test_losses.py::test_places_to_labels",
    ),
    # ----------------------------------------- The quantile loss, and what is read from its outputs
    Mistake(
        name="quantile levels i / n",
        file=LOSSES,
        old=" + 0.5) / n",
        new=") / n",
        test="test_losses.py::test_quantile_levels",
        says="Level 0 is the minimum, and the median is missing.",
    ),
    Mistake(
        name="quantile levels (i + 1) / n",
        file=LOSSES,
        old=" + 0.5) / n",
        new=" + 1.0) / n",
        test="test_losses.py::test_quantile_levels",
        says="The last level is then 1, the maximum, which no finite quantile reaches.",
    ),
    Mistake(
        name="tau the wrong way round",
        file=LOSSES,
        old="(u < 0)",
        new="(u > 0)",
        test="test_losses.py::test_kappa_zero_learns_quantiles",
        says=(
            "Low quantiles are pulled down: an error from below costs tau, one from above 1 - tau."
        ),
    ),
    Mistake(
        name="u = q - z",
        file=LOSSES,
        old="u = z - q",
        new="u = q - z",
        test="test_losses.py::test_kappa_zero_learns_quantiles",
        says="The error is target minus quantile; reversed, every tau becomes 1 - tau.",
    ),
    Mistake(
        name="a quantile's weight without absolute value",
        file=LOSSES,
        old=".to(q.dtype)).abs()",
        new=".to(q.dtype))",
        test="test_losses.py::test_quantile_huber_by_hand",
        says="tau - 1 is negative, so without the absolute value errors on that side are rewarded.",
    ),
    Mistake(
        name="quantiles without asymmetry",
        file=LOSSES,
        old="(tau - (u < 0).to(q.dtype)).abs()",
        new="0.5",
        test="test_losses.py::test_quantile_huber_by_hand",
        says="Without tau every output learns the same number.",
    ),
    Mistake(
        name="a Huber that jumps",
        file=LOSSES,
        old="(huber - kappa / 2)",
        new="huber",
        test="test_losses.py::test_quantile_huber_by_hand",
        says="The straight part must meet the square at kappa.",
    ),
    Mistake(
        name="Huber divided by kappa",
        file=LOSSES,
        old="* huber *",
        new="* huber / (kappa or 1.0) *",
        test="test_losses.py::test_quantile_huber_by_hand",
        says=(
            "QR-DQN divides by kappa and this loss does not; at kappa 1 nobody sees the difference."
        ),
    ),
    Mistake(
        name="mean over quantiles",
        file=LOSSES,
        old="div(num_targets).sum(-1)",
        new="div(num_targets).mean(-1)",
        test="test_losses.py::test_quantile_huber_by_hand",
        says=(
            "It is a sum over quantiles and a mean over targets; else the loss shrinks as "
            "quantiles are added."
        ),
    ),
    Mistake(
        name="sum over targets",
        file=LOSSES,
        old=".div(num_targets)",
        new="",
        test="test_losses.py::test_quantile_huber_by_hand",
        says=(
            "Summed over its targets, a response that was judged ten times weighs ten "
            "times."
        ),
    ),
    Mistake(
        name="a target mask accepted and ignored",
        file=LOSSES,
        old=" * target_mask.unsqueeze(-2)",
        new="",
        test="test_losses.py::test_quantile_loss_means_over_targets_then_over_responses",
        says="Targets that are not there are then taken for 0.",
    ),
    Mistake(
        name="squares where kappa is 0",
        file=LOSSES,
        old="huber = u.abs()",
        new="huber = u.abs() if kappa > 0 else u * u / 2",
        test="test_losses.py::test_quantile_huber_by_hand",
        says="kappa 0 is the pinball loss; squares learn expectiles.",
    ),
    Mistake(
        name="responses without a target counted",
        file=LOSSES,
        old="masked_mean(per_response, has_target,",
        new="masked_mean(per_response, has_target >= 0,",
        test="test_losses.py::test_quantile_loss_means_over_targets_then_over_responses",
        says="A response without a target has loss 0 and must not dilute the mean.",
    ),
    Mistake(
        name="quantiles read unsorted",
        file=REWARD,
        old="outputs.sort(-1).values",
        new="outputs",
        test="test_losses.py::test_statistics_of_unsorted_outputs",
        says="Outputs may cross, so the distribution is read from them sorted.",
    ),
    Mistake(
        name="CVaR of the best",
        file=REWARD,
        old="ordered[..., : cvar_count(statistic[5:], outputs.shape[-1])]",
        new="ordered[..., -cvar_count(statistic[5:], outputs.shape[-1]) :]",
        test="test_losses.py::test_statistics_of_unsorted_outputs",
        says="CVaR is pessimistic: it is the mean of the lowest share.",
    ),
    Mistake(
        name="CVaR is a quantile",
        file=REWARD,
        old=": cvar_count(statistic[5:], outputs.shape[-1])].mean(-1)",
        new="cvar_count(statistic[5:], outputs.shape[-1]) - 1]",
        test="test_losses.py::test_statistics_of_unsorted_outputs",
        says="CVaR is the mean below the quantile, not the quantile.",
    ),
    # --------------------------------------------------------------------------- The unit of reward
    Mistake(
        name="deviation over the mix",
        file=REWARD,
        old="deviation_within(raw) if within else mix",
        new="mix",
        test="test_reward.py::test_the_mean_is_of_responses_and_the_unit_is_within_prompts",
        says="A ranking loss leaves a prompt's level free, so levels are no unit of reward.",
    ),
    Mistake(
        name="paper A's deviation is not to be had",
        file=REWARD,
        old="within = within and any(",
        new="within = any(",
        test="test_reward.py::test_the_mean_is_of_responses_and_the_unit_is_within_prompts",
        says="within=False is the paper's own, over the whole mix.",
    ),
    Mistake(
        name="one response per prompt deviates by NaN",
        file=REWARD,
        old=" and any(len(output) > 1 for output in outputs)",
        new="",
        test="test_reward.py::test_the_mean_is_of_responses_and_the_unit_is_within_prompts",
        says="Without two responses to a prompt there is no deviation within prompts.",
    ),
    Mistake(
        name="deviation over n",
        file=REWARD,
        old="freedom = sum(len(x) - 1 for x in scores)",
        new="freedom = sum(len(x) for x in scores)",
        test="test_reward.py::test_deviation_within_by_hand",
        says="Each prompt's mean costs one degree of freedom: with two responses that is half.",
    ),
    Mistake(
        name="about the mean of all",
        file=REWARD,
        old="(x - x.mean()) ** 2",
        new="(x - torch.cat(scores).mean()) ** 2",
        test="test_reward.py::test_deviation_within_by_hand",
        says="The prompt's own mean is what a score is compared with.",
    ),
    Mistake(
        name="mean of the prompts' means",
        file=REWARD,
        old="(mix.mean().item(), max",
        new="(torch.stack([x.mean() for x in raw]).mean().item(), max",
        test="test_reward.py::test_the_mean_is_of_responses_and_the_unit_is_within_prompts",
        says="The average training response is to have reward 0.",
    ),
    # ------------------------------------------------------------------------------- KL and rewards
    Mistake(
        name="k1 reversed",
        file=PPO,
        old=") - ref_logprobs",
        new=").neg() + ref_logprobs",
        test="test_ppo.py::test_kl_estimates_by_enumeration",
        says=(
            "Samples come from the policy, so log policy - log reference has the mean KL(policy || "
            "reference); reversed, it has its negative."
        ),
    ),
    Mistake(
        name="|k1|",
        file=PPO,
        old=") - ref_logprobs",
        new=").sub(ref_logprobs).abs()",
        test="test_ppo.py::test_kl_estimates_by_enumeration",
        says=(
            "One sample of k1 may be negative, and only the mean is the KL; the mean of |k1| is "
            "larger."
        ),
    ),
    Mistake(
        name="k1 cut at 0",
        file=PPO,
        old=") - ref_logprobs",
        new=").sub(ref_logprobs).clamp(min=0)",
        test="test_ppo.py::test_kl_estimates_by_enumeration",
        says="A sample of k1 may be negative; cut at 0, the estimate is too large.",
    ),
    Mistake(
        name="k2 for k3",
        file=PPO,
        old="torch.expm1(-k1) + k1",
        new="k1 * k1 / 2",
        test="test_ppo.py::test_kl_estimates_by_enumeration",
        says="k1^2 / 2 is near k3 where the two agree, but its mean is not the KL.",
    ),
    Mistake(
        name="k3 with the wrong sign",
        file=PPO,
        old="torch.expm1(-k1) + k1",
        new="torch.expm1(k1) - k1",
        test="test_ppo.py::test_kl_estimates_by_enumeration",
        says=(
            "exp(+k1) needs samples of the reference; under the policy its mean is another number."
        ),
    ),
    Mistake(
        name="k3 by exp(x) - 1",
        file=PPO,
        old="torch.expm1(-k1)",
        new="torch.exp(-k1) - 1",
        test="test_ppo.py::test_k3_keeps_its_digits_where_policy_and_reference_nearly_agree",
        says=(
            "exp(x) - 1 loses its digits where policy and reference nearly agree, which is where "
            "PPO starts."
        ),
    ),
    Mistake(
        name="KL rewarded",
        file=PPO,
        old="-kl_coef *",
        new="kl_coef *",
        test="test_ppo.py::test_rewards_add_up_to_the_objective",
        says="The penalty is subtracted.",
    ),
    Mistake(
        name="score on every token",
        file=PPO,
        old=", last_token(mask))",
        new=", mask)",
        test="test_ppo.py::test_the_score_sits_on_the_last_token_alone",
        says="A response earns its score once; paid on every token, long answers earn more.",
    ),
    Mistake(
        name="score spread evenly",
        file=PPO,
        old="scores.unsqueeze(-1), last_token(mask))",
        new="scores.unsqueeze(-1) / mask.sum(-1, keepdim=True).clamp(min=1), mask)",
        test="test_ppo.py::test_the_score_sits_on_the_last_token_alone",
        says="The sum is right but the credit is not: the score comes with the last token.",
    ),
    Mistake(
        name="score one token past EOS",
        file=PPO,
        old="mask & ~after",
        new="torch.cat([torch.zeros_like(mask[..., :1]), (mask & ~after)[..., :-1]], -1)",
        test="test_ppo.py::test_the_score_sits_on_the_last_token_alone",
    ),
    Mistake(
        name="score on the last column",
        file=PPO,
        old="mask & ~after",
        new="torch.zeros_like(mask).index_fill(-1, torch.tensor(mask.shape[-1] - 1), True)",
        test="test_ppo.py::test_the_score_sits_on_the_last_token_alone",
        says="The last token of a response is not the last column.",
    ),
    Mistake(
        name="KL at the last token only",
        file=PPO,
        old="masked(kl_k1(logprobs, ref_logprobs), mask)",
        new="masked(kl_k1(logprobs, ref_logprobs), last_token(mask))",
        test="test_ppo.py::test_shape_rewards_by_hand",
        says="Every token pays for its own log-ratio.",
    ),
    Mistake(
        name="adaptive KL the wrong way",
        file=PPO,
        old="kl / target - 1",
        new="1 - kl / target",
        test="test_ppo.py::test_adaptive_kl",
        says="Too far from the reference, beta must grow.",
    ),
    Mistake(
        name="adaptive KL without its limits",
        file=PPO,
        old="min(max(kl / target - 1, -0.2), 0.2)",
        new="(kl / target - 1)",
        test="test_ppo.py::test_adaptive_kl",
        says="One wild step could then move beta by any factor.",
    ),
    # ----------------------------------------------------------------------------------- Advantages
    Mistake(
        name="advantages of the wrong sign",
        file=PPO,
        old="delta + gamma * lam",
        new="-delta + gamma * lam",
        test="test_ppo.py::test_gae_by_hand",
        says="An advantage is how much better it went than expected.",
    ),
    Mistake(
        name="V_t for V_t+1",
        file=PPO,
        old="gamma * value_after",
        new="gamma * values[..., t]",
        test="test_ppo.py::test_gae_by_hand",
        says="delta compares with the value one step later.",
    ),
    Mistake(
        name="the future's value forgotten",
        file=PPO,
        old=" + gamma * value_after",
        new="",
        test="test_ppo.py::test_gae_by_hand",
        says="Without gamma V_t+1 every token but the last looks like a failure.",
    ),
    Mistake(
        name="lambda forgotten",
        file=PPO,
        old="gamma * lam * advantage",
        new="gamma * advantage",
        test="test_ppo.py::test_gae_by_hand",
        says="That is lambda 1, whatever was asked for.",
    ),
    Mistake(
        name="gamma forgotten in the recursion",
        file=PPO,
        old="gamma * lam * advantage",
        new="lam * advantage",
        test="test_ppo.py::test_gae_is_the_sum_of_discounted_deltas",
        says="The recursion discounts by gamma times lambda.",
    ),
    Mistake(
        name="GAE forwards in time",
        file=PPO,
        old="reversed(range(mask.shape[-1]))",
        new="range(mask.shape[-1])",
        test="test_ppo.py::test_gae_by_hand",
        says="Credit flows from the future to the past, so go backwards.",
    ),
    Mistake(
        name="bootstrap past the end",
        file=PPO,
        old="value_after = torch.zeros_like(advantage)",
        new="value_after = values[..., -1].clone()",
        test="test_ppo.py::test_gae_of_a_single_column",
        says=(
            "After the last token the episode is over: its value is 0, not the critic's "
            "last word."
        ),
    ),
    Mistake(
        name="a value after the last token",
        file=PPO,
        old="masked(values, mask).detach()",
        new="values.detach()",
        test="test_ppo.py::test_the_value_after_the_last_token_is_zero",
        says="What stands behind the mask became the value after the end.",
    ),
    Mistake(
        name="returns are advantages",
        file=PPO,
        old="advantages, advantages + values",
        new="advantages, advantages",
        test="test_ppo.py::test_gae_by_hand",
        says="The critic's target is A + V.",
    ),
    Mistake(
        name="gradient through GAE",
        file=PPO,
        old="masked(values, mask).detach()",
        new="masked(values, mask)",
        test="test_ppo.py::test_gae_carries_no_gradient",
        says="Advantages and returns are targets, and nothing flows back through them.",
    ),
    Mistake(
        name="variance of a sample",
        file=PPO,
        old="(wide * wide).sum() / count - mean * mean",
        new="((wide * wide).sum() / count - mean * mean) * count / (count - 1)",
        test="test_ppo.py::test_whiten_by_hand",
        says="It is the variance of a population: divide by n, not by n - 1.",
    ),
    Mistake(
        name="whitening over padding",
        file=PPO,
        old="count = mask.sum().clamp(min=1)\n    mean",
        new="count = mask.numel()\n    mean",
        test="test_ppo.py::test_whiten_by_hand",
        says="Padding is then counted as tokens of advantage 0.",
    ),
    Mistake(
        name="scaled, not centred",
        file=PPO,
        old="(wide - mean)",
        new="wide",
        test="test_ppo.py::test_whiten_by_hand",
        says="Whitening takes the mean away too.",
    ),
    Mistake(
        name="divided by the variance",
        file=PPO,
        old="torch.sqrt(var + 1e-8)",
        new="(var + 1e-8)",
        test="test_ppo.py::test_whiten_by_hand",
        says="Divide by the deviation, which is the variance's root.",
    ),
    Mistake(
        name="epsilon outside the root",
        file=PPO,
        old="torch.sqrt(var + 1e-8)",
        new="(torch.sqrt(var) + 1e-8)",
        test="test_ppo.py::test_whiten_of_a_deviation_as_small_as_its_epsilon",
        says=(
            "It matters only where the deviation is as small as the epsilon, but it is said to "
            "stand inside."
        ),
    ),
    Mistake(
        name="explained variance upside down",
        file=PPO,
        old=".item() / variance if",
        new=".item() / max(v.var(unbiased=False).item(), 1e-12) if",
        test="test_ppo.py::test_explained_variance",
        says="What is to be explained is the variance of the returns.",
    ),
    # -------------------------------------------------------------- The clipped losses, and entropy
    Mistake(
        name="policy clipped on the wrong side",
        file=PPO,
        old="torch.minimum(unclipped,",
        new="torch.maximum(unclipped,",
        test="test_ppo.py::test_policy_loss_by_case",
        says="PPO takes the worse of the two; the better one never stops.",
    ),
    Mistake(
        name="the clipped branch alone",
        file=PPO,
        old="torch.minimum(unclipped, clipped)",
        new="clipped",
        test="test_ppo.py::test_policy_loss_by_case",
        says=(
            "It also stops the steps that would undo harm: a bad token that is already "
            "likelier."
        ),
    ),
    Mistake(
        name="policy not clipped",
        file=PPO,
        old="torch.minimum(unclipped, clipped)",
        new="unclipped",
        test="test_ppo.py::test_policy_loss_by_case",
        says="Nothing then stops the ratio.",
    ),
    Mistake(
        name="policy loss of the wrong sign",
        file=PPO,
        old="loss = -masked_mean(",
        new="loss = masked_mean(",
        test="test_ppo.py::test_policy_loss_by_case",
        says="The objective is to grow, so the loss is its negative.",
    ),
    Mistake(
        name="ratio upside down",
        file=PPO,
        old="kl_k1(masked(logprobs, mask), masked(old_logprobs, mask))",
        new="kl_k1(masked(old_logprobs, mask), masked(logprobs, mask))",
        test="test_ppo.py::test_policy_loss_by_case",
        says="The ratio is new over old; upside down, good tokens get less likely.",
    ),
    Mistake(
        name="log-ratio taken for the ratio",
        file=PPO,
        old="torch.exp(torch.where(adv",
        new="1 + (torch.where(adv",
        test="test_ppo.py::test_policy_loss_by_case",
        says="1 + log r is near r only where r is near 1.",
    ),
    Mistake(
        name="clip of the log-ratio",
        file=PPO,
        old="ratio.clamp(1 - clip, 1 + clip)",
        new="log_ratio.clamp(-clip, clip).exp()",
        test="test_ppo.py::test_policy_loss_by_case",
        says="1 - eps and 1 + eps bound the ratio, and e^-eps is not 1 - eps.",
    ),
    Mistake(
        name="ratio without gradient",
        file=PPO,
        old="unclipped = ratio * advantages",
        new="ratio = ratio.detach()\n    unclipped = ratio * advantages",
        test="test_ppo_loop.py::test_after_a_large_step_ratios_are_clipped",
        says="The old log-probabilities are constants; the new ones are what learns.",
    ),
    Mistake(
        name="clip fraction counts every far ratio",
        file=PPO,
        old="clipped < unclipped",
        new="(ratio - 1).abs() > clip",
        test="test_ppo.py::test_policy_loss_by_case",
        says="A far ratio is clipped only where the clipped branch is the one taken.",
    ),
    Mistake(
        name="a clipped ratio that overflows",
        file=PPO,
        old="log_ratio.clamp(max=80)",
        new="log_ratio",
        test="test_ppo.py::test_policy_loss_at_extremes",
    ),
    Mistake(
        name="mean of means in PPO",
        file=PPO,
        old="torch.minimum(unclipped, clipped), mask, count)",
        new="torch.minimum(unclipped, clipped), mask)",
        test="test_ppo.py::test_micro_batches_with_the_whole_count_are_the_whole",
        says="A micro-batch that divides by its own tokens gives a mean of means.",
    ),
    Mistake(
        name="value clipped on the wrong side",
        file=PPO,
        old="torch.maximum(unclipped,",
        new="torch.minimum(unclipped,",
        test="test_ppo.py::test_value_loss_by_case",
        says="The larger error counts, so that leaving the old value is never rewarded.",
    ),
    Mistake(
        name="value loss without its half",
        file=PPO,
        old="0.5 * torch.maximum",
        new="torch.maximum",
        test="test_ppo.py::test_value_loss_by_case",
        says="It is half the square; otherwise vf_coef means something else.",
    ),
    Mistake(
        name="value clipped around the return",
        file=PPO,
        old="old_values - clip), old_values + clip",
        new="returns - clip), returns + clip",
        test="test_ppo.py::test_value_loss_by_case",
        says="The clip keeps V near its old value, not near its target.",
    ),
    Mistake(
        name="value not clipped",
        file=PPO,
        old="torch.maximum(unclipped, clipped)",
        new="unclipped",
        test="test_ppo.py::test_value_loss_by_case",
        says="The clip is missing.",
    ),
    Mistake(
        name="entropy of the wrong sign",
        file=PPO,
        old="-(logp.exp()",
        new="(logp.exp()",
        test="test_ppo.py::test_entropy_by_enumeration",
        says="H = - sum p log p.",
    ),
    Mistake(
        name="entropy with 0 * -infinity",
        file=PPO,
        old="logp.clamp(min=torch.finfo(logp.dtype).min)",
        new="logp",
        test="test_ppo.py::test_entropy_at_extremes",
        says="A word that was cut away adds p log p = 0, not NaN.",
    ),
    Mistake(
        name="entropy averaged over padding",
        file=LOSSES,
        old="(mask.sum().clamp(min=1) if",
        new="(mask.numel() if",
        test="test_ppo.py::test_padding_never_enters_an_entropy",
    ),
    Mistake(
        name="entropy of a pad counted as -1",
        file=LOSSES,
        old="torch.zeros_like(x))",
        new="-torch.ones_like(x))",
        test="test_ppo.py::test_padding_never_enters_an_entropy",
    ),
    Mistake(
        name="a mask accepted and ignored, PPO",
        file=PPO,
        old="    x = masked(x, mask)\n    wide",
        new="    wide",
        test="test_ppo.py::test_what_stands_behind_the_mask_is_ignored",
    ),
    Mistake(
        name="a mask multiplied in PPO: 0 * NaN",
        file=LOSSES,
        old="torch.where(mask, x, torch.zeros_like(x))",
        new="x * mask",
        test="test_ppo.py::test_what_stands_behind_the_mask_is_ignored",
    ),
    # --------------------------------------------------------------------- The loop of train_ppo.py
    Mistake(
        name="sampled at temperature 1",
        file=TRAIN_PPO,
        old="config.temperature, max_tokens",
        new="1.0, max_tokens",
        test="test_ppo_loop.py::test_a_temperature_near_zero_takes_the_likeliest_token",
        says="The rollout is drawn at the temperature at which it is looked at and learnt from.",
    ),
    Mistake(
        name="the rollout evaluated without its temperature",
        file=TRAIN_PPO,
        old="setup.policy(batch, config.temperature, return_entropy",
        new="setup.policy(batch, 1.0, return_entropy",
        test="test_ppo_loop.py::test_one_temperature_for_policy_reference_and_update",
        says=(
            "The old log-probabilities then belong to another softmax than the one that "
            "drew."
        ),
    ),
    Mistake(
        name="reference at temperature 1",
        file=TRAIN_PPO,
        old="reference(batch, config.temperature)",
        new="reference(batch)",
        test="test_ppo_loop.py::test_one_temperature_for_policy_reference_and_update",
        says="The KL is then between two different softmaxes.",
    ),
    Mistake(
        name="temperature forgotten in the update",
        file=TRAIN_PPO,
        old="policy(batch, config.temperature)",
        new="policy(batch)",
        test="test_ppo_loop.py::test_one_temperature_for_policy_reference_and_update",
        says="Sampling and training are then two policies, and the first ratio is not 1.",
    ),
    Mistake(
        name="penalty for not ending added",
        file=TRAIN_PPO,
        old="- config.eos_penalty",
        new="+ config.eos_penalty",
        test="test_ppo_loop.py::test_a_response_that_did_not_end_pays_the_penalty",
        says="A response that did not end is to score less, not more.",
    ),
    Mistake(
        name="penalty for ending",
        file=TRAIN_PPO,
        old="* ~ended",
        new="* ended",
        test="test_ppo_loop.py::test_a_response_that_did_not_end_pays_the_penalty",
        says="The penalty is for what did not end.",
    ),
    Mistake(
        name="advantages not whitened",
        file=TRAIN_PPO,
        old="ppo.whiten(advantages, mask)",
        new="advantages",
        test="test_ppo_loop.py::test_rewards_returns_and_advantages_by_hand",
        says="The size of a step then follows the unit of the reward.",
    ),
    Mistake(
        name="--whiten read and ignored",
        file=TRAIN_PPO,
        old="mask) if config.whiten else advantages",
        new="mask)",
        test="test_ppo_loop.py::test_rewards_returns_and_advantages_by_hand",
        says="Without whitening a constant reward moves the policy until the critic knows it.",
    ),
    Mistake(
        name="returns whitened too",
        file=TRAIN_PPO,
        old=(
            "advantages, rollout.returns = ppo.gae(\n        rewards, rollout.values, "
            "mask, config.gamma, config.lam\n    )"
        ),
        new=(
            "advantages, rollout.returns = ppo.gae(\n        rewards, rollout.values, "
            "mask, config.gamma, config.lam\n    )\n    rollout.returns = "
            "ppo.whiten(rollout.returns, mask)"
        ),
        test="test_ppo_loop.py::test_rewards_returns_and_advantages_by_hand",
        says="The critic's target loses its unit, and V no longer fits r + gamma V.",
    ),
    Mistake(
        name="policy and reference swapped",
        file=TRAIN_PPO,
        old="rollout.old_logprobs, rollout.ref_logprobs, mask",
        new="rollout.ref_logprobs, rollout.old_logprobs, mask",
        test="test_ppo_loop.py::test_rewards_returns_and_advantages_by_hand",
        says="The penalty then pays for leaving the reference.",
    ),
    Mistake(
        name="no KL in the reward",
        file=TRAIN_PPO,
        old="mask, kl_coef\n",
        new="mask, 0.0\n",
        test="test_ppo_loop.py::test_rewards_returns_and_advantages_by_hand",
        says="Without it the reward has no leash.",
    ),
    Mistake(
        name="beta of the flags, not the adapted one",
        file=TRAIN_PPO,
        old="mask, kl_coef\n",
        new="mask, config.kl_coef\n",
        test="test_ppo_loop.py::test_rewards_returns_and_advantages_by_hand",
        says="Adapted or not, the beta of this step is the one that is handed in.",
    ),
    Mistake(
        name="the rollout's policy as the reference",
        file=TRAIN_PPO,
        old="rollout.ref_logprobs, mask, kl_coef",
        new="rollout.old_logprobs, mask, kl_coef",
        test="test_ppo_loop.py::test_rewards_returns_and_advantages_by_hand",
        says="The KL to yesterday's policy is 0 every morning, so it bounds no distance.",
    ),
    Mistake(
        name="gamma ignored by the script",
        file=TRAIN_PPO,
        old="config.gamma, config.lam",
        new="1.0, config.lam",
        test="test_ppo_loop.py::test_rewards_returns_and_advantages_by_hand",
        says="A flag that is accepted and ignored.",
    ),
    Mistake(
        name="lambda ignored by the script",
        file=TRAIN_PPO,
        old="config.gamma, config.lam",
        new="config.gamma, 1.0",
        test="test_ppo_loop.py::test_rewards_returns_and_advantages_by_hand",
        says="A flag that is accepted and ignored.",
    ),
    Mistake(
        name="old log-probabilities taken anew",
        file=TRAIN_PPO,
        old="new.logprobs, targets.old_logprobs, targets.adv",
        new="new.logprobs, new.logprobs.detach(), targets.adv",
        test="test_ppo_loop.py::test_after_a_large_step_ratios_are_clipped",
        says=(
            "The ratio is then always 1: nothing is ever clipped, and later passes leave "
            "the policy in silence."
        ),
    ),
    Mistake(
        name="clip ignored by the script",
        file=TRAIN_PPO,
        old="config.clip,",
        new="0.2,",
        test="test_ppo_loop.py::test_the_loss_of_a_minibatch_by_hand",
        says="A flag that is accepted and ignored.",
    ),
    Mistake(
        name="value clip ignored by the script",
        file=TRAIN_PPO,
        old="config.value_clip,",
        new="0.2,",
        test="test_ppo_loop.py::test_the_loss_of_a_minibatch_by_hand",
        says="A flag that is accepted and ignored.",
    ),
    Mistake(
        name="no value loss",
        file=TRAIN_PPO,
        old=" + config.vf_coef * value_loss",
        new="",
        test="test_ppo_loop.py::test_the_critic_learns_by_vf_coef",
        says="The critic then never learns, and GAE is the plain return.",
    ),
    Mistake(
        name="value loss without its coefficient",
        file=TRAIN_PPO,
        old="config.vf_coef * value_loss",
        new="value_loss",
        test="test_ppo_loop.py::test_the_loss_of_a_minibatch_by_hand",
        says="A flag that is accepted and ignored.",
    ),
    Mistake(
        name="policy loss subtracted",
        file=TRAIN_PPO,
        old="loss = policy_loss +",
        new="loss = -policy_loss +",
        test="test_ppo_loop.py::test_the_loss_of_a_minibatch_by_hand",
        says="The minus stands in the loss already; a second one makes the policy worse.",
    ),
    Mistake(
        name="KL to the rollout per token",
        file=TRAIN_PPO,
        old="masked_mean(kl, mask, num_responses)",
        new="masked_mean(kl, mask, num_tokens)",
        test="test_ppo_loop.py::test_the_loss_of_a_minibatch_by_hand",
        says="target_kl is nats per response.",
    ),
    Mistake(
        name="the same order in every epoch",
        file=TRAIN_PPO,
        old="step * config.epochs + epoch",
        new="step",
        test="test_ppo_loop.py::test_every_epoch_has_its_own_order",
        says="Every pass then cuts the same minibatches.",
    ),
    Mistake(
        name="the same orders in every step",
        file=TRAIN_PPO,
        old="step * config.epochs + epoch",
        new="epoch",
        test="test_ppo_loop.py::test_every_epoch_has_its_own_order",
        says="Every rollout then cuts the same minibatches.",
    ),
    Mistake(
        name="orders that overlap between steps",
        file=TRAIN_PPO,
        old="step * config.epochs + epoch",
        new="step + epoch",
        test="test_ppo_loop.py::test_every_epoch_has_its_own_order",
        says="The second pass of one step then has the order of the first pass of the next.",
    ),
    # ----------------------------------------------------------- The optimizer's step, and resuming
    Mistake(
        name="gradients pile up",
        file=OPTIM,
        old="optimizer.zero_grad(set_to_none=True)",
        new="pass",
        test="test_faults.py::test_update_clips_the_norm_of_the_whole_gradient",
        says="Every step then repeats all the steps before it.",
    ),
    Mistake(
        name="clipping before backward or after the step: the step is not clipped",
        file=OPTIM,
        old="(), MAX_GRAD_NORM, norm)",
        new="(), 1e9, norm)",
        test="test_faults.py::test_update_clips_the_norm_of_the_whole_gradient",
    ),
    Mistake(
        name="clipping parameter by parameter",
        file=OPTIM,
        old="clip_grads_with_norm_(model.parameters(), MAX_GRAD_NORM, norm)",
        new=(
            "[torch.nn.utils.clip_grad_norm_([p], MAX_GRAD_NORM) for p in "
            "model.parameters()]"
        ),
        test="test_faults.py::test_update_clips_the_norm_of_the_whole_gradient",
    ),
    Mistake(
        name="clipped where it is small",
        file=OPTIM,
        old="if norm > MAX_GRAD_NORM",
        new="if norm < MAX_GRAD_NORM",
        test="test_speed.py::test_update_clips_as_clip_grad_norm",
    ),
    Mistake(
        name="a step with NaN",
        file=NONFINITE,
        old="if all(map(math.isfinite, sum(losses, []) + list(norms))):",
        new="if True:",
        test="test_runs.py::test_a_step_that_is_not_finite_is_reproduced_from_its_report",
    ),
    Mistake(
        name="a resume that forgets the optimizer",
        file=RUN_FOLDER,
        old="            if state:",
        new="            if False:",
        test="test_runs.py::test_state_resumes_bit_for_bit",
    ),
    Mistake(
        name="inputs of the start before",
        file=RUN_FOLDER,
        old="    input_digests.cache_clear()\n",
        new="",
        test="test_runs.py::test_other_inputs_are_refused",
    ),
    Mistake(
        name="a parent that has trained on is the same",
        file=RUN_FOLDER,
        old="digests[key] == old_digests[key]",
        new="True",
        test="test_runs.py::test_other_inputs_are_refused",
    ),
    Mistake(
        name="another device is the same to the bit",
        file=RUN_FOLDER,
        old="to_the_bit &=",
        new="to_the_bit |=",
        test="test_runs.py::test_where_the_run_goes_on_to_rounding_it_says_so",
    ),
    # ------------------------------------------------------------------------------------- Sampling
    Mistake(
        name="top-p one token short",
        file=GENERATE,
        old="ordered.cumsum(-1) - ordered",
        new="ordered.cumsum(-1)",
        test="test_generate.py::test_top_p_is_the_smallest_set",
    ),
    Mistake(
        name="top-p one token too many",
        file=GENERATE,
        old="likelier < top_p",
        new="likelier <= top_p",
        test="test_generate.py::test_top_p_is_the_smallest_set",
    ),
    Mistake(
        name="a token of no probability drawn",
        file=GENERATE,
        old="right=True",
        new="right=False",
        test="test_generate.py::test_extremes_never_draw_what_has_no_probability",
    ),
    Mistake(
        name="a response without its EOS",
        file=GENERATE,
        old="torch.where(ends, t + 1,",
        new="torch.where(ends, t,",
        test="test_generate.py::test_cached_is_uncached",
    ),
    Mistake(
        name="samples see the prompt's padding",
        file=GENERATE,
        old="batch.branch, self.cache",
        new="0 * batch.branch, self.cache",
        test="test_generate.py::test_cached_is_uncached",
    ),
    Mistake(
        name="a cache that forgets branches",
        file=ATTENTION,
        old="else self.branch[:, : self.used]",
        new="else 0 * self.branch[:, : self.used]",
        test="test_generate.py::test_cached_is_uncached",
    ),
    # --------------------------------------------------------------------------------- Faster paths
    Mistake(
        name="flex: rows see each other",
        file=ATTENTION,
        old="(row[i] == row[j]) & (j <= i)",
        new="(j <= i)",
        test="test_paths.py::test_who_sees_whom_in_flex_attention",
    ),
    Mistake(
        name="flex: columns see later ones",
        file=ATTENTION,
        old="(row[i] == row[j]) & (j <= i)",
        new="(row[i] == row[j])",
        test="test_paths.py::test_every_path_is_each_response_alone[llama-flex]",
    ),
    Mistake(
        name="dense: columns see later ones",
        file=ATTENTION,
        old="prefix_mask(row[None], row[None]) for",
        new="prefix_mask(row[None], row[None]) | prefix_mask(row[None], row[None]).mT for",
        test="test_paths.py::test_every_path_is_each_response_alone[gpt2-dense]",
    ),
    Mistake(
        name="the last block's columns counted with padding",
        file=ATTENTION,
        old="torch.searchsorted(self.index, at)",
        new="at",
        test="test_paths.py::test_every_path_is_each_response_alone[llama-dense]",
    ),
    Mistake(
        name="a chunk without its temperature",
        file=HEADS,
        old="(*chunk, temperature, return_entropy)",
        new="(*chunk, 1.0, return_entropy)",
        test="test_paths.py::test_every_path_is_each_response_alone[gpt2-chunked]",
    ),
    Mistake(
        name="a softmax in bfloat16",
        file=HEADS,
        old="logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature",
        new="logits / temperature",
        test="test_paths.py::test_bfloat16_moves_little[gpt2]",
    ),
    Mistake(
        name="activation checkpointing accepted and ignored",
        file=ATTENTION,
        old="if activation_checkpointing and torch.is_grad_enabled()",
        new="if False",
        test="test_paths.py::test_activation_checkpointing_keeps_less_than_half[gpt2]",
    ),
    Mistake(
        name="oneDNN without the bias",
        file=KERNELS,
        old="_product(x, weight, layer.bias)",
        new="_product(x, weight)",
        test="test_paths.py::test_decoding_with_onednn_says_the_same",
    ),
    Mistake(
        name="the last block counted in full",
        file=SPEED,
        old="tokens_read * after_attention",
        new="num_tokens * after_attention",
        test="test_speed.py::test_operations_of_gpt2_by_hand",
    ),
    # ---------------------------------------------------------------------------- Several processes
    Mistake(
        name="each process counts its own share",
        file=TRAIN_SFT,
        old="num_tokens = sum(row.num_response_tokens for row in step_rows)",
        new=(
            "num_tokens = sum(step_rows[i].num_response_tokens for ids in "
            "plan[dist.rank()] for i in ids)"
        ),
        test="test_processes.py::test_the_same_update[sft-two processes]",
    ),
    Mistake(
        name="gradients that nobody adds up",
        file=DIST,
        old="pending.append(distributed.all_reduce(parameter.grad, async_op=True))",
        new="pass",
        test="test_processes.py::test_the_same_update[sft-two processes]",
    ),
    Mistake(
        name="a loss of one process in the log",
        file=TRAIN_SFT,
        old="loss=sum(map(sum, gathered_losses))",
        new="loss=sum(gathered_losses[0])",
        test="test_processes.py::test_the_same_update[sft-two processes]",
    ),
    Mistake(
        name="early stop, KL and logs of one process",
        file=TRAIN_PPO,
        old="for process_stats in gathered_stats:",
        new="for process_stats in gathered_stats[:1]:",
        test="test_processes.py::test_the_same_update[ppo-two processes]",
    ),
    Mistake(
        name="a rollout of one process",
        file=TRAIN_PPO,
        old="    dist.all_reduce(tensors)",
        new="    dist.all_reduce(tensors.clone())",
        test="test_processes.py::test_the_same_update[ppo-two processes]",
    ),
]
