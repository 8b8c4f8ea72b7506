# SPDX-License-Identifier: Apache-2.0
"""JSON lines as the format says, and what is said of everything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_adaskip.lab.data.items import DataError
from vllm_adaskip.lab.data.json_lines import JsonError, parsed_object, read_lines
from vllm_adaskip.lab.data.sources import load_items

ROW = {"prompt": "2 + 2 =", "reference": "4"}


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    """Other separators, U+2028 and a form feed among them, are text; so is a carriage return."""
    path = tmp_path / "a.jsonl"
    texts = ["one\u2028two", "one\u0085two", "one\x0ctwo", "plain"]
    lines = [json.dumps({**ROW, "prompt": text}, ensure_ascii=False) for text in texts]
    lines[2] = lines[2].replace("\\f", "\\u000c")
    path.write_bytes("\r\n".join(lines).encode())
    assert [item.prompt for item in load_items(str(path))] == texts


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROW), encoding="utf-8-sig")
    assert load_items(str(path))[0].prompt == ROW["prompt"]
    path.write_text(json.dumps([ROW]), encoding="utf-8-sig")
    assert load_items(str(path))[0].prompt == ROW["prompt"]


def test_an_array_is_read_however_it_is_laid_out(tmp_path: Path) -> None:
    for indent in (None, 2):
        (path := tmp_path / "a.json").write_text(json.dumps([ROW, ROW], indent=indent))
        assert [item.item for item in load_items(str(path))] == ["a/1", "a/2"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps(ROW, indent=2), ["a.jsonl:1", "one JSON object a line, not spread over"]),
        (json.dumps(ROW) + "\n" + json.dumps(ROW, indent=1), ["a.jsonl:2", "not spread over"]),
        (json.dumps([ROW, 7]), ["row 2 is 7", "JSON objects"]),
        (json.dumps([ROW])[:-1], ["begins as a JSON array, but no JSON"]),
        ("", ["no items"]),
        ("\n \n", ["no items"]),
        ("7", ["a.jsonl:1", "the line is int, 7"]),
        ('{"prompt": "p", "reference": NaN}', ["NaN is no JSON"]),
        ('{"prompt": "p", "reference": -Infinity}', ["-Infinity is no JSON"]),
        ('{"prompt": "p", "prompt": "q", "reference": "r"}', ["key 'prompt' comes twice"]),
        ('{"prompt": ' + "[" * 100_000, ["a.jsonl:1", "nested too deeply"]),
        ("[" * 100_000, ["begins as a JSON array, but nested too deeply"]),
        ('{"prompt": ' + "9" * 10_000 + "}", ["a.jsonl:1", "digits"]),
        (
            json.dumps({**ROW, "references": ["4"]}),
            ["a.jsonl:1", "reference and references", "either"],
        ),
    ],
)
def test_what_was_found_and_what_is_wanted(tmp_path: Path, text: str, words: list[str]) -> None:
    (path := tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError) as refusal:
        load_items(str(path))
    for word in words:
        assert word in str(refusal.value)


def test_other_encodings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROW), encoding="utf-16")
    with pytest.raises(DataError, match="no UTF-8: UTF-16; allowed: UTF-8"):
        load_items(str(path))
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(DataError, match=r"a.jsonl:1: no UTF-8: byte 13"):
        load_items(str(path))


def test_a_reader_that_goes_on_gets_errors_as_lines(tmp_path: Path) -> None:
    (path := tmp_path / "a.jsonl").write_text('{"a": 1}\n{\n\n{"a": 2}')
    found = list(read_lines(path))
    assert [number for number, _ in found] == [1, 2, 4]
    assert [isinstance(one, JsonError) for _, one in found] == [False, True, False]
    with pytest.raises(JsonError, match="the line is an array"):
        parsed_object(b"[1]")
