# SPDX-License-Identifier: Apache-2.0
"""Looks at what the model would predict after a layer, and lets a rule say whether to stop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_adaskip.classifiers.adainfer.rules import ExitRule
from vllm_adaskip.classifiers.gates import Gate, Lens, Look, Stream


def features(logits: Tensor) -> Tensor:
    """Return ``[tokens, 2]`` float32 ``top_prob`` and ``gap`` of ``[tokens, vocabulary]`` logits.

    Probabilities are over these logits alone; the second is 0 where there is one token only.
    """
    logits = logits.float()
    best = logits.topk(min(2, logits.shape[-1])).values
    probabilities = (best - logits.logsumexp(dim=-1, keepdim=True)).exp()
    top_prob = probabilities[:, 0]
    second = probabilities[:, 1] if probabilities.shape[1] == 2 else torch.zeros_like(top_prob)
    return torch.stack((top_prob, top_prob - second), dim=-1)


class LensGate(Gate):
    """AdaInfer's check (arXiv 2403.02181, its algorithm), for each token by itself.

    All tokens of a step go through norm and head together; the host reads two numbers of each.
    A token that is settled leaves out all that is above.
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
        self.sub_layers = frozenset(2 * layer + 1 for layer in check_layers)
        self.warm_up = warm_up
        self._rule = rule
        self._lens = lens
        self._vocabulary = vocabulary
        self._by_request = by_request

    def begin(
        self, planned: NDArray[np.bool_], allowed: Sequence[Sequence[int] | None] | None
    ) -> None:
        """Remember nothing of these tokens yet."""
        self._above = np.arange(planned.shape[1])
        self._seen = np.zeros((len(planned), 2))
        own: list[tuple[int, ...] | None] = [None]
        if allowed is not None and self._by_request:
            own = [tuple(dict.fromkeys(ids)) if ids else None for ids in allowed]
        kinds = {ids: number for number, ids in enumerate(dict.fromkeys(own))}
        self._kinds = list(kinds)
        self._kind = np.array([kinds[ids] for ids in own])

    def after(
        self, sub_layer: int, tokens: NDArray[np.int64], look: Look
    ) -> NDArray[np.bool_] | None:
        """Ask the rule."""
        layer = sub_layer // 2
        found = self._look(tokens, look(None))
        settled, self._seen[tokens] = self._rule.settled(layer, found, self._seen[tokens])
        return settled[:, None] & (self._above > sub_layer) if settled.any() else None

    def _look(self, tokens: NDArray[np.int64], stream: Stream) -> NDArray[np.float64]:
        """Return features, vocabulary by vocabulary; mostly there is only one."""
        if len(self._kinds) == 1:
            return self._features(stream, self._kinds[0])
        kind = self._kind[tokens]
        found = np.empty((len(kind), 2))
        assert stream.before is not None
        for number in np.unique(kind):
            rows = torch.from_numpy(np.flatnonzero(kind == number)).to(stream.update.device)
            part = Stream(stream.update[rows], stream.before[rows])
            found[kind == number] = self._features(part, self._kinds[number])
        return found

    def _features(self, stream: Stream, own: Sequence[int] | None) -> NDArray[np.float64]:
        logits = self._lens(stream, self._vocabulary if own is None else own)
        found: NDArray[np.float64] = features(logits).cpu().numpy().astype(np.float64)
        return found
