# SPDX-License-Identifier: Apache-2.0
"""What a scan comes to: one sentence, what speaks against it, and the figures of a profile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_adaskip.classifiers.plan import DecoderShape, SkipPlan
from vllm_adaskip.lab.evaluation.doubt import Doubt, of_time
from vllm_adaskip.lab.evaluation.quality import Interval, interval
from vllm_adaskip.lab.evaluation.results import PlanReading, StepTime
from vllm_adaskip.lab.evaluation.summary import Speed, speed_of
from vllm_adaskip.lab.scan.timing import STOCK, Shape, variant_of

#: Fewer held-out tokens recommend nothing.
FEW = 200


@dataclass(frozen=True)
class Confirmed:
    """A plan that the engine answered under, and that was timed beside compiled stock vLLM.

    Attributes:
        agreement: share of the answers' tokens that are the whole model's, and its interval.
        surprise: nats a token by which the whole model prefers its own.
        speeds: by batch size, time against compiled stock vLLM.
        kept: share of the decoder's compute.

    """

    plan: SkipPlan
    agreement: Interval
    surprise: float
    speeds: Mapping[int, Speed]
    kept: float

    @property
    def batch(self) -> int:
        """The batch size that decides."""
        return max(self.speeds)

    @property
    def speed(self) -> Speed:
        """The time that decides."""
        return self.speeds[self.batch]


@dataclass(frozen=True)
class Verdict:
    """The outcome.

    Attributes:
        sentence: what to do.
        chosen: what to leave out; None: nothing.
        doubts: what speaks against the figures of what was confirmed.

    """

    sentence: str
    chosen: Confirmed | None
    doubts: Sequence[Doubt]


def share_of(values: Sequence[float]) -> Interval:
    """Return the mean of answers' shares with its 95% interval."""
    return interval(np.asarray(values, dtype=np.float64)).clipped(0.0, 1.0)


def speeds_of(times: Sequence[StepTime], variant: str) -> dict[int, Speed]:
    """Return by batch size the time of a variant against stock vLLM in the same rounds."""
    stock = {one.batch: one.seconds for one in times if one.variant == STOCK}
    return {
        one.batch: speed_of([a / b for a, b in zip(one.seconds, stock[one.batch], strict=True)])
        for one in times
        if one.variant == variant
    }


def confirmed(
    readings: Sequence[PlanReading], times: Sequence[StepTime], shape: DecoderShape
) -> list[Confirmed]:
    """Put together what was answered and what was timed, dense first."""
    found = []
    for one in readings:
        plan = SkipPlan.parse(one.skip, shape.num_layers)
        speeds = speeds_of(times, variant_of(plan))
        surprise = float(np.mean(one.surprise))
        found.append(Confirmed(plan, share_of(one.agreement), surprise, speeds, plan.share(shape)))
    return found


def verdict(
    dense: Confirmed, plans: Sequence[Confirmed], bound: float, step: Shape, tokens: int
) -> Verdict:
    """Say what to leave out: of what keeps enough the fastest, if it surely is faster than stock.

    Args:
        dense: ours with nothing left out, read again: the noise.
        plans: the confirmed ones.
        bound: share of tokens that must stay the whole model's.
        step: what a step takes at the batch size that decides.
        tokens: of the held-out answers.

    """
    doubts = [doubt for one in plans for doubt in against(one, dense)]
    few = [*_of_tokens(tokens)]
    good = [one for one in plans if one.agreement.mean >= bound]
    if not good:
        return Verdict(_falls(plans, bound), None, [*few, *doubts])
    best = min(good, key=lambda one: one.speed.median)
    if best.speed.sure[1] >= 1:
        return Verdict(_slow(best, bound, step), None, [*few, *doubts])
    reasons = [*few, *(one for one in against(best, dense) if one.kind in ("faster", "better"))]
    if reasons:
        sentence = f"Do not skip layers of this model for now: what '{best.plan}' wins is in doubt"
        return Verdict(f"{sentence}. {reasons[0].text.removesuffix('.')}", None, [*few, *doubts])
    return Verdict(_good(best), best, [*doubts, *_of_interval(best, bound)])


def _good(one: Confirmed) -> str:
    left_out = str(one.plan).removeprefix("skip ")
    return (
        f"Leave out {left_out}: {1 - one.speed.median:.0%} less time at batch {one.batch} than "
        f"compiled stock vLLM (measured, {1 - one.speed.sure[1]:.0%} to "
        f"{1 - one.speed.sure[0]:.0%}), {stays(one)} of answer tokens stay the whole model's"
    )


def _falls(plans: Sequence[Confirmed], bound: float) -> str:
    closest = max(plans, key=lambda one: one.agreement.mean)
    left_out = str(closest.plan).removeprefix("skip ")
    return (
        f"Do not skip layers of this model here: quality falls at once. Without {left_out} alone, "
        f"{stays(closest)} of answer tokens stay the whole model's, and {bound:.0%} are wanted; a "
        f"step takes {closest.speed.median:.2f} of compiled stock vLLM's time at batch "
        f"{closest.batch}"
    )


def _slow(best: Confirmed, bound: float, step: Shape) -> str:
    left_out = str(best.plan).removeprefix("skip ")
    price = step.dense / step.stock - 1
    return (
        f"Do not skip layers of this model here: no plan that keeps {bound:.0%} of answer tokens "
        f"is surely faster than compiled stock vLLM. The fastest, without {left_out}, takes "
        f"{best.speed.median:.2f} of its time at batch {best.batch} ({best.speed.sure[0]:.2f} to "
        f"{best.speed.sure[1]:.2f}): ours dense costs {price:+.1%}, and a layer that is left "
        f"out saves {(step.attention + step.mlp) / step.stock:.1%}"
    )


def stays(one: Confirmed) -> str:
    """Return the share of tokens that stay, with its interval, in words."""
    share = one.agreement
    return f"{share.mean:.1%} ({share.low:.1%} to {share.high:.1%})"


def against(one: Confirmed, dense: Confirmed) -> Iterator[Doubt]:
    """Return what speaks against a plan's figures."""
    for batch, speed in one.speeds.items():
        yield from of_time(f"'{one.plan}' at batch {batch}", one.kept, speed, "compiled stock vLLM")
    if one.agreement.low > dense.agreement.high:
        yield Doubt(
            "better",
            f"'{one.plan}' agrees with the whole model more than the whole model with itself: "
            "look at the answers, which may be short or say one thing again and again.",
        )


def _of_tokens(tokens: int) -> Iterator[Doubt]:
    if tokens < FEW:
        yield Doubt(
            "nothing",
            f"The held-out answers have {tokens} tokens after their first, and at least {FEW} are "
            "needed: ask more questions (--data, --limit), or such as want longer answers.",
        )


def _of_interval(one: Confirmed, bound: float) -> Iterator[Doubt]:
    if one.agreement.low < bound:
        yield Doubt(
            "interval",
            f"'{one.plan}' may keep as little as {one.agreement.low:.1%} of the tokens: ask more "
            f"questions (--limit) to be sure of {bound:.0%}.",
        )


def against_baselines(curve: Mapping[str, Sequence[tuple[float, float]]]) -> Iterator[Doubt]:
    """Say where another family of plans is as good, at the same time, as the order that was found.

    ``curve``: by family, time against stock vLLM and agreement of each plan.
    """
    ours = curve.get("greedy", ())
    for family, points in curve.items():
        if family == "greedy":
            continue
        better = [
            time for time, share in points if share > max([s for t, s in ours if t <= time] or [1])
        ]
        if better:
            yield Doubt(
                "baseline",
                f"Plans of the family '{family}' keep more than the order that was found, at "
                f"{min(better):.2f} of the time: that order is not the best there.",
            )


def figures(
    one: Confirmed, manifest_facts: Mapping[str, str], model: str
) -> dict[str, float | int | str]:
    """Return the metrics of the profile."""
    found: dict[str, float | int | str] = {
        "model": model,
        "left_out": str(one.plan).removeprefix("skip "),
        "compute_kept": round(one.kept, 4),
        "agreement": round(one.agreement.mean, 4),
        "agreement_low": round(one.agreement.low, 4),
        "agreement_high": round(one.agreement.high, 4),
        "surprise": round(one.surprise, 4),
    }
    for batch, speed in sorted(one.speeds.items()):
        found[f"time_ratio_batch_{batch}"] = round(speed.median, 4)
        found[f"time_ratio_batch_{batch}_low"] = round(speed.sure[0], 4)
        found[f"time_ratio_batch_{batch}_high"] = round(speed.sure[1], 4)
    return {**found, **manifest_facts}
