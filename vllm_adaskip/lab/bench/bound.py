# SPDX-License-Identifier: Apache-2.0
"""How fast a step with mixed plans could be: each layer at the rows that need it, summed.

A layer's time at so many rows is that of its attention and MLP inside real steps of such a batch,
whose plans leave out one layer, so that they run as planned steps do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from vllm_adaskip.classifiers import SkipPlan


def nearly_dense(num_layers: int) -> SkipPlan:
    """Return the plan without one layer; it runs as steps with plans do, not as stock's do."""
    return SkipPlan.parse([num_layers // 2], num_layers)


def rows_to_time(plans: Sequence[SkipPlan]) -> list[int]:
    """Return numbers of rows between which the time of every layer of these plans lies."""
    running = _running(plans)
    most = len(plans)
    lowest, highest = int(running.min()), int(running.max())
    step = max(1, most // 8)
    grid = range(max(1, lowest // step * step), min(most, highest + step), step)
    return sorted({*grid, most})


def bound(plans: Sequence[SkipPlan], nearly: float, layer: Mapping[int, float]) -> float:
    """Return the least seconds of a step in which each row follows its plan.

    Args:
        plans: of whole layers, one a row.
        nearly: seconds of a step of as many rows without one layer.
        layer: rows -> a layer's seconds at so many, all rows of the batch among them.

    """
    rows = sorted(layer)
    seconds = [layer[one] for one in rows]
    running = _running(plans)
    taken = np.interp(running, [0, *rows], [0.0, *seconds])
    rest = nearly - (len(running) - 1) * layer[len(plans)]
    return rest + float(taken.sum())


def _running(plans: Sequence[SkipPlan]) -> np.ndarray:
    """Return ``[num_layers]``, how many of the plans run each layer."""
    running: np.ndarray = (~np.array([plan.mask() for plan in plans]))[:, 0::2].sum(axis=0)
    return running


def all_rows(mixtures: Iterable[Sequence[SkipPlan]]) -> list[int]:
    """Return `rows_to_time` of several batches together."""
    return sorted({rows for plans in mixtures for rows in rows_to_time(plans)})
