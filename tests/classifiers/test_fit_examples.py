# SPDX-License-Identifier: Apache-2.0
"""Training examples: where they come from, and every way in which they cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_adaskip.lab.data.examples import load_examples
from vllm_adaskip.lab.data.items import DataError
from vllm_adaskip.lab.data.sources import load_items
from vllm_adaskip.lab.testbed.tasks import TASKS, split_of

ROWS: list[dict[str, Any]] = [{"prompt": f"{n} + 1 =", "reference": str(n + 1)} for n in range(40)]


def write(path: Path, *lines: object) -> str:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return str(path)


def test_bundled_examples_are_of_the_training_split_and_none_is_held_out() -> None:
    examples = load_examples("bundled", limit=30)
    assert {item.task for item in examples} == set(TASKS) and len(examples) == 30 * len(TASKS)
    for item in examples:
        text = item.prompt.removeprefix(f"{item.task} : ").removesuffix(" answer :")
        assert split_of(item.task, text) == "train"
    held_out = {item.prompt for item in load_items("bundled", limit=200)}
    assert not held_out & {item.prompt for item in examples}
    assert examples == load_examples("bundled", limit=30)
    assert examples != load_examples("bundled", limit=30, seed=1)
    assert {item.task for item in examples[:40]} == set(TASKS)  # in no order


def test_a_file_s_references_are_the_answers(tmp_path: Path) -> None:
    examples = load_examples(write(tmp_path / "sums.jsonl", *ROWS))
    assert sorted(examples, key=lambda item: int(item.item[5:]))[3].references == ("4",)
    assert [item.prompt for item in examples] != [row["prompt"] for row in ROWS]
    assert len(load_examples(write(tmp_path / "sums.jsonl", *ROWS), limit=35)) == 35


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], ["sums.jsonl", "no items"]),
        (ROWS[:31], ["sums.jsonl", "31 examples", "32 or more", "two batches of 16"]),
        ([*ROWS, "{"], ["sums.jsonl:41", "no JSON"]),
        ([*ROWS, {"prompt": "p"}], ["sums.jsonl:41", "needs a reference"]),
        ([*ROWS, {"prompt": "p", "answer": "a"}], ["sums.jsonl:41", "answer", "allowed keys"]),
        ([*ROWS[:9], {"prompt": "", "reference": "a"}], ["sums.jsonl:10", "at least 1"]),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(
    tmp_path: Path, lines: list[object], words: list[str]
) -> None:
    with pytest.raises(DataError) as refusal:
        load_examples(write(tmp_path / "sums.jsonl", *lines))
    for word in words:
        assert word in str(refusal.value)


def test_few_examples_do_not_do_whatever_the_batch(tmp_path: Path) -> None:
    source = write(tmp_path / "sums.jsonl", *ROWS[:15])
    with pytest.raises(DataError, match=r"15 examples; allowed: 16 or more"):
        load_examples(source, batch=1)


@pytest.mark.parametrize("source", ["bundled:nope", "nowhere.jsonl", "hub:no/such-folder-here"])
def test_a_source_that_is_not_there_is_named(source: str) -> None:
    with pytest.raises(DataError, match=r"nope|nowhere|no/such"):
        load_examples(source)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set as it lies on the hub, in a folder, which `datasets` takes as well."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": f"q {n}", "reply": f"a {n}", "number": n} for n in range(40)]
    (folder := tmp_path / "data").mkdir()
    write(folder / "train.jsonl", *rows)
    write(folder / "test.jsonl", *rows[:20])
    return f"hub:{folder}"


def test_a_data_set_of_the_hub_by_split_and_columns(hub: str) -> None:
    columns = ("question", "reply")
    examples = load_examples(hub, columns=columns, limit=36)
    assert len({item.item for item in examples}) == 36
    assert all(item.references[0] == item.prompt.replace("q", "a") for item in examples)
    with pytest.raises(DataError, match="20 examples"):
        load_examples(f"{hub}:test", columns=columns)


@pytest.mark.parametrize(
    ("split", "columns", "words"),
    [
        ("", ("prompt", "reply"), ["no column 'prompt'", "question, reply, number"]),
        ("", ("question", "number"), ["row 0", "number is 0", "a text"]),
        (":nope", ("question", "reply"), ["nope"]),
        ("::nope", ("question", "reply"), ["nope"]),
    ],
)
def test_a_data_set_that_does_not_fit_is_refused(
    hub: str, split: str, columns: tuple[str, str], words: list[str]
) -> None:
    with pytest.raises(DataError) as refusal:
        load_examples(f"{hub}{split}", columns=columns)
    for word in ["hub:", *words]:
        assert word in str(refusal.value)
