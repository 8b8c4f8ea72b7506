# SPDX-License-Identifier: Apache-2.0
"""Runs settings on items through the real engine: answers, scores, and times beside dense."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from vllm_adaskip.classifiers import DecoderShape
from vllm_adaskip.config import AdaSkipConfig, ConfigError
from vllm_adaskip.engine.compiled import MOST
from vllm_adaskip.lab.data.harness import HarnessItem
from vllm_adaskip.lab.data.items import Item
from vllm_adaskip.lab.evaluation.engine import CHUNK, Engine
from vllm_adaskip.lab.evaluation.harness_engine import HarnessEngine
from vllm_adaskip.lab.evaluation.quality import is_narrow
from vllm_adaskip.lab.evaluation.reading import heard, read
from vllm_adaskip.lab.evaluation.results import Answer, Results, Setting, Timing, Unread
from vllm_adaskip.lab.evaluation.settings import is_adapted

Report = Callable[[str, int], None]


@dataclass(frozen=True)
class Timed:
    """How settings are timed.

    Attributes:
        batch: sequences in the batch.
        tokens: that each sequence generates.
        most: at most so many rounds of a setting; more than were asked for only while its times
            vary too much (`is_narrow`).

    """

    batch: int
    tokens: int
    most: int = 0

    def wants_more(self, ratios: Sequence[float]) -> bool:
        """Return whether a setting needs one more round after those that were asked for."""
        return 0 < len(ratios) < self.most and not is_narrow(ratios)


@dataclass(frozen=True)
class Work:
    """What is still to be done of a run.

    Attributes:
        answers: setting -> items that it has not answered.
        rounds: setting -> rounds that have not been timed; dense is timed beside the others.

    """

    answers: dict[str, list[Item]]
    rounds: dict[str, list[int]]

    @classmethod
    def left(
        cls,
        results: Results,
        settings: Sequence[Setting],
        items: Sequence[Item],
        rounds: int,
        timed: Timed,
    ) -> Work:
        """Compare with what the results hold already."""
        answered = _answered(results)
        times = _ratios(results, timed.batch)
        names = [one.name for one in settings]
        return cls(
            {name: [one for one in items if (name, one.item) not in answered] for name in names},
            {name: _rounds_left(times.get(name, {}), rounds, timed) for name in names[1:]},
        )

    @property
    def steps(self) -> int:
        """How many answers and rounds there are to do, for a progress bar."""
        return sum(map(len, self.answers.values())) + sum(map(len, self.rounds.values()))

    def of(self, setting: Setting) -> int:
        """Return the same for one setting."""
        return len(self.answers[setting.name]) + len(self.rounds.get(setting.name, ()))


def check(settings: Sequence[Setting], shape: DecoderShape) -> None:
    """Refuse, before an engine starts, a setting that it would refuse (`ValueError`)."""
    for one in settings:
        if one.skip is None:
            options = {**one.options, "method": one.method, "max_compute": one.budget}
            try:
                AdaSkipConfig.parse(options).facts(shape)
            except ConfigError as error:
                raise ValueError(f"{one.name}: {error}") from None


def evaluate(
    results: Results,
    model: str,
    settings: Sequence[Setting],
    items: Sequence[Item],
    work: Work,
    *,
    max_tokens: int,
    timed: Timed,
    report: Report,
    **engine: Any,
) -> None:
    """Answer every item under every setting, and time each setting beside dense.

    Results are appended as they come. ``settings`` begin with the dense one. ``report(what,
    steps done)`` is called as it goes; `Work.steps` is their number.
    """
    start = HarnessEngine if isinstance(items[0], HarnessItem) else Engine
    prompts = [items[index % len(items)].prompt for index in range(timed.batch)]
    for (method, _), group in groupby(settings, key=lambda one: (one.method, str(one.options))):
        members = [one for one in group if work.of(one)]
        if not members:
            continue
        report(f"starting vLLM, method {method}", 0)
        more = {**_known(members, work), **_shortens(members, results)}
        runs_on = start(model, method, {**members[0].options, **more}, **engine)
        adapted = is_adapted(members[0])
        for setting in members:
            for part in heard(runs_on, setting, work.answers[setting.name], max_tokens):
                results.append(part if adapted else read(runs_on, part))
                report(f"answers under {setting.name}", len(part))
        for round_, setting in _in_turn(members, work):
            results.append([_time(runs_on, settings[0], setting, round_, prompts, timed)])
            report(f"timing {setting.name}", 1)
        while again := _unsure(results, members, work, timed):
            for setting, round_ in again:
                results.append([_time(runs_on, settings[0], setting, round_, prompts, timed)])
                report(f"timing {setting.name} again: its times vary", 0)
        runs_on.close()
    if left := _unread(results):
        report("starting vLLM without an adapter, to read what it wrote", 0)
        judge = start(model, "none", {}, **engine)
        for first in range(0, len(left), CHUNK):
            results.append(read(judge, left[first : first + CHUNK]))
        judge.close()


def _answered(results: Results) -> set[tuple[str, str]]:
    """Return setting and item of each answer that is there, read or not."""
    unread = (one.answer for one in results.read(Unread))
    return {(one.setting, one.item) for one in (*results.read(Answer), *unread)}


def _unread(results: Results) -> list[Unread]:
    """Return the answers of adapters that the model has not read yet."""
    done = {(one.setting, one.item) for one in results.read(Answer)}
    made = results.read(Unread)
    return [one for one in made if (one.answer.setting, one.answer.item) not in done]


def _known(members: Sequence[Setting], work: Work) -> dict[str, Any]:
    """Return the option by which a few plans that are timed run as a profile's would."""
    plans = [one.skip for one in members if one.skip and work.rounds.get(one.name)]
    return {"known_plans": plans} if 0 < len(plans) <= MOST else {}


def _shortens(members: Sequence[Setting], results: Results) -> dict[str, Any]:
    """Return the option by which an engine is ready for prompt plans, but runs prompts whole."""
    if not any(one.prompt for one in members):
        return {}
    return {"prompt": {"exit": results.manifest().num_layers}}


def _ratios(results: Results, batch: int) -> dict[str, dict[int, float]]:
    """Return times against dense by setting and round, at one batch size."""
    found: dict[str, dict[int, float]] = {}
    for one in results.read(Timing):
        if one.batch == batch:
            found.setdefault(one.setting, {})[one.round] = one.seconds / one.dense_seconds
    return found


def _rounds_left(done: Mapping[int, float], rounds: int, timed: Timed) -> list[int]:
    """Return the rounds that were asked for and are missing, else the next one if it is needed."""
    missing = [one for one in range(rounds) if one not in done]
    if missing or not rounds or not timed.wants_more([*done.values()]):
        return missing
    return [max(done) + 1]


def _unsure(
    results: Results, members: Sequence[Setting], work: Work, timed: Timed
) -> list[tuple[Setting, int]]:
    """Return settings that were timed now and need one more round, with its number."""
    times = _ratios(results, timed.batch)
    return [
        (one, max(times[one.name]) + 1)
        for one in members
        if work.rounds.get(one.name) and timed.wants_more([*times[one.name].values()])
    ]


def _in_turn(members: Sequence[Setting], work: Work) -> Iterator[tuple[int, Setting]]:
    """Return rounds and settings so that the machine's drift falls on all settings alike."""
    rounds = sorted({one for setting in members for one in work.rounds.get(setting.name, ())})
    for round_ in rounds:
        order = [one for one in members if round_ in work.rounds.get(one.name, ())]
        random.Random(round_).shuffle(order)
        yield from ((round_, setting) for setting in order)


def _time(
    engine: Engine,
    dense: Setting,
    setting: Setting,
    round_: int,
    prompts: Sequence[str],
    timed: Timed,
) -> Timing:
    """Time a setting and dense, one right after the other, each first in every other round."""
    pair = [dense, setting] if round_ % 2 else [setting, dense]
    if not engine.is_warm:
        engine.seconds(dense, prompts, timed.tokens)
        engine.is_warm = True
    seconds = {one.name: engine.seconds(one, prompts, timed.tokens) for one in pair}
    return Timing(
        setting=setting.name,
        round=round_,
        batch=timed.batch,
        tokens=timed.tokens,
        seconds=seconds[setting.name],
        dense_seconds=seconds[dense.name],
    )
