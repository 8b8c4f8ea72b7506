# SPDX-License-Identifier: Apache-2.0
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adaskip.classifiers import METHODS, PlanError, SkipPlan
from vllm_adaskip.classifiers.profile import Profile, ProfileError
from vllm_adaskip.lab.evaluation.settings import (
    DENSE,
    PLAN_FAMILIES,
    at_random,
    decided,
    distinct,
    explicit,
    plans,
    profiled,
    shortened,
    uniform,
)


@given(layers=st.integers(4, 80), data=st.data())
def test_uniform_plans_are_even_and_spare_both_ends(layers: int, data: st.DataObject) -> None:
    left_out = data.draw(st.integers(1, layers - 2))
    skip = [int(layer) for layer in uniform(layers, left_out)]
    assert len(set(skip)) == left_out and min(skip) >= 1 and max(skip) <= layers - 2
    gaps = [after - before for before, after in pairwise(skip)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@given(
    layers=st.integers(4, 40),
    budget=st.floats(0.1, 1.0),
    seed=st.integers(0, 9),
)
def test_families_keep_at_most_the_budget(layers: int, budget: float, seed: int) -> None:
    for setting in plans(PLAN_FAMILIES, [budget], layers, draws=2, seed=seed):
        plan = SkipPlan.parse(setting.skip, layers)
        kept = layers - plan.attention.bit_count()
        assert plan.attention == plan.mlp
        assert kept == max(2, int(budget * layers + 1e-6))
        assert f"{kept}/{layers}" in setting.name


def test_random_plans_differ_by_draw_and_repeat_by_seed() -> None:
    drawn = [one.skip for one in plans(["random"], [0.5], 12, draws=3, seed=7)]
    assert drawn == [one.skip for one in plans(["random"], [0.5], 12, draws=3, seed=7)]
    assert len({str(one) for one in drawn}) == 3 and drawn[0] == at_random(12, 6, 7)


def test_dense_comes_first_and_doubles_are_dropped() -> None:
    twice = [explicit([5, 6], 12), explicit(["attn:6", 5, "mlp:6"], 12)]
    assert distinct([*twice, DENSE]) == [DENSE, explicit([5, 6], 12)]


def test_a_profile_by_itself_below_its_own_budget_and_at_targets(tmp_path: Path) -> None:
    adaptive, fixed = str(tmp_path / "a"), str(tmp_path / "b")
    facts = {"model": "m", "fingerprint": "f"}
    Profile(method="first", max_compute=0.8, **facts).save(Path(adaptive))
    Profile(method="static", options={"skip": [5]}, **facts).save(Path(fixed))
    found = list(profiled(adaptive, [0.9, 0.8, 0.5], [0.25], "f"))
    names = [adaptive, f"{adaptive} 0.5", f"{adaptive} -25%"]
    assert [one.name for one in found] == names
    assert [one.budget for one in found] == [0.8, 0.5, 0.8]
    assert found[2].options == {"profile": adaptive, "target_skip": 0.25}
    assert {one.method for one in found} == {"first"}
    assert [one.name for one in profiled(fixed, [0.9], [], "f")] == [fixed]
    prompts = {"skip": ["mlp:3"], "tail": 4, "from": 100}
    Profile(method="none", prompt=prompts, **facts).save(Path(adaptive))
    [found_prompt] = profiled(adaptive, [], [], "f")
    assert found_prompt.prompt == {"skip": ["mlp:3"], "tail": 4}
    with pytest.raises(ProfileError, match="fingerprint"):
        list(profiled(fixed, [0.9], [], "another"))
    with pytest.raises(ValueError, match=r"method 'static' .* no target"):
        list(profiled(fixed, [], [0.25], "f"))


def test_an_unknown_method_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=f"'nope' is no method; allowed: {', '.join(METHODS)}"):
        list(decided("nope", {}, [0.5]))


def test_shortened_prompts_are_settings_of_their_own() -> None:
    one, other = shortened([9, 6], 5, 12)
    assert one.prompt == {"exit": 9, "tail": 5} and one.skip == [] and one.name != other.name
    with pytest.raises(PlanError, match="1 to 12"):
        [*shortened([13], 5, 12)]
