# SPDX-License-Identifier: Apache-2.0
"""One token per word, and text that comes back as it went in."""

import pytest

from vllm_adaskip.lab.testbed import tasks, tokenizer


@pytest.fixture(scope="module")
def built():
    return tokenizer.build()


@pytest.mark.parametrize("task", [*tasks.TASKS, *tasks.EXERCISES])
def test_questions_round_trip(built, task: str) -> None:
    for sample in tasks.samples(task, "test", 0, 100):
        for text in (sample.prompt, sample.answer):
            ids = built(text).input_ids
            assert built.unk_token_id not in ids
            assert len(ids) == len(text.split())
            assert built.decode(ids) == text


def test_the_vocabulary_is_small(built) -> None:
    assert len(built) < 1000


def test_unknown_words_and_free_spacing(built) -> None:
    assert built("zeppelin").input_ids == [built.unk_token_id]
    assert built.decode(built("Sum: 38+47 = ?").input_ids) == "sum : 3 8 + 4 7 = ?"


@pytest.mark.parametrize("ending", ["", " answer :"])
def test_the_chat_template_gives_the_trained_prompt(built, ending: str) -> None:
    (sample,) = tasks.samples("key", "test", 0, 1)
    text = sample.prompt.removesuffix(" answer :") + ending
    message = [{"role": "user", "content": text}]
    chat = built.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    assert chat == sample.prompt
