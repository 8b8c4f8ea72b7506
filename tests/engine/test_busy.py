# SPDX-License-Identifier: Apache-2.0
"""When prompts begin to be shortened, and when that ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adaskip.config import AdaSkipConfig, ConfigError
from vllm_adaskip.engine.prompt_plan import Busy, BusyOptions

LOADS = st.lists(st.integers(0, 12), max_size=60)


@given(loads=LOADS, leave=st.integers(0, 6), more=st.integers(1, 6))
def test_it_changes_only_where_a_threshold_is_crossed(
    loads: list[int], leave: int, more: int
) -> None:
    busy, enter = Busy(BusyOptions(enter=leave + more, leave=leave)), leave + more
    for load in loads:
        before = busy.now
        has_changed = busy.saw(load)
        assert has_changed == (busy.now != before)
        if load >= enter:
            assert busy.now
        elif load <= leave:
            assert not busy.now
        else:  # between the two nothing changes, so load around one of them does not flap
            assert busy.now == before


@pytest.mark.parametrize(
    ("busy", "words"),
    [
        ({"enter": 2, "leave": 2}, "'leave' must be less than 'enter'"),
        ({"enter": 0, "leave": 0}, "greater than or equal to 1"),
        ({"enter": 4}, "Field required"),
        ({"enter": 4, "leave": 1, "min_seconds": 3}, "unknown option; allowed: enter, leave"),
        ({"enter": True, "leave": 0}, "integer"),
        (4, "dictionary"),
    ],
)
def test_what_cannot_be_is_refused(busy: object, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"adaskip\.prompt\.busy.*: .*{words}"):
        AdaSkipConfig.parse({"prompt": {"exit": 3, "busy": busy}})
