# SPDX-License-Identifier: Apache-2.0
"""Which MLPs each generated token leaves out, found out on its way through the layers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_adaskip.classifiers.cosine import Cosines
from vllm_adaskip.classifiers.gates import Gate, Look


class MlpGate(Gate):
    """FFN-SkipLLM's rule per token (arXiv 2404.03865, its algorithm).

    Tokens past the warm-up are watched: the first MLP that leaves a token's stream as similar
    as the threshold asks has run, and from the next layer on the token's MLPs are left out
    until ``max_skip`` are gone or the middle ends. There is no second test.
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
        self.sub_layers = frozenset(2 * layer + 1 for layer in middle[:-1])
        self.warm_up = warm_up
        self._middle = middle
        self._threshold = threshold
        self._max_skip = max_skip
        self._hidden_size = hidden_size
        self._device = device
        self._cosines = Cosines(1, hidden_size, device)

    def begin(self, planned: NDArray[np.bool_], allowed: object) -> None:
        """Watch all of these tokens."""
        self._planned = planned[:, 2 * self._middle.start + 1 : 2 * self._middle.stop : 2].sum(1)
        self._is_watched = np.ones(len(planned), dtype=np.bool_)
        self._layers = np.arange(planned.shape[1] // 2)

    def after(
        self, sub_layer: int, tokens: NDArray[np.int64], look: Look
    ) -> NDArray[np.bool_] | None:
        """Find out which of the watched tokens this MLP hardly changed."""
        watched = self._is_watched[tokens]
        if not (count := int(np.count_nonzero(watched))):
            return None
        if count != self._cosines.tokens:  # buffers stay, often for the next step
            self._cosines = Cosines(count, self._hidden_size, self._device)
        stream = look(None if count == len(tokens) else watched)
        assert stream.before is not None
        saturated = self._cosines.of(stream.before, stream.update) >= self._threshold
        if not np.count_nonzero(saturated):
            return None
        watched[watched] = saturated
        found, layer = tokens[watched], sub_layer // 2
        self._is_watched[found] = False
        until = np.minimum(layer + self._max_skip - self._planned[found], self._middle[-1])
        left_out = np.zeros((len(tokens), 2 * len(self._layers)), dtype=np.bool_)
        left_out[watched, 1::2] = (self._layers > layer) & (self._layers <= until[:, None])
        return left_out
