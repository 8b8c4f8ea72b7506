# SPDX-License-Identifier: Apache-2.0
"""Fits classifier ``threshold``: the least top_prob and the least gap at each layer.

FlexEE's equations 2 and 3: of each feature by itself the least value from which on cases agree
often enough; a case that stops passes both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vllm_adaskip.classifiers.adainfer.fit.base import (
    ExitFit,
    Ints,
    above_others_cut,
    checked_cuts,
    least_cut,
)
from vllm_adaskip.classifiers.adainfer.fit.cases import Bools, Cases
from vllm_adaskip.classifiers.adainfer.rules import Threshold


class ThresholdFit(ExitFit):
    """Thresholds on both features, from all cases but those judged."""

    def __init__(self, cases: Cases, folds: Ints, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self._cases, self._folds = cases, folds

    def exits(self, level: float) -> Bools:
        """Ask for both features."""
        features, agrees = self._cases.features, self._cases.agrees
        return np.stack(
            [
                above_others_cut(features[:, layer, 0], agrees[:, layer], self._folds, level)
                & above_others_cut(features[:, layer, 1], agrees[:, layer], self._folds, level)
                for layer in self.layers
            ],
            axis=1,
        )

    def only(self, layers: Sequence[int]) -> ThresholdFit:
        """Return the same at fewer layers."""
        return ThresholdFit(self._cases, self._folds, layers)

    def rule(self, level: float) -> Threshold:
        """Return the cuts of all cases."""
        top_prob, gap = (
            checked_cuts(
                self.layers,
                [
                    least_cut(
                        self._cases.features[:, layer, feature],
                        self._cases.agrees[:, layer],
                        level,
                    )
                    for layer in self.layers
                ],
                level,
            )
            for feature in (0, 1)
        )
        return Threshold(self.layers, top_prob, gap)

    def save(self, folder: Path) -> None:
        """Write nothing: the rule is all there is."""
