# SPDX-License-Identifier: Apache-2.0
"""How an answer is scored against its references.

All but ``perplexity`` give a score in [0, 1], larger is better. ``perplexity`` is that of the
first reference, generated token by token under the plan (`forced`); smaller is better. ``choice``
is 1 if the right choice is likelier, by byte, than each other one, all generated that way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from vllm_adaskip.lab.data.items import Item
from vllm_adaskip.lab.data.words import compared, first_label, labels_as_words, last_number

PERPLEXITY = "perplexity"
CHOICE = "choice"
Score = Callable[[str, Sequence[str]], float]


def score_of(item: Item, text: str) -> float:
    """Return the score of an item's answer, by a metric that is a function of its text."""
    if item.metric == "accuracy":
        return accuracy(text, item.references, item.labels)
    score = METRICS[item.metric]
    assert score is not None
    return score(text, item.references)


def exact_match(text: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references; case, punctuation, articles, emphasis aside."""
    return float(compared(text) in map(compared, references))


def accuracy(text: str, references: Sequence[str], labels: Sequence[str] = ()) -> float:
    """1 if a reference is the first of all labels that the answer says, and does not negate.

    Near its start. ``labels`` has all references of the task; without, the references are all
    there is to look for.
    """
    said = first_label(text, tuple(labels or references))
    return float(said in labels_as_words(tuple(references)))


def contains(text: str, references: Sequence[str]) -> float:
    """1 if the answer contains one of the references, as whole words."""
    answer = compared(text)
    return float(any(_within(compared(one), answer) for one in references))


def number(text: str, references: Sequence[str]) -> float:
    """1 if the answer's last number is the last of one of the references."""
    last = last_number(text)
    return float(last is not None and last in map(last_number, references))


def f1(text: str, references: Sequence[str]) -> float:
    """F1 of the words that answer and reference share, the best over the references."""
    return max(_f1(compared(text), compared(one)) for one in references)


def rouge_l(text: str, references: Sequence[str]) -> float:
    """ROUGE-L F1, the best over the references (``rouge-score``, no stemming)."""
    scores = [_rouge().score(reference, text)["rougeL"].fmeasure for reference in references]
    return float(max(scores))


def bleu(text: str, references: Sequence[str]) -> float:
    """Sentence BLEU / 100 with effective n-gram order (``sacrebleu``)."""
    return float(_bleu().sentence_score(text, list(references)).score) / 100


#: Every metric by the name that users write; None where it is no function of the text.
METRICS: dict[str, Score | None] = {
    "exact_match": exact_match,
    "accuracy": accuracy,
    "contains": contains,
    "number": number,
    "f1": f1,
    "rouge_l": rouge_l,
    "bleu": bleu,
    PERPLEXITY: None,
    CHOICE: None,
}


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


@cache
def _bleu() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(effective_order=True)


def _within(part: Sequence[str], whole: Sequence[str]) -> bool:
    starts = range(len(whole) - len(part) + 1)
    return any(whole[start : start + len(part)] == part for start in starts)


def _f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    shared = (Counter(answer) & Counter(reference)).total()
    return 2 * shared / max(len(answer) + len(reference), 1)
