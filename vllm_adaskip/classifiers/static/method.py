# SPDX-License-Identifier: Apache-2.0
"""Method ``static``: one fixed plan for everybody, the baseline of every adaptive method."""

from __future__ import annotations

from pathlib import Path

from vllm_adaskip.classifiers.base import Classifier, MethodOptions, PromptStatistics
from vllm_adaskip.classifiers.plan import DecoderShape, PlanError, SkipPlan


class StaticOptions(MethodOptions):
    """``skip``: the plan, in the form of `SkipPlan.parse`."""

    skip: list[int | str]


class Static(Classifier):
    """The same plan for every sequence (fixed skip sets, arXiv 2410.20022 section 3)."""

    Options = StaticOptions

    def __init__(
        self, shape: DecoderShape, options: MethodOptions, profile: Path | None = None
    ) -> None:
        assert isinstance(options, StaticOptions)
        self._plan = SkipPlan.parse(options.skip, shape.num_layers)
        self._share = self._plan.share(shape)

    def check(self, budget: float) -> None:
        """Refuse a budget below what the plan keeps."""
        if self._share > budget:
            raise PlanError(
                f"a budget of {budget:g} cannot be met: method 'static' has the one plan "
                f"'{self._plan}', which keeps {self._share:.3f} of the decoder's compute"
            )

    def decide(self, budget: float, prompt: PromptStatistics | None) -> SkipPlan:
        """Give the fixed plan."""
        return self._plan
