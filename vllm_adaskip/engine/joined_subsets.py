# SPDX-License-Identifier: Apache-2.0
"""The subsets of one step plan, laid end to end, so that one gather serves them all. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_adaskip.engine.layout import Subset

#: Rows, tokens, and what is dropped of each row, if anything; see `JoinedSubsets`.
Indices = tuple[Tensor, Tensor, Tensor | None]


class JoinedSubsets:
    """Indices of several subsets of one step.

    Attributes:
        subsets: in the order in which they lie.
        num_rows: of each, how many rows it keeps.
        num_tokens: of each, how many tokens.

    """

    def __init__(self, subsets: Sequence[Subset]) -> None:
        """Join at least one."""
        self.subsets = tuple(subsets)
        self.num_rows = [len(subset.rows) for subset in subsets]
        self.num_tokens = [subset.num_tokens for subset in subsets]
        rows = torch.cat([subset.rows for subset in subsets])
        tokens = torch.cat([_indices(subset.tokens) for subset in subsets])
        dropped = torch.cat([subset.dropped for subset in subsets])
        self._indices: Indices = rows, tokens, dropped if dropped.any() else None

    def on(self, device: torch.device) -> Indices:
        """Give the indices, copied to a device once.

        Rows, int64 ``[all kept rows]``; tokens, int64 ``[all kept tokens]``, index in the step;
        `Subset.dropped`, int32 ``[all kept rows]``, or None where nothing is.
        """
        rows, tokens, dropped = self._indices
        if rows.device != device:
            rows, tokens = rows.to(device), tokens.to(device)
            dropped = None if dropped is None else dropped.to(device)
            self._indices = rows, tokens, dropped
        return self._indices


def _indices(tokens: slice | Tensor) -> Tensor:
    return torch.arange(tokens.start, tokens.stop) if isinstance(tokens, slice) else tokens
