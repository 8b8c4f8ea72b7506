# SPDX-License-Identifier: Apache-2.0
"""How much plans leave out as load grows: levels, each with a budget, entered and left apart. Pure.

At level 0 sequences whose request leaves it open run dense. What a sequence gets when it is first
scheduled it keeps, so only "the same answer whatever the load" is given up.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_adaskip import old_names

#: In a request's arguments, of the level that holds for it; the scheduler alone writes it.
LEVEL = "_adaskip_level"


class Load(NamedTuple):
    """What an engine has to do.

    Attributes:
        waiting: requests that wait to be scheduled.
        running: requests that are scheduled.
        kv_use: share of the K/V blocks that are taken.

    """

    waiting: int
    running: int
    kv_use: float


class Thresholds(BaseModel):
    """Some or all of `Load`.

    Attributes:
        waiting: requests that wait to be scheduled.
        running: requests that are scheduled.
        kv_use: share of the K/V blocks that are taken.

    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    waiting: int | None = Field(default=None, ge=0)
    running: int | None = Field(default=None, ge=0)
    kv_use: float | None = Field(default=None, ge=0, le=1)

    @property
    def named(self) -> dict[str, float]:
        """What is named."""
        return {name: value for name, value in self if value is not None}

    @model_validator(mode="after")
    def _is_one(self) -> Thresholds:
        if not self.named:
            raise ValueError("names nothing; allowed: waiting, running, kv_use")
        return self


class Level(BaseModel):
    """A level of load.

    Attributes:
        max_compute: largest share of decoder compute that plans keep there.
        enter: the level begins when one of these is reached.
        leave: it ends when each is at this or below.

    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    max_compute: float = Field(gt=0, le=1)
    enter: Thresholds
    leave: Thresholds

    @model_validator(mode="before")
    @classmethod
    def _by_new_names(cls, given: Any) -> Any:
        return old_names.renamed(given, old_names.LEVEL) if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _apart(self) -> Level:
        enter, leave = self.enter.named, self.leave.named
        if enter.keys() != leave.keys():
            raise ValueError("'enter' and 'leave' must name the same")
        for name, value in leave.items():
            if value >= enter[name]:
                raise ValueError(f"'leave' must be less than 'enter': {name}")
        return self


class BusyPlans(BaseModel):
    """The server's option ``busy``.

    Attributes:
        levels: levels of load, the lowest first; each keeps less than the one before.
        min_seconds: seconds for which a level stays at least.

    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    levels: list[Level] = Field(min_length=1, max_length=8)
    min_seconds: float = Field(default=5.0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _by_new_names(cls, given: Any) -> Any:
        return old_names.renamed(given, old_names.BUSY) if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _descend(self) -> BusyPlans:
        kept = [each.max_compute for each in self.levels]
        if any(later >= earlier for earlier, later in pairwise(kept)):
            raise ValueError(f"max_compute must fall from level to level, and is {kept}")
        return self


class Levels:
    """Which level holds.

    Attributes:
        now: it; 0: none.

    """

    def __init__(self, options: BusyPlans) -> None:
        self._options = options
        self._on = [False] * len(options.levels)
        self._changed = float("-inf")
        self.now = 0

    def saw(self, load: Load, at: float) -> bool:
        """Take the load at a time in seconds; return whether `now` has changed.

        It is the highest level that is on: entered, and not left since.
        """
        seen = load._asdict()
        for place, level in enumerate(self._options.levels):
            if self._on[place]:
                self._on[place] = any(seen[key] > at for key, at in level.leave.named.items())
            else:
                self._on[place] = any(seen[key] >= at for key, at in level.enter.named.items())
        wanted = max((place for place, is_on in enumerate(self._on, 1) if is_on), default=0)
        if wanted == self.now or at - self._changed < self._options.min_seconds:
            return False
        self.now, self._changed = wanted, at
        return True
