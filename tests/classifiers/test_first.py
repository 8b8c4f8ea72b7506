# SPDX-License-Identifier: Apache-2.0
"""Method ``first``: from reduced scores to plans, and routers that come from a hostile file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from vllm_adaskip.classifiers import DecoderShape, PlanError, PromptStatistics, SkipPlan
from vllm_adaskip.classifiers.first.method import First, FirstOptions
from vllm_adaskip.classifiers.first.routers import FILE, Routers
from vllm_adaskip.classifiers.profile import ProfileError

LAYERS, HIDDEN = 8, 16
SHAPE = DecoderShape(LAYERS, 1, 3)
SCORES = np.array([0.0, 0.2, 0.9, 0.4, 0.45, 0.8, 0.7, 0.0])
INNER = range(1, LAYERS - 1)
some_layers = st.sets(st.sampled_from(list(INNER))).map(sorted)


def first(**options: Any) -> First:
    return First(SHAPE, FirstOptions(**options), Path("nowhere"))


def skipped(plan: SkipPlan) -> list[int | str]:
    return plan.entries()


def test_layers_below_the_threshold_are_left_out_but_not_the_ends() -> None:
    assert skipped(first().plan(SCORES)) == [1, 3, 4]
    assert skipped(first(threshold=0.43).plan(SCORES)) == [1, 3]
    assert skipped(first(keep_first=2, keep_last=4).plan(SCORES)) == [3]
    assert skipped(first(keep_first=0, keep_last=1, threshold=0.1).plan(SCORES)) == [0]


def test_a_target_is_looked_up_in_the_calibration_of_the_fit() -> None:
    calibration = [[0.0, 0.0], [0.3, 0.1], [0.5, 0.5], [0.9, 0.6]]
    for target, out in ((0.0, []), (0.1, [1]), (0.3, [1]), (0.31, [1, 3]), (0.5, [1, 3, 4])):
        found = first(target_skip=target, calibration=calibration).plan(SCORES)
        assert skipped(found) == out
    for options in ({"calibration": calibration}, {}):
        with pytest.raises(PlanError, match=r"target_skip 0\.7; allowed .* 0 to"):
            first(target_skip=0.7, **options)
    with pytest.raises(PlanError, match="ascend"):
        first(target_skip=0.1, calibration=[[0.5, 0.1], [0.4, 0.2]])


def test_a_budget_moves_the_threshold() -> None:
    assert skipped(first().plan(SCORES, 0.5)) == [1, 3, 4, 6]
    assert skipped(first(threshold=0.0).plan(SCORES, 0.8)) == [1, 3]
    with pytest.raises(PlanError, match=r"budget of 0\.2 cannot be met.*'first'.* 0\.250"):
        first().check(0.2)


def test_the_codebook_s_nearest_plan_that_skips_no_more_than_allowed() -> None:
    book = {"codebook": [[1], [3, 4], [1, 3, 4, 5], [2, 3]]}
    assert skipped(first(**book).plan(SCORES)) == [3, 4]
    assert first(**book, threshold=0.1).plan(SCORES).is_dense
    # Within 0.5 there is one plan, which the threshold must reach: up to layer 5's score.
    assert skipped(first(**book).plan(SCORES, 0.5)) == [1, 3, 4, 5]
    # What lies far beyond the budget is not taken for it.
    assert skipped(first(codebook=[[*INNER]]).plan(SCORES, 0.8)) == [1, 3, 4]
    # Within 0.4 there is none: not snapped.
    assert skipped(first(**book).plan(SCORES, 0.4)) == [1, 3, 4, 5, 6]


@given(
    scores=st.lists(st.floats(0, 1), min_size=LAYERS, max_size=LAYERS),
    threshold=st.floats(0, 1),
    budget=st.floats(0.25, 1),
    codebook=st.lists(some_layers, max_size=5),
)
def test_plans_meet_the_budget_and_skip_what_is_needed_least(
    scores: list[float], threshold: float, budget: float, codebook: list[list[int]]
) -> None:
    plan = first(threshold=threshold, codebook=codebook).plan(np.array(scores), budget)
    out = skipped(plan)
    assert plan.share(SHAPE) <= budget and set(out) <= set(INNER)
    if not codebook:
        kept = [scores[layer] for layer in INNER if layer not in out]
        assert not out or not kept or max(scores[int(layer)] for layer in out) <= min(kept)
    elif budget == 1:
        assert out in [[], *codebook]
    if budget == 1:
        assert all(scores[int(layer)] < threshold for layer in out)


@pytest.mark.parametrize("width", [0, 4])
def test_what_is_observed_and_which_part_of_it_decides(tmp_path: Path, width: int) -> None:
    routers = Routers(LAYERS, HIDDEN, width)
    torch.nn.init.normal_(routers.weight)
    routers.save(tmp_path)
    before = torch.randn(5, HIDDEN).bfloat16()
    rho = routers(2, before)
    assert rho.shape == (5,) and ((rho > 0) & (rho < 1)).all()
    torch.testing.assert_close(routers(2, 7 * before), rho, atol=1e-2, rtol=0)  # at any scale
    for reduce, want in (("mean", rho), ("last", rho), ("fraction", (rho >= 0.5).float())):
        method = First(SHAPE, FirstOptions(reduce=reduce), tmp_path)
        observe = method.observer(HIDDEN, before.device)
        values = torch.zeros(5, LAYERS)
        for sub_layer in range(2 * LAYERS):
            observe(sub_layer, before, before, values)
        assert torch.equal(values[:, 2], want) and not values[:, [0, LAYERS - 1]].any()
    statistics = PromptStatistics(5, SCORES, 1 - SCORES)
    for reduce, out in (("mean", [1, 3, 4]), ("fraction", [1, 3, 4]), ("last", [2, 5, 6])):
        assert skipped(first(reduce=reduce).decide(1.0, statistics)) == out


def test_routers_are_float32_whatever_the_engine_loads_its_model_in(tmp_path: Path) -> None:
    Routers(LAYERS, HIDDEN, 4).save(tmp_path)
    torch.set_default_dtype(torch.bfloat16)
    try:
        routers = Routers.load(tmp_path, LAYERS, HIDDEN)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {one.dtype for one in routers.parameters()} == {torch.float32}
    assert routers(2, torch.randn(5, HIDDEN).bfloat16()).dtype == torch.float32


def test_without_a_profile_there_are_no_routers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a profile"):
        First(SHAPE, FirstOptions())
    with pytest.raises(ProfileError, match=FILE):
        First(SHAPE, FirstOptions(), tmp_path).observer(HIDDEN, torch.device("cpu"))


@pytest.mark.parametrize("codebook", [[[8]], [["attn:x"]], [list(range(8))]])
def test_a_codebook_of_impossible_plans_is_refused(codebook: list[list[int | str]]) -> None:
    with pytest.raises(PlanError):
        first(codebook=codebook)


@pytest.mark.parametrize(
    "change",
    [
        {"weight": torch.zeros(LAYERS, HIDDEN + 1)},
        {"weight": torch.zeros(LAYERS + 1, HIDDEN)},
        {"weight": torch.full((LAYERS, HIDDEN), float("nan"))},
        {"extra": torch.zeros(1)},
        {"inner": torch.zeros(3)},
        {"inner": torch.zeros(1, 2**20, 1)},
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, torch.Tensor]
) -> None:
    save_file({**Routers(LAYERS, HIDDEN).state_dict(), **change}, tmp_path / FILE)
    with pytest.raises(ProfileError, match=FILE):
        Routers.load(tmp_path, LAYERS, HIDDEN)


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"\xff" * 64])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ProfileError, match=FILE):
        Routers.load(tmp_path, LAYERS, HIDDEN)
