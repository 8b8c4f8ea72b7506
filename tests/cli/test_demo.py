# SPDX-License-Identifier: Apache-2.0
"""What `adaskip demo` says; `.ci/run` runs the whole of it."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from vllm_adaskip import bundled_model
from vllm_adaskip.classifiers import SkipPlan
from vllm_adaskip.cli import demo


def printed(*what: object) -> str:
    console = Console(width=200, record=True, file=StringIO())
    console.print(*what)
    return console.export_text()


@pytest.mark.parametrize("error", [OSError("no network"), ModuleNotFoundError("no gguf")])
def test_without_smollm2_it_shows_the_bundled_model_and_says_so(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(name: str) -> str:
        raise error

    monkeypatch.setattr(demo, "get", get)
    console = Console(width=200, record=True, file=StringIO())
    one = demo._subject(console)
    assert console.export_text() == f"The bundled model stands in for SmolLM2: {error}.\n"
    assert (one.path, len(one.questions)) == (bundled_model(), 8)
    assert [*one.plans] == ["dense", "skip 5-6", "skip 3-8"]


def test_healed_answers_stand_beside_those_of_the_plan_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def generate(llm: str, prompts: list[str], plans: list[demo.Entries], **_: object) -> list[str]:
        return [f"{llm}, {prompt}, {plan}" for prompt, plan in zip(prompts, plans, strict=True)]

    monkeypatch.setattr(demo, "_generate", generate)
    plans: dict[str, demo.Entries] = {"dense": [], f"skip 1{demo.HEALED}": [1]}
    one = demo.Subject("tiny", "/tiny", ["a?"], ["a"], plans, "/profile")
    assert one.options == {"profile": "/profile"}
    assert demo._unhealed("whole", one) == {"skip 1": ["whole, a, [1]"]}  # type: ignore[arg-type]


def test_every_answer_stands_in_its_plan_s_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch has each question under each plan, side by side."""

    class Engine:
        def collective_rpc(self, name: str) -> list[dict[str, int]]:
            return [{"decode_tokens": 1}]

    def generate(
        llm: object, prompts: list[str], plans: list[demo.Entries], **_: object
    ) -> list[str]:
        assert len(prompts) == 24
        return [
            f"{prompt} {SkipPlan.parse(plan, 12)}"
            for prompt, plan in zip(prompts, plans, strict=True)
        ]

    monkeypatch.setattr(demo, "_generate", generate)
    one = demo._bundled()
    answers, _ = demo._answers(Engine(), one)  # type: ignore[arg-type]
    for name, given in answers.items():
        assert given == [f"{prompt} {name}" for prompt in one.prompts]


def test_sub_layers_that_ran_equally_often_stand_together() -> None:
    report = {"decode_tokens": 8, "attn_run": [8, 8, 2, 8], "mlp_run": [8, 4, 2, 8]}
    text = printed(demo._ran_table(report))
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "0, 3, attn:1 8 (100%)" in rows
    assert "mlp:1 4 (50%)" in rows
    assert "2 2 (25%)" in rows


def test_the_verdict_says_slower_where_it_is() -> None:
    taken = {"stock": [1.0, 2.0, 1.0], "dense": [1.0, 2.0, 1.0]}
    taken |= {"everybody skip 1": [1.2, 2.4, 1.1], "everybody skip 1-5": [0.7, 1.4, 0.9]}
    taken["everybody skip 2"] = [0.9, 1.8, 1.1]
    said = demo._verdict(taken)
    assert "'skip 1' was 20% slower than compiled stock vLLM" in said
    assert "'skip 1-5' was 30% faster than compiled stock vLLM" in said
    assert "'skip 2' was neither faster nor slower in all rounds than compiled stock" in said
