# SPDX-License-Identifier: Apache-2.0
"""Rows of an offline job, and its output folder, without any engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.ray.batch import Job
from deploy.ray.batch_args import BatchArgs
from deploy.ray.batch_parts import Parts
from deploy.ray.batch_rows import SCHEMA, RowCheck, RowError, read

ROWS: list[dict[str, Any]] = [
    {"prompt": "a", "id": 7, "vllm_xargs": {"adaskip_skip": [5, "attn:7"]}, "max_tokens": 3},
    {"prompt": "b", "vllm_xargs": {"adaskip": "off"}},
    {"prompt": "c", "temperature": 0.5, "vllm_xargs": {"adaskip_max_compute": 1.0}},
    {"prompt": "d"},
]


@pytest.fixture(scope="module")
def check() -> RowCheck:
    return RowCheck.of(BatchArgs())


def test_plans_are_spelt_out_and_what_is_absent_is_null(check: RowCheck) -> None:
    found = [check(number, row) for number, row in enumerate(ROWS)]
    assert [one["adaskip_skip"] for one in found] == [
        ["attn:5", "mlp:5", "attn:7"],
        [],
        None,
        None,
    ]
    assert [one["adaskip_max_compute"] for one in found] == [None, None, 1.0, None]
    assert [one["max_tokens"] for one in found] == [3, 64, 64, 64]
    assert [one["temperature"] for one in found] == [0, 0, 0.5, 0]
    assert pa.Table.from_pylist(found, SCHEMA).num_rows == 4


def test_an_old_argument_is_written_by_its_new_name(check: RowCheck) -> None:
    row = check(0, {"prompt": "a", "vllm_xargs": {"adaskip_budget": 1.0}})
    assert row["adaskip_max_compute"] == 1.0


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, ["prompt: None", "a text"]),
        ({"prompt": ""}, ["prompt: ''"]),
        ({"prompt": 5}, ["prompt: 5"]),
        ({"prompt": "a", "vllm_xargs": [1]}, ["vllm_xargs: [1]", "an object"]),
        ({"prompt": "a", "vllm_xargs": "{"}, ["vllm_xargs", "no JSON"]),
        ({"prompt": "a", "vllm_xargs": {"seed": 1}}, ["'seed'"]),
        ({"prompt": "a", "vllm_xargs": {"adaskip_skip": "5-6"}}, ["adaskip_skip", "'5-6'"]),
        ({"prompt": "a", "vllm_xargs": {"adaskip_skip": [12]}}, ["12", "layers 0 to 11"]),
        ({"prompt": "a", "vllm_xargs": {"adaskip_skp": [1]}}, ["did you mean adaskip_skip"]),
        ({"prompt": "a", "vllm_xargs": {"adaskip_max_compute": 0.5}}, ["method 'none'"]),
        ({"prompt": "a", "max_tokens": 0}, ["max_tokens: 0", "int >= 1"]),
        ({"prompt": "a", "max_tokens": 1.5}, ["max_tokens: 1.5"]),
        ({"prompt": "a", "max_tokens": True}, ["max_tokens: True"]),
        ({"prompt": "a", "temperature": float("nan")}, ["temperature: nan"]),
    ],
)
def test_a_row_that_cannot_run_says_why(
    check: RowCheck, row: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(RowError) as refused:
        check(0, row)
    for word in words:
        assert word in str(refused.value)


def test_json_lines_and_parquet_are_the_same_job(check: RowCheck, tmp_path: Path) -> None:
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    texts = [
        {**row, "vllm_xargs": json.dumps(row["vllm_xargs"]) if "vllm_xargs" in row else None}
        for row in ROWS
    ]
    columns = ("prompt", "id", "vllm_xargs", "max_tokens", "temperature")
    pq.write_table(pa.table({key: [row.get(key) for row in texts] for key in columns}), table)
    jobs = [Job.plan(path, check, Parts(tmp_path / path.suffix, {}), 3) for path in (lines, table)]
    assert jobs[0].tables == jobs[1].tables and jobs[0].missing == jobs[1].missing == 4
    assert [one.num_rows for one in jobs[0].tables] == [3, 1]
    with pytest.raises(ValueError, match=r"'\.csv' are not read"):
        list(read(tmp_path / "a.csv"))


def test_lines_that_are_no_rows_keep_their_place(check: RowCheck, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"prompt": "a"}\n\n[1]\n{"prompt": "\xff"}\n{"prompt": "b"}\n')
    parts = Parts(tmp_path / "answers", {})
    job = Job.plan(source, check, parts, 2)
    assert (job.total, job.missing, job.failed) == (5, 2, 3)
    errors = [json.loads(line) for line in parts.path(1).read_text().splitlines()]
    assert [one["row"] for one in errors] == [2, 3]
    assert "the line is an array" in errors[0]["error"] and "no UTF-8" in errors[1]["error"]
    answer = {"generated_text": "x", "num_generated_tokens": 1, "__inference_error__": ""}
    job.take({"row": 4, **answer})
    assert parts.is_done(2) and not parts.is_done(0)
    job.take({"row": 0, **answer})
    rows = [json.loads(line) for line in parts.path(0).read_text().splitlines()]
    assert [one["row"] for one in rows] == [0, 1] and rows[0]["text"] == "x"
    assert Job.plan(source, check, parts, 2).tables == []


def test_a_folder_belongs_to_one_job_and_one_process_at_a_time(tmp_path: Path) -> None:
    parts = Parts(tmp_path, {"model": "a"})
    with pytest.raises(ValueError, match="another job is writing there"):
        Parts(tmp_path, {"model": "a"})
    del parts
    with pytest.raises(ValueError, match="model was 'a', is 'b'"):
        Parts(tmp_path, {"model": "b"})
    Parts(tmp_path, {"model": "a"})
