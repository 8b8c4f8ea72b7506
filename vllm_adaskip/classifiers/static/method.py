# SPDX-License-Identifier: Apache-2.0
"""Method ``static``: one fixed plan for all, the baseline of every adaptive method."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from vllm_adaskip.classifiers.base import Classifier, MethodOptions, PromptStatistics
from vllm_adaskip.classifiers.plan import DecoderShape, PlanError, SkipPlan


class StaticOptions(MethodOptions):
    """Plans, in the form of `SkipPlan.parse`.

    Attributes:
        skip: what all sequences leave out, in the form of ``adaskip_skip``.
        ladder: other plans; a budget picks the plan that keeps most within it.

    """

    skip: list[int | str]
    ladder: list[list[int | str]] = Field(default=[], max_length=64)


class Static(Classifier):
    """The same plan for every sequence (fixed skip sets, arXiv 2410.20022 section 3).

    With a ladder, the plan that keeps most of those within the budget.
    """

    Options = StaticOptions

    def __init__(
        self, shape: DecoderShape, options: MethodOptions, profile: Path | None = None
    ) -> None:
        assert isinstance(options, StaticOptions)
        plans = [SkipPlan.parse(each, shape.num_layers) for each in (options.skip, *options.ladder)]
        self.codebook = sorted(plans, key=lambda each: -each.share(shape))
        self._shares = [each.share(shape) for each in self.codebook]

    def check(self, budget: float) -> None:
        """Refuse a budget below what all plans keep."""
        least, share = self.codebook[-1], self._shares[-1]
        if share > budget:
            raise PlanError(
                f"a budget of {budget:g} cannot be met: method 'static' has "
                f"{'the one plan' if len(self._shares) == 1 else 'as its smallest plan'} "
                f"'{least}', which keeps {share:.3f} of the decoder's compute"
            )

    def decide(self, budget: float, prompt: PromptStatistics | None) -> SkipPlan:
        """Return the plan that keeps most of those within the budget."""
        plans = zip(self.codebook, self._shares, strict=True)
        return next(plan for plan, share in plans if share <= budget)
