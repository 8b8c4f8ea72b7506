# SPDX-License-Identifier: Apache-2.0
"""The subsets of one step plan, laid end to end, so that one gather serves them all. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_adaskip.engine.layout import Subset


class JoinedSubsets:
    """Indices of several subsets of one step.

    Attributes:
        subsets: in the order in which they lie.
        num_rows: of each, how many rows it keeps.
        num_tokens: of each, how many tokens.
        rows: int64 tensor ``[all kept rows]``.
        tokens: int64 tensor ``[all kept tokens]``, index in the step.
        dropped: int32 tensor ``[all kept rows]`` as `Subset.dropped`; None where nothing is.

    """

    def __init__(self, subsets: Sequence[Subset], device: torch.device) -> None:
        """Join at least one; tensors are put on a device."""
        self.subsets = tuple(subsets)
        self.num_rows = [len(subset.rows) for subset in subsets]
        self.num_tokens = [subset.num_tokens for subset in subsets]
        self.rows = torch.cat([subset.rows for subset in subsets]).to(device)
        self.tokens = torch.cat([_indices(subset.tokens) for subset in subsets]).to(device)
        dropped = torch.cat([subset.dropped for subset in subsets])
        self.dropped: Tensor | None = dropped.to(device) if dropped.any() else None


def _indices(tokens: slice | Tensor) -> Tensor:
    return torch.arange(tokens.start, tokens.stop) if isinstance(tokens, slice) else tokens
