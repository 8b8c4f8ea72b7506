# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adaskip import DecoderShape, SkipPlan
from vllm_adaskip.classifiers import PlanError
from vllm_adaskip.classifiers.plan import shown

LAYERS = 12
SHAPE = DecoderShape(LAYERS, attention_parameters=1, mlp_parameters=3)
masks = st.integers(0, (1 << LAYERS) - 1)
plans = st.builds(SkipPlan, st.just(LAYERS), masks, masks).filter(lambda p: not p.skips_everything)


@given(plans)
def test_entries_and_mask_read_back_as_the_same_plan(plan: SkipPlan) -> None:
    assert SkipPlan.parse(plan.entries(), LAYERS) == plan
    assert SkipPlan.of_mask(plan.mask()) == plan


@given(plans, plans)
def test_union_leaves_out_what_either_leaves_out(one: SkipPlan, other: SkipPlan) -> None:
    assert ((one | other).mask() == (one.mask() | other.mask())).all()
    assert hash(one | other) == hash(other | one)


@given(plans)
def test_share_weighs_sub_layers_by_parameters(plan: SkipPlan) -> None:
    attention, mlp = plan.mask()[0::2].sum(), plan.mask()[1::2].sum()
    assert plan.share(SHAPE) == pytest.approx(1 - (attention + 3 * mlp) / (4 * LAYERS))


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ([], "dense"),
        ([5, 6, "attn:7"], "skip 5-6, attn:7"),
        (["attn:3", "mlp:3"], "skip 3"),
        ([0, 2, 3, 4, 11, "mlp:6", "mlp:7", "attn:9"], "skip 0, 2-4, 11, attn:9, mlp:6-7"),
        ([5, 5, "attn:5"], "skip 5"),
    ],
)
def test_prints_ranges(entries: list[int | str], text: str) -> None:
    assert str(SkipPlan.parse(entries, LAYERS)) == text


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ("5-6", ["'5-6'", "a list"]),
        (5, ["5 is no skip plan"]),
        (None, ["None", "a list"]),
        ({5: 6}, ["a list"]),
        ([12], ["12", "layers 0 to 11"]),
        ([-1], ["-1", "layers 0 to 11"]),
        (["attn:12"], ["'attn:12'", "layers 0 to 11"]),
        (["attn:-1"], ["'attn:-1'", "attn:7"]),
        (["ffn:3"], ["'ffn:3'", "mlp:8"]),
        (["attn:" + "9" * 5000], ["no part of a skip plan"]),
        (["attn:٣"], ["no part of a skip plan"]),
        ([5.0], ["5.0"]),
        ([True], ["True"]),
        ([[5]], ["[5]"]),
        ([10**5000], ["beyond 64 bits", "layers 0 to 11"]),
        (list(range(LAYERS)), ["all 24 sub-layers"]),
        ([f"{kind}:{layer}" for kind in ("attn", "mlp") for layer in range(LAYERS)], ["all 24"]),
        ([5] * 25, ["25 entries", "at most 24"]),
        ([[10**5000]], ["beyond 64 bits"]),
    ],
)
def test_refuses_what_is_no_plan_and_says_what_is_allowed(
    entries: object, words: list[str]
) -> None:
    with pytest.raises(PlanError) as refusal:
        SkipPlan.parse(entries, LAYERS)
    for word in words:
        assert word in str(refusal.value)
    assert len(str(refusal.value)) < 400


def test_as_many_entries_as_sub_layers_are_allowed() -> None:
    assert SkipPlan.parse([5] * 2 * LAYERS, LAYERS).entries() == [5]


class Untouched(Sequence[int]):
    """A list so long that nobody may look into it."""

    def __len__(self) -> int:
        return 4_000_000

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("looked into")


def test_a_plan_that_is_too_long_is_refused_before_any_work() -> None:
    with pytest.raises(PlanError, match="4000000 entries"):
        SkipPlan.parse(Untouched(), LAYERS)


def test_a_message_looks_at_no_more_of_a_value_than_it_shows() -> None:
    looked = []

    class Entry:
        def __repr__(self) -> str:
            looked.append(self)
            return "entry"

    assert len(shown([Entry()] * 100_000)) <= 80 and 0 < len(looked) < 100
    assert shown("x" * 10**6).startswith("'xxx") and shown([5, "attn:7"]) == "[5, 'attn:7']"


def test_is_immutable_and_plans_of_two_depths_do_not_mix() -> None:
    plan = SkipPlan(LAYERS, 1, 0)
    with pytest.raises(AttributeError):
        plan.attention = 3  # type: ignore[misc]
    with pytest.raises(PlanError, match="12 and 8"):
        plan | SkipPlan(8)
