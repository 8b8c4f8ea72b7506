# SPDX-License-Identifier: Apache-2.0
"""Looks at what the model would predict after a layer, and lets a rule say whether to stop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_adaskip.classifiers.adainfer.rules import ExitRule
from vllm_adaskip.classifiers.gates import ExitGate, Lens


def features(logits: Tensor) -> Tensor:
    """Give ``[tokens, 2]`` float32 ``top_prob`` and ``gap`` of ``[tokens, vocabulary]`` logits.

    Probabilities are over these logits alone; the second is 0 where there is one token only.
    """
    logits = logits.float()
    best = logits.topk(min(2, logits.shape[-1])).values
    probabilities = (best - logits.logsumexp(dim=-1, keepdim=True)).exp()
    top_prob = probabilities[:, 0]
    second = probabilities[:, 1] if probabilities.shape[1] == 2 else torch.zeros_like(top_prob)
    return torch.stack((top_prob, top_prob - second), dim=-1)


class LensGate(ExitGate):
    """AdaInfer's check (arXiv 2403.02181, its algorithm), for each token by itself.

    All tokens of a step go through norm and head together; the host reads two numbers of each.
    """

    def __init__(
        self,
        rule: ExitRule,
        lens: Lens,
        *,
        check_layers: Sequence[int],
        vocabulary: Sequence[int] | None = None,
        by_request: bool = False,
        warm_up: int = 0,
    ) -> None:
        """Take ids to look at instead of all, or have each request name its own."""
        lens.check(() if by_request else vocabulary)
        self.check_layers = tuple(check_layers)
        self.warm_up = warm_up
        self._rule = rule
        self._lens = lens
        self._vocabulary = vocabulary
        self._by_request = by_request

    def begin(self, vocabularies: Sequence[Sequence[int] | None]) -> None:
        """Remember nothing of these tokens yet."""
        own = [
            tuple(dict.fromkeys(one)) if one and self._by_request else None for one in vocabularies
        ]
        kinds = {one: number for number, one in enumerate(dict.fromkeys(own))}
        self._kinds = list(kinds)
        self._kind = np.array([kinds[one] for one in own])
        self._seen = np.zeros((len(own), 2))

    def exits(
        self, layer: int, tokens: NDArray[np.int64], before: Tensor, update: Tensor
    ) -> NDArray[np.bool_]:
        """Ask the rule."""
        found = self._look(self._kind[tokens], before, update)
        settled, self._seen[tokens] = self._rule.settled(layer, found, self._seen[tokens])
        return settled

    def _look(self, kind: NDArray[np.int64], before: Tensor, update: Tensor) -> NDArray[np.float64]:
        """Give features, vocabulary by vocabulary; mostly there is one."""
        if len(self._kinds) == 1:
            return self._features(before, update, self._kinds[0])
        found = np.empty((len(kind), 2))
        for number in np.unique(kind):
            rows = torch.from_numpy(np.flatnonzero(kind == number)).to(before.device)
            found[kind == number] = self._features(before[rows], update[rows], self._kinds[number])
        return found

    def _features(
        self, before: Tensor, update: Tensor, own: Sequence[int] | None
    ) -> NDArray[np.float64]:
        logits = self._lens(before, update, self._vocabulary if own is None else own)
        found: NDArray[np.float64] = features(logits).cpu().numpy().astype(np.float64)
        return found
