# SPDX-License-Identifier: Apache-2.0
"""Scores of answers as real models write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_adaskip.lab.data.items import DataError, Item
from vllm_adaskip.lab.data.metrics import METRICS, accuracy, score_of
from vllm_adaskip.lab.data.sources import load_items
from vllm_adaskip.lab.testbed.tasks import TASKS, samples

MOOD = ("positive", "negative")
LETTERS = ("A", "B", "C")


@pytest.mark.parametrize(
    ("metric", "text", "references", "score"),
    [
        ("exact_match", " 9  7\n", ["9 7"], 1),
        ("exact_match", "9 7 1", ["9 7"], 0),
        ("exact_match", "b", ["a", "b"], 1),
        ("exact_match", "Paris.", ["Paris"], 1),
        ("exact_match", "**paris**", ["Paris"], 1),
        ("exact_match", "_The_ `Louvre`!", ["louvre"], 1),
        ("exact_match", "Don\u2019t", ["don't"], 1),
        ("exact_match", "The U.S.", ["US"], 1),
        ("exact_match", "\uff11\uff12", ["12"], 1),
        ("exact_match", "$1,234.", ["1234"], 1),
        ("exact_match", "-5", ["5"], 0),  # a sign is no punctuation
        ("exact_match", "\N{MINUS SIGN}5", ["-5"], 1),
        ("exact_match", "3.14", ["314"], 0),
        ("exact_match", "The", ["A"], 0),  # nothing would be left of both
        ("exact_match", "C", ["C++"], 0),
        ("exact_match", "", ["..."], 0),
        ("contains", "It is Paris, of course.", ["paris"], 1),
        ("contains", "comparison", ["paris"], 0),
        ("contains", "New big Delhi", ["New Delhi"], 0),
        ("number", "6 * 7 is **42**.", ["42"], 1),
        ("number", "I get $1,234.50 in all", ["#### 1234.5"], 1),
        ("number", "first 42, then 43", ["42"], 0),
        ("number", "it is -5", ["5"], 0),
        ("number", "the range 3-5", ["5"], 1),
        ("number", "no idea", ["5"], 0),
        ("f1", "The cat sat.", ["a cat sat down", "dog"], 4 / 5),
        ("f1", "", ["cat"], 0),
        ("rouge_l", "the cat sat", ["the cat sat"], 1),
        ("rouge_l", "a dog", ["the cat"], 0),
        ("rouge_l", "the cat", ["the cat sat down"], 2 * 1 * 0.5 / 1.5),
        ("bleu", "the cat sat on the mat", ["the cat sat on the mat"], 1),
        ("bleu", "", ["the cat"], 0),
    ],
)
def test_metrics(metric: str, text: str, references: list[str], score: float) -> None:
    score_text = METRICS[metric]
    assert score_text is not None
    assert score_text(text, references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "reference", "labels", "score"),
    [
        ("Paris.", "Paris", (), 1),
        ("The capital is **Paris**.", "Paris", (), 1),
        ("Parisian", "Paris", (), 0),
        ("not Paris", "Paris", (), 0),
        ("word " * 30 + "Paris", "Paris", (), 0),  # not near the start
        ("New Delhi, of course", "New Delhi", (), 1),
        ("Positive, I think", "positive,", (), 1),
        # Of first contact with a real model, which is right, and of the same with layers left out.
        (" Paris.", "Paris", ("Nairobi", "Paris"), 1),
        (" Cairo, Egypt.", "Cairo", ("Nairobi", "Cairo"), 1),
        (" the Czech Republic, which is a sovereign", "Czech Republic", ("Chile",), 1),
        (" the Bernakedoniciliteylandylandyofice", "Switzerland", ("Chile",), 0),
        (" positive. It does not contain a negative sentiment.", "negative", MOOD, 0),
        (" positive. It does not contain a negative sentiment.", "positive", MOOD, 1),
        ("positive, but it's also a bit negative", "positive", MOOD, 1),
        ("positive, but it's also a bit negative", "negative", MOOD, 0),
        ("It is not positive, it is negative", "positive", MOOD, 0),
        ("It is not positive, it is negative", "negative", MOOD, 1),
        ("This isn't a very positive review, it is negative", "negative", MOOD, 1),
        ("negative rather than positive", "negative", MOOD, 1),
        ("Rather than positive, negative", "negative", MOOD, 1),
        ("neither positive nor negative", "positive", MOOD, 0),
        ("neither positive nor negative", "negative", MOOD, 0),
        ("Not entailment.", "not_entailment", ("entailment", "not_entailment"), 1),
        ("Not entailment.", "entailment", ("entailment", "not_entailment"), 0),
        ("New York City", "New York City", ("New York",), 1),
        ("Papua New Guinea", "Guinea", ("Guinea", "Papua New Guinea"), 0),
        ("A good answer is B.", "B", LETTERS, 1),
        ("A is right", "A", LETTERS, 1),
        ("(a)", "A", LETTERS, 1),
        ("The answer is A", "A", LETTERS, 1),
        ("", "A", LETTERS, 0),
    ],
)
def test_the_first_label_that_is_not_denied_counts(
    text: str, reference: str, labels: tuple[str, ...], score: float
) -> None:
    every = (*labels, reference) if labels else ()
    assert accuracy(text, [reference], every) == score


def test_labels_are_those_of_the_whole_file_and_of_one_task(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "reference": label, "task": task, "metric": metric}
        for task, labels in (("mood", MOOD), ("letter", LETTERS))
        for metric in ("accuracy", "contains")
        for label in labels
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = {(item.task, item.metric): item for item in load_items(str(path), limit=1)}
    assert {one.labels for one in found.values()} <= {MOOD, LETTERS, ()}
    for item in load_items(str(path)):
        wanted = {"mood": MOOD, "letter": LETTERS}[item.task]
        assert item.labels == (wanted if item.metric == "accuracy" else ())
    item = Item("a", "mood", "p", ("negative",), "accuracy", labels=MOOD)
    assert score_of(item, "positive, not negative") == 0


def test_right_answers_of_the_bundled_tasks_are_compared_word_by_word() -> None:
    exact = METRICS["exact_match"]
    assert exact is not None
    for task in TASKS:
        for one in samples(task, "test", 1, 50):
            assert exact(one.answer, [one.answer]) == 1
            assert exact(" ".join(one.answer.split()[:-1]), [one.answer]) == 0


def test_a_number_wants_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "p", "reference": "four", "metric": "number"}))
    with pytest.raises(DataError, match=r"a.jsonl:1: metric 'number' needs references with"):
        load_items(str(path))
