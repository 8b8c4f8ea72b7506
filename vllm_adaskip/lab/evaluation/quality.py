# SPDX-License-Identifier: Apache-2.0
"""How much worse than dense a setting's answers are, paired by item, with its uncertainty.

Scores and perplexity are never averaged together: a score's difference to dense is in points of
the score, a perplexity's is a factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from vllm_adaskip.lab.data.metrics import PERPLEXITY
from vllm_adaskip.lab.evaluation.results import Answer, ResultsError

RESAMPLES = 9999
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

    """

    mean: float
    loss: Interval
    items: int
    perplexity: bool = False

    @property
    def worse(self) -> bool:
        """Significantly: the whole interval is on the worse side."""
        return self.loss.low > (1.0 if self.perplexity else 0.0)


def interval(losses: Floats, span: float = 1.0) -> Interval:
    """Give the mean and its 95% percentile bootstrap interval.

    Where all values are equal the bootstrap would claim certainty. Then the interval is what is
    still possible at 95% if some items, none of which was drawn, differ by ``span`` (the rule of
    three: up to about 3 in n).
    """
    mean = float(losses.mean())
    if np.ptp(losses) == 0:
        unseen = span * (1 - 0.05 ** (1 / len(losses)))
        return Interval(mean, mean - unseen, mean + unseen, same=True)
    found = bootstrap(
        (losses,), np.mean, n_resamples=RESAMPLES, batch=1000, method="percentile", rng=0
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


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
    return Quality(float(scores.mean()), loss, len(answers))


def _ran_alike(one: Answer, other: Answer) -> bool:
    """Tell whether both followed one plan; tokens that each left out something did not."""
    return one.skip == other.skip and not any((*(one.left_out or ()), *(other.left_out or ())))


def _usable(answer: Answer) -> bool:
    """Tell whether a score can be reckoned with; a broken model's perplexity may be infinite."""
    return not np.isnan(answer.score) and (
        answer.metric == PERPLEXITY or bool(np.isfinite(answer.score))
    )
