# SPDX-License-Identifier: Apache-2.0
"""The oracle against trying every allotment."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from vllm_adaskip.cli.report import oracle as command
from vllm_adaskip.lab.evaluation.oracle import Oracle, OracleError, Point, gather, groups, points
from vllm_adaskip.lab.evaluation.results import Answer, Manifest, OraclePoint, Results, Setting

#: Tables of (layers, score) with many ties; scores are sixteenths, as small ROUGE tables have.
Table = list[list[tuple[int, int]]]
tables = st.integers(1, 4).flatmap(
    lambda width: st.lists(
        st.lists(st.tuples(st.integers(1, 12), st.integers(0, 16)), min_size=width, max_size=width),
        min_size=1,
        max_size=4,
    )
)


def oracle_of(table: Table) -> Oracle:
    costs, scores = np.moveaxis(np.array(table, dtype=float), 2, 0)
    return Oracle(costs, scores / 16)


def every_allotment(table: Table) -> list[Point]:
    return [Point(*(np.sum(chosen, axis=0) / len(table) / (1, 16))) for chosen in product(*table)]


@settings(max_examples=150)
@given(tables, st.integers(0, 48))
def test_the_best_score_at_a_budget(table: Table, quarters: int) -> None:
    budget = quarters / 4
    allowed = [each for each in every_allotment(table) if each.layers <= budget + 1e-9]
    if not allowed:
        with pytest.raises(OracleError, match="no allotment"):
            oracle_of(table).best_score(budget)
        return
    best = oracle_of(table).best_score(budget)
    assert best.layers <= budget + 1e-6
    assert best.score == pytest.approx(max(each.score for each in allowed))


@settings(max_examples=150)
@given(tables, st.integers(0, 16))
def test_the_fewest_layers_at_a_score(table: Table, sixteenths: int) -> None:
    score = sixteenths / 16
    allowed = [each for each in every_allotment(table) if each.score >= score - 1e-9]
    if not allowed:
        with pytest.raises(OracleError, match="no allotment"):
            oracle_of(table).fewest_layers(score)
        return
    fewest = oracle_of(table).fewest_layers(score)
    assert fewest.score >= score - 1e-6
    assert fewest.layers == pytest.approx(min(each.layers for each in allowed))


@settings(max_examples=150)
@given(tables)
def test_the_frontier_is_the_hull_of_all_allotments(table: Table) -> None:
    everything = every_allotment(table)
    frontier = oracle_of(table).frontier()
    for vertex in frontier:
        cheaper = [each.score for each in everything if each.layers <= vertex.layers + 1e-9]
        assert vertex.score == pytest.approx(max(cheaper))
    layers, scores = zip(*((each.layers, each.score) for each in frontier), strict=True)
    assert list(layers) == sorted(set(layers))
    for each in everything:
        assert each.score <= np.interp(each.layers, layers, scores) + 1e-9
    slopes = np.diff(scores) / np.diff(layers)
    assert (np.diff(slopes) < 0).all()
    assert scores[-1] == pytest.approx(max(each.score for each in everything))


def test_tables_of_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="want two tables"):
        Oracle(np.ones((2, 3)), np.ones((3, 2)))


DENSE = Setting(name="dense", family="dense")
UNIFORM = Setting(name="uniform 6/12", family="uniform", skip=[1, 3, 5, 7, 9, 11])
EXIT = Setting(name="exit 3/12", family="exit", skip=[*range(3, 12)])
#: Item -> (dense, uniform, exit) scores; the exit alone knows sum/2.
SCORES = {"sum/0": (1, 1, 0), "sum/1": (1, 0, 0), "sum/2": (0, 0, 1), "sum/3": (1, 1, 1)}


def answers(metric: str = "exact_match") -> list[Answer]:
    return [
        Answer(
            setting=setting.name,
            item=item,
            task="sum",
            metric=metric,
            score=score,
            kept=kept,
            skip=setting.skip or [],
            tokens=4,
            text="1",
        )
        for item, scores in SCORES.items()
        for setting, kept, score in zip((DENSE, UNIFORM, EXIT), (1, 0.5, 0.25), scores, strict=True)
    ]


def manifest(*settings: Setting) -> Manifest:
    return Manifest(
        command="adaskip eval",
        created="2026-01-01",
        model="m",
        fingerprint="f",
        num_layers=12,
        data={},
        settings=list(settings),
        seed=0,
        versions={},
        hardware={},
        commit=None,
    )


FULL = manifest(EXIT, DENSE, UNIFORM)


def test_candidates_are_lined_up_and_grouped() -> None:
    found = gather(FULL, answers())
    assert found.settings == [DENSE, EXIT, UNIFORM]
    assert [groups(setting) for setting in found.settings] == [
        ("skip", "exit"),
        ("exit",),
        ("skip",),
    ]
    assert found.average(DENSE) == Point(12, 0.75)
    assert found.average(EXIT) == Point(3, 0.5)
    # Skips: uniform for two, dense for one, and the cheapest where nothing helps.
    assert found.oracle("skip").fewest_layers(0.75) == Point((6 + 12 + 6 + 6) / 4, 0.75)
    # Exits: three of four are right at 3, 3 and 12 layers, the last one is given up.
    assert found.oracle("exit").fewest_layers(0.75) == Point((3 + 3 + 3 + 12) / 4, 0.75)
    stored = points(found)
    assert {one.candidates for one in stored} == {"skip", "exit"}
    assert [one for one in stored if one.candidates == "exit"][-1].score == 1.0


def test_of_an_item_answered_twice_the_later_counts() -> None:
    twice = [*answers(), answers()[0].model_copy(update={"score": 0.0})]
    assert gather(FULL, twice).average(DENSE).score == 0.5


def test_a_run_without_dense_is_refused() -> None:
    rest = [one for one in answers() if one.setting != "dense"]
    with pytest.raises(OracleError, match="no setting of family dense"):
        gather(manifest(EXIT, UNIFORM), rest)


def test_items_that_a_setting_lacks_are_named() -> None:
    lacking = [one for one in answers() if (one.setting, one.item) != ("exit 3/12", "sum/2")]
    with pytest.raises(OracleError, match=r"'exit 3/12' has not answered sum/2, of 4 items"):
        gather(FULL, lacking)


def test_metrics_are_not_mixed() -> None:
    halves = [one.model_copy(update={"score": one.score / 2}) for one in answers("bleu")]
    both = [*halves, *answers()]
    with pytest.raises(OracleError, match="bleu, exact_match cannot be summed"):
        gather(FULL, both)
    assert gather(FULL, both, "bleu").average(DENSE).score == 0.375
    with pytest.raises(OracleError, match="--metric 'rouge_l'; allowed: bleu, exact_match"):
        gather(FULL, both, "rouge_l")


def test_perplexity_is_left_out() -> None:
    assert gather(FULL, [*answers(), *answers("perplexity")]).metric == "exact_match"
    with pytest.raises(OracleError, match=r"can be summed; metrics of this run: \['perplexity'\]"):
        gather(FULL, answers("perplexity"))
    with pytest.raises(OracleError, match="--metric 'perplexity'; allowed: exact_match"):
        gather(FULL, [*answers(), *answers("perplexity")], "perplexity")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    results = Results(tmp_path)
    results.write_manifest(FULL)
    results.append(answers())
    other = OraclePoint(candidates="skip", metric="bleu", layers=1, score=0.5)
    results.append([other, OraclePoint(candidates="skip", metric="exact_match", layers=1, score=9)])
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, [str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "62.5%" in done.output  # 7.5 of 12 layers by skipping
    assert results.read(OraclePoint) == [other, *points(gather(FULL, answers()))]
    (tmp_path / "answers.jsonl").unlink()
    assert CliRunner().invoke(app, [str(tmp_path)]).exit_code != 0
