# SPDX-License-Identifier: Apache-2.0
"""Method ``exit``: all run the first decoder layers and no more, a fixed baseline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from vllm_adaskip.classifiers.base import Classifier, MethodOptions, PromptStatistics
from vllm_adaskip.classifiers.gates import Lens
from vllm_adaskip.classifiers.plan import DecoderShape, PlanError, SkipPlan

if TYPE_CHECKING:
    import torch


class EarlyExitOptions(MethodOptions):
    """How deep, and which tokens.

    Attributes:
        layers: decoder layers that run, from the first.
        scope: ``sequence``: prompts run at full depth, generated tokens stop early; ``answer``:
            so do the prompts of requests that ask for one token.

    """

    layers: int = Field(ge=1)
    scope: Literal["sequence", "answer"] = "sequence"


class EarlyExit(Classifier):
    """Static early exit (arXiv 2410.20022 section 3): the last layers are left out."""

    Options = EarlyExitOptions

    def __init__(
        self, shape: DecoderShape, options: MethodOptions, profile: Path | None = None
    ) -> None:
        assert isinstance(options, EarlyExitOptions)
        if options.layers > shape.num_layers:
            raise PlanError(f"layers {options.layers}; allowed: 1 to {shape.num_layers}")
        self.gate_scope = "answer" if options.scope == "answer" else None
        self.gates_attention = options.scope == "answer"
        self._plan = exit_plan(options.layers, shape)
        self._share = self._plan.share(shape)

    def check(self, budget: float) -> None:
        """Refuse a budget below what these layers take."""
        if self._share > budget:
            raise PlanError(
                f"a budget of {budget:g} cannot be met: method 'exit' runs the one plan "
                f"'{self._plan}', which keeps {self._share:.3f} of the decoder's compute"
            )

    def decide(self, budget: float, prompt: PromptStatistics | None) -> SkipPlan:
        """Return the fixed plan."""
        return self._plan

    def gate(self, hidden_size: int, device: torch.device, lens: Lens) -> None:
        """Return no gate: the depth is fixed."""


def exit_plan(depth: int, shape: DecoderShape) -> SkipPlan:
    """Return the plan that runs the first ``depth`` layers."""
    return SkipPlan.parse(range(depth, shape.num_layers), shape.num_layers)


def deepest_exit(budget: float, shape: DecoderShape) -> int:
    """Return how many of the first layers a budget allows; 0: not even one."""
    depths = range(shape.num_layers, 0, -1)
    return next((each for each in depths if exit_plan(each, shape).share(shape) <= budget), 0)
