# SPDX-License-Identifier: Apache-2.0
"""What is drafted, and how much of it pays. Pure: arrays and seconds, no vLLM.

Tokens are drafted by the model itself with more left out (LayerSkip, arXiv 2404.16710; SWIFT,
arXiv 2410.06916), and then verified by it, all at once. Verification decides every token, so
nothing in here can change an answer; it can only make it faster or slower.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_adaskip.classifiers.hub import located
from vllm_adaskip.classifiers.plan import PlanError, SkipPlan
from vllm_adaskip.engine.draft_weights import DraftProfile
from vllm_adaskip.engine.guard import Floats, at_rows
from vllm_adaskip.engine.prompt_plan import named_plan

if TYPE_CHECKING:  # which imports torch
    from vllm_adaskip.engine.step import Ints

#: Tokens of the forwards that are timed; between them times are interpolated.
SIZES = (1, 2, 4, 8, 16, 32, 64)
#: Bins of confidence, and drafts that each is taken to have seen at first, accepted as it says.
BINS, PRIOR = 10, 4.0
#: How much one draft makes older ones count less.
FORGET = 1 / 1024
#: Rounds in which drafting is tried before it is judged, and rounds of which the judgement is.
TRIES, MEMORY = 4, 64
#: How far what is seen moves what is known of times, and of drafts that lose.
RATE = 1 / 16
#: Share of the time that may go into trying again what did not pay.
PROBING = 0.01


class DraftOptions(BaseModel):
    """The server's option ``draft``.

    Attributes:
        exit: first layers that draft; the others are left out.
        skip: what drafts leave out, in the form of ``adaskip_skip``.
        profile: folder or hub id of layers trained to draft; one of ``exit``, ``skip`` and
            ``profile`` is needed.
        tokens: most tokens that are drafted before they are verified.
        vocabulary: first token ids that drafts may have, of which alone the LM head is computed;
            all by default. Tokenizers that merge pairs give frequent tokens small ids.
        adapt: draft fewer tokens, or none, where it does not pay; ``false``: always ``tokens``.

    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    exit: int | None = None
    skip: list[int | str] | None = None
    profile: str | None = None
    tokens: int = Field(default=4, ge=1, le=16)
    vocabulary: int | None = Field(default=None, ge=2)
    adapt: bool = True

    @model_validator(mode="after")
    def _one_way(self) -> DraftOptions:
        given = [each for each in (self.exit, self.skip, self.profile) if each is not None]
        if len(given) != 1:
            raise ValueError("needs one of 'exit', 'skip' and 'profile'")
        if self.profile is not None and self.vocabulary is not None:
            raise ValueError("'vocabulary' does not go with 'profile', which has its own")
        return self


@dataclass(frozen=True, slots=True)
class Draft:
    """How an engine drafts.

    Attributes:
        plan: what drafts leave out, beside what the request's own plan does.
        tokens: at most, before they are verified.
        vocabulary: first token ids that drafts may have; None: all, or the profile's.
        profile: folder of the layers that draft; None: the model's own.
        adapt: whether fewer are drafted where it does not pay.

    """

    plan: SkipPlan
    tokens: int
    vocabulary: int | None = None
    profile: Path | None = None
    adapt: bool = True

    @classmethod
    def of_options(cls, options: Mapping[str, Any], num_layers: int) -> Draft:
        """Read the option ``draft``, as `DraftOptions`.

        Raises:
            PlanError: it names layers that this model has not, or leaves out none.
            ProfileError: a profile that cannot be used.

        """
        read = DraftOptions.model_validate(dict(options))
        profile = None if read.profile is None else located(read.profile)
        exit = read.exit if profile is None else DraftProfile.load(profile).exit
        try:
            plan = named_plan(exit, read.skip, num_layers)
        except PlanError as error:
            raise PlanError(f"draft: {error}") from None
        if plan.is_dense:
            raise PlanError("draft: a draft that leaves out nothing is as slow as the model")
        return cls(plan, read.tokens, read.vocabulary, profile, read.adapt)


class Terms(NamedTuple):
    """What drafting costs in the step that comes, counted in accepted tokens.

    Attributes:
        a_pass: of one pass over all rows that draft.
        a_token: of verifying one more token.
        rate: share of drafts that are accepted.

    """

    a_pass: float
    a_token: float
    rate: float


class Calibration:
    """How often drafts of some confidence are accepted, as seen so far.

    Confidence is the probability that the draft gives to its token.
    """

    def __init__(self) -> None:
        self._seen = np.full(BINS, PRIOR)
        self._accepted = PRIOR * (np.arange(BINS) + 0.5) / BINS

    def of(self, confidence: Floats) -> Floats:
        """Return, of ``[drafts]`` confidences, how probable acceptance is."""
        bins = self._bins(confidence)
        found: Floats = self._accepted[bins] / self._seen[bins]
        return found

    @property
    def rate(self) -> float:
        """Share of all drafts that is accepted."""
        return float(self._accepted.sum() / self._seen.sum())

    def learn(self, confidence: Sequence[float], accepted: int) -> None:
        """Take a row's drafts that were verified, in order, of which the first were accepted.

        Of drafts behind the first that was not accepted, nothing is known.
        """
        bins = self._bins(np.array(confidence[: accepted + 1]))
        kept = (1 - FORGET) ** len(bins)
        self._seen *= kept
        self._accepted *= kept
        np.add.at(self._seen, bins, 1.0)
        np.add.at(self._accepted, bins[:accepted], 1.0)

    def _bins(self, confidence: Floats) -> Ints:
        found: Ints = np.clip(confidence * BINS, 0, BINS - 1).astype(np.int64)
        return found


class Times:
    """What steps take: measured at start-up, corrected while serving.

    Attributes:
        rest: seconds of a step outside the forward: scheduler, sampler, the way between processes.
        judging: the same of a step that verifies drafts, which vLLM samples in another way.

    """

    def __init__(self, sizes: Sequence[int], table: Floats) -> None:
        """Take ``[2, sizes]`` seconds of a whole forward, and of a draft's pass."""
        self._sizes, self._forward, self._pass = np.array(sizes), *table
        self._factors = {"forward": 1.0, "pass": 1.0}
        self.rest = self.judging = 0.0
        self._has_judged = False

    def forward(self, tokens: int) -> float:
        """Return the seconds of a forward of the whole model, or of what requests' plans keep."""
        return self._factors["forward"] * self._at(self._forward, tokens)

    def a_pass(self, rows: int) -> float:
        """Return the seconds of one draft of each of so many rows."""
        return self._factors["pass"] * self._at(self._pass, rows)

    def saw_forward(self, tokens: int, seconds: float, rest: float, *, verifies: bool) -> None:
        """Learn from a step in which all rows decode."""
        self._learn("forward", seconds / self._at(self._forward, tokens))
        if not verifies:
            self.rest = _sooner(self.rest, rest)
        elif self._has_judged:
            self.judging = _sooner(self.judging, rest)
        self._has_judged |= verifies  # the first time takes long, and no other is like it

    def saw_pass(self, rows: int, seconds: float) -> None:
        """Learn from one pass, with what comes before and after it."""
        self._learn("pass", seconds / self._at(self._pass, rows))

    def _learn(self, kind: str, seen: float) -> None:
        old = self._factors[kind]
        self._factors[kind] = old + RATE * (float(np.clip(seen, old / 2, old * 2)) - old)

    def _at(self, seconds: Floats, tokens: int) -> float:
        return float(at_rows(self._sizes, seconds, tokens))


def _sooner(known: float, seen: float) -> float:
    """Return what a rest takes: engines wait for requests too, so short ones count at once."""
    return min(seen, known * 1.02) if known else seen


@dataclass
class Gain:
    """What drafting gains at about so many rows, as a share of a step without.

    A round gains tokens or none, so the mean of a few is a matter of luck. So drafting goes on
    until it has *surely* lost: the mean lies below 0 by more than its own standard error.

    Attributes:
        mean: tokens more a step, less time more a step; below 0 it makes steps slower.
        variance: of a round's.
        rounds: that were seen.
        cost: time that a round with drafts takes more, as a share of a step without.
        waited: steps without drafts since the last round with them.

    """

    mean: float = 0.0
    variance: float = 0.0
    rounds: int = 0
    cost: float = 0.0
    waited: int = 0

    @property
    def is_judged(self) -> bool:
        """Whether enough was seen."""
        return self.rounds >= TRIES

    @property
    def loses(self) -> bool:
        """Whether it makes steps slower, for all that is known."""
        error = math.sqrt(self.variance / max(1, min(self.rounds, MEMORY)))
        return self.is_judged and self.mean + error <= 0

    def is_due(self, lost: Sequence[Gain]) -> bool:
        """Return whether to draft now: it pays, or is to be tried.

        ``lost``: gains at fewer rows, if none was to be had there; it is tried seldom then, as
        more rows wait less for weights.
        """
        if not self.loses and (self.is_judged or self.mean > 0 or not lost):
            return True
        cost = self.cost if self.rounds else max(one.cost for one in lost)
        return self.waited * PROBING >= cost

    def saw(self, gained: float, cost: float) -> None:
        """Learn from a round with drafts; rounds that are far apart make older ones count less."""
        self.rounds += 1
        self.waited = 0
        rate = max(RATE if self.loses else 1 / MEMORY, 1 / self.rounds)
        more = gained - cost - self.mean
        self.mean += rate * more
        self.variance = (1 - rate) * (self.variance + rate * more**2)
        self.cost += rate * (cost - self.cost)


class Pace:
    """How many tokens are drafted, by what was accepted and what it took.

    Attributes:
        times: None until they are measured.
        calibration: see there.
        gains: by the number of rows, in powers of two.

    """

    def __init__(self, times: Callable[..., Times], of_rank_0: Callable[[Floats], Floats]) -> None:
        """Take what measures times, and what returns rank 0's values on all ranks."""
        self._measured, self._of_rank_0 = times, of_rank_0
        self.times: Times | None = None
        self.calibration = Calibration()
        self.gains: defaultdict[int, Gain] = defaultdict(Gain)

    def measure(self, *inputs: Any) -> None:
        """Measure times, once; on the inputs of a warm-up, or without any."""
        if self.times is None:
            self.times = self._measured(*inputs)

    def terms(self, rows: int, drafting: int) -> Terms | None:
        """Return what drafting costs now with so many of the batch's rows; None: it does not pay.

        All ranks get the same.
        """
        about = _about(rows)
        fewer = [one for at, one in self.gains.items() if at < about and one.is_judged]
        lost = fewer if all(one.loses for one in fewer) else []
        gain = self.gains[about]
        terms = self._terms(rows, drafting) if gain.is_due(lost) else None
        found = self._of_rank_0(np.array([0.0, 0, 0, 0] if terms is None else [1.0, *terms]))
        if not found[0]:
            gain.waited += 1
            return None
        return Terms(*found[1:].tolist())

    def _terms(self, rows: int, drafting: int) -> Terms | None:
        """Return the same; None where it would not pay if all drafts were accepted."""
        self.measure()
        assert self.times is not None
        times = self.times
        token = (times.rest + times.forward(rows)) / rows
        more = times.forward(rows + drafting) - times.forward(rows)
        a_pass, a_token = times.a_pass(drafting) / token, more / drafting / token
        terms = Terms(a_pass, a_token, self.calibration.rate)
        return terms if terms.a_pass + terms.a_token * drafting < drafting else None

    def saw(self, rows: int, verified: int, accepted: int, seconds: float) -> None:
        """Learn from a round with drafts.

        Args:
            rows: of the step that verified them.
            verified: drafts that it verified; fewer than were drafted, or none.
            accepted: those among them that were.
            seconds: that drafting took.

        """
        assert self.times is not None
        times = self.times
        plain = times.rest + times.forward(rows)
        more = times.forward(rows + verified) - times.forward(rows)
        if verified and times.rest:
            more += max(0.0, times.judging - times.rest)
        self.gains[_about(rows)].saw(accepted / rows, (seconds + more) / plain)

    def report(self) -> dict[str, Any]:
        """Return the gain by rows, ``{"up to 4": 0.31}``, and the seconds it rests on."""
        found: dict[str, Any] = {
            "gain": {f"up to {1 << about}": round(g.mean, 3) for about, g in self.gains.items()}
        }
        if self.times is not None:
            found["milliseconds"] = {
                "forward": round(1e3 * self.times.forward(1), 3),
                "pass": round(1e3 * self.times.a_pass(1), 3),
                "rest": round(1e3 * self.times.rest, 3),
            }
        return found


def _about(rows: int) -> int:
    return (rows - 1).bit_length()


def goes_on(reach: Floats, terms: Terms) -> bool:
    """Return whether one more pass pays for rows that are accepted so far with ``[rows]`` reach."""
    return float((reach * terms.rate - terms.a_token).clip(min=0).sum()) > terms.a_pass


class Drafted:
    """What was drafted, of the whole engine.

    Attributes:
        passes: over a draft's layers.
        drafted: tokens.
        verified: ``[tokens]`` drafts that were verified, by their place.
        accepted: those among them that were.
        off: steps before which drafting was not worth while.

    """

    def __init__(self, tokens: int) -> None:
        self.passes = self.drafted = self.off = 0
        self.verified, self.accepted = np.zeros((2, tokens), dtype=np.int64)

    def saw(self, verified: int, accepted: int) -> None:
        """Count a row's drafts."""
        self.verified[:verified] += 1
        self.accepted[:accepted] += 1

    def report(self) -> dict[str, Any]:
        """Return the counters."""
        return {
            "passes": self.passes,
            "drafted": self.drafted,
            "verified": self.verified.tolist(),
            "accepted": self.accepted.tolist(),
            "off": self.off,
        }
