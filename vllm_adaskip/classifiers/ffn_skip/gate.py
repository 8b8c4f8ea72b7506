# SPDX-License-Identifier: Apache-2.0
"""Which MLPs each generated token leaves out, found out on its way through the layers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_adaskip.classifiers.cosine import Cosines
from vllm_adaskip.classifiers.gates import TokenGate


class MlpGate(TokenGate):
    """FFN-SkipLLM's rule per token (arXiv 2404.03865, its algorithm).

    Tokens past the warm-up are watched: the first MLP that leaves a token's stream as similar
    as the threshold asks has run, and from the next layer on the token's MLPs are left out
    until ``max_skip`` are gone or the middle ends. There is no second test. So one number
    per token says it all: the last layer whose MLP it leaves out.
    """

    def __init__(
        self,
        middle: range,
        *,
        threshold: float,
        warm_up: int,
        max_skip: int,
        hidden_size: int,
        device: torch.device,
    ) -> None:
        self.sub_layers = frozenset(2 * layer + 1 for layer in middle)
        self._last = middle[-1]
        self._threshold = threshold
        self._warm_up = warm_up
        self._max_skip = max_skip
        self._hidden_size = hidden_size
        self._device = device
        self._cosines = Cosines(1, hidden_size, device)

    def begin(self, ages: NDArray[np.int64], planned: NDArray[np.int64]) -> bool:
        """Watch the tokens past the warm-up."""
        self.deciding = ages >= self._warm_up
        (past,) = self.deciding.nonzero()
        self._planned = planned
        self._until: NDArray[np.int64] | None = None  # as long as nobody leaves anything out
        self._watch(past, len(ages))
        return len(past) > 0

    def closed(self, sub_layer: int) -> NDArray[np.bool_] | None:
        """Close an MLP to those that have saturated below."""
        return None if self._until is None else self._until >= sub_layer // 2

    def observe(self, sub_layer: int, before: Tensor, update: Tensor) -> None:
        """Find out which of the watched tokens this MLP hardly changed."""
        layer = sub_layer // 2
        if not len(self._watched) or layer == self._last:
            return
        if self._rows is not None:
            before, update = before[self._rows], update[self._rows]
        saturated = self._cosines.of(before, update) >= self._threshold
        if np.count_nonzero(saturated):
            found = self._watched[saturated]
            if self._until is None:
                self._until = np.full(len(self._planned), -1)
            self._until[found] = layer + self._max_skip - self._planned[found]
            self._watch(self._watched[~saturated], len(self._planned))

    def _watch(self, tokens: NDArray[np.int64], of: int) -> None:
        self._watched = tokens
        self._rows = None if len(tokens) == of else torch.from_numpy(tokens).to(self._device)
        if len(tokens) not in (0, self._cosines.tokens):  # buffers stay, often for the next step
            self._cosines = Cosines(len(tokens), self._hidden_size, self._device)
