# SPDX-License-Identifier: Apache-2.0
"""What routers make of a batch's prompts, in the pass in which the answers are gated.

A prompt sees nothing of its answer and runs at full depth, so its scores are there, exactly as
a server gets them, before the answer needs them at the same layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_adaskip.classifiers.first.fit.gated import gated_logits
from vllm_adaskip.classifiers.first.method import VOTE, FirstOptions
from vllm_adaskip.classifiers.first.routers import Routers
from vllm_adaskip.lab.fitting.samples import Batch, Sample, batches_of

#: Makes gates ``[rows]`` of a layer's scores ``[rows]``.
Decide = Callable[[Tensor], Tensor]


class Routing:
    """A `Gate` that scores each prompt before each routed layer, and decides by the score.

    Attributes:
        scores: by layer ``[rows]`` float32, once the model has run.

    """

    def __init__(
        self, routers: Routers, options: FirstOptions, batch: Batch, decide: Decide
    ) -> None:
        self.scores: dict[int, Tensor] = {}
        self._routed, self._reduce = options.inner(len(routers.weight)), options.reduce
        self._routers, self._batch, self._decide = routers, batch, decide

    def __call__(self, layer: int, before: Tensor) -> Tensor:
        """Return the gates of a layer; layers that are not routed always run."""
        if layer not in self._routed:
            return before.new_ones(len(before))
        # Detached: no gate changes a prompt's stream, so there is nothing to learn through it.
        rho = self._routers(layer, before.detach())
        self.scores[layer] = score = reduced(rho, self._batch.prompt, self._reduce)
        return self._decide(score)


def reduced(rho: Tensor, prompt: Tensor, reduce: str) -> Tensor:
    """Return one score a row of each token's ``rho``, as `FirstOptions.reduce` says.

    Votes have no gradient; ``fraction`` takes that of the ``rho`` they are cast by.
    """
    if reduce == "last":
        last = prompt.long().cumsum(1).argmax(1, keepdim=True)  # the first of the largest
        return rho.gather(1, last)[:, 0]
    if reduce == "fraction":
        rho = straight_through(rho >= VOTE, rho)
    return rho.masked_fill(~prompt, 0.0).sum(1) / prompt.sum(1)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Return exactly what ``hard`` says, with the gradient of ``soft`` (arXiv 1308.3432)."""
    return hard.to(soft.dtype) + (soft - soft.detach())


@torch.no_grad()
def prompt_scores(
    model: Any,
    routers: Routers,
    options: FirstOptions,
    samples: Sequence[Sample],
    batch: int,
) -> NDArray[np.float64]:
    """Return ``[samples, layers]`` reduced scores; layers that are not routed have 1."""
    scores = np.ones((len(samples), len(routers.weight)))
    for places, one in batches_of(samples, batch, model.device):
        routing = Routing(routers, options, one, torch.ones_like)
        gated_logits(model, one, routing)
        for layer, score in routing.scores.items():
            scores[places, layer] = score.double().cpu().numpy()
    return scores
