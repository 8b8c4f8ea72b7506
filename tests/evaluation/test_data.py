# SPDX-License-Identifier: Apache-2.0
"""Data sets: what is read, and every way in which a file can be wrong, before a model loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_adaskip.lab.data.items import DataError
from vllm_adaskip.lab.data.sources import load_items


def write(tmp_path: Path, *lines: object) -> str:
    path = tmp_path / "quiz.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return str(path)


def test_bundled_tasks_are_held_out_and_drawn_by_seed() -> None:
    items = load_items("bundled:sum, hop", limit=5, seed=1)
    assert [item.item for item in items[:2]] == ["sum/0", "sum/1"] and len(items) == 10
    assert items == load_items("bundled:sum,hop", limit=5, seed=1)
    assert items != load_items("bundled:sum,hop", limit=5, seed=2)


def test_a_file_with_defaults_and_with_everything(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        {"prompt": "1 + 1 =", "reference": "2"},
        "",
        {"prompt": "höflich", "references": ["a", "b"], "task": "t", "id": "x", "metric": "bleu"},
    )
    first, second = load_items(source)
    assert (first.item, first.task, first.metric) == ("quiz/1", "quiz", "exact_match")
    assert (second.item, second.references, second.metric) == ("x", ("a", "b"), "bleu")


def test_a_limit_holds_for_each_task(tmp_path: Path) -> None:
    lines = [{"prompt": "p", "reference": "r", "task": f"t{n % 2}"} for n in range(20)]
    items = load_items(write(tmp_path, *lines), limit=3, seed=4)
    assert sorted(item.task for item in items) == ["t0"] * 3 + ["t1"] * 3
    assert items == load_items(write(tmp_path, *lines), limit=3, seed=4)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], ["no items"]),
        (["{"], ["quiz.jsonl:1", "no JSON"]),
        ([{"prompt": "p", "reference": "r"}, "[1]"], ["quiz.jsonl:2", "the line"]),
        ([{"reference": "r"}], ["quiz.jsonl:1", "prompt"]),
        ([{"prompt": "", "reference": "r"}], ["prompt", "at least 1"]),
        ([{"prompt": 3, "reference": "r"}], ["prompt", "string"]),
        ([{"prompt": "p", "refrence": "r"}], ["refrence", "allowed keys: prompt, reference"]),
        ([{"prompt": "p"}], ["exact_match", "needs a reference"]),
        ([{"prompt": "p", "references": []}], ["needs a reference"]),
        ([{"prompt": "p", "reference": " "}], ["needs a reference", "not empty"]),
        ([{"prompt": "p", "reference": "r", "metric": "f2"}], ["'f2'", "rouge_l"]),
        ([{"prompt": "p", "reference": "r", "id": "a"}] * 2, ["quiz.jsonl:2", "'a' comes twice"]),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(
    tmp_path: Path, lines: list[object], words: list[str]
) -> None:
    with pytest.raises(DataError) as refusal:
        load_items(write(tmp_path, *lines))
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize("source", ["bundled:nope", "nowhere.jsonl", "/"])
def test_a_source_that_is_not_there_is_named(source: str) -> None:
    with pytest.raises(DataError, match=r"nope|nowhere|/"):
        load_items(source)
