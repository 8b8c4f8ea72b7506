# SPDX-License-Identifier: Apache-2.0
"""Which threshold leaves out which share of the layers, over the prompts of a fit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vllm_adaskip.classifiers.first.fit.codebook import Plans, Scores, Weights, plans_of
from vllm_adaskip.classifiers.first.method import FirstOptions

#: Thresholds in a calibration; `FirstOptions.resolved_threshold` interpolates between them.
_POINTS = 48


def share_skipped(plans: Plans, weights: Weights) -> float:
    """Return the share of layers that these plans leave out, each prompt by its weight."""
    return float(np.average(plans.mean(1), weights=weights))


def calibrated(scores: Scores, weights: Weights, options: FirstOptions) -> list[list[float]]:
    """Return `FirstOptions.calibration`: pairs of a threshold and the share left out at it.

    Measured with the options' codebook, so that what it costs is made up for.

    Args:
        scores: ``[prompts, layers]``, reduced, of prompts that nothing was trained on.
        weights: ``[prompts]``, such as the tokens of their answers.
        options: of the method; its threshold plays no part.

    """
    found: dict[float, list[float]] = {}
    for threshold in _grid(scores, options.inner(scores.shape[1])):
        there = options.model_copy(update={"threshold": threshold})
        share = round(share_skipped(plans_of(scores, there), weights), 6)
        found.setdefault(share, []).append(threshold)
    # Of thresholds that leave out as much, the one farthest from leaving out more or less.
    return [[round((same[0] + same[-1]) / 2, 6), share] for share, same in found.items()]


def with_thresholds(
    options: FirstOptions, scores: Scores, weights: Weights, target: float
) -> FirstOptions:
    """Add a calibration to a method's options, and the threshold that leaves out ``target``.

    If the target is out of reach, as much as there is; if it is 0, the threshold stays.
    """
    complete = options.model_copy(update={"calibration": calibrated(scores, weights, options)})
    return at_target(complete, target) if target else complete


def at_target(options: FirstOptions, target: float) -> FirstOptions:
    """Set the threshold that leaves out ``target``, or as much as there is, by the calibration."""
    most = options.calibration[-1][1]
    asked = options.model_copy(update={"target_skip": min(target, most)})
    return options.model_copy(update={"threshold": asked.resolved_threshold()})


def _grid(scores: NDArray[np.float64], inner: range) -> list[float]:
    """Return ascending thresholds, as many layers' scores between any two, from 0 to 1."""
    own = np.unique(scores[:, inner.start : inner.stop])
    # Between neighbouring scores, so that rounding another way changes nothing.
    middles = np.concatenate([[0.0], (own[1:] + own[:-1]) / 2, [1.0]])
    chosen = np.quantile(middles, np.linspace(0, 1, _POINTS), method="nearest")
    return [*map(float, np.unique(chosen.round(6)))]
