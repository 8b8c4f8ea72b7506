# SPDX-License-Identifier: Apache-2.0
"""Data as people have it: tables, messages and choices; and how each can be wrong."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vllm_adaskip import bundled_model
from vllm_adaskip.lab.data.items import DataError, Item
from vllm_adaskip.lab.data.sources import load_items

TEMPLATE = (
    "{% for one in messages %}<{{ one.role }}"
    "{% if 'name' in one %} {{ one.name }}{% endif %}>{{ one.content }}\n{% endfor %}"
    "{% if tools %}[{{ tools[0].function.name }}]\n{% endif %}"
    "{% if messages[0].role == 'nobody' %}{{ raise_exception('no such role') }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}
ASKS = {"role": "user", "content": "2 + 2?"}
SAYS = {"role": "assistant", "content": "4"}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer with a template of chats."""
    folder = tmp_path_factory.mktemp("chat")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(Path(bundled_model()) / name, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


@pytest.fixture(scope="module")
def plain_model(chat_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("plain") / "base"
    shutil.copytree(chat_model, folder)
    (folder / "chat_template.jinja").unlink()
    return str(folder)


def write(tmp_path: Path, *rows: object, name: str = "quiz.jsonl") -> str:
    path = tmp_path / name
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in rows))
    return str(path)


def load_one(tmp_path: Path, row: dict[str, Any], **how: Any) -> Item:
    (item,) = load_items(write(tmp_path, row), **how)
    return item


def test_a_newcomers_table_of_questions(tmp_path: Path, chat_model: str) -> None:
    source = write(
        tmp_path,
        "number,question,answer",
        '1,"Who, then?","Me\nand you"',
        "2,What is 2 + 2?,4",
        name="chats.csv",
    )
    named: Any = {"columns": ("question", "answer")}
    items = load_items(source, **named)
    assert [(one.item, one.prompt, one.references) for one in items] == [
        ("chats/1", "Who, then?", ("Me\nand you",)),
        ("chats/2", "What is 2 + 2?", ("4",)),
    ]
    items = load_items(source, model=chat_model, apply_chat_template=True, **named)
    assert items[1].prompt == "<user>What is 2 + 2?\n<assistant>"


def test_all_kinds_of_files_say_the_same(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p\n1", "references": ["a", "b"], "id": "x"},
        {"prompt": "2 + 2", "choices": ["3", "4"], "label": 1},
    ]
    whole = load_items(write(tmp_path, *rows))
    for sign, name in ((",", "quiz.csv"), ("\t", "quiz.tsv")):
        lines = [["prompt", "references", "id", "choices", "label"]]
        for row in rows:
            cells = [row.get(key, "") for key in lines[0]]
            texts = [one if isinstance(one, str) else json.dumps(one) for one in cells]
            lines.append(['"' + text.replace('"', '""') + '"' for text in texts])
        source = write(tmp_path, *(sign.join(cells) for cells in lines), name=name)
        assert load_items(source) == whole
    columns = {key: [row.get(key) for row in rows] for key in lines[0]}
    pq.write_table(pa.table(columns), tmp_path / "quiz.parquet")
    assert load_items(str(tmp_path / "quiz.parquet")) == whole


def test_messages_are_rendered_by_the_model_s_own_template(tmp_path: Path, chat_model: str) -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    row = {"messages": [SYSTEM, ASKS], "reference": 4, "tools": [tool]}
    item = load_one(tmp_path, row, model=chat_model)
    assert item.prompt == "<system>Be brief.\n<user>2 + 2?\n[add]\n<assistant>"
    assert item.references == ("4",)


def test_a_last_turn_is_the_answer_unless_there_is_one(tmp_path: Path, chat_model: str) -> None:
    item = load_one(tmp_path, {"messages": [ASKS, SAYS]}, model=chat_model)
    assert (item.prompt, item.references) == ("<user>2 + 2?\n<assistant>", ("4",))
    begun = {"role": "assistant", "content": "It is"}
    item = load_one(tmp_path, {"messages": [ASKS, begun], "reference": "4"}, model=chat_model)
    assert item.prompt == "<user>2 + 2?\n<assistant>It is"


def test_parquet_s_messages_have_no_more_keys_than_they_had(
    tmp_path: Path, chat_model: str
) -> None:
    """A column gives all objects the keys of any."""
    named = {"role": "user", "content": "2 + 2?", "name": "me"}
    pq.write_table(
        pa.Table.from_pylist([{"messages": [SYSTEM, named, SAYS]}]), tmp_path / "a.parquet"
    )
    (item,) = load_items(str(tmp_path / "a.parquet"), model=chat_model)
    assert item.prompt == "<system>Be brief.\n<user me>2 + 2?\n<assistant>"
    assert item.references == ("4",)


@pytest.mark.parametrize(
    ("choices", "label", "right"),
    [
        (["no", "yes"], 1, "yes"),
        (["no", "yes"], "yes", "yes"),
        ([" no", " yes"], "yes", " yes"),
        (["no", "yes"], "1", "yes"),
        (["2", "1", "0"], "2", "2"),  # a text goes before a number
        ([2, 1, 0], 2, "0"),
    ],
)
def test_a_label_is_a_choice_or_its_number(
    tmp_path: Path, choices: list[Any], label: Any, right: str
) -> None:
    item = load_one(tmp_path, {"prompt": "p", "choices": choices, "label": label})
    assert (item.metric, item.references) == ("choice", (right,))
    assert item.choices == tuple(map(str, choices))


def test_generated_answers_may_be_scored_by_their_choices(tmp_path: Path) -> None:
    row = {"prompt": "p", "choices": ["no", "yes"], "label": 1, "metric": "accuracy"}
    assert load_one(tmp_path, row).labels == ("no", "yes")
    row = {"prompt": "p", "choices": ["no", "yes"], "reference": "yes"}
    assert load_one(tmp_path, row).references == ("yes",)


CHOICES: dict[str, Any] = {"prompt": "p", "choices": ["no", "yes"]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"reference": "r"}, ["no prompt and no messages; there is reference"]),
        ({"prompt": "p", "messages": [ASKS]}, ["prompt and messages", "either"]),
        ({"prompt": "p", "reference": float("inf")}, ["no JSON"]),
        ({"prompt": "p", "reference": True}, ["reference", "string", "not True"]),
        ({"prompt": "\ud800", "reference": "r"}, ["prompt", "surrogate"]),
        ({"messages": []}, ["messages", "at least 1"]),
        ({"messages": [{"content": "p"}]}, ["messages.0", "role is None"]),
        ({"messages": [ASKS], "reference": "r"}, ["chat template"]),
        ({**CHOICES, "label": 2}, ["label 2: no choice", "0 to 1", "'yes'"]),
        ({**CHOICES, "label": -1}, ["label -1: no choice"]),
        ({**CHOICES, "label": "maybe"}, ["label 'maybe': no choice"]),
        ({**CHOICES, "label": True}, ["label"]),
        (CHOICES, ["choices and label go together"]),
        ({"prompt": "p", "label": 1}, ["choices and label go together"]),
        ({**CHOICES, "label": 1, "reference": "yes"}, ["label and reference; allowed: either"]),
        ({"prompt": "p", "choices": ["yes"], "label": 0}, ["choices", "at least 2"]),
        ({"prompt": "p", "choices": ["a", "a"], "label": 0}, ["different ones"]),
        ({"prompt": "p", "choices": ["a", " "], "label": 0}, ["none empty"]),
        ({"prompt": "p", "reference": "r", "metric": "choice"}, ["needs choices and a label"]),
    ],
)
def test_a_wrong_row_is_refused(tmp_path: Path, row: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(DataError) as refusal:
        load_one(tmp_path, row)
    for word in ["quiz.jsonl:1", *words]:
        assert word in str(refusal.value)


def test_what_no_template_takes_is_refused(
    tmp_path: Path, chat_model: str, plain_model: str
) -> None:
    row: dict[str, Any] = {"messages": [ASKS], "reference": "4"}
    with pytest.raises(DataError, match=r"quiz.jsonl:1: messages want .* and .*base has none"):
        load_one(tmp_path, row, model=plain_model)
    with pytest.raises(DataError, match="no such role"):
        load_one(tmp_path, {**row, "messages": [{**ASKS, "role": "nobody"}]}, model=chat_model)
    with pytest.raises(DataError, match="nothing comes before the last turn"):
        load_one(tmp_path, {"messages": [SAYS]}, model=chat_model)
    with pytest.raises(DataError, match="are of files, not of 'bundled'"):
        load_items("bundled", apply_chat_template=True, model=chat_model)
    with pytest.raises(DataError, match="a chat template is a model's, and none is named"):
        load_items("lm-eval:any", apply_chat_template=True)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], ["no items"]),
        (["prompt,reference"], ["no items"]),
        (["question,answer", "p,r"], ["a.csv:2", "'question', 'answer'", "--columns"]),
        (["prompt,reference", "p,r,s"], ["a.csv:2: 3 cells; the first row names 2"]),
        (["prompt,prompt", "p,r"], ["each name once"]),
        (["prompt,reference", "p,"], ["a.csv:2", "needs a reference"]),
        (["prompt,reference", '"p'], ["a.csv:2: no CSV"]),
        (["prompt,choices,label", "p,no|yes,1"], ["a.csv:2: choices", "a JSON array"]),
        (["prompt,reference,id", "p,r,7", "q,s,7"], ["a.csv:3: id '7' comes twice"]),
    ],
)
def test_a_wrong_table_is_refused_with_its_line(
    tmp_path: Path, lines: list[str], words: list[str]
) -> None:
    with pytest.raises(DataError) as refusal:
        load_items(write(tmp_path, *lines, name="a.csv"))
    for word in words:
        assert word in str(refusal.value)


def test_a_column_that_is_missing_is_named(tmp_path: Path) -> None:
    source = write(tmp_path, {"question": "p", "answer": "r"})
    assert load_items(source, columns=("question", "answer"))[0].references == ("r",)
    with pytest.raises(DataError, match="no column 'reply'; it has question, answer"):
        load_items(source, columns=("question", "reply"))


def test_parquet_without_its_reader_or_with_nothing_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path, "no parquet", name="a.parquet")
    with pytest.raises(DataError, match="no Parquet"):
        load_items(source)
    table = pa.table({"prompt": ["p", None], "reference": [1.0, float("nan")]})
    pq.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"row 2: reference: .* not nan"):
        load_items(str(tmp_path / "b.parquet"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="Parquet wants pyarrow"):
        load_items(source)
