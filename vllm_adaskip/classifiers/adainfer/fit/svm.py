# SPDX-License-Identifier: Apache-2.0
"""Fits classifier ``svm``: a support vector machine per layer, with its cut.

The paper gives no kernel, no C and no scaling. Here features are standardised, the rarer label
weighs more, and each training set also has the two predictions that need no learning: both features
0 is not settled, both 1 is. A layer at which all cases agree would have one class only, and would
say yes to anything it has not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vllm_adaskip.classifiers.adainfer.fit.base import (
    FOLDS,
    ExitFit,
    Ints,
    above_others_cut,
    checked_cuts,
    least_cut,
)
from vllm_adaskip.classifiers.adainfer.fit.cases import Bools, Cases, Floats
from vllm_adaskip.classifiers.adainfer.rules import Svm

#: What was trained, beside the profile; nothing that serves reads it.
ARTEFACT = "training.skops"

Kernel = Literal["rbf", "linear"]

#: Of standardised features. A fifth of scikit-learn's ``scale``: narrower kernels are surest in
#: the middle of what they have seen, and not where both features are 1.
_GAMMA = 0.1
#: Cases that one machine is trained on at most: support vectors grow with them, what they say
#: about two features does not.
_MOST = 2000


class SvmFit(ExitFit):
    """Machines trained on all folds but one, so that each case is judged by one it is new to."""

    def __init__(
        self, cases: Cases, folds: Ints, layers: Sequence[int], kernel: Kernel, seed: int
    ) -> None:
        self.layers = tuple(layers)
        self._cases, self._folds, self._kernel, self._seed = cases, folds, kernel, seed
        self._scores = {layer: self._held_out(layer) for layer in self.layers}
        self._machines: dict[int, Any] = {}

    def exits(self, level: float) -> Bools:
        """Compare held-out scores with the cuts of other folds."""
        agrees = self._cases.agrees
        return np.stack(
            [
                above_others_cut(self._scores[layer], agrees[:, layer], self._folds, level)
                for layer in self.layers
            ],
            axis=1,
        )

    def only(self, layers: Sequence[int]) -> SvmFit:
        """Return the same at fewer layers."""
        fewer = copy(self)  # which shares the scores
        fewer.layers = tuple(layers)
        return fewer

    def rule(self, level: float) -> Svm:
        """Train on all cases; the cut becomes part of the bias."""
        agrees = self._cases.agrees
        cuts = [least_cut(self._scores[one], agrees[:, one], level) for one in self.layers]
        everybody = np.ones(len(self._cases), dtype=np.bool_)
        self._machines = {layer: self._trained(layer, everybody) for layer in self.layers}
        return exported(self._machines, checked_cuts(self.layers, cuts, level))

    def save(self, folder: Path) -> None:
        """Write scalers and machines, before their cuts."""
        machines = {str(layer): machine for layer, machine in self._machines.items()}
        write_artefact(machines, folder)

    def _held_out(self, layer: int) -> Floats:
        scores = np.empty(len(self._cases))
        for fold in range(FOLDS):
            own = self._folds == fold
            machine = self._trained(layer, ~own)
            scores[own] = machine.decision_function(self._cases.features[own, layer])
        return scores

    def _trained(self, layer: int, on: Bools) -> Any:
        draw = np.random.default_rng(self._seed)
        chosen = draw.permutation(np.flatnonzero(on))[:_MOST]
        features = self._cases.features[chosen, layer]
        return train(features, self._cases.agrees[chosen, layer], self._kernel)


def train(features: Floats, agrees: Bools, kernel: Kernel) -> Any:
    """Return scikit-learn's scaler and machine, trained on ``[cases, 2]`` and ``[cases]``."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    machine = SVC(kernel=kernel, gamma=_GAMMA, class_weight="balanced")
    known = np.array([[0.0, 0.0], [1.0, 1.0]])
    pipeline = make_pipeline(StandardScaler(), machine)
    return pipeline.fit(np.concatenate([features, known]), np.append(agrees, [False, True]))


def exported(machines: dict[int, Any], cuts: Floats) -> Svm:
    """Return the rule that stops where a layer's machine decides for its cut or more."""
    scalers, svcs = zip(*((one[0], one[1]) for one in machines.values()), strict=True)
    is_linear = svcs[0].kernel == "linear"
    # A linear machine is its one weight vector, whatever the number of its support vectors.
    pairs = [(one.coef_, np.ones((1, 1))) if is_linear else (one.support_vectors_, one.dual_coef_)
             for one in svcs]  # fmt: skip
    return Svm(
        tuple(machines),
        mean=np.stack([one.mean_ for one in scalers]),
        scale=np.stack([one.scale_ for one in scalers]),
        bias=np.array([one.intercept_[0] for one in svcs]) - cuts,
        vectors=tuple(np.ascontiguousarray(vectors) for vectors, _ in pairs),
        dual=tuple(np.ascontiguousarray(dual[0]) for _, dual in pairs),
        gamma=None if is_linear else np.full(len(svcs), _GAMMA),
    )


def write_artefact(trained: object, folder: Path) -> None:
    """Write objects of scikit-learn into a profile's folder."""
    from skops.io import dump

    dump(trained, folder / ARTEFACT)
