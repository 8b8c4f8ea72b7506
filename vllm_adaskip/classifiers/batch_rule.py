# SPDX-License-Identifier: Apache-2.0
"""How the tokens of one step can be made to agree about a sub-layer, for the sake of its weights.

A step reads a sub-layer's weights if a single token goes through it. Each token by itself,
which is exact, then saves the others' computing alone. The rules here break isolation on
purpose: what a sequence leaves out depends on who else is in the batch, so the same request may
be answered differently another time.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

#: From ``[tokens]`` who would leave a sub-layer out, and ``[tokens]`` about whom the gate may
#: decide, to who does; None for nobody. The tokens are those whose plans let them through.
BatchRule = Callable[[NDArray[np.bool_], NDArray[np.bool_]], NDArray[np.bool_] | None]


def majority(votes: NDArray[np.bool_], deciding: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """Let all about whom the gate may decide leave it out if more than half of them would."""
    return deciding if 2 * np.count_nonzero(votes) > np.count_nonzero(deciding) else None


def unanimous(votes: NDArray[np.bool_], deciding: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """Leave it out only if every token of the step would, so that it is not launched."""
    return votes if votes.all() else None


#: By the names that options use.
BATCH_RULES: dict[str, BatchRule | None] = {
    "exact": None,
    "majority": majority,
    "all": unanimous,
}
