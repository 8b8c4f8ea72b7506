# SPDX-License-Identifier: Apache-2.0
"""Where an answer begins, and what ends it, for all that reads answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluation.letters import MARKS, START, TEXT_END, TURN, Letters, text
from transformers import AutoTokenizer

from vllm_adaskip import bundled_model
from vllm_adaskip.lab.data.items import DataError, Item
from vllm_adaskip.lab.data.tokens import (
    answer_tokens,
    end_after,
    end_tokens,
    first_tokens,
    prompt_tokens,
)
from vllm_adaskip.lab.fitting.samples import sample


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("The capital is", "Paris", " Paris"),
        ("The capital is ", "Paris", "Paris"),
        ("assistant\n", "Paris", "Paris"),
        (f"user hi{TURN}", "Paris", "Paris"),  # templates whose turns end without white space
        ("The capital is", " Paris", " Paris"),
        ("The answer is (", "B", "B"),
        ("首都是", "東京", "東京"),
        ("首都は「", "Paris", "Paris"),
        ('He said "no"', "Then", " Then"),
    ],
)
def test_a_space_stands_only_where_words_would_touch(
    prompt: str, answer: str, expected: str
) -> None:
    assert text(answer_tokens(prompt, answer, Letters())) == expected


def test_a_start_that_the_template_wrote_is_not_added_again() -> None:
    assert text(prompt_tokens("hi", Letters())) == f"{START}hi"
    assert text(prompt_tokens(f"{START}hi", Letters())) == f"{START}hi"
    assert text(prompt_tokens(f"{START}{START}hi", Letters())) == f"{START}{START}hi"
    assert text(prompt_tokens("hi", Letters(bos_token=None))) == "hi"
    assert text(answer_tokens(f"{START}hi\n", "yes", Letters())) == "yes"


def test_all_of_the_prompt_comes_before_the_answer() -> None:
    """Read in one text the prompt's last letter would join the answer's first."""
    item = Item("a/0", "a", "abc", ("de", "not this"), "exact_match")
    spaced, own = ord(" ") + ord("d"), ord("e")
    read = sample(item, Letters(size=2))
    assert (read.task, read.ids, read.answer) == ("a", [0, 195, 99, spaced, own], 2)
    assert sample(item, Letters(size=2), [2]).ids[-1] == 2


def test_an_answer_ends_as_the_turns_of_its_prompt_do() -> None:
    turn, end = MARKS[TURN], MARKS[TEXT_END]
    chat, plain = prompt_tokens(f"user hi{TURN}", Letters()), prompt_tokens("hi", Letters())
    assert end_after(chat, [end, turn], Letters()) == [turn]
    assert end_after(plain, [turn, end], Letters()) == [end]  # the tokenizer's own
    assert end_after(plain, [turn, 77], Letters()) == [turn]  # the model knows better
    assert end_after(plain, [], Letters()) == []


def test_the_end_is_the_generation_config_s_and_else_the_tokenizer_s(tmp_path: Path) -> None:
    assert end_tokens(str(tmp_path), Letters()) == [2]
    assert end_tokens(str(tmp_path), Letters(eos_token_id=None)) == []
    for named, expected in ((7, [7]), ([7, 8], [7, 8]), (None, [2])):
        config = tmp_path / "generation_config.json"
        config.write_text(json.dumps({"eos_token_id": named}))
        assert end_tokens(str(tmp_path), Letters()) == expected


def test_the_bundled_model_reads_as_it_did() -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    ends = end_tokens(bundled_model(), tokenizer)
    found = sample(Item("a", "a", "sum : 7 2 + 4 1 =", ("1 1 3",), "exact_match"), tokenizer, ends)
    assert found.ids == tokenizer.encode("sum : 7 2 + 4 1 = 1 1 3<eos>") and found.answer == 4


def test_what_has_no_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="'a/0': 0 tokens of a prompt, 3 more"):
        sample(Item("a/0", "a", "", ("yes",), "exact_match"), Letters(bos_token=None))
    with pytest.raises(DataError, match="'a/0': 3 tokens of a prompt, 0 more"):
        sample(Item("a/0", "a", "hi", ("",), "exact_match"), Letters())


def test_an_answer_begins_in_the_forms_in_which_models_write_it() -> None:
    letters = {ord(one) for one in "pP"}
    assert first_tokens("positive", Letters()) == letters
    assert first_tokens("Positive", Letters()) == letters  # a space alone says nothing
    pairs = {sum(map(ord, one)) for one in ("po", "Po", "PO", " p", " P")}
    assert first_tokens("positive", Letters(size=2)) == pairs
    assert first_tokens("7", Letters()) == {ord("7")}
    unknown = Letters(unk_token_id=ord("P"))
    assert first_tokens("positive", unknown) == {ord("p")}
