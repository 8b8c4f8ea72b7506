# SPDX-License-Identifier: Apache-2.0
"""What skipping could save if one knew the best plan for each sequence, arXiv 2410.20022.

Every item takes one of the candidate plans, such that the summed score is largest at an average
depth: a multiple-choice knapsack. The choice looks at the references, so this is a ceiling
which no method has to reach. It also gains from luck: an item that a plan happens to
answer right is counted as skill, the more so the more candidates there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vllm_adaskip.lab.data.metrics import PERPLEXITY
from vllm_adaskip.lab.evaluation.results import Answer, Manifest, OraclePoint, Setting

Floats = NDArray[np.float64]
#: Budgets and scores may miss by this much, which is rounding.
_ROUNDING = 1e-9


class OracleError(ValueError):
    """Answers that no oracle can choose from; the message says what is missing."""


@dataclass(frozen=True)
class Point:
    """An allotment's averages over the items: decoder layers per token, and score."""

    layers: float
    score: float


class Oracle:
    """Allots a candidate to each item.

    Args:
        layers: ``[items, candidates]`` decoder layers that a generated token goes through.
        scores: ``[items, candidates]``, larger is better.

    """

    def __init__(self, layers: ArrayLike, scores: ArrayLike) -> None:
        costs, values = (np.asarray(each, dtype=np.float64) for each in (layers, scores))
        if costs.ndim != 2 or costs.shape != values.shape or not costs.size:
            raise ValueError(f"layers {costs.shape} and scores {values.shape}: want two tables")
        #: For each item its candidates that no other beats, by layers: ``[candidates, 2]``.
        self._useful = [_undominated(*each) for each in zip(costs, values, strict=True)]
        self._layers, self._scores = np.concatenate(self._useful).T

    def frontier(self) -> list[Point]:
        """Return the vertices of the concave hull of all allotments, cheapest first.

        Each vertex is the best allotment at its number of layers. Between two of them the
        straight line is above the best one by less than one item's gain.
        """
        hulls = [_hull(useful) for useful in self._useful]
        pieces = np.concatenate([np.diff(hull, axis=0) for hull in hulls])
        # Steepest first over all items: each item's own pieces stay in order, and what was
        # taken up to any point is the best allotment at its cost.
        slopes = pieces[:, 1] / pieces[:, 0]
        order = np.argsort(-slopes, kind="stable")
        first = np.sum([hull[0] for hull in hulls], axis=0, keepdims=True)
        path = np.concatenate([first, first + np.cumsum(pieces[order], axis=0)])
        turns = ~np.isclose(np.diff(slopes[order]), 0)
        vertices = path[np.concatenate([[True], turns, [True]])[: len(path)]]
        return [Point(*map(float, vertex)) for vertex in vertices / len(hulls)]

    def best_score(self, layers: float) -> Point:
        """Return the best allotment that averages at most so many layers (`OracleError`: none)."""
        return self._solve(self._scores, -self._layers, -layers)

    def fewest_layers(self, score: float) -> Point:
        """Return the cheapest allotment that averages at least this score (`OracleError`: none)."""
        return self._solve(-self._layers, self._scores, score)

    def _solve(self, gain: Floats, bounded: Floats, least: float) -> Point:
        """Maximise the summed ``gain`` where ``bounded`` averages at least ``least``."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        items = np.repeat(np.arange(len(self._useful)), [len(each) for each in self._useful])
        ones, columns = np.ones(len(items)), np.arange(len(items))
        found = milp(
            -gain,
            integrality=ones,
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(csr_array((ones, (items, columns))), 1, 1),
                LinearConstraint(bounded, (least - _ROUNDING) * len(self._useful), np.inf),
            ],
            options={"mip_rel_gap": 1e-7},
        )
        if found.x is None:
            raise OracleError(f"no allotment averages {abs(least):g}: {found.message}")
        chosen = found.x > 0.5
        totals = self._layers[chosen].sum(), self._scores[chosen].sum()
        return Point(*(float(total / len(self._useful)) for total in totals))


def _undominated(layers: Floats, scores: Floats) -> Floats:
    """Keep candidates that score more than every cheaper one: ``[kept, 2]``."""
    kept: list[tuple[float, float]] = []
    for index in np.lexsort((-scores, layers)):
        if not kept or scores[index] > kept[-1][1]:
            kept.append((float(layers[index]), float(scores[index])))
    return np.array(kept)


def _hull(points: Floats) -> Floats:
    """Keep the vertices of the upper concave hull of points that rise in both coordinates."""
    kept: list[Floats] = []
    for point in points:
        while len(kept) > 1 and _not_above(kept[-2], kept[-1], point):
            kept.pop()
        kept.append(point)
    return np.array(kept)


def _not_above(left: Floats, middle: Floats, right: Floats) -> bool:
    """Whether the middle point is on or under the straight line of the others."""
    (run, rise), (whole_run, whole_rise) = middle - left, right - left
    return bool(rise * whole_run <= whole_rise * run + _ROUNDING)


@dataclass(frozen=True)
class Candidates:
    """All answers of a run in one metric, item by item and setting by setting.

    Attributes:
        settings: the candidates, dense first.
        layers: ``[items, settings]``; ``scores`` likewise.

    """

    metric: str
    settings: list[Setting]
    layers: Floats
    scores: Floats

    def oracle(self, group: str) -> Oracle:
        """Return the oracle over dense and the exits, or over all that are no exits."""
        chosen = [group in groups(setting) for setting in self.settings]
        return Oracle(self.layers[:, chosen], self.scores[:, chosen])

    def average(self, setting: Setting) -> Point:
        """Return a setting's own averages: every item takes it."""
        column = self.settings.index(setting)
        return Point(float(self.layers[:, column].mean()), float(self.scores[:, column].mean()))


def groups(setting: Setting) -> tuple[str, ...]:
    """Name the groups of candidates that a setting is in."""
    return {"dense": ("skip", "exit"), "exit": ("exit",)}.get(setting.family, ("skip",))


def gather(manifest: Manifest, answers: Iterable[Answer], metric: str | None = None) -> Candidates:
    """Line up a run's answers; of an item answered twice the later counts.

    Raises:
        OracleError: no dense setting, items that some setting has not answered, no metric of
            which more is better, or several of them and none chosen.

    """
    answers = list(answers)
    metric = _metric(sorted({answer.metric for answer in answers}), metric)
    found: dict[str, dict[str, Answer]] = {setting.name: {} for setting in manifest.settings}
    for answer in answers:
        if answer.setting not in found:
            raise OracleError(f"setting {answer.setting!r} has answers but is in no manifest")
        if answer.metric == metric:
            found[answer.setting][answer.item] = answer
    settings = sorted(manifest.settings, key=lambda setting: setting.family != "dense")
    if not settings or settings[0].family != "dense":
        raise OracleError("no setting of family dense; run `adaskip eval` with one")
    items = list(dict.fromkeys(item for each in found.values() for item in each))
    for name, each in found.items():
        if missing := [item for item in items if item not in each]:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise OracleError(
                f"setting {name!r} has not answered {', '.join(missing[:5])}{more}, of "
                f"{len(items)} items; run the same `adaskip eval` again, which goes on"
            )
    table = [[found[setting.name][item] for setting in settings] for item in items]
    layers = [[manifest.num_layers * one.kept for one in row] for row in table]
    scores = [[one.score for one in row] for row in table]
    return Candidates(metric, settings, np.round(layers, 9), np.array(scores))


def points(candidates: Candidates) -> list[OraclePoint]:
    """Return the frontiers of both groups, to store."""
    return [
        OraclePoint(
            candidates=group, metric=candidates.metric, layers=point.layers, score=point.score
        )
        for group in ("skip", "exit")
        for point in candidates.oracle(group).frontier()
    ]


def _metric(present: list[str], chosen: str | None) -> str:
    """Choose the one metric whose scores are summed."""
    usable = [metric for metric in present if metric != PERPLEXITY]
    if not usable:
        raise OracleError(
            f"no answers whose scores can be summed; metrics of this run: {present or 'none'}"
        )
    if chosen is None and len(usable) > 1:
        raise OracleError(f"scores of {', '.join(usable)} cannot be summed; choose with --metric")
    if chosen is not None and chosen not in usable:
        raise OracleError(f"--metric {chosen!r:.80}; allowed: {', '.join(usable)}")
    return chosen or usable[0]
