# SPDX-License-Identifier: Apache-2.0
"""A scan with a real judge and made-up times: the order, the verdict, the page, the profile."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.fit_models import tiny, useless

from vllm_adaskip.classifiers.plan import DecoderShape, SkipPlan
from vllm_adaskip.classifiers.profile import Profile
from vllm_adaskip.lab.data.items import DataError, Item
from vllm_adaskip.lab.evaluation.results import (
    Manifest,
    PlanReading,
    Question,
    Results,
    StepTime,
    WholeAnswer,
)
from vllm_adaskip.lab.scan import answers, scan, timing
from vllm_adaskip.lab.scan.order import baselines, lazy_greedy, sizes
from vllm_adaskip.lab.scan.page import page
from vllm_adaskip.lab.scan.profile import as_json, save_profile
from vllm_adaskip.lab.scan.verdict import verdict

ASKED = [([5, 30, 17, 42], [9, 11, 12, 13]), ([7, 8], [9, 50, 51]), ([3, 4, 5], [20, 21, 22])]
SHAPE = DecoderShape(4, 100, 300)
#: Milliseconds of a step; `dense` is reset by tests.
COST = {"stock": 10.0, "dense": 11.0, "attention": 1.0, "mlp": 2.0}


def step_ms(plan: SkipPlan) -> float:
    """What the made-up engine takes."""
    saved = plan.attention.bit_count() * COST["attention"] + plan.mlp.bit_count() * COST["mlp"]
    return COST["dense"] - saved


def made_up_times(
    _: Any,
    stage: str,
    plans: Sequence[SkipPlan],
    batch: int,
    rounds: int,
    done: Callable[[], None],
) -> list[StepTime]:
    times = {"stock": COST["stock"], "dense": COST["dense"]}
    times |= {str(plan): step_ms(plan) for plan in plans}
    return [
        StepTime(stage=stage, variant=name, batch=batch, seconds=[ms / 1000] * rounds)
        for name, ms in times.items()
    ]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    """A folder in which the whole model has answered; the engine is made up."""

    def answered(_: Any, asked: Sequence[WholeAnswer], plan: SkipPlan, tokens: int) -> PlanReading:
        share = 1.0 if set(plan.entries()) <= {"attn:1", "mlp:1", 1} else 0.5
        shares = [share] * len(asked)
        texts = [f"<u>{plan}</u>"] * len(asked)
        return PlanReading(
            how="answered", skip=plan.entries(), agreement=shares, surprise=shares, texts=texts
        )

    monkeypatch.setattr(timing, "timed", made_up_times)
    monkeypatch.setattr(answers, "answered", answered)
    monkeypatch.setattr("vllm_adaskip.lab.scan.verdict.FEW", 2)
    monkeypatch.setitem(COST, "dense", 11.0)
    results = Results(tmp_path / "out")
    results.write_manifest(
        Manifest(
            command="adaskip scan",
            created="today",
            model="/home/me/x",
            fingerprint="f00",
            num_layers=4,
            data={},
            settings=[],
            seed=0,
            versions={"vllm": "0.32.0"},
            hardware={"processor": "one <of> them", "cores": 2},
            commit=None,
        )
    )
    whole = [
        WholeAnswer(item=f"{place}/{number}", prompt=prompt, answer=answer, text="<script>")
        for place in range(4)
        for number, (prompt, answer) in enumerate(ASKED)
    ]
    results.append(whole)
    results.append([Question(item=one.item, prompt="<i>", references=[""]) for one in whole])
    return results


class NoEngine:
    def ours(self, known: Sequence[SkipPlan]) -> None:
        return None

    def shortening(self, num_layers: int) -> str:
        return "ours"

    def stock(self) -> str:
        return "stock"


def run(
    results: Results, unit: Any = "sub-layer", model: Any = None, exits: Sequence[int] = ()
) -> scan.Found:
    one = scan.Scan(
        results,
        lambda: model,
        SHAPE,
        NoEngine(),  # type: ignore[arg-type]
        unit=unit,
        rounds=8,
        tokens=4,
        say=lambda what, total: lambda: None,
    )
    return one.run([], [], 0.95, exits)


def layer_1_useless() -> Any:
    model = tiny("llama")
    useless(model, 1)
    return model


def test_what_costs_nothing_and_saves_time_is_left_out(results: Results) -> None:
    found = run(results, model=layer_1_useless())
    assert set(found.order[:2]) == {"attn:1", "mlp:1"}
    assert found.singles["mlp:1"].agreement == [1.0] * 6 > found.singles["mlp:2"].agreement
    assert found.steps[16].dense == pytest.approx(0.011)
    assert found.saved["mlp:0"] == pytest.approx(0.002) and len(found.saved) == 8
    assert found.verdict.chosen is not None
    assert found.verdict.chosen.plan.entries() == [1]
    assert found.verdict.sentence.startswith("Leave out 1: 20% less time at batch 16")
    profile = save_profile(results.folder / "profile", found, results.manifest(), "org/name")
    assert profile is not None
    written = Profile.load(profile)
    metrics = written.metrics
    assert written.guard and metrics["time_ratio_batch_16"] == 0.8 and metrics["left_out"] == "1"
    assert metrics["machine"] == "one <of> them, 2 cores" and metrics["vllm"] == "0.32.0"
    told = json.loads(as_json(found, results.manifest(), "org/name", 0.95))
    assert told["verdict"] == found.verdict.sentence
    html = page(found, results, "<org>", 0.95)
    assert html.count("<svg") == 2 and "http:" not in html.replace("http://www.w3.org", "")
    for raw in ("<script", "<org>", "<u>", "<i>", "<of>"):
        assert raw not in html
    # A second time nothing is measured: there is no model to do it with.
    assert run(results).verdict == found.verdict


def test_no_profile_where_ours_costs_more_than_is_saved(results: Results) -> None:
    COST["dense"] = 20.0
    found = run(results, "layer", layer_1_useless())
    assert found.verdict.chosen is None and found.order[0] == 1
    assert "ours dense costs +100.0%" in found.verdict.sentence
    assert "a layer that is left out saves 30.0%" in found.verdict.sentence
    (folder := results.folder / "profile").mkdir()
    assert save_profile(folder, found, results.manifest(), "x") is None and not folder.exists()


def test_no_profile_where_quality_falls_at_once(results: Results) -> None:
    found = run(results, model=tiny("llama"))
    assert found.verdict.chosen is None
    assert "quality falls at once. Without" in found.verdict.sentence


def first_tokens_in(layer_ms: float) -> Callable[[str, Sequence[Any], int], float]:
    """Return what times prompts by layers that run; stock vLLM takes 10 ms."""

    def timed(llm: str, arguments: Sequence[Any], tokens: int) -> float:
        assert tokens == 3 and len(arguments) in timing.BATCHES
        if llm == "stock":
            return 0.01
        return (7 + layer_ms * arguments[0]["adaskip_prompt_exit"]) / 1000

    return timed


@pytest.mark.parametrize(
    ("layer_ms", "agreements", "chosen", "words"),
    [
        (1.0, {3: 0.98, 2: 0.97, 1: 0.9}, 2, "Prompts may stop after 2 of 4 layers: 10% less time"),
        (2.0, {3: 0.98, 2: 0.97}, None, "The fastest, 2 of 4 layers, takes 1.10 of its time to"),
        (1.0, {3: 0.9, 2: 0.8}, None, "Read whole prompts: with 3 of 4 layers 90.0%"),
        (-2.0, {3: 0.98}, None, "takes 0.10 of compiled stock vLLM's time and keeps 0.83"),
    ],
)
def test_prompts(
    results: Results,
    monkeypatch: pytest.MonkeyPatch,
    layer_ms: float,
    agreements: dict[int, float],
    chosen: int | None,
    words: str,
) -> None:
    def shortened(
        _: str, asked: Sequence[WholeAnswer], plan: SkipPlan, layers: int, tokens: int
    ) -> PlanReading:
        shares = [{4: 0.99, **agreements}[layers]] * len(asked)
        skip = plan.entries()
        return PlanReading(how="shortened", skip=skip, agreement=shares, surprise=shares)

    monkeypatch.setattr("vllm_adaskip.lab.scan.prompts.TAIL", 1)
    monkeypatch.setattr("vllm_adaskip.lab.scan.prompts.shortened", shortened)
    monkeypatch.setattr("vllm_adaskip.lab.scan.prompts.first_tokens", first_tokens_in(layer_ms))
    found = run(results, model=layer_1_useless(), exits=[*agreements])
    assert found.prompts is not None and words in found.prompts.sentence
    assert found.prompts.chosen == chosen and found.prompts.tokens == 3
    told = json.loads(as_json(found, results.manifest(), "org/name", 0.95))["prompts"]
    assert told["verdict"] == found.prompts.sentence and len(told["by layers that run"]) > 1
    html = page(found, results, "<org>", 0.95)
    assert "Shortened prompts" in html and html.count('class="chosen"') == 1 + bool(chosen)
    # A second time nothing is measured.
    monkeypatch.delattr("vllm_adaskip.lab.scan.prompts.first_tokens")
    assert run(results, exits=[*agreements]).prompts == found.prompts


def test_few_tokens_recommend_nothing(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(results, model=layer_1_useless())
    again = verdict(found.dense, found.plans, 0.95, found.steps[16], tokens=1)
    assert again.chosen is None and "1 tokens after their first" in again.sentence


def test_a_time_below_the_compute_kept_is_in_doubt(results: Results) -> None:
    COST["dense"] = 5.0
    found = run(results, model=layer_1_useless())
    assert found.verdict.chosen is None and "is in doubt" in found.verdict.sentence
    assert any(one.kind == "faster" for one in found.verdict.doubts)


def test_lazy_greedy_weighs_loss_by_time() -> None:
    losses = {"a": 1.0, "b": 1.5, "c": 9.0}
    asked = []

    def loss(entries: tuple[Any, ...]) -> float:
        asked.append(entries)
        return sum(losses[one] for one in entries) + 5.0 * ({"a", "b"} <= {*entries})

    steps = [*lazy_greedy(loss, {"a": 1.0, "b": 2.0, "c": 2.0})]
    assert [step.left_out for step in steps] == [("b",), ("b", "c"), ("b", "c", "a")]
    assert steps[-1].loss == 16.5 and asked[0] == ()


def test_sizes_and_baselines() -> None:
    assert sizes(3) == [1, 2, 3] and sizes(1) == [1] and sizes(30)[-1] == 30
    found = baselines([*range(10)], 2)
    assert found["late"] == [8, 9] and found["even"] == [2, 7]
    assert len({tuple(one) for one in found.values()}) == 5


def test_answers_of_one_token_judge_nothing() -> None:
    whole = [WholeAnswer(item=str(one), prompt=[1], answer=[2]) for one in range(9)]
    with pytest.raises(DataError, match="0 of 9 answers of the whole model have two tokens"):
        answers.halves(whole)


def test_prompts_that_leave_no_room(tiny_words: str) -> None:
    item = Item("q/7", "q", "word " * 3000, ("",), "exact_match")
    with pytest.raises(DataError, match=r"q/7: a prompt of \d+ tokens; allowed: 1 to"):
        answers.tokenised([item], tiny_words, 48)


@pytest.fixture(scope="session")
def tiny_words(tmp_path_factory: pytest.TempPathFactory) -> str:
    from vllm_adaskip.lab.testbed import network, tokenizer

    folder = tmp_path_factory.mktemp("model")
    network.save(network.create(words := tokenizer.build(), 4, 32), words, folder)
    return str(folder)
