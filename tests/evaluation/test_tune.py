# SPDX-License-Identifier: Apache-2.0
"""That a chosen setting keeps its promise: by numbers, and by repeating the whole choice."""

from __future__ import annotations

import random

import pytest

from vllm_adaskip.lab.data.items import Item
from vllm_adaskip.lab.evaluation.quality import upper_bound
from vllm_adaskip.lab.evaluation.results import Answer
from vllm_adaskip.lab.evaluation.tune import check, choose, halves, trials

ITEMS = [Item(f"{task}/{n}", task, "p", ("r",), "exact_match") for task in "ab" for n in range(200)]


def answers(setting: str, wrong: float, kept: float, seed: int) -> list[Answer]:
    rng = random.Random(seed)
    return [
        Answer(
            setting=setting, item=item.item, task=item.task, metric=item.metric,
            score=float(rng.random() >= wrong), kept=kept, skip=[], tokens=1, text="",
        )
        for item in ITEMS
    ]  # fmt: skip


def test_halves_split_each_task_and_repeat_by_seed() -> None:
    first, second = halves(ITEMS, 3)
    assert sorted(item.item for item in first + second) == sorted(item.item for item in ITEMS)
    assert sum(item.task == "a" for item in first) == 100
    assert halves(ITEMS, 3)[0] == first != halves(ITEMS, 4)[0]


def test_no_loss_among_n_is_no_proof_of_none() -> None:
    assert upper_bound([0.0] * 300, 0.95) == pytest.approx(1 - 0.05 ** (1 / 300))
    assert upper_bound([0.0] * 30, 0.95) > 0.09
    assert upper_bound([-1.0] * 30, 0.95) > 0.09


def test_the_bound_lies_above_the_mean_and_falls_with_more_items() -> None:
    few, many = [1.0, *[0.0] * 19], [1.0, *[0.0] * 19] * 20
    assert 0.05 < upper_bound(many, 0.95) < upper_bound(few, 0.95)


def test_takes_the_fastest_that_passes_and_tests_no_bolder_one_after_a_failure() -> None:
    first, second = halves(ITEMS, 0)
    given = [
        *answers("dense", 0.0, 1.0, 0),
        *answers("safe", 0.0, 0.9, 1),
        *answers("bold", 0.0, 0.6, 2),
        *answers("bad", 0.2, 0.5, 3),
        *answers("worse", 0.4, 0.4, 4),
    ]
    done = trials(given, ["worse", "bad", "bold", "safe"], first, second, 0.02)
    assert [one.setting for one in done] == ["safe", "bold", "bad", "worse"]
    assert [one.bound is None for one in done] == [False, False, False, True]
    best = choose(done, 0.02, {"safe": 0.9, "bold": 0.6, "bad": 0.5, "worse": 0.4})
    assert best is not None and best.setting == "bold"
    faster = choose(done, 0.02, {"safe": 0.7, "bold": 0.8})
    assert faster is not None and faster.setting == "safe"
    assert choose(done, 0.02, {"safe": 1.1, "bold": 1.2}) is None  # right, but saves no time
    assert choose(done, 0.02, {}) is None  # nobody's time is sure
    assert choose(done, 0.001, {"safe": 0.9, "bold": 0.6}) is None


def test_a_promise_is_broken_at_most_as_often_as_said() -> None:
    """Settings whose true loss is just above what is allowed: few may be let through."""
    broken = 0
    repeats = 120
    for seed in range(repeats):
        first, second = halves(ITEMS, seed)
        given = [*answers("dense", 0.0, 1.0, 0), *answers("x", 0.055, 0.5, 10 + seed)]
        broken += choose(trials(given, ["x"], first, second, 0.05), 0.05, {"x": 0.5}) is not None
    assert broken / repeats < 0.1


@pytest.mark.parametrize(
    ("numbers", "metric", "max_loss", "words"),
    [
        (1, "exact_match", 0.5, "2 items, no task with two"),
        (2, "perplexity", 0.5, "only perplexities"),
        (20, "exact_match", 0.1, r"20 held-out items .* at least 29 held-out .* 0\.14 or more"),
        (20, "exact_match", 0.0, r"20 held-out items .* allowed: --max-loss 0\.14 or more"),
    ],
)
def test_what_the_items_cannot_decide_is_refused(
    numbers: int, metric: str, max_loss: float, words: str
) -> None:
    items = [Item(f"{t}/{n}", t, "p", ("r",), metric) for t in "ab" for n in range(numbers)]
    with pytest.raises(ValueError, match=words):
        check(*halves(items, 0), max_loss)


def test_as_many_items_as_are_asked_for_are_enough() -> None:
    items = [Item(f"a/{n}", "a", "p", ("r",), "exact_match") for n in range(58)]
    check(*halves(items, 0), 0.1)
    with pytest.raises(ValueError, match="at least 29 held-out"):
        check(*halves(items[:56], 0), 0.1)
    assert upper_bound([0.0] * 29, 0.95) <= 0.1
