# SPDX-License-Identifier: Apache-2.0
"""Method ``none``: nothing is decided; a request skips only what it names itself."""

from __future__ import annotations

from pathlib import Path

from vllm_adaskip.classifiers.base import Classifier, MethodOptions, PromptStatistics
from vllm_adaskip.classifiers.plan import DecoderShape, PlanError, SkipPlan


class Dense(Classifier):
    """Every sequence runs every sub-layer."""

    def __init__(
        self, shape: DecoderShape, options: MethodOptions, profile: Path | None = None
    ) -> None:
        self._plan = SkipPlan(shape.num_layers)

    def check(self, budget: float) -> None:
        """Refuse every budget below 1."""
        if budget < 1.0:
            raise PlanError(
                f"a budget of {budget:g} cannot be met: method 'none' skips nothing; start the "
                "server with a method, or name a plan in adaskip_skip"
            )

    def decide(self, budget: float, prompt: PromptStatistics | None) -> SkipPlan:
        """Return the dense plan."""
        return self._plan
