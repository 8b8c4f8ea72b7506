# SPDX-License-Identifier: Apache-2.0
"""Fits classifier ``crf``: a linear chain over the check layers, by CRFsuite.

An observation is a layer's two features and a 1, under names of its own, so that each layer has its
own weights; transitions are shared, which is how CRFsuite has them. A server decides on its way up
by P(this layer's label | features so far), not by the whole chain.

One cut serves all layers. Adding it to the weight of label 1 and taking it off again in the
transitions from label 1 moves each layer's decision and leaves the messages between them as they
were; for a cut per layer the shared transitions have no place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from vllm_adaskip.classifiers.adainfer.fit.base import FOLDS, LEAST, ExitFit, Ints
from vllm_adaskip.classifiers.adainfer.fit.cases import Bools, Cases, Floats
from vllm_adaskip.classifiers.adainfer.rules import Crf

FILE = "training.crfsuite"
FEATURES = ("top_prob", "gap", "bias")
#: Strength of CRFsuite's L2 regularisation; its own default, 1, holds weights of features within
#: [0, 1] too small to be sure of anything.
_C2 = 0.01
#: Cuts that are tried.
_CUTS = 400


class CrfFit(ExitFit):
    """Chains trained on all folds but one, so that each case is judged by one it is new to."""

    def __init__(self, cases: Cases, folds: Ints, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self._cases, self._folds = cases, folds
        self._scores = np.empty((len(cases), len(self.layers)))
        with TemporaryDirectory() as folder:
            for fold in range(FOLDS):
                own = folds == fold
                crf = train(cases.of(~own), self.layers, Path(folder) / FILE)
                self._scores[own] = log_odds(crf, cases.features[own])
        agrees = cases.agrees[:, list(self.layers)]
        others = [folds != fold for fold in range(FOLDS)]
        self._sure = [_Sure.of(self._scores[one], agrees[one]) for one in others]

    def exits(self, level: float) -> Bools:
        """Compare held-out scores with the cut of other folds."""
        exits = np.empty(self._scores.shape, dtype=np.bool_)
        for fold, sure in enumerate(self._sure):
            own = self._folds == fold
            exits[own] = self._scores[own] >= sure.cut(level)
        return exits

    def only(self, layers: Sequence[int]) -> CrfFit:
        """Train shorter chains: what comes first matters."""
        return CrfFit(self._cases, self._folds, layers)

    def rule(self, level: float) -> Crf:
        """Train on all cases, with their cut."""
        agrees = self._cases.agrees[:, list(self.layers)]
        cut = _Sure.of(self._scores, agrees).cut(level)
        if cut == np.inf:
            raise ValueError(
                f"check layers {list(self.layers)}: no {LEAST} examples are settled there with an "
                f"agreement of {level:g}; allowed: other layers, a lower agreement, more examples"
            )
        with TemporaryDirectory() as folder:
            crf = train(self._cases, self.layers, path := Path(folder) / FILE)
            self._trained = path.read_bytes()
        return shifted(crf, cut)

    def save(self, folder: Path) -> None:
        """Write CRFsuite's model, before its cut."""
        (folder / FILE).write_bytes(self._trained)


@dataclass(frozen=True)
class _Sure:
    """How often cases that stop, where they first would, agree at ascending cuts.

    Attributes:
        cuts: ``[cuts]``.
        agreement: ``[cuts]``; negative where too few stop to tell.

    """

    cuts: Floats
    agreement: Floats

    @classmethod
    def of(cls, scores: Floats, agrees: Bools) -> _Sure:
        """Measure ``[cases, layers]``."""
        cuts = np.unique(np.quantile(scores, np.linspace(0, 1, _CUTS), method="nearest"))
        agreement = np.full(len(cuts), -1.0)
        for place, cut in enumerate(cuts):
            stops = (above := scores >= cut).any(1)
            if stops.sum() >= LEAST:
                first = agrees[np.arange(len(scores)), above.argmax(1)]
                agreement[place] = first[stops].mean()
        return cls(cuts, agreement)

    def cut(self, level: float) -> float:
        """Return the least cut with this agreement; inf if there is none."""
        enough = np.flatnonzero(self.agreement >= level)
        return float(self.cuts[enough[0]]) if len(enough) else np.inf


def train(cases: Cases, layers: Sequence[int], path: Path) -> Crf:
    """Train CRFsuite's model, written to a path, and give its weights."""
    import pycrfsuite

    trainer = pycrfsuite.Trainer(algorithm="lbfgs", verbose=False)
    trainer.set_params(
        {
            "c1": 0.0,
            "c2": _C2,
            "feature.possible_states": True,  # also of labels that a layer never has
            "feature.possible_transitions": True,
        }
    )
    for features, agrees in zip(cases.features, cases.agrees, strict=True):
        labels = ["1" if agrees[layer] else "0" for layer in layers]
        trainer.append(observations(features, layers), labels)
    trainer.train(str(path))
    return read(path, layers)


def observations(features: Floats, layers: Sequence[int]) -> list[dict[str, float]]:
    """Return what CRFsuite reads, from ``[num_layers, 2]``: an item for each of these layers."""
    return [
        {f"top_prob@{layer}": top_prob, f"gap@{layer}": gap, f"bias@{layer}": 1.0}
        for layer, (top_prob, gap) in ((one, features[one].tolist()) for one in layers)
    ]


def read(path: Path, layers: Sequence[int]) -> Crf:
    """Read CRFsuite's model; it tells its weights to six digits after the point."""
    import pycrfsuite

    tagger = pycrfsuite.Tagger()
    tagger.open(str(path))
    found = tagger.info()
    tagger.close()
    unary = [
        [[found.state_features.get((f"{name}@{layer}", label), 0.0) for name in FEATURES]
         for label in "01"]
        for layer in layers
    ]  # fmt: skip
    transition = [[found.transitions.get((one, other), 0.0) for other in "01"] for one in "01"]
    return Crf(tuple(layers), np.array(unary), np.array(transition))


def shifted(crf: Crf, cut: float) -> Crf:
    """Have it stop at log-odds of the cut instead of 0."""
    unary, transition = crf.unary.copy(), crf.transition.copy()
    unary[:, 1, 2] -= cut
    transition[1] += cut
    return Crf(crf.layers, unary, transition)


def log_odds(crf: Crf, features: Floats) -> Floats:
    """Return ``[cases, layers]`` log P(1) / P(0) given the features so far."""
    seen, found = np.zeros((len(features), 2)), []
    for layer in crf.layers:
        _, seen = crf.settled(layer, features[:, layer], seen)
        found.append(seen[:, 1] - seen[:, 0])
    return np.stack(found, axis=1)
