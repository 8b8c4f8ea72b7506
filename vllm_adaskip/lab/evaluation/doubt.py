# SPDX-License-Identifier: Apache-2.0
"""What speaks against the numbers of a run: reasons to recommend nothing, in plain words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, Literal

from vllm_adaskip.engine.prompt_plan import named_plan
from vllm_adaskip.lab.data.metrics import PERPLEXITY
from vllm_adaskip.lab.evaluation.quality import LEAST_ROUNDS, Quality, resampled
from vllm_adaskip.lab.evaluation.summary import SettingSummary, Speed, Summary

#: A mean score up to this is near nothing.
NOTHING = 0.05
#: Share of dense's time by which a time may be below the compute kept, which counts parameters.
_SLACK = 0.02

Kind = Literal[
    "nothing",
    "chance",
    "better",
    "faster",
    "rounds",
    "spread",
    "unfinished",
    "many",
    "interval",
    "baseline",
]


@dataclass(frozen=True)
class Doubt:
    """One reason, as a sentence for the page."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class Doubts:
    """All reasons: those against the whole run, and those against a setting, by its name."""

    run: list[Doubt] = field(default_factory=list)
    settings: dict[str, list[Doubt]] = field(default_factory=dict)

    @property
    def all(self) -> list[Doubt]:
        """All of them, those against the run first."""
        return [*self.run, *(one for each in self.settings.values() for one in each)]

    def of(self, setting: str) -> list[Doubt]:
        """Return what speaks against a setting."""
        return [*self.run, *self.settings.get(setting, [])]


def doubts(summary: Summary, max_loss: float = 0.0) -> Doubts:
    """Collect all that speaks against recommending a setting of this run.

    Args:
        summary: of the run.
        max_loss: the loss of mean score that is allowed.

    """
    own = {one.name: list(_of_setting(one, summary)) for one in summary.others}
    return Doubts([*_of_run(summary, max_loss), *_better(summary)], own)


def among_many(one: SettingSummary, looked_at: int, max_loss: float) -> Iterator[Doubt]:
    """Ask whether a loss is within bounds also if it is the luckiest of several (Bonferroni)."""
    if looked_at < 2 or one.score is None:
        return
    bound = one.score.upper(1 - 0.05 / looked_at)
    if bound > max_loss:
        yield Doubt(
            "many",
            f"{one.name} is one of {looked_at} settings that were looked at. Allowing for that, it "
            f"may lose {_points(bound)}: ask more questions, or compare fewer settings.",
        )


def _of_run(summary: Summary, max_loss: float) -> Iterator[Doubt]:
    dense = summary.dense
    if summary.batch is None and summary.others:
        yield Doubt("rounds", "Nothing was timed, and less compute is not always less time.")
    if summary.asked is not None and dense.items < summary.asked:
        yield Doubt(
            "unfinished",
            f"Dense has answered {dense.items} of {summary.asked} items: let the run finish.",
        )
    for (task, metric), quality in dense.columns.items():
        if metric == PERPLEXITY:
            continue
        scores = f"Dense scores {_points(quality.mean)} of 100 on {task} ({metric})"
        if quality.mean <= NOTHING:
            yield Doubt(
                "nothing",
                f"{scores}, next to nothing, so there is nothing to lose. Either the metric does "
                "not see right answers, or the model cannot do the task: see the answers in the "
                "report.",
            )
        elif _lower(quality) <= (luck := summary.chance.get(task, 0.0)):
            yield Doubt(
                "chance",
                f"{scores}, and always answering with the most frequent label scores "
                f"{_points(luck)}. A task at chance shows no loss: leave it out, or mend it.",
            )
    if dense.score and NOTHING < dense.score.mean <= max_loss:
        yield Doubt(
            "nothing",
            f"Dense scores {_points(dense.score.mean)} of 100, and a loss of {_points(max_loss)} "
            "is allowed: a model that knows nothing would pass.",
        )


def _better(summary: Summary) -> Iterator[Doubt]:
    """Find settings that beat dense beyond what the best of so many comparisons may by luck."""
    compared = [
        (one, where, quality)
        for one in summary.others
        for where, quality in _compared(one)
        if quality.loss.high < 0
    ]
    cells = sum(len(list(_compared(one))) for one in summary.others)
    for one, where, quality in compared:
        if resampled(quality.losses, 1 - 0.025 / cells) < 0:
            yield Doubt(
                "better",
                f"{one.name} scores {_points(-quality.loss.mean)} above dense{where}. Less of a "
                "model seldom knows more: check the metric, by the answers in the report.",
            )


def _compared(one: SettingSummary) -> Iterator[tuple[str, Quality]]:
    """Return the overall score, and that of each task where there are several."""
    if one.score:
        yield "", one.score
    scored = {task: each for (task, metric), each in one.columns.items() if metric != PERPLEXITY}
    if len(scored) > 1:
        yield from ((f" on {task}", each) for task, each in scored.items())


def _of_setting(one: SettingSummary, summary: Summary) -> Iterator[Doubt]:
    if not one.complete:
        yield Doubt("unfinished", f"{one.name} has not answered all that dense has.")
    if summary.batch is None:
        return
    if (speed := one.speeds.get(summary.batch)) is None:
        yield Doubt("rounds", f"{one.name} was not timed at batch {summary.batch}.")
        return
    if speed.rounds < summary.rounds:
        done = f"{speed.rounds} of {summary.rounds} rounds"
        yield Doubt("unfinished", f"{one.name} was timed in {done}: let the run finish.")
    prompts = _least_of_prompts(one.setting.prompt, summary.num_layers)
    yield from of_time(one.name, min(one.kept, prompts), speed)


def _least_of_prompts(prompt: Mapping[str, Any], num_layers: int) -> float:
    """Return the least share of compute that a prompt plan keeps, whatever sub-layers weigh."""
    if not prompt:
        return 1.0
    plan = named_plan(prompt.get("exit"), prompt.get("skip"), num_layers)
    return 1 - max(plan.attention.bit_count(), plan.mlp.bit_count()) / num_layers


def of_time(name: str, kept: float, speed: Speed, whose: str = "dense") -> Iterator[Doubt]:
    """Collect what speaks against a time.

    Args:
        name: of what was timed.
        kept: share of decoder compute that it keeps; of prompts or of answers, the smaller.
        speed: its time against somebody's.
        whose: that is.

    """
    if speed.rounds < LEAST_ROUNDS:
        yield Doubt(
            "rounds",
            f"{name} was timed in {speed.rounds} round{'s' * (speed.rounds > 1)}; at least "
            f"{LEAST_ROUNDS} are needed to see how much times vary (--rounds).",
        )
    elif speed.median < 1 and speed.width > 1 - speed.median:
        yield Doubt(
            "spread",
            f"{name} takes {speed.median:.2f} of {whose}'s time, and may take "
            f"{speed.sure[0]:.2f} to {speed.sure[1]:.2f}: that is wider than what it saves. Time "
            "more rounds on a quiet machine.",
        )
    if speed.sure[1] < kept - _SLACK:
        yield Doubt(
            "faster",
            f"{name} takes {speed.median:.2f} of {whose}'s time and keeps {kept:.2f} of the "
            "compute. Leaving out compute cannot save more time than that: something else slowed "
            f"{whose} down. Time again on a quiet machine.",
        )


def _lower(quality: Quality) -> float:
    """Return Wilson's one-sided lower 95% bound of a mean of scores in [0, 1]."""
    mean, n, z = quality.mean, quality.items, 1.645
    middle = mean + z * z / (2 * n)
    half = z * sqrt(max(mean * (1 - mean), 0) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n)


def _points(score: float) -> str:
    return f"{100 * score:.1f}"
