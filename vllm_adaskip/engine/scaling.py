# SPDX-License-Identifier: Apache-2.0
"""What stands in for left-out sub-layers: the stream, multiplied (AdaSkip, arXiv 2501.02336).

Pure: made from arrays, without vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_adaskip.engine.layout import BoolArray, Layout, generated_tokens
from vllm_adaskip.engine.table import Factors


@dataclass(frozen=True)
class Scaling:
    """Tokens whose residual stream is multiplied, in place of sub-layers they left out.

    Attributes:
        tokens: index of these tokens in the step, as in `Subset`.
        factors: float32 ``[tokens, 1]``.

    """

    tokens: slice | torch.Tensor
    factors: torch.Tensor


class DueFactors:
    """While a step is planned: what each row's generated tokens are still to be multiplied by.

    Factors of sub-layers that a row leaves out one after the other become one. When it falls
    due depends on the row's own plan alone, so neighbours do not change its rounding (isolation).
    """

    def __init__(self, layout: Layout, factors: Factors | None) -> None:
        """Take ``[rows, 2 * num_layers]`` factors; None: nothing is ever due."""
        self._layout = layout
        self._factors = factors
        self._due = np.ones(len(layout.query_lens), dtype=np.float32)

    def add(self, rows: BoolArray, sub_layer: int) -> None:
        """Note who leaves a sub-layer out."""
        if self._factors is not None:
            self._due[rows] *= self._factors[rows, sub_layer]

    def any_of(self, rows: BoolArray) -> bool:
        """Tell whether anything is due of some rows."""
        return self._factors is not None and bool((self._due[rows] != 1).any())

    def settle(self, rows: BoolArray) -> Scaling | None:
        """Give what is due of some rows, if anything, which then is no longer."""
        if not self.any_of(rows):
            return None
        rows = rows & (self._due != 1)
        each = np.repeat(self._due, np.where(rows, self._layout.generated, 0))
        self._due[rows] = 1
        return Scaling(generated_tokens(self._layout, rows), torch.from_numpy(each)[:, None])
