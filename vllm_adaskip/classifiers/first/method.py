# SPDX-License-Identifier: Apache-2.0
"""Method ``first``: routers read the prompt and say which decoder layers it needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vllm_adaskip.classifiers.base import Classifier, MethodOptions, Observe, PromptStatistics
from vllm_adaskip.classifiers.calibration import CalibratedOptions
from vllm_adaskip.classifiers.gates import Lens
from vllm_adaskip.classifiers.plan import DecoderShape, SkipPlan
from vllm_adaskip.classifiers.regret import regrets

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: A token votes for a layer from this ``rho`` on, where ``reduce`` counts votes.
VOTE = 0.5
#: Layers that a codebook may leave out beyond what a budget takes; more would cost too much.
REACH = 2


class FirstOptions(CalibratedOptions):
    """How the routers' scores become one decision per layer and sequence.

    The paper leaves this open. A layer is left out where its reduced score is below ``threshold``.
    So easy prompts may skip much and hard ones little; a budget binds each of them.

    Attributes:
        reduce: ``mean`` of ``rho`` over the prompt's tokens, ``fraction`` of tokens whose ``rho``
            is at least 0.5, or ``rho`` of the ``last`` token.
        threshold: layers whose score is below it are left out. A budget moves it up until the plan
            meets the budget.
        codebook: plans that decisions snap to, as lists of layers; none: any plan.

    """

    reduce: Literal["mean", "fraction", "last"] = "mean"
    threshold: float = Field(default=0.5, ge=0, le=1)
    codebook: list[list[int | str]] = Field(default=[], max_length=256)


class First(Classifier):
    """Sequence-level routing of whole decoder layers, FiRST (arXiv 2410.12513).

    Needs a profile with trained `Routers`. Prompts run at full depth; the routers' scores of
    their tokens decide the plan of what is generated.
    """

    Options = FirstOptions
    coalesces = True

    def __init__(
        self, shape: DecoderShape, options: MethodOptions, profile: Path | None = None
    ) -> None:
        assert isinstance(options, FirstOptions)
        if profile is None:
            raise ValueError("method 'first' needs a profile with trained routers (option profile)")
        self.width = shape.num_layers
        self.options = options
        self._shape = shape
        self._profile = profile
        self._routed = options.inner(shape.num_layers)
        self._threshold = options.resolved_threshold()
        self.codebook = [
            SkipPlan.parse(plan, shape.num_layers)
            for plan in (options.codebook and [[], *options.codebook])
        ]

    def check(self, budget: float) -> None:
        """Refuse a budget below what the layers at both ends take."""
        self.options.check(budget, self._shape, "first")

    def observer(self, hidden_size: int, device: torch.device, lens: Lens | None = None) -> Observe:
        """Load the routers, and score each token by its stream before each routed layer."""
        from vllm_adaskip.classifiers.first.routers import Routers

        routers = Routers.load(self._profile, self._shape.num_layers, hidden_size).to(device)
        votes = self.options.reduce == "fraction"

        def observe(sub_layer: int, before: Tensor, update: Tensor, values: Tensor) -> None:
            layer, is_mlp = divmod(sub_layer, 2)
            if is_mlp or layer not in self._routed:
                return
            rho = routers(layer, before)
            values[:, layer] = (rho >= VOTE).float() if votes else rho

        return observe

    def decide(self, budget: float, prompt: PromptStatistics | None) -> SkipPlan:
        """Leave out the layers whose score is below the threshold, or that the budget asks for."""
        assert prompt is not None
        return self.plan(self._scores(prompt), budget)

    def regrets(
        self, own: SkipPlan, left_out: NDArray[np.bool_], prompt: PromptStatistics
    ) -> NDArray[np.float64]:
        """Weigh plans by the summed scores of the layers they leave out."""
        harms = np.full(self._shape.num_layers, np.inf)
        harms[self._routed] = self._scores(prompt)[self._routed]
        return regrets(np.repeat(harms, 2), own.mask(), left_out)

    def _scores(self, prompt: PromptStatistics) -> NDArray[np.float64]:
        return prompt.last if self.options.reduce == "last" else prompt.mean

    def plan(self, scores: NDArray[np.float64], budget: float = 1.0) -> SkipPlan:
        """Return the plan for ``[num_layers]`` reduced scores.

        Layers are left out in the order of their scores, below the threshold, and beyond it as far
        as the budget asks. With a codebook, a few more layers may be allowed than that takes, so
        that one of its plans within the budget fits; otherwise the plan is not snapped.
        """
        order = sorted(self._routed, key=lambda layer: (scores[layer], layer))
        allowed = sum(bool(scores[layer] < self._threshold) for layer in order)
        plans = [_layers(order[:count], self._shape.num_layers) for count in range(len(order) + 1)]
        needed = next(
            count
            for count in range(allowed, len(plans))
            if plans[count].share(self._shape) <= budget
        )
        fitting = [plan for plan in self.codebook if plan.share(self._shape) <= budget]
        for plan in plans[allowed : needed + 1 + REACH]:
            if snapped := nearest_within(plan, fitting):
                return snapped
        return plans[needed]


def _layers(layers: Sequence[int], num_layers: int) -> SkipPlan:
    bits = sum(1 << layer for layer in layers)
    return SkipPlan(num_layers, bits, bits)


def nearest_within(allowed: SkipPlan, codebook: Sequence[SkipPlan]) -> SkipPlan | None:
    """Return the codebook's plan nearest to ``allowed`` that leaves out nothing beyond it.

    Nearest by sub-layers that differ; of equals the first. None: every plan goes beyond it.
    """
    within = [plan for plan in codebook if plan | allowed == allowed]
    return max(within, key=_sub_layers, default=None)


def _sub_layers(plan: SkipPlan) -> int:
    return plan.attention.bit_count() + plan.mlp.bit_count()
