"""BLEU, ROUGE-L and CIDEr of texts with one reference each, to the last digit as pycocoevalcap has them.

Tokens are separated by blanks. Every function takes the truths and the predictions in the same order and
returns the score of the whole and the scores of every pair.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

ORDERS = 4
# What keeps BLEU's fractions defined.
_TINY, _SMALL = 1e-15, 1e-9
# Weight of recall in ROUGE-L, and the width of CIDEr's penalty for another length, in tokens.
_BETA, _SIGMA = 1.2, 6.0


def count_ngrams(text: str) -> Counter[tuple[str, ...]]:
    """How often every run of 1 to 4 tokens occurs, the short ones first."""
    tokens = text.split()
    return Counter(
        tuple(tokens[start : start + order])
        for order in range(1, ORDERS + 1)
        for start in range(len(tokens) - order + 1)
    )


def bleu_counts(truths: Sequence[str], predictions: Sequence[str]) -> np.ndarray:
    """What BLEU is made of, (pairs, 10): n-grams found and n-grams said by order, then tokens said, tokens of
    the truth. BLEU of several pairs is BLEU of their sum.
    """
    rows = []
    for truth, predicted in zip(truths, predictions, strict=True):
        wanted, said = count_ngrams(truth), count_ngrams(predicted)
        found = [0] * ORDERS
        for ngram, count in said.items():
            found[len(ngram) - 1] += min(count, wanted[ngram])
        length = len(predicted.split())
        rows.append(
            [*found, *(max(0, length - order) for order in range(ORDERS)), length, len(truth.split())]
        )
    return np.array(rows, np.int64).reshape(-1, 2 * ORDERS + 2)


def bleu_of(counts: np.ndarray) -> list[float]:
    """BLEU-1 to 4 of one row of `bleu_counts`, or of a sum of rows."""
    found, said, (length, wanted) = np.split(counts, [ORDERS, 2 * ORDERS])
    ratio = (length + _TINY) / (wanted + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for order in range(ORDERS):
        product *= (found[order] + _TINY) / (said[order] + _SMALL)
        scores.append(float(product ** (1 / (order + 1)) * brevity))
    return scores


def bleu(truths: Sequence[str], predictions: Sequence[str]) -> tuple[list[float], list[list[float]]]:
    """BLEU-1 to 4 of the whole, and of every pair."""
    counts = bleu_counts(truths, predictions)
    return bleu_of(counts.sum(0)) if len(counts) else [0.0] * ORDERS, [bleu_of(row) for row in counts]


def rouge_l(truths: Sequence[str], predictions: Sequence[str]) -> tuple[float, list[float]]:
    """F of the longest common subsequence. An empty text is one empty token: two of them agree."""
    scores = []
    for truth, predicted in zip(truths, predictions, strict=True):
        wanted, said = truth.split(" "), predicted.split(" ")
        common = _common_length(wanted, said)
        precision, recall = common / len(said), common / len(wanted)
        scores.append(
            (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision) if common else 0.0
        )
    return float(np.mean(scores)) if scores else float("nan"), scores


def _common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for token in first:
        before = 0
        for column, other in enumerate(second, 1):
            before, row[column] = (
                row[column],
                before + 1 if token == other else max(row[column], row[column - 1]),
            )
    return row[-1]


def cider(truths: Sequence[str], predictions: Sequence[str]) -> tuple[float, list[float]]:
    """CIDEr with the document frequencies of the truths under test; 0 for a single pair.

    Raises:
        ValueError: there are no pairs.
    """
    if not truths:
        raise ValueError("CIDEr of no texts is not defined.")
    counted = [count_ngrams(truth) for truth in truths]
    frequency = Counter(ngram for counts in counted for ngram in counts)
    most = np.log(float(len(truths)))

    def vectors(counts: Counter) -> tuple[list[dict], list[float], int]:
        weights: list[dict] = [{} for _ in range(ORDERS)]
        norms = [0.0] * ORDERS
        for ngram, count in counts.items():
            weight = float(count) * (most - np.log(max(1.0, frequency[ngram])))
            weights[len(ngram) - 1][ngram] = weight
            norms[len(ngram) - 1] += weight**2
        pairs = sum(count for ngram, count in counts.items() if len(ngram) == 2)
        return weights, [np.sqrt(norm) for norm in norms], pairs

    scores = []
    for counts, predicted in zip(counted, predictions, strict=True):
        wanted, wanted_norms, wanted_length = vectors(counts)
        said, said_norms, said_length = vectors(count_ngrams(predicted))
        penalty = np.e ** (-(float(said_length - wanted_length) ** 2) / (2 * _SIGMA**2))
        by_order = []
        for order in range(ORDERS):
            value = 0.0
            for ngram, weight in said[order].items():
                other = wanted[order].get(ngram, 0.0)
                value += min(weight, other) * other
            if said_norms[order] and wanted_norms[order]:
                value /= said_norms[order] * wanted_norms[order]
            by_order.append(value * penalty)
        scores.append(float(np.mean(by_order)) * 10.0)
    return float(np.mean(scores)), scores
