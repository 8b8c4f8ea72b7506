# SPDX-License-Identifier: Apache-2.0
"""The layers at both ends of the decoder, which adaptive methods never leave out."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from vllm_adaskip.classifiers.base import MethodOptions
from vllm_adaskip.classifiers.plan import DecoderShape, PlanError, SkipPlan


class EndsOptions(MethodOptions):
    """Options of a method that keeps both ends, the critical ones (arXiv 2406.19384).

    Attributes:
        keep_first: decoder layers at the beginning that are never left out.
        keep_last: decoder layers at the end that are never left out.

    """

    #: Fewest layers that must be kept, so that no plan leaves out everything.
    least_kept: ClassVar[int] = 1

    keep_first: int = Field(default=1, ge=0)
    keep_last: int = Field(default=1, ge=0)

    def inner(self, num_layers: int) -> range:
        """Return the layers that may be left out (`PlanError`: none, or all)."""
        kept = self.keep_first + self.keep_last
        if not self.least_kept <= kept < num_layers:
            raise PlanError(
                f"keep_first {self.keep_first} and keep_last {self.keep_last} keep {kept} "
                f"layers; allowed: {self.least_kept} to {num_layers - 1} in all, of {num_layers}"
            )
        return range(self.keep_first, num_layers - self.keep_last)

    def check(self, budget: float, shape: DecoderShape, method: str) -> None:
        """Refuse a budget below what the layers at both ends take (`PlanError`)."""
        inner = self.inner(shape.num_layers)
        least = SkipPlan.parse([*inner], shape.num_layers).share(shape)
        if budget < least:
            raise PlanError(
                f"a budget of {budget:g} cannot be met: the layers that method {method!r} "
                f"always keeps are {least:.3f} of the decoder's compute"
            )
