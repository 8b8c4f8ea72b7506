# SPDX-License-Identifier: Apache-2.0
"""Method ``adaskip``: leave out the sub-layers that changed this prompt least (AdaSkip)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vllm_adaskip.classifiers.base import Classifier, MethodOptions, Observe, PromptStatistics
from vllm_adaskip.classifiers.ends import EndsOptions
from vllm_adaskip.classifiers.gates import Lens
from vllm_adaskip.classifiers.plan import DecoderShape, SkipPlan
from vllm_adaskip.classifiers.regret import regrets

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class AdaSkip(Classifier):
    """Attention and MLP sub-layers ranked together by how little they changed the prompt.

    The rank is the cosine similarity of the residual stream before and after a sub-layer,
    mean over the prompt's tokens; the most similar are left out first, until the plan keeps
    no more than the budget. This is the ranking of AdaSkip (arXiv 2501.02336), for each
    sequence by itself, without its scale compensation, which won nothing here (docs/adaskip.md).
    """

    Options = EndsOptions
    coalesces = True

    def __init__(
        self, shape: DecoderShape, options: MethodOptions, profile: Path | None = None
    ) -> None:
        assert isinstance(options, EndsOptions)
        inner = options.inner(shape.num_layers)
        self.width = 2 * shape.num_layers
        self._shape = shape
        self._options = options
        self._candidates = range(2 * inner.start, 2 * inner.stop)

    def check(self, budget: float) -> None:
        """Refuse a budget below what the layers at both ends take."""
        self._options.check(budget, self._shape, "adaskip")

    def observer(self, hidden_size: int, device: torch.device, lens: Lens | None = None) -> Observe:
        """Keep each token's cosine similarity of the stream before and after."""
        from vllm_adaskip.classifiers.cosine import cosine  # here: it loads torch

        def observe(sub_layer: int, before: Tensor, update: Tensor, values: Tensor) -> None:
            values[:, sub_layer] = cosine(before, update)

        return observe

    def decide(self, budget: float, prompt: PromptStatistics | None) -> SkipPlan:
        """Leave out the most similar sub-layers until the budget is met."""
        assert prompt is not None
        order = np.argsort(-prompt.mean[self._candidates], kind="stable") + self._candidates.start
        skipped: list[int] = []
        plan = _plan(self._shape, skipped)
        for sub_layer in order.tolist():
            if plan.share(self._shape) <= budget:
                break
            skipped.append(sub_layer)
            plan = _plan(self._shape, skipped)
        return plan

    def regrets(
        self, own: SkipPlan, left_out: NDArray[np.bool_], prompt: PromptStatistics
    ) -> NDArray[np.float64]:
        """Weigh plans by what is missing to a similarity of 1, summed over what they leave out."""
        harms = np.full(self.width, np.inf)
        harms[self._candidates] = np.maximum(1 - prompt.mean[self._candidates], 0)
        return regrets(harms, own.mask(), left_out)


def _plan(shape: DecoderShape, sub_layers: list[int]) -> SkipPlan:
    attention = sum(1 << one // 2 for one in sub_layers if one % 2 == 0)
    mlp = sum(1 << one // 2 for one in sub_layers if one % 2 == 1)
    return SkipPlan(shape.num_layers, attention, mlp)
