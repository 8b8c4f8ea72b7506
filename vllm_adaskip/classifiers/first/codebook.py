# SPDX-License-Identifier: Apache-2.0
"""A codebook: the few plans that decisions snap to, so that sequences of a batch share them."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_adaskip.classifiers.plan import SkipPlan


def nearest_within(allowed: SkipPlan, codebook: Sequence[SkipPlan]) -> SkipPlan | None:
    """Give the codebook's plan nearest to ``allowed`` that leaves out nothing beyond it.

    Nearest by sub-layers that differ; of equals the first. None: every plan goes beyond it.
    """
    within = [plan for plan in codebook if plan | allowed == allowed]
    return max(within, key=_sub_layers, default=None)


def _sub_layers(plan: SkipPlan) -> int:
    return plan.attention.bit_count() + plan.mlp.bit_count()
