# SPDX-License-Identifier: Apache-2.0
"""How a step's tokens agree, and the option that says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_adaskip.classifiers import DecoderShape
from vllm_adaskip.classifiers.batch_rule import BATCH_RULES, majority, unanimous
from vllm_adaskip.classifiers.ffn_skip.method import FfnSkip, FfnSkipOptions

#: Of each token: may the gate decide about it, and would it leave the sub-layer out?
tokens = st.lists(
    st.sampled_from([(True, True), (True, False), (False, False)]), min_size=1, max_size=9
)


@given(tokens)
def test_each_rule_says_for_all_or_nobody(step: list[tuple[bool, bool]]) -> None:
    deciding, votes = (np.array(each) for each in zip(*step, strict=True))
    yes, may = sum(vote for _, vote in step), sum(may for may, _ in step)
    agreed = majority(votes, deciding)
    assert (agreed is not None) == (yes > may / 2)
    assert agreed is None or (agreed == deciding).all()
    agreed = unanimous(votes, deciding)
    assert (agreed is not None) == (yes == len(step))
    assert agreed is None or agreed.all()


@pytest.mark.parametrize("name", ["exact", "majority", "all"])
def test_the_gate_brings_the_rule_of_the_option(name: str) -> None:
    options = FfnSkipOptions.model_validate({"scope": "token", "batch_rule": name})
    gate = FfnSkip(DecoderShape(6, 1, 3), options).gate(16, torch.device("cpu"))
    assert gate.batch_rule is BATCH_RULES[name]


def test_rules_are_refused_where_sequences_decide() -> None:
    with pytest.raises(ValidationError, match="allowed with scope 'sequence': 'exact'"):
        FfnSkipOptions.model_validate({"batch_rule": "majority"})
    with pytest.raises(ValidationError, match="'exact', 'majority' or 'all'"):
        FfnSkipOptions.model_validate({"scope": "token", "batch_rule": "most"})
    assert FfnSkipOptions.model_validate({"batch_rule": "exact"}).batch_rule == "exact"
