# SPDX-License-Identifier: Apache-2.0
"""What method ``ffn-skip`` decides, and its gate against the paper's rule in plain words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vllm_adaskip.classifiers import DecoderShape, PlanError, PromptStatistics
from vllm_adaskip.classifiers.cosine import Cosines, cosine
from vllm_adaskip.classifiers.ffn_skip.gate import MlpGate
from vllm_adaskip.classifiers.ffn_skip.method import FfnSkip, FfnSkipOptions
from vllm_adaskip.classifiers.gates import Stream

SHAPE = DecoderShape(6, attention_parameters=1, mlp_parameters=3)
LAYERS = range(SHAPE.num_layers)


def made(**options: object) -> FfnSkip:
    return FfnSkip(SHAPE, FfnSkipOptions.model_validate(options))


def prompt(*similarities: float) -> PromptStatistics:
    mean = np.array(similarities)
    return PromptStatistics(3, mean, mean)


def test_the_prompt_leaves_out_what_is_above_the_threshold_and_no_more_than_max_skip() -> None:
    read = prompt(0.95, 0.99, 0.9, 0.97)  # of layers 1 to 4
    assert made(threshold=0.96).decide(1, read).entries() == ["mlp:2", "mlp:4"]
    assert made(threshold=0.95).decide(1, read).entries() == ["mlp:1", "mlp:2", "mlp:4"]
    assert made(threshold=-1, max_skip=1).decide(1, read).entries() == ["mlp:2"]
    assert made(threshold=1.5).decide(1, read).is_dense
    assert made(threshold=0, keep_first=2, keep_last=3).decide(1, prompt(0.5)).entries() == [
        "mlp:2"
    ]


def test_a_budget_goes_on_in_the_order_of_the_similarities() -> None:
    read = prompt(0.95, 0.99, 0.9, 0.97)
    for budget, skipped in ((1, 1), (0.9, 1), (0.75, 2), (0.7, 3), (0.5, 4)):
        plan = made(threshold=0.98).decide(budget, read)
        assert plan.mlp.bit_count() == skipped and plan.share(SHAPE) <= budget
    assert made(threshold=0.98).decide(0.75, read).entries() == ["mlp:2", "mlp:4"]
    assert made(threshold=0.98).decide(0.7, read).entries() == ["mlp:1", "mlp:2", "mlp:4"]


@pytest.mark.parametrize("scope", ["sequence", "token"])
def test_a_budget_below_what_is_always_kept_is_refused(scope: str) -> None:
    made(scope=scope).check(0.5)
    with pytest.raises(PlanError, match=r"0\.49 cannot be met: .*at most 4 MLPs.* keeps 0\.500"):
        made(scope=scope).check(0.49)
    made(scope=scope, max_skip=2).check(0.75)
    with pytest.raises(PlanError, match=r"at most 2 MLPs.* keeps 0\.750"):
        made(scope=scope, max_skip=2).check(0.7)


def test_token_by_token_a_budget_is_a_plan_of_the_last_mlps_of_the_middle() -> None:
    one = made(scope="token")
    assert one.width == 0 and one.gate_scope == "token"
    assert one.decide(1.0, None).is_dense
    assert one.decide(0.8, None).entries() == ["mlp:3", "mlp:4"]


def test_only_mlps_of_the_middle_are_observed() -> None:
    before, update = torch.randn(2, 5, 16)
    one = made(keep_first=2)
    values = torch.zeros(5, one.width)
    observe = one.observer(16, before.device)
    for sub_layer in range(2 * SHAPE.num_layers):
        if sub_layer != 7:
            observe(sub_layer, before + sub_layer, update, values)
    assert one.width == 3 and not values[:, 1].any() and values[:, [0, 2]].all()
    observe(7, before, update, values)
    assert torch.equal(values[:, 1], cosine(before, update))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_has_the_same_cosine_in_any_company(dtype: torch.dtype) -> None:
    """Bit for bit, so that no threshold can tell; and it is the cosine."""
    for width in (128, 192, 2048):
        before, update = torch.randn(2, 70, width).to(dtype)
        old, new = before.double(), before.double() + update.double()
        want = torch.nn.functional.cosine_similarity(old, new, dim=-1)
        for similarity in (cosine, few):
            whole = similarity(before, update)
            assert torch.allclose(whole.double(), want, atol=1e-6)
            for chunk in (slice(0, 1), slice(1, 3), slice(3, 69), torch.tensor([69, 4, 31])):
                assert torch.equal(similarity(before[chunk], update[chunk]), whole[chunk])


def few(before: Tensor, update: Tensor) -> Tensor:
    return torch.from_numpy(Cosines(*before.shape, before.device).of(before, update))


def changes(cosines: Tensor) -> tuple[Tensor, Tensor]:
    """A stream and what is added to it, for ``[tokens]`` wanted similarities."""
    before = torch.tensor([1.0, 0.0]).expand(len(cosines), 2)
    after = torch.stack((cosines, (1 - cosines**2).sqrt()), dim=1)
    return before, after - before


def plain_rule(
    cosines: list[float], first: int, end: int, threshold: float, room: int
) -> list[int]:
    """FFN-SkipLLM for one token past its warm-up: the MLPs it leaves out."""
    left_out: list[int] = []
    is_on = False
    for layer in range(first, end):
        if is_on and len(left_out) < room:
            left_out.append(layer)
        elif not is_on:
            is_on = cosines[layer] >= threshold
    return left_out


tokens = st.tuples(
    st.integers(-3, 6),
    st.lists(st.sampled_from([-0.5, 0.2, 0.6, 0.9]), min_size=len(LAYERS), max_size=len(LAYERS)),
)


@given(
    st.lists(st.lists(tokens, min_size=1, max_size=7), min_size=1, max_size=3),
    st.sampled_from([-1.0, 0.3, 0.7, 1.1]),
    st.integers(0, 3),
    st.integers(1, 4),
    st.integers(0, 1),
)
def test_the_gate_closes_what_the_rule_says_step_after_step(
    steps: list[list[tuple[int, list[float]]]],
    threshold: float,
    warm_up: int,
    max_skip: int,
    planned: int,
) -> None:
    """One gate for several steps; ``planned`` MLPs at the end of the middle are a plan's."""
    middle = range(1, 5)
    gate = MlpGate(
        middle,
        threshold=threshold,
        warm_up=warm_up,
        max_skip=max_skip,
        hidden_size=2,
        device=torch.device("cpu"),
    )
    assert gate.sub_layers == {3, 5, 7} and gate.warm_up == warm_up
    for step in steps:
        ages = np.array([age for age, _ in step])
        watched = np.flatnonzero(ages >= warm_up)  # the engine asks about no others
        plan = np.zeros((len(watched), 12), dtype=np.bool_)
        plan[:, [2 * layer + 1 for layer in middle[len(middle) - planned :]]] = True
        gone = np.zeros((len(step), 12), dtype=np.bool_)
        gate.begin(plan, None)
        for layer in middle[: len(middle) - planned]:
            asked = np.flatnonzero(~gone[watched, 2 * layer + 1])
            if not len(asked) or 2 * layer + 1 not in gate.sub_layers:
                continue
            cosines = torch.tensor([step[token][1][layer] for token in watched[asked]])
            before, update = changes(cosines)

            def look(chosen: Any, stream: Stream = Stream(update, before)) -> Stream:  # noqa: B008
                return stream if chosen is None else Stream(*(half[chosen] for half in stream))

            found = gate.after(2 * layer + 1, asked, look)
            if found is not None:
                assert not found[:, : 2 * layer + 2].any() and not found[:, 0::2].any()
                assert not found[:, 2 * middle.stop :].any()
                gone[watched[asked]] |= found
        left_out = [
            [layer for layer in middle[: len(middle) - planned] if gone[token, 2 * layer + 1]]
            for token in range(len(step))
        ]
        for (age, each), got in zip(step, left_out, strict=True):
            want = plain_rule(each, 1, 5 - planned, threshold, max_skip - planned)
            assert got == (want if age >= warm_up else [])
