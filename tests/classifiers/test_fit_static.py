# SPDX-License-Identifier: Apache-2.0
"""Searches for a fixed plan: by losses that are known exactly, and by those of a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from math import inf, nan
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers.fit_models import own_answers, tiny
from hypothesis import given
from hypothesis import strategies as st

from vllm_adaskip import SkipPlan, bundled_model
from vllm_adaskip.classifiers.static.fit import KnownLosses, Search, StaticSettings, search
from vllm_adaskip.lab.fitting import quality
from vllm_adaskip.lab.fitting.greedy import greedy, trials
from vllm_adaskip.lab.fitting.quality import PlanLoss
from vllm_adaskip.lab.fitting.sub_layers import decoder_shape
from vllm_adaskip.lab.fixed_plans import Unit, at_random, evenly, latest, units

prices = st.lists(st.integers(0, 1000), min_size=2, max_size=7, unique=True)
blind = st.sampled_from(["late", "uniform", "random"])
unit_kinds = st.sampled_from(get_args(Unit))


def by_depth(asked: list[SkipPlan]) -> Callable[[SkipPlan], float]:
    """Return a loss that grows with depth, and writes down what it was asked for."""

    def loss(plan: SkipPlan) -> float:
        asked.append(plan)
        return float(plan.mask().nonzero()[0].sum())

    return loss


def told(**options: Any) -> StaticSettings:
    return StaticSettings.model_validate(options)


@given(prices, st.data())
def test_where_losses_add_up_greedy_finds_what_an_exhaustive_search_finds(
    price: list[int], data: st.DataObject
) -> None:
    steps = data.draw(st.integers(1, len(price)))
    asked = []

    def loss(left_out: Sequence[int]) -> float:
        asked.append(frozenset(left_out))
        return float(sum(price[one] for one in left_out))

    found = list(greedy(loss, range(len(price)), steps))
    assert len(asked) == len(set(asked)) == trials(len(price), steps)
    for count, step in enumerate(found, 1):
        sets = itertools.combinations(range(len(price)), count)
        assert set(step.left_out) == set(min(sets, key=lambda one: sum(price[i] for i in one)))
        assert step.loss == sum(price[one] for one in step.left_out)
    assert len(found) == steps


def test_of_equal_losses_the_first_goes_and_what_overflows_goes_last() -> None:
    assert [one.left_out[-1] for one in greedy(lambda _: 1.0, "cab", 9)] == ["c", "a", "b"]
    single = {"a": nan, "b": inf, "c": 2.0}
    assert [one.left_out[-1] for one in greedy(lambda left: single[left[-1]], "abc", 3)] == [
        "c", "b", "a",
    ]  # fmt: skip


@given(st.integers(4, 60), unit_kinds, st.integers(0, 3), st.integers(0, 3), st.data())
def test_blind_choices_keep_the_ends_and_take_as_many_as_asked(
    layers: int, unit: Unit, first: int, last: int, data: st.DataObject
) -> None:
    inner = range(first, max(first + 1, layers - last))
    candidates = units(unit, inner)
    masks = [SkipPlan.parse([one], layers).mask() for one in candidates]
    assert all(mask.any() and set(mask.nonzero()[0] // 2) <= {*inner} for mask in masks)
    assert len(candidates) == (2 if unit == "sub-layer" else 1) * len(inner)
    count, seed = data.draw(st.integers(1, len(candidates))), data.draw(st.integers(0, 99))
    for chosen in (
        evenly(candidates, count),
        at_random(candidates, count, seed),
        latest(candidates, count),
    ):
        places = [candidates.index(one) for one in chosen]
        assert len(places) == count and places == sorted(set(places))
    assert at_random(candidates, count, seed) == at_random(candidates, count, seed)
    assert latest(candidates, count)[-1] == candidates[-1]
    places = [candidates.index(one) for one in evenly(candidates, count)]
    gaps = [after - before for before, after in itertools.pairwise(places)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert abs(places[0] - (len(candidates) - 1 - places[-1])) <= 1


def test_random_choices_differ_by_seed() -> None:
    assert len({tuple(at_random(range(30), 10, seed)) for seed in range(5)}) == 5


def test_sub_layers_are_offered_in_running_order() -> None:
    assert units("sub-layer", range(1, 3)) == ["attn:1", "mlp:1", "attn:2", "mlp:2"]
    assert units("layer", range(1, 3)) == [1, 2]
    assert units("attention", [4]) == ["attn:4"] and units("mlp", [4]) == ["mlp:4"]


@given(st.integers(2, 80), unit_kinds, st.floats(0.001, 0.999), st.integers(0, 2))
def test_a_target_is_met_to_the_nearest_unit_or_refused(
    layers: int, unit: Unit, target: float, keep_last: int
) -> None:
    settings = told(unit=unit, target_skip=target, keep_last=min(keep_last, layers - 2))
    there = len(units(unit, range(layers)))
    try:
        count = settings.count(layers)
    except ValueError as error:
        wanted = round(target * there)
        assert wanted == 0 or wanted > len(settings.candidates(layers))
        assert f"target_skip {target:g}" in str(error)
        if not wanted:
            least = float(str(error).rsplit(" ", 1)[1])
            assert round(least * there) == 1 and target < least
        return
    assert abs(count - target * there) <= 0.5 and 0 < count <= len(settings.candidates(layers))


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({"search": "late", "unit": "attention"}, ["attn:9", "attn:10", "attn:8"]),
        ({"search": "late", "unit": "attention", "keep_last": 0}, ["attn:9", "attn:10", "attn:11"]),
        ({"search": "late"}, [8, 9, 10]),
        ({"search": "uniform"}, [2, 6, 9]),
        ({"search": "uniform", "unit": "mlp"}, ["mlp:2", "mlp:6", "mlp:9"]),
        ({"search": "greedy", "unit": "mlp", "keep_first": 3}, ["mlp:3", "mlp:4", "mlp:5"]),
    ],
)
def test_each_search_on_twelve_layers(options: dict[str, Any], left_out: list[Any]) -> None:
    asked: list[SkipPlan] = []
    found = search(by_depth(asked), settings := told(**options), 12)
    assert found.plan == SkipPlan.parse(left_out, 12)
    assert found.steps[0].left_out == () and found.steps[0].loss == 0.0
    assert found.steps[-1].loss == by_depth([])(found.plan)
    assert len(asked) == settings.losses(12)
    assert len(found.steps) == (4 if settings.search == "greedy" else 2)


@torch.no_grad()
def test_greedy_finds_the_sub_layers_that_a_model_does_not_use() -> None:
    model = tiny("llama", layers=6)
    samples = own_answers(model, 12)
    layers = model.model.layers
    layers[1].mlp.down_proj.weight.zero_()
    for layer in (3, 4):
        layers[layer].self_attn.o_proj.weight.zero_()
    loss = PlanLoss(model, samples, 5)
    found = search(loss, told(unit="sub-layer", target_skip=0.25), 6)
    assert found.plan == SkipPlan.parse(["mlp:1", "attn:3", "attn:4"], 6)
    dense = pytest.approx(found.steps[0].loss)
    assert all(step.loss == dense for step in found.steps)
    more = search(loss, told(unit="sub-layer", target_skip=0.34), 6)
    assert more.steps[:4] == found.steps and more.steps[4].loss != dense
    attention = search(loss, told(unit="attention", target_skip=0.34), 6)
    assert attention.plan == SkipPlan.parse(["attn:3", "attn:4"], 6)


@pytest.mark.parametrize("family", ["llama", "mistral", "opt", "qwen2", "qwen3"])
def test_losses_are_those_of_prompts_that_are_read_anew(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family)
    samples = own_answers(model, 12)
    plans = [SkipPlan.parse(skip, 4) for skip in ([], [1], ["attn:1", "mlp:3"], [0, 1, 2])]
    kept = PlanLoss(model, samples, 5)
    found = [kept(plan) for plan in [*plans, *plans]]
    monkeypatch.setattr(quality, "KEPT", 0)
    anew = PlanLoss(model, samples, 5)
    monkeypatch.setattr(quality, "_cache", None)  # asked for by nobody
    assert found == pytest.approx([anew(plan) for plan in plans] * 2, rel=1e-5)
    assert len(set(found)) == 4


def test_a_loss_is_asked_for_once_also_by_a_later_process(tmp_path: Path) -> None:
    asked: list[SkipPlan] = []

    def stops(plan: SkipPlan) -> float:
        if len(asked) == 9:
            raise KeyboardInterrupt
        return by_depth(asked)(plan)

    settings = told(unit="mlp", target_skip=0.5)
    with pytest.raises(KeyboardInterrupt):
        search(KnownLosses(tmp_path, stops), settings, 8)
    later: list[SkipPlan] = []
    found = search(KnownLosses(tmp_path, by_depth(later)), settings, 8)
    assert found == search(by_depth([]), settings, 8)
    assert not {*asked} & {*later} and len(asked) + len(later) == settings.losses(8)


def test_layers_weigh_what_a_server_takes_them_to_weigh() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from vllm_adaskip.model_executors.registry import llama_shape

    config = AutoConfig.from_pretrained(bundled_model())
    model = AutoModelForCausalLM.from_config(config)
    assert decoder_shape(model) == llama_shape(config)
    opt = decoder_shape(tiny("opt"))  # fc1 and fc2 stand in the layer itself
    assert (opt.attention_parameters, opt.mlp_parameters) == (4 * 32 * 32, 2 * 32 * 64)


def test_every_search_is_named() -> None:
    for name in get_args(Search):
        assert search(lambda plan: 0.0, told(search=name), 12).plan.mask().sum() == 6
