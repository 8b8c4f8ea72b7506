# SPDX-License-Identifier: Apache-2.0
"""A real run: what is stored is what a float32 transformers loop says, and a killed run goes on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation.letters import Letters
from helpers.profiles import write_lora
from helpers.reference import Reference
from safetensors.torch import load_file, save_file
from torture.judge import Judge
from transformers import AutoTokenizer

from vllm_adaskip import bundled_model
from vllm_adaskip.classifiers import DecoderShape
from vllm_adaskip.classifiers.profile import Profile
from vllm_adaskip.lab.data.items import Item
from vllm_adaskip.lab.data.sources import load_items
from vllm_adaskip.lab.evaluation.engine import (
    Engine,
    Ran,
    forced_pairs,
    likeliest,
    of_one_token,
)
from vllm_adaskip.lab.evaluation.manifest import new_manifest, start_or_resume
from vllm_adaskip.lab.evaluation.quality import is_narrow
from vllm_adaskip.lab.evaluation.results import Answer, Manifest, Results, Setting, Timing
from vllm_adaskip.lab.evaluation.runner import Timed, Work, check, evaluate
from vllm_adaskip.lab.evaluation.settings import DENSE, adapters_alone, decided, explicit, profiled

SETTINGS: list[Setting] = [
    DENSE,
    explicit([*range(2, 9), "attn:9"], 12),
    *decided("adaskip", {}, [0.8]),
]
ROUNDS, MAX_TOKENS = 2, 8
TIMED = Timed(batch=2, tokens=4, most=4)


def test_a_budget_that_cannot_be_met_is_refused_before_an_engine_starts() -> None:
    shape = DecoderShape(12, 100, 300)
    check([*SETTINGS, *decided("ffn-skip", {}, [0.9])], shape)
    with pytest.raises(ValueError, match=r"^ffn-skip 0\.3: .* cannot be met: method 'ffn-skip'"):
        check([*SETTINGS, *decided("ffn-skip", {}, [0.3])], shape)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    asked = load_items("bundled:sum,hop,translate", limit=4)
    read = [
        Item(f"read/{one.item}", "read", one.prompt, one.references, "perplexity") for one in asked
    ]
    return [*asked, *read, *chosen(asked)]


def chosen(asked: list[Item]) -> list[Item]:
    """Ask the same with the answers to all questions of the task as choices, of any length."""
    found = []
    for one in asked:
        own = dict.fromkeys(other.references[0] for other in asked if other.task == one.task)
        choices = tuple(own) if len(own) > 1 else (*own, "1 2")
        wrong = next(choice for choice in choices if choice not in one.references)
        for name, right in (("choice", one.references), ("wrong", (wrong,))):
            found.append(
                Item(f"{name}/{one.item}", name, one.prompt, right, "choice", choices=choices)
            )
    return found


def run(
    results: Results,
    items: list[Item],
    settings: list[Setting] = SETTINGS,
    rounds: int = ROUNDS,
) -> int:
    """Do what is left; give how much that was."""
    work = Work.left(results, settings, items, rounds, TIMED)
    steps = work.steps
    reported: list[int] = []

    def report(what: str, done: int) -> None:
        reported.append(done)

    engine: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}
    evaluate(
        results,
        bundled_model(),
        settings,
        items,
        work,
        max_tokens=MAX_TOKENS,
        timed=TIMED,
        report=report,
        distributed_executor_backend="uni",
        **engine,
    )
    assert sum(reported) == steps
    return steps


def manifest_of(settings: list[Setting]) -> Manifest:
    return new_manifest(
        command="", model=bundled_model(), data={}, engine={}, settings=settings, seed=0
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, items: list[Item]) -> Results:
    results = Results(tmp_path_factory.mktemp("run"))
    start_or_resume(results, manifest_of(SETTINGS))
    run(results, items)
    return results


def test_every_item_is_answered_under_every_setting(results: Results, items: list[Item]) -> None:
    answers = results.read(Answer)
    assert len(answers) == len(SETTINGS) * len(items)
    assert len({(one.setting, one.item) for one in answers}) == len(answers)
    rounds = [(one.setting, one.round) for one in results.read(Timing)]
    assert len(rounds) == len({*rounds})
    assert {*rounds} >= {(s.name, r) for s in SETTINGS[1:] for r in range(ROUNDS)}
    for setting in SETTINGS[1:]:  # to the bound, unless the times say enough
        own = [one for one in results.read(Timing) if one.setting == setting.name]
        ratios = [one.seconds / one.dense_seconds for one in own]
        assert len(own) == TIMED.most or (len(own) < TIMED.most and is_narrow(ratios))
    assert all(one.seconds > 0 and one.dense_seconds > 0 for one in results.read(Timing))


def test_answers_are_those_of_the_reference_under_the_stored_plan(
    results: Results, items: list[Item]
) -> None:
    reference = Reference(bundled_model())
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    prompts = {item.item: item.prompt for item in items if item.metric == "exact_match"}
    plans = set()
    for one in results.read(Answer):
        if one.item not in prompts:
            continue
        plans.add(str(one.skip))
        prompt = tokenizer.encode(prompts[one.item])
        tokens, _ = reference.generate(prompt, one.skip, one.tokens)
        assert one.text.split() == tokenizer.decode(tokens, skip_special_tokens=True).split()
    assert len(plans) > 3  # decided ones are stored as they were


def test_perplexity_is_that_of_the_reference_answer_under_the_plan(
    results: Results, items: list[Item]
) -> None:
    judge = Judge(bundled_model())
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    by_name = {item.item: item for item in items}
    worse = 0
    for one in results.read(Answer):
        if one.metric != "perplexity":
            continue
        item = by_name[one.item]
        prompt = tokenizer.encode(item.prompt)
        answer = tokenizer.encode(f"{item.prompt} {item.references[0]}")[len(prompt) :]
        logits = judge.logits(prompt, one.skip, answer)
        chosen = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])
        assert one.score == pytest.approx(math.exp(-chosen.mean().item()), rel=1e-3)
        worse += one.score > 1.01
    assert worse  # the plans do tell


def test_the_whole_model_says_of_planned_answers_what_the_reference_says(
    results: Results, items: list[Item]
) -> None:
    reference, judge = Reference(bundled_model()), Judge(bundled_model())
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    prompts = {item.item: item.prompt for item in items if item.metric == "exact_match"}
    disagreed = 0
    for one in results.read(Answer):
        if one.item not in prompts:
            assert one.agreement is None and one.surprise is None  # given, not generated
            continue
        prompt = tokenizer.encode(prompts[one.item])
        tokens, _ = reference.generate(prompt, one.skip, one.tokens)
        whole = judge.logits(prompt, [], tokens).log_softmax(-1)
        chosen = whole.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        gaps = whole.max(-1).values - chosen
        assert one.surprise == pytest.approx(gaps.mean().item(), rel=1e-3, abs=1e-5)
        assert one.agreement == pytest.approx((gaps <= 0).float().mean().item())
        if one.setting == "dense":
            assert one.agreement == 1 and one.surprise == 0
        disagreed += one.agreement < 1
    assert disagreed  # the plans do tell


def test_answers_of_an_adapter_are_read_by_the_model_as_it_is(
    tmp_path: Path, items: list[Item]
) -> None:
    """The adapted model would agree with all that it writes itself with nothing left out."""
    own = Profile(method="none", model="bundled", fingerprint=manifest_of([]).fingerprint)
    own.save(folder := tmp_path / "adapted")
    write_lora(folder, bundled_model())
    path = folder / "lora" / "adapter_model.safetensors"
    save_file({name: 4 * one for name, one in load_file(path).items()}, path)
    settings = [DENSE, *adapters_alone(profiled(str(folder), [], [], own.fingerprint))]
    assert [one.skip for one in settings[1:]] == [None, []]
    results = Results(tmp_path / "run")
    start_or_resume(results, manifest_of(settings))
    asked = [one for one in items if one.metric == "exact_match"]
    run(results, asked, settings, rounds=0)
    answers = results.read(Answer)
    assert len(answers) == 3 * len(asked)
    for one in settings:
        read = [answer.agreement or 0 for answer in answers if answer.setting == one.name]
        assert (min(read) == 1) == (one is DENSE)
    # Killed before they were read: nothing is asked again.
    results.replace(Answer, [one for one in answers if one.setting == DENSE.name])
    assert run(results, asked, settings, rounds=0) == 0
    assert results.read(Answer) == answers


def test_another_batch_is_timed_anew(results: Results, items: list[Item]) -> None:
    other = Work.left(results, SETTINGS, items, ROUNDS, Timed(batch=3, tokens=4))
    assert other.rounds == {one.name: [0, 1] for one in SETTINGS[1:]}


def test_the_choice_that_is_likeliest_by_byte_under_the_plan_counts(
    results: Results, items: list[Item]
) -> None:
    judge = Judge(bundled_model())
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    by_name = {item.item: item for item in items}
    scores = set()
    for one in results.read(Answer):
        if one.metric != "choice":
            continue
        item = by_name[one.item]
        prompt = tokenizer.encode(item.prompt)
        each = []
        for choice in item.choices:
            answer = tokenizer.encode(choice)
            logits = judge.logits(prompt, one.skip, answer).log_softmax(-1)
            chosen = logits.gather(-1, torch.tensor(answer)[:, None])
            each.append(chosen.sum().item() / len(choice.encode()))
        best = item.choices[each.index(max(each))]
        assert one.text == best and one.score == (best == item.references[0])
        assert one.tokens == sum(len(tokenizer.encode(choice)) for choice in item.choices)
        scores.add((one.setting, one.score))
    assert ("dense", 1.0) in scores and {score for _, score in scores} == {0.0, 1.0}


def test_what_several_requests_ran_is_weighed_by_their_tokens() -> None:
    engine = Engine.__new__(Engine)
    engine.shape = DecoderShape(2, 1, 2)
    own, plan = Ran(0.5, [], [0, 1, 0, 1]), Ran(0.5, [1])
    assert engine._together([plan, plan], [3, 1]) == plan
    both = engine._together([own, plan], [4, 2])
    assert both.left_out == [0, 0.75, 0.25, 1] and both.skip == []
    assert engine._together([own, plan], [1, 1]).left_out == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("each", "place"),
    [
        ([-1.0, -2.0], 0),
        ([-2.0, -1.0], 1),
        ([-1.0, -1.0], None),  # a model that says the same of all knows nothing
        ([math.nan, -1.0], None),
        ([-1.0, math.nan], None),
        ([-math.inf, -1.0], 1),
    ],
)
def test_only_a_likelier_choice_is_chosen(each: list[float], place: int | None) -> None:
    assert likeliest(each) == place


def test_items_whose_answers_come_of_the_prompt_are_counted() -> None:
    letters = Item("a", "t", "2 + 2 ", ("B",), "choice", choices=("A", "B"))
    longer = Item("b", "t", "2 + 2 ", ("B",), "choice", choices=("A", "BC"))
    read = Item("c", "t", "2 + 2 ", ("B", "not this"), "perplexity")
    free = Item("d", "t", "2 + 2 ", ("B",), "exact_match")
    assert forced_pairs(letters) == (("2 + 2 ", "A"), ("2 + 2 ", "B"))
    assert forced_pairs(read) == (("2 + 2 ", "B"),) and forced_pairs(free) == ()
    assert of_one_token([letters, longer, read, free], Letters()) == 2


def test_a_killed_run_goes_on_where_it_was(results: Results, items: list[Item]) -> None:
    assert Work.left(results, SETTINGS, items, ROUNDS, TIMED).steps == 0
    path: Path = results.folder / "answers.jsonl"
    whole = results.read(Answer)
    path.write_bytes(path.read_bytes()[:-20])  # killed while it wrote the last line
    assert run(results, items) == 1
    again = results.read(Answer)
    assert sorted(map(str, again)) == sorted(map(str, whole))
