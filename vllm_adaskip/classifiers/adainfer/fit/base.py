# SPDX-License-Identifier: Apache-2.0
"""What fits of AdaInfer's classifiers share: folds, and how sure is sure enough.

A classifier that separates as well as it can stops too often: at a decision of 0 a plain SVM
agreed with the whole model in about 95 of 100 cases. So what it says is taken as a score, and the
cut is put where cases that it was not trained on agree as often as asked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_adaskip.classifiers.adainfer.fit.cases import Bools, Cases, Floats
from vllm_adaskip.classifiers.adainfer.rules import ExitRule

#: Folds of the cross-validation.
FOLDS = 5
#: Fewer cases than this above a cut say nothing about how often such cases agree.
LEAST = 30

Ints = NDArray[np.int64]


class ExitFit(ABC):
    """Classifiers of one kind at some layers.

    Attributes:
        layers: these, ascending.

    """

    layers: tuple[int, ...]

    @abstractmethod
    def exits(self, level: float) -> Bools:
        """Return ``[cases, layers]`` whether each would stop there, by what was not fitted on it.

        Args:
            level: agreement for which cuts are chosen.

        """

    @abstractmethod
    def only(self, layers: Sequence[int]) -> ExitFit:
        """Return the same at fewer layers."""

    @abstractmethod
    def rule(self, level: float) -> ExitRule:
        """Fit on all cases; give what a server decides by (`ValueError`: a layer without cut)."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what training made beside the profile, for people to look at; no server does."""


def folds_of(cases: Cases, seed: int) -> Ints:
    """Return ``[cases]`` the fold of each: all of an example in one, tasks spread evenly."""
    samples, first, place = np.unique(cases.samples, return_index=True, return_inverse=True)
    draw = np.random.default_rng(seed).random(len(samples))
    fold = np.empty(len(samples), dtype=np.int64)
    fold[np.lexsort((draw, cases.tasks[first]))] = np.arange(len(samples)) % FOLDS
    return fold[place]


def least_cut(scores: Floats, agrees: Bools, level: float) -> float:
    """Return the least score from which on cases agree at this level; inf if there is none.

    FlexEE's equation 2. Halfway to the next lower score, so that rounding another way changes
    nothing; not below what was seen.
    """
    order = np.argsort(-scores, kind="stable")
    own = scores[order]
    share = np.cumsum(agrees[order]) / np.arange(1, len(own) + 1)
    ends = np.append(own[1:] < own[:-1], True)  # equal scores stop together
    enough = np.flatnonzero(ends & (share >= level) & (np.arange(len(own)) >= LEAST - 1))
    if not len(enough):
        return np.inf
    last = enough[-1]
    return float(own[last] if last == len(own) - 1 else (own[last] + own[last + 1]) / 2)


def above_others_cut(scores: Floats, agrees: Bools, folds: Ints, level: float) -> Bools:
    """Return ``[cases]`` whether each is above the cut of the other folds; False without a cut."""
    above = np.zeros(len(scores), dtype=np.bool_)
    if least_cut(scores, agrees, level) < np.inf:
        for fold in range(FOLDS):
            own = folds == fold
            above[own] = scores[own] >= least_cut(scores[~own], agrees[~own], level)
    return above


def checked_cuts(layers: Sequence[int], cuts: Sequence[float], level: float) -> Floats:
    """Refuse layers without a cut."""
    for layer, cut in zip(layers, cuts, strict=True):
        if cut == np.inf:
            raise ValueError(
                f"check layer {layer}: no {LEAST} examples are settled there with an agreement "
                f"of {level:g}; allowed: a deeper layer, a lower agreement, or more examples"
            )
    return np.array(cuts)
