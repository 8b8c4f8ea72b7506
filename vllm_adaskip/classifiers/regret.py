# SPDX-License-Identifier: Apache-2.0
"""Regret: how much worse other plans are for a prompt than the one decided from it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def regrets(
    harms: NDArray[np.float64], own: NDArray[np.bool_], left_out: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Weigh plans by the harm of what they leave out, on a scale from the own plan to the worst.

    The worst leaves out as many sub-layers as the own plan, namely those that harm most. So 0.1
    is a tenth of the way from the best that the prompt's statistics know to the worst, whatever the
    method's scores mean.

    Args:
        harms: ``[2 * num_layers]``, of leaving out each sub-layer, 0 or more; infinite where the
            method never does.
        own: ``[2 * num_layers]``, what the own plan leaves out, as `SkipPlan.mask`.
        left_out: ``[plans, 2 * num_layers]``, the same of the plans to weigh.

    Returns:
        ``[plans]``, 0 (the own plan, or less harm) to 1 (the worst, or more); infinite for a plan
        that leaves out what the method never does.

    """
    known = np.isfinite(harms)
    finite = np.where(known, harms, 0.0)
    most = np.sort(finite[known])[::-1][: np.count_nonzero(own & known)]
    best, worst = finite[own].sum(), most.sum()
    beyond = left_out @ finite - best
    scale = worst - best
    weighed = beyond / scale if scale > 0 else np.where(beyond > 0, 1.0, 0.0)
    found: NDArray[np.float64] = np.clip(weighed, 0.0, 1.0)
    found[left_out[:, ~known].any(axis=1)] = np.inf
    return found
