# SPDX-License-Identifier: Apache-2.0
"""How an answer is scored against its references.

All but ``perplexity`` give a score in [0, 1], larger is better. ``perplexity`` is that of the
first reference, generated token by token under the plan (`forced`); smaller is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

PERPLEXITY = "perplexity"
Score = Callable[[str, Sequence[str]], float]


def exact_match(text: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, white space aside."""
    return float(_words(text) in map(_words, references))


def accuracy(text: str, references: Sequence[str]) -> float:
    """1 if the answer begins with one of the references (labels, choices), case aside."""
    words = _words(text.lower())
    return float(any(words[: len(one)] == one for one in (_words(r.lower()) for r in references)))


def rouge_l(text: str, references: Sequence[str]) -> float:
    """ROUGE-L F1, the best over the references (``rouge-score``, no stemming)."""
    scores = [_rouge().score(reference, text)["rougeL"].fmeasure for reference in references]
    return float(max(scores))


def bleu(text: str, references: Sequence[str]) -> float:
    """Sentence BLEU / 100 with effective n-gram order (``sacrebleu``)."""
    return float(_bleu().sentence_score(text, list(references)).score) / 100


#: Every metric by the name that users write; perplexity is not a function of the text.
METRICS: dict[str, Score | None] = {
    "exact_match": exact_match,
    "accuracy": accuracy,
    "rouge_l": rouge_l,
    "bleu": bleu,
    PERPLEXITY: None,
}


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


@cache
def _bleu() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(effective_order=True)


def _words(text: str) -> list[str]:
    return text.split()
