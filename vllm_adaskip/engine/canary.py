# SPDX-License-Identifier: Apache-2.0
"""What the whole model says of finished answers under plans, and whether plans stay on. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, Final, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

#: In a request's arguments, what its scheduler knows of the canary; it alone writes it.
CANARY: Final = "_adaskip_canary"
#: In the arguments of requests that the scheduler makes itself.
READS: Final = "_adaskip_reads"
#: Answers that wait to be read; of more the oldest are dropped.
MOST_WAITING: Final = 64


class CanaryOptions(BaseModel):
    """The server's option ``canary``.

    Attributes:
        share: of finished answers under plans, that which is read again at full depth.
        max_surprise: plans are switched off above it; nats a token; absent: never.
        min_agreement: plans are switched off below it; a share of tokens; absent: never.
        answers: read answers that are judged together, and of which figures are shown.

    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    share: float = Field(gt=0, le=1)
    max_surprise: float | None = Field(default=None, ge=0)
    min_agreement: float | None = Field(default=None, ge=0, le=1)
    answers: int = Field(default=50, ge=10, le=10_000)

    @model_validator(mode="after")
    def _can_be_broken(self) -> CanaryOptions:
        if self.min_agreement == 0:
            raise ValueError("min_agreement 0 is never broken; leave it out to set no bound")
        return self


class Reading(NamedTuple):
    """What the whole model says of one answer.

    Attributes:
        agreement: share of its tokens that are the whole model's first choice.
        surprise: nats a token by which the whole model's first choice is likelier, in the mean.

    """

    agreement: float
    surprise: float

    @classmethod
    def of(cls, gaps: Sequence[float]) -> Reading:
        """Return it of how much likelier than each token the first choice is; at least one."""
        return cls(sum(gap <= 0 for gap in gaps) / len(gaps), sum(gaps) / len(gaps))


class Mean(NamedTuple):
    """A mean over answers, and its interval: two standard errors to either side."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Mean:
        """Return it of at least one value."""
        mean = fmean(values)
        error = 2 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
        return cls(mean, mean - error, mean + error)

    def shown(self) -> list[float]:
        """Return mean, low and high; of one answer alone the mean."""
        return [round(each, 4) for each in self if math.isfinite(each)]


class Canary:
    """Judges answers in groups that share no answer, so that many looks make no false alarm likely.

    A bound is broken where a group's whole interval lies beyond it.

    Attributes:
        is_off: whether plans are switched off; until it begins anew.
        answers: that were read.
        dropped: answers that were not, as too many waited.

    """

    def __init__(self, options: CanaryOptions) -> None:
        self._options = options
        self._last: deque[Reading] = deque(maxlen=options.answers)
        self.answers = self.dropped = 0
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget what was read, but for the counts; plans are on again."""
        self._last.clear()
        self._begun = self.answers
        self.is_off = False
        self._figures: dict[str, list[float]] = {}

    def read(self, reading: Reading) -> bool:
        """Take a reading; return whether it switches plans off."""
        self._last.append(reading)
        self.answers += 1
        agreement, surprise = (Mean.of([*part]) for part in zip(*self._last, strict=True))
        self._figures = {"agreement": agreement.shown(), "surprise": surprise.shown()}
        if self.is_off or (self.answers - self._begun) % self._options.answers:
            return False
        self.is_off = self._is_broken(agreement, surprise)
        return self.is_off

    def _is_broken(self, agreement: Mean, surprise: Mean) -> bool:
        options = self._options
        too_rare = options.min_agreement is not None and agreement.high < options.min_agreement
        return too_rare or (
            options.max_surprise is not None and surprise.low > options.max_surprise
        )

    def report(self) -> dict[str, Any]:
        """Return whether plans are off, the counts, and the means of the last answers if any."""
        return {
            "off": self.is_off,
            "answers": self.answers,
            "dropped": self.dropped,
            **self._figures,
        }
