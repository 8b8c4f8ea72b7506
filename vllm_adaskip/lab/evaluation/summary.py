# SPDX-License-Identifier: Apache-2.0
"""Numbers from a run's records: what each setting keeps, costs and saves, item by item to dense."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_adaskip.classifiers.plan import PlanError, SkipPlan
from vllm_adaskip.lab.data.metrics import PERPLEXITY
from vllm_adaskip.lab.evaluation.quality import Floats, Quality, loss_to, median_interval
from vllm_adaskip.lab.evaluation.results import Answer, Manifest, ResultsError, Setting, Timing

#: What a column of the table of tasks is about: task and metric.
Column = tuple[str, str]


@dataclass(frozen=True)
class Speed:
    """Time against dense at one batch size: median and quartiles of the rounds' ratios.

    Attributes:
        sure: 95% interval of the median; all ratios where there are few.

    """

    median: float
    low: float
    high: float
    rounds: int
    sure: tuple[float, float]

    @property
    def width(self) -> float:
        """How much is unknown of the median."""
        return self.sure[1] - self.sure[0]


@dataclass(frozen=True)
class Reading:
    """What the whole model says of generated tokens, of all answers; see `Answer`."""

    agreement: float
    surprise: float


@dataclass(frozen=True)
class SettingSummary:
    """All about one setting; what was not measured is None or empty.

    Attributes:
        kept: share of decoder compute, weighted by generated tokens.
        score: over all items with a score; None where there are none.
        perplexity: over all items with a perplexity.
        columns: by task and metric.
        complete: dense has no scored item that this setting lacks.
        speeds: by batch size.
        plans: by task, share of sequences that leave out each sub-layer, as `SkipPlan.mask`; where
            each token decides for itself, mean share of a sequence's tokens.
        plan: the one plan of all sequences; None where they, or their tokens, differ.
        by_token: whether each token decides for itself.
        reading: of its answers; dense's own is the noise that any other may have.

    """

    setting: Setting
    kept: float
    score: Quality | None
    perplexity: Quality | None
    columns: dict[Column, Quality]
    complete: bool
    speeds: dict[int, Speed]
    plans: dict[str, Floats]
    plan: SkipPlan | None
    by_token: bool = False
    reading: Reading | None = None

    @property
    def items(self) -> int:
        """How many items were compared with dense, whatever their metric."""
        return sum(one.items for one in (self.score, self.perplexity) if one)

    @property
    def name(self) -> str:
        """The setting's name."""
        return self.setting.name


@dataclass(frozen=True)
class Summary:
    """A run in numbers; ``settings`` has dense first and then the manifest's order.

    Attributes:
        unanswered: settings without answers.
        chance: by task, the mean score of the best constant answer, where that is known.
        asked: how many items were asked; None: not known.
        rounds: how many rounds were to be timed.

    """

    num_layers: int
    dense: SettingSummary
    settings: list[SettingSummary]
    columns: list[Column]
    unanswered: list[str] = field(default_factory=list)
    chance: dict[str, float] = field(default_factory=dict)
    asked: int | None = None
    rounds: int = 0

    @property
    def others(self) -> list[SettingSummary]:
        """All but dense."""
        return self.settings[1:]

    @property
    def batch(self) -> int | None:
        """The largest batch that was timed: what servers run when time matters."""
        return max((batch for one in self.others for batch in one.speeds), default=None)


def summarise(manifest: Manifest, answers: Iterable[Answer], timings: Iterable[Timing]) -> Summary:
    """Work out all numbers of a run.

    Raises:
        ResultsError: no dense setting, no answers of it, a record of an unknown setting, a score
            that is no number, or a plan that does not fit the model.

    """
    own = {setting.name: _Own(setting) for setting in manifest.settings}
    records: list[Answer | Timing] = [*answers, *timings]
    for record in records:
        if record.setting not in own:
            raise ResultsError(f"a record names setting {record.setting!r}; not in manifest.json")
        own[record.setting].add(record)
    reference = next((one for one in own.values() if one.setting.family == "dense"), None)
    if reference is None or not reference.answers:
        raise ResultsError(
            "this run has no answers of a setting of family 'dense', and without them there is "
            f"nothing to compare with; settings: {', '.join(map(repr, own)) or 'none'}"
        )
    others = [one for one in own.values() if one is not reference]
    with_answers = [one for one in others if one.answers.keys() & reference.answers.keys()]
    settings = [one.summarise(reference, manifest.num_layers) for one in (reference, *with_answers)]
    return Summary(
        num_layers=manifest.num_layers,
        dense=settings[0],
        settings=settings,
        columns=list(settings[0].columns),
        unanswered=[one.setting.name for one in others if one not in with_answers],
        chance=manifest.chance,
        asked=manifest.asked,
        rounds=manifest.rounds,
    )


class _Own:
    """The records of one setting; of an item measured twice the later counts."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.answers: dict[tuple[str, str], Answer] = {}
        self.ratios: dict[int, dict[int, float]] = {}

    def add(self, record: Answer | Timing) -> None:
        if isinstance(record, Answer):
            self.answers[record.metric, record.item] = record
        elif record.seconds > 0 and record.dense_seconds > 0:
            ratio = record.seconds / record.dense_seconds
            self.ratios.setdefault(record.batch, {})[record.round] = ratio

    def summarise(self, dense: _Own, num_layers: int) -> SettingSummary:
        shared = [key for key in dense.answers if key in self.answers]
        answers = [self.answers[key] for key in shared]
        pairs = list(zip((dense.answers[key] for key in shared), answers, strict=True))
        masks = _masks(answers, num_layers)
        columns = dict.fromkeys((answer.task, answer.metric) for answer in answers)
        scored = {key for key in dense.answers if key[0] != PERPLEXITY}
        return SettingSummary(
            setting=self.setting,
            kept=_kept(answers),
            score=_quality(pair for pair in pairs if pair[0].metric != PERPLEXITY),
            perplexity=_quality(pair for pair in pairs if pair[0].metric == PERPLEXITY),
            columns={
                column: quality
                for column in columns
                if (quality := _quality(p for p in pairs if (p[0].task, p[0].metric) == column))
            },
            complete=scored <= self.answers.keys(),
            speeds={batch: speed_of(list(each.values())) for batch, each in self.ratios.items()},
            plans={
                task: np.mean([m for m, a in zip(masks, answers, strict=True) if a.task == task], 0)
                for task in dict.fromkeys(answer.task for answer in answers)
            },
            plan=_only_plan(answers, num_layers),
            by_token=any(answer.left_out is not None for answer in answers),
            reading=_reading(answers),
        )


def _quality(pairs: Iterable[tuple[Answer, Answer]]) -> Quality | None:
    found = list(pairs)
    return loss_to([pair[0] for pair in found], [pair[1] for pair in found])


def _kept(answers: Sequence[Answer]) -> float:
    kept = np.array([answer.kept for answer in answers])
    tokens = np.array([answer.tokens for answer in answers], dtype=np.float64)
    return float(np.average(kept, weights=tokens if tokens.sum() > 0 else None))


def _reading(answers: Sequence[Answer]) -> Reading | None:
    """Return means over tokens of the answers that were read."""
    read = [
        (one.tokens, one.agreement, one.surprise)
        for one in answers
        if one.tokens and one.agreement is not None and one.surprise is not None
    ]
    if not read:
        return None
    tokens, agreement, surprise = zip(*read, strict=True)
    return Reading(
        float(np.average(agreement, weights=tokens)), float(np.average(surprise, weights=tokens))
    )


def speed_of(ratios: Sequence[float]) -> Speed:
    """Sum up the ratios of rounds."""
    low, median, high = np.percentile(ratios, [25, 50, 75]).tolist()
    return Speed(median, low, high, len(ratios), median_interval(ratios))


def _masks(answers: Sequence[Answer], num_layers: int) -> list[Floats]:
    """Return ``[2 * num_layers]`` left out of each answer, each distinct plan read once."""
    seen: dict[tuple[int | str, ...], Floats] = {}
    for answer in answers:
        if (key := tuple(answer.skip)) not in seen:
            try:
                seen[key] = SkipPlan.parse(answer.skip, num_layers).mask().astype(np.float64)
            except PlanError as error:
                raise ResultsError(f"{answer.item} under {answer.setting!r}: {error}") from None
        if answer.left_out is not None and len(answer.left_out) != 2 * num_layers:
            raise ResultsError(
                f"{answer.item} under {answer.setting!r}: left_out of {len(answer.left_out)} "
                f"sub-layers; this model has {2 * num_layers}"
            )
    return [
        seen[tuple(answer.skip)] if answer.left_out is None else np.array(answer.left_out)
        for answer in answers
    ]


def _only_plan(answers: Sequence[Answer], num_layers: int) -> SkipPlan | None:
    if any(answer.left_out is not None for answer in answers):
        return None
    plans = {SkipPlan.parse(list(skip), num_layers) for skip in {tuple(a.skip) for a in answers}}
    return plans.pop() if len(plans) == 1 else None
