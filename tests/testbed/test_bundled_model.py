# SPDX-License-Identifier: Apache-2.0
"""The model in the repository answers held-out questions, and needs its layers."""

from pathlib import Path

import pytest

import vllm_adaskip.lab.testbed
from vllm_adaskip.lab.testbed import score, tasks

FOLDER = Path(vllm_adaskip.lab.testbed.__file__).parent / "model"


@pytest.fixture(scope="module")
def loaded():
    return score.load(FOLDER)


def test_the_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 25e6


def test_its_shape_suits_two_way_tensor_parallelism(loaded) -> None:
    config = loaded[0].config
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.num_hidden_layers == 12
    assert config.num_key_value_heads % 2 == 0
    assert config.vocab_size == len(loaded[1])


def test_it_answers_held_out_easy_questions(loaded) -> None:
    results = [score.score(*loaded, task, 16, seed=7) for task in tasks.EASY]
    assert sum(result.right for result in results) >= 0.9 * 64


def test_chat_and_plain_prompts_are_the_same_tokens(loaded) -> None:
    tokenizer = loaded[1]
    for sample in tasks.samples("fact", "test", 0, 5):
        message = [{"role": "user", "content": sample.prompt.removesuffix(" answer :")}]
        chat = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        assert tokenizer(chat).input_ids == tokenizer(sample.prompt).input_ids


def test_hard_questions_need_layers_that_easy_ones_can_miss() -> None:
    model, tokenizer = score.load(FOLDER)
    score.delete_layers(model, range(5, 10))
    assert score.score(model, tokenizer, "sentiment", 32).share > 0.75
    assert score.score(model, tokenizer, "column", 32).share < 0.5


def test_scored_questions_differ_and_are_held_out() -> None:
    questions = score.questions_of("fact", 100, seed=7)
    assert len({question.prompt for question in questions}) == 100
    assert not set(questions) & set(tasks.samples("fact", "train", 0, 5000))


def test_the_wilson_interval() -> None:
    low, high = score.Score("sum", 200, 190).interval
    assert low == pytest.approx(0.9104, abs=1e-3)
    assert high == pytest.approx(0.9726, abs=1e-3)
