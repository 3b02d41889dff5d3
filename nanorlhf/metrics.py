"""How good a reward model is: accuracy over pairs, AUC over labels, beside a fair coin."""
from itertools import combinations

import torch


def pair_accuracy(rows, scores):
    """How often the better response has the higher score, ties half, over all pairs in groups.

    -> eval_accuracy, eval_pairs, and eval_accuracy_of_longer, which longer responses would have: a
    baseline without a model
    """
    right = 0.0
    longer = 0.0
    pairs = 0
    for row, score in zip(rows, scores):
        length = [len(response) for response in row.responses]
        for i, j in combinations(range(len(score)), 2):
            if row.place[i] == row.place[j]:
                continue
            better, worse = (i, j) if row.place[i] < row.place[j] else (j, i)
            right += wins(score[better], score[worse])
            longer += wins(length[better], length[worse])
            pairs += 1
    return {
        "eval_accuracy": right / max(pairs, 1),
        "eval_pairs": pairs,
        "eval_accuracy_of_longer": longer / max(pairs, 1)
    }


def wins(a, b):
    return (a > b) + 0.5 * (a == b)


def auc(scores, labels):
    """Chance that a good response of any prompt outscores a bad one of any prompt, ties half.
    (n,), (n,) bool -> float
    """
    good = scores[labels]
    bad = scores[~labels].sort().values
    if not len(good) or not len(bad):
        return float("nan")
    below = torch.searchsorted(bad, good)
    below_or_equal = torch.searchsorted(bad, good, right=True)
    return (below + below_or_equal).double().mean().item() / (2 * len(bad))


def at_chance(accuracy, pairs):
    """Could a fair coin do this? Within 1.96 of its standard deviations, pairs as independent."""
    return abs(accuracy - 0.5) <= 1.96 * (0.25 / max(pairs, 1)) ** 0.5
