# SPDX-License-Identifier: Apache-2.0
"""How much worse than dense a setting's answers are, paired by item, with its uncertainty.

Scores and perplexity are never averaged together: a score's difference to dense is in points of
the score, a perplexity's is a factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, quantile_test

from vllm_adaskip.lab.data.metrics import PERPLEXITY
from vllm_adaskip.lab.evaluation.results import Answer, ResultsError

RESAMPLES = 9999
#: Fewer rounds of timing say nothing about how much they vary.
LEAST_ROUNDS = 3
#: Of times against dense, an interval that is narrow whatever is gained.
NARROW = 0.05
#: Beyond this a perplexity says no more than "broken".
_MAX_PERPLEXITY = 1e9

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% bootstrap interval; ``same``: all values were equal, see `interval`."""

    mean: float
    low: float
    high: float
    same: bool = False

    def clipped(self, low: float, high: float) -> Interval:
        """Keep the ends within what is possible."""
        return replace(self, low=max(low, self.low), high=min(high, self.high))


@dataclass(frozen=True)
class Quality:
    """One setting on some items: its mean, and how much worse than dense it is.

    Attributes:
        mean: mean score; of perplexity the geometric mean.
        loss: paired by item. Of scores dense minus this, so positive is worse; of perplexity
            the factor to dense, so above 1 is worse.
        items: how many items both have answered.
        losses: of each item, where they are differences of scores.

    """

    mean: float
    loss: Interval
    items: int
    perplexity: bool = False
    losses: tuple[float, ...] = field(default=(), repr=False)

    @property
    def worse(self) -> bool:
        """Significantly: the whole interval is on the worse side."""
        return self.loss.low > (1.0 if self.perplexity else 0.0)

    def upper(self, confidence: float) -> float:
        """Return the one-sided upper bound of a score's mean loss."""
        if self.loss.low == self.loss.high:  # known, not drawn
            return self.loss.mean
        return upper_bound(self.losses, confidence)


def interval(losses: Floats, span: float = 1.0) -> Interval:
    """Return the mean and its 95% percentile bootstrap interval.

    Where all values are equal the bootstrap would claim certainty. Then the interval is what is
    still possible at 95% if some items, none of which was drawn, differ by ``span`` (the rule of
    three: up to about 3 in n).
    """
    mean = float(losses.mean())
    if np.ptp(losses) == 0:
        missed = span * unseen(len(losses), 0.95)
        return Interval(mean, mean - missed, mean + missed, same=True)
    found = bootstrap(
        (losses,), np.mean, n_resamples=RESAMPLES, batch=1000, method="percentile", rng=0
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def upper_bound(values: Sequence[float], confidence: float) -> float:
    """Return the one-sided upper bound of the mean of losses in [-1, 1].

    By bootstrap; but where no loss was seen among n items resampling sees none either, and
    then the bound is the chance of a loss that n items would miss, ``1 - (1 - c) ** (1 / n)``.
    """
    losses = np.asarray(values, dtype=np.float64)
    least = unseen(len(losses), confidence)
    return max(resampled(losses, confidence), least) if (losses > 0).any() else least


def resampled(values: Sequence[float] | Floats, confidence: float) -> float:
    """Return the one-sided upper bound of the mean by bootstrap alone."""
    values = np.asarray(values, dtype=np.float64)
    if np.ptp(values) == 0:
        return float(values[0])
    found = bootstrap(
        (values,),
        np.mean,
        confidence_level=confidence,
        alternative="less",
        n_resamples=RESAMPLES,
        batch=1000,
        method="percentile",
        rng=0,
    )
    return float(found.confidence_interval.high)


def unseen(items: int, confidence: float) -> float:
    """Return the chance of a loss that so many items would all miss."""
    return 1.0 - float((1.0 - confidence) ** (1.0 / items))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% interval of the median by order statistics; of few values all of them."""
    found = quantile_test(values, p=0.5).confidence_interval(0.95)
    low, high = float(found.low), float(found.high)
    return (min(values), max(values)) if math.isnan(low) or math.isnan(high) else (low, high)


def is_narrow(ratios: Sequence[float]) -> bool:
    """Return whether times against dense say enough: their interval is no wider than the gain."""
    if len(ratios) < LEAST_ROUNDS:
        return False
    low, high = median_interval(ratios)
    gain = abs(1 - float(np.median(ratios)))
    return high - low <= max(gain, NARROW)


def loss_to(reference: Sequence[Answer], answers: Sequence[Answer]) -> Quality | None:
    """Compare answers with a reference's answers to the same items, all of one kind of metric."""
    if not answers:
        return None
    scores, whole = (np.array([one.score for one in each]) for each in (answers, reference))
    if bad := next((one for one in (*answers, *reference) if not _usable(one)), None):
        raise ResultsError(f"{bad.item} under {bad.setting!r} has a {bad.metric} of {bad.score}")
    if answers[0].metric == PERPLEXITY:
        logs, whole_logs = (
            np.log(np.clip(each, 1e-9, _MAX_PERPLEXITY)) for each in (scores, whole)
        )
        found = interval(logs - whole_logs, span=0.0)
        factor = Interval(*np.exp([found.mean, found.low, found.high]).tolist())
        return Quality(float(np.exp(logs.mean())), factor, len(answers), perplexity=True)
    # The same plan on the same item is the same answer: that is known, not drawn.
    known = all(_ran_alike(*pair) for pair in zip(answers, reference, strict=True))
    loss = interval(whole - scores, span=0.0 if known else 1.0)
    if min(scores.min(), whole.min()) >= 0 and max(scores.max(), whole.max()) <= 1:
        loss = loss.clipped(float(whole.mean()) - 1, float(whole.mean()))
    return Quality(float(scores.mean()), loss, len(answers), losses=tuple(whole - scores))


def _ran_alike(one: Answer, other: Answer) -> bool:
    """Return whether both followed one plan; tokens that each left out something did not."""
    return one.skip == other.skip and not any((*(one.left_out or ()), *(other.left_out or ())))


def _usable(answer: Answer) -> bool:
    """Return whether a score can be used; a broken model's perplexity may be infinite."""
    return not np.isnan(answer.score) and (
        answer.metric == PERPLEXITY or bool(np.isfinite(answer.score))
    )
