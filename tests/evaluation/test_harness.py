# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness: asked by the harness under real plans, and refused without."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torture.judge import Judge
from transformers import AutoTokenizer
from typer.testing import CliRunner

from vllm_adaskip import bundled_model
from vllm_adaskip.lab.data.harness import HarnessItem, HarnessTask
from vllm_adaskip.lab.data.items import DataError, Item
from vllm_adaskip.lab.data.sources import load_items
from vllm_adaskip.lab.evaluation import harness_engine
from vllm_adaskip.lab.evaluation.harness_engine import HarnessEngine, run_task
from vllm_adaskip.lab.evaluation.manifest import new_manifest, start_or_resume
from vllm_adaskip.lab.evaluation.results import Answer, Results, Setting, Timing
from vllm_adaskip.lab.evaluation.runner import Engine, Timed, Work, evaluate
from vllm_adaskip.lab.evaluation.settings import DENSE, decided, explicit
from vllm_adaskip.lab.testbed.tasks import samples

LEFT_OUT = [1, 2, 3, 4, 5, 6, 7, 8]
STRONG = explicit([*LEFT_OUT], 12)
LIMIT = 6
WORDS = {
    "name": "words",
    "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
}
EXACT = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
#: Two choices without a delimiter that the tokenizer of words would not see.
CHOICES: dict[str, Any] = {
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}",
    "metric_list": [ACC, {**ACC, "metric": "acc_norm"}],
}
#: Tasks that cannot be used: what is wrong, and words of the refusal.
WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "rolling": (
        {"output_type": "loglikelihood_rolling"},
        ["lm-eval:rolling has output_type loglikelihood_rolling", "generate_until", "no prompt"],
    ),
    "blank": (
        {"output_type": "loglikelihood", "doc_to_target": "{{''}}", "metric_list": [ACC]},
        ["lm-eval:blank has an empty choice"],
    ),
    "drawn": (
        {"generation_kwargs": {"until": ["\n"], "do_sample": True, "temperature": 0.7}},
        ["lm-eval:drawn draws", "do_sample: false"],
    ),
    "corpus": (
        {"metric_list": [{"metric": "bleu", "aggregation": "bleu", "higher_is_better": True}]},
        ["lm-eval:corpus has metrics bleu", "[0, 1]"],
    ),
    "worse": (
        {"metric_list": [{**EXACT, "higher_is_better": False}]},
        ["lm-eval:worse has metrics exact_match", "higher_is_better: true"],
    ),
    "unsafe": ({"unsafe_code": True}, ["lm-eval:unsafe runs generated code"]),
    "nowhere": ({"dataset_path": "nobody/nothing"}, ["lm-eval:nowhere cannot be loaded", "nobody"]),
    "broken": ({"doc_to_text": "{{nothing.at.all}}"}, ["lm-eval:broken cannot be loaded"]),
    "empty": ({}, ["lm-eval:empty cannot be loaded", "not empty?"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks in files, as a user has them, two of them usable as a group."""
    folder = tmp_path_factory.mktemp("tasks")
    for name in ("sum", "hop"):
        write(folder, f"our_{name}", samples(name, "test", 7, LIMIT + 2), filter_list=[WORDS])
    # Examples drawn at random; and answers read in two ways, of which the first counts.
    shots = samples("sum", "test", 8, LIMIT + 2)
    lower = {"name": "lower", "filter": [{"function": "lowercase"}, {"function": "take_first"}]}
    write(folder, "shots", shots, num_fewshot=2, fewshot_split="test", filter_list=[WORDS, lower])
    write(folder, "long", shots, generation_kwargs={"until": ["\n"], "max_gen_toks": 500})
    write(folder, "chosen", asked("sum"), output_type="multiple_choice", **CHOICES)
    write(folder, "wrong", asked("hop", right=False), output_type="multiple_choice", **CHOICES)
    write(folder, "continued", asked("sum"), output_type="loglikelihood", metric_list=[ACC])
    write(folder, "chat", [{**one, "question": "hi"} for one in asked("sum")])
    for name, (what, _) in WRONG.items():
        write(folder, name, [] if name == "empty" else shots, **what)
    (folder / "ours.yaml").write_text(
        yaml.safe_dump({"group": "ours", "task": ["our_sum", "our_hop"]})
    )
    (folder / "mixed.yaml").write_text(
        yaml.safe_dump({"group": "mixed", "task": ["our_sum", "rolling"]})
    )
    return folder


def row(one: Any) -> dict[str, Any]:
    return {"question": one.prompt, "answer": one.answer, "choices": ["a", "b"], "label": 0}


def asked(task: str, right: bool = True) -> list[dict[str, Any]]:
    """Questions with their own answer and the next one's as choices."""
    found = samples(task, "test", 9, LIMIT + 1)
    return [
        {**row(one), "choices": [other.answer, one.answer], "label": int(right)}
        for one, other in pairwise(found)
    ]


def write(folder: Path, name: str, asked: list[Any], **config: Any) -> None:
    data = folder / f"{name}.jsonl"
    lines = [one if isinstance(one, dict) else row(one) for one in asked]
    data.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": None if "dataset_path" in config else kwargs,
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24},
        "metric_list": [EXACT],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**task, **config}))


def load(names: str, folder: Path, limit: int | None = LIMIT) -> list[Item]:
    return load_items(f"lm-eval:{names}", limit=limit, lm_eval_path=folder)


@pytest.fixture(scope="module")
def engine() -> Iterator[HarnessEngine]:
    """One for all: method `adaskip` also follows explicit plans."""
    options: dict[str, Any] = {"enforce_eager": True, "max_model_len": 256, "dtype": "float32"}
    engine = HarnessEngine(bundled_model(), "adaskip", {}, **options)
    yield engine
    engine.close()


def stripped(answer: Answer) -> Answer:
    return answer.model_copy(update={"text": answer.text.strip()})


def answered(engine: Engine, setting: Setting, items: list[Item]) -> list[Answer]:
    return [one for part in engine.answers(setting, items, 24) for one in part]


def test_a_group_is_expanded_and_the_first_documents_are_asked(folder: Path) -> None:
    items = load("ours", folder)
    expected = [
        (f"our_{name}/{n}", f"our_{name}", one.prompt, (one.answer,), "exact_match")
        for name in ("sum", "hop")
        for n, one in enumerate(samples(name, "test", 7, LIMIT))
    ]
    assert [(i.item, i.task, i.prompt, i.references, i.metric) for i in items] == expected
    assert len(load("our_sum, ours", folder, None)) == 2 * (LIMIT + 2)  # each task once
    assert load("shots", folder)[0].metric == "exact_match,words"  # as the harness calls it


def test_harness_and_ordinary_scores_are_equal_under_every_plan(
    folder: Path, engine: HarnessEngine
) -> None:
    items = load("ours", folder)
    plain = [Item(one.item, one.task, one.prompt, one.references, one.metric) for one in items]
    scores, plans = {}, {}
    for setting in (DENSE, STRONG, *decided("adaskip", {}, [0.6])):
        before = engine.llm.collective_rpc("adaskip_report")[0]["mlp_run"]
        ours = answered(engine, setting, items)
        after = engine.llm.collective_rpc("adaskip_report")[0]["mlp_run"]
        if setting.skip is not None:
            generated = sum(one.tokens - 1 for one in ours)  # the first comes of the prompt
            ran = [late - early for early, late in zip(before, after, strict=True)]
            assert ran == [0 if layer in setting.skip else generated for layer in range(12)]
        theirs = [one for part in Engine.answers(engine, setting, plain, 24) for one in part]
        assert list(map(stripped, ours)) == list(map(stripped, theirs))
        scores[setting.name] = sum(one.score for one in ours) / len(ours)
        plans[setting.name] = {str(one.skip) for one in ours}
    assert scores["dense"] == 1 and scores[STRONG.name] < 0.7
    assert plans["dense"] == {"[]"} and plans[STRONG.name] == {str(LEFT_OUT)}
    assert len(plans["adaskip 0.6"]) > 1 and "[]" not in plans["adaskip 0.6"]


def probability(judge: Judge, tokenizer: Any, skip: list[Any], pair: tuple[str, str]) -> float:
    """The log-probability of a continuation under a plan, in float32, by transformers."""
    prompt, answer = map(tokenizer.encode, pair)
    logits = judge.logits(prompt, skip, answer).log_softmax(-1)
    return float(logits.gather(-1, torch.tensor(answer)[:, None]).sum())


def test_choices_and_continuations_are_generated_under_the_plan(
    folder: Path, engine: HarnessEngine
) -> None:
    judge, tokenizer = Judge(bundled_model()), AutoTokenizer.from_pretrained(bundled_model())
    scores: dict[str, list[float]] = {}
    for name, metric in (("chosen", "acc"), ("wrong", "acc"), ("continued", "acc")):
        items = load(name, folder)
        assert len(items) == LIMIT and {one.metric for one in items} == {metric}
        for setting in (DENSE, STRONG):
            for one, item in zip(answered(engine, setting, items), items, strict=True):
                assert isinstance(item, HarnessItem)
                each = [probability(judge, tokenizer, one.skip, pair) for pair in item.pairs]
                if name == "continued":
                    best = item.pairs[0][1] if one.score else ""
                    assert (math.exp(each[0]) > 0.99) <= bool(one.score)
                else:
                    best = item.pairs[each.index(max(each))][1]
                    assert one.score == (best.strip() == item.references[0])
                assert one.text == best and one.skip == (setting.skip or [])
                words = [pair[1].split() for pair in item.pairs]
                assert one.tokens == sum(map(len, words))
                scores.setdefault(f"{name} {setting.name}", []).append(one.score)
    assert scores["chosen dense"] == [1] * LIMIT == scores["continued dense"]
    assert scores["wrong dense"] == [0] * LIMIT
    assert sum(scores[f"continued {STRONG.name}"]) < LIMIT  # the plan tells


def test_a_chat_template_is_applied_as_the_harness_does(
    folder: Path, engine: HarnessEngine
) -> None:
    items = load_items(
        "lm-eval:chat", limit=LIMIT, lm_eval_path=folder,
        model=bundled_model(), apply_chat_template=True,
    )  # fmt: skip
    assert {one.prompt for one in items} == {"hi answer :"}
    assert len(answered(engine, DENSE, items)) == LIMIT
    assert {one.prompt for one in load("chat", folder)} == {"hi"}


def test_a_package_that_a_task_wants_is_named(tmp_path: Path) -> None:
    folder = tmp_path
    (folder / "needs.py").write_text("import nobody_has_this\n\n\ndef of(doc): ...\n")
    write(folder, "needy", asked("sum"))
    text = (folder / "needy.yaml").read_text()
    (folder / "needy.yaml").write_text(text + "process_results: !function needs.of\n")
    with pytest.raises(DataError, match=r"needy wants the package nobody_has_this, .*lm_eval\["):
        load("needy", folder)


def test_few_shot_prompts_are_those_that_were_timed_and_shown(
    folder: Path, engine: HarnessEngine
) -> None:
    items = load("shots", folder)
    assert all(one.prompt.count("answer :") == 3 for one in items)
    for part in (items, items[3:]):  # a resumed run asks for the rest, and sees the same prompts
        for setting in (DENSE, STRONG):
            assert [one.item for one in answered(engine, setting, part)] == [i.item for i in part]


def test_a_prompt_that_the_harness_would_cut_is_refused(
    folder: Path, engine: HarnessEngine
) -> None:
    with pytest.raises(DataError, match=r"long/0: \d+ tokens and up to 500 .* --max-model-len"):
        answered(engine, DENSE, load("long", folder))


def test_a_run_is_stored_timed_and_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items, settings = load("ours", folder), [DENSE, STRONG]
    asked: list[tuple[str, int]] = []

    def spy(task: HarnessTask, backend: Any) -> Any:
        found = run_task(task, backend)
        asked.append((task.name, len(found)))
        return found

    monkeypatch.setattr(harness_engine, "run_task", spy)
    results = Results(tmp_path)
    start_or_resume(
        results,
        new_manifest(
            command="", model=bundled_model(), data={}, engine={}, settings=settings, seed=0
        ),
    )

    def go_on() -> int:
        work = Work.left(results, settings, items, 2, Timed(2, 4))
        options: dict[str, Any] = {"enforce_eager": True, "max_model_len": 256}
        evaluate(
            results, bundled_model(), settings, items, work,
            max_tokens=1, timed=Timed(2, 4), report=lambda what, done: None, **options,
        )  # fmt: skip
        return work.steps

    assert go_on() == 2 * 2 * LIMIT + 2
    whole = results.read(Answer)
    assert asked == [("our_sum", LIMIT), ("our_hop", LIMIT)] * 2 and len(whole) == 4 * LIMIT
    assert len(results.read(Timing)) == 2 and all(one.tokens > 1 for one in whole)
    path = tmp_path / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # killed while it wrote the last line
    assert go_on() == 1 and asked[4:] == [("our_hop", LIMIT)]
    assert sorted(map(str, results.read(Answer))) == sorted(map(str, whole))
    assert go_on() == 0 and len(asked) == 5


@pytest.mark.parametrize("name", WRONG)
def test_a_task_that_plans_cannot_be_evaluated_on_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(DataError) as refusal:
        load(name, folder)
    for word in WRONG[name][1]:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("lm-eval:our_smu", ["no task 'our_smu'", "our_sum", "lm-eval ls tasks"]),
        ("lm-eval:our_sum,", ["no task ''"]),
        ("lm-eval:mixed", ["lm-eval:rolling has output_type loglikelihood_rolling"]),
        # The harness's own, whose data is never fetched.
        ("lm-eval:wikitext", ["lm-eval:wikitext has output_type loglikelihood_rolling"]),
        ("bundled", ["--lm-eval-path", "'bundled'"]),
    ],
)
def test_a_wrong_name_is_refused(folder: Path, source: str, words: list[str]) -> None:
    with pytest.raises(DataError) as refusal:
        load_items(source, lm_eval_path=folder)
    for word in words:
        assert word in str(refusal.value)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load("our_sum", tmp_path / "gone")


def test_without_the_harness_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_adaskip.cli.main import app

    monkeypatch.delitem(sys.modules, "lm_eval.tasks", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    arguments = ["--data", "lm-eval:gsm8k", "--lm-eval-path", str(tmp_path)]
    done = CliRunner().invoke(app, ["eval", "--out", str(tmp_path / "run"), *arguments])
    assert done.exit_code == 2 and "install vllm-adaskip[lm-eval]" in " ".join(done.output.split())
    assert not (tmp_path / "run").exists()
