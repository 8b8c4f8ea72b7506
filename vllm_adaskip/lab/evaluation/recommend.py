# SPDX-License-Identifier: Apache-2.0
"""What to switch on for the loss a user accepts, how to switch it on, and where skipping loses."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from vllm_adaskip.lab.evaluation.doubt import Doubt, Doubts, among_many, doubts
from vllm_adaskip.lab.evaluation.quality import Quality, loss_to
from vllm_adaskip.lab.evaluation.results import Answer, Manifest, Setting, prompt_arguments
from vllm_adaskip.lab.evaluation.summary import Column, SettingSummary, Summary

_DROP = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|points?)?", re.ASCII)


class MaxLossError(ValueError):
    """A loss that cannot be read; the message names it and what is allowed."""


def parse_max_loss(text: str) -> float:
    """Read ``1%``, ``1 point`` or ``0.01``: all three are 0.01 of the mean score.

    Raises:
        MaxLossError: another form, or a share outside [0, 1).

    """
    found = _DROP.fullmatch(text.strip())
    share = float(found[1]) / (100 if found[2] else 1) if found else math.nan
    if not 0 <= share < 1:
        raise MaxLossError(
            f"--max-loss: {text!r:.80} is not allowed; allowed: a percentage such as 1%, points "
            "of 100 such as '1 point', or a share in [0, 1) such as 0.01"
        )
    return share


@dataclass(frozen=True)
class Recommendation:
    """What the rule gives.

    Among the settings whose upper 95% bound of the mean loss is within ``max_loss``, the fastest
    by measured time at ``batch`` (by compute kept where nothing was timed) whose numbers nothing
    speaks against.

    Attributes:
        verdict: ``on``: switch ``setting`` on. ``doubt``: ``setting`` would be the fastest, but
            something speaks against its numbers, and against those of all others. ``slow``:
            settings lose little enough, but none is faster than dense; ``setting`` comes closest.
            ``lossy``: none loses little enough; ``setting`` is the nearest miss among those that
            save something. ``nothing``: there is nothing to choose from.
        batch: None: ranked by compute kept.
        choices: from how many settings was chosen.
        doubts: all that speaks against numbers of the run.
        why: what speaks against ``setting``.

    """

    verdict: Literal["on", "doubt", "slow", "lossy", "nothing"]
    max_loss: float
    doubts: Doubts
    setting: SettingSummary | None = None
    batch: int | None = None
    choices: int = 0
    why: list[Doubt] = field(default_factory=list)

    @property
    def items_needed(self) -> int | None:
        """About how many items would show a nearest miss to be within bounds, if its mean holds."""
        if self.verdict != "lossy" or not self.setting or not (score := self.setting.score):
            return None
        room = self.max_loss - score.loss.mean
        if room <= 0:
            return None
        shrinks = 1 if score.loss.same else 2  # as 1/n, or as the root of it
        return math.ceil(score.items * ((score.loss.high - score.loss.mean) / room) ** shrinks)


def recommend(summary: Summary, max_loss: float) -> Recommendation:
    """Apply the rule that `Recommendation` states."""
    able = [one for one in summary.others if one.score and one.complete and options(one.setting)]
    found = doubts(summary, max_loss)
    if not able:
        return Recommendation("nothing", max_loss, found, why=found.run)
    within = [one for one in able if _upper(one) <= max_loss]
    if not within:
        saving = [one for one in able if _saves(one, summary.batch)]
        nearest = min(saving or able, key=_upper)
        why = found.of(nearest.name)
        return Recommendation("lossy", max_loss, found, nearest, summary.batch, len(able), why)
    timed = [one for one in within if summary.batch in one.speeds]
    batch = summary.batch if timed else None
    ranked = sorted(timed or within, key=lambda one: (cost(one, batch), _upper(one)))
    if cost(ranked[0], batch) >= 1:
        why = found.of(ranked[0].name)
        return Recommendation("slow", max_loss, found, ranked[0], batch, len(able), why)
    reasons: list[list[Doubt]] = []
    for one in ranked:
        if cost(one, batch) < 1:
            reasons.append([*found.of(one.name), *among_many(one, len(able), max_loss)])
            if not reasons[-1]:
                return Recommendation("on", max_loss, found, one, batch, len(able))
    return Recommendation("doubt", max_loss, found, ranked[0], batch, len(able), reasons[0])


def cost(one: SettingSummary, batch: int | None) -> float:
    """Time against dense at a batch size; without one, compute kept."""
    return one.kept if batch is None else one.speeds[batch].median


def _saves(one: SettingSummary, batch: int | None) -> bool:
    return cost(one, batch if batch in one.speeds else None) < 1


def _upper(one: SettingSummary) -> float:
    return one.score.loss.high if one.score else math.inf


def options(setting: Setting) -> dict[str, Any] | None:
    """Return the server's options for a setting; None where no option would bring its plans.

    That is dense, and plans that were drawn for each item outside the server.
    """
    prompt = {"prompt": setting.prompt} if setting.prompt else {}
    if setting.skip:
        return {"method": "static", "skip": setting.skip, **prompt}
    if setting.skip is not None or setting.method == "none":
        return prompt or None
    budget = {"max_compute": setting.budget} if setting.budget < 1 else {}
    return {"method": setting.method, **budget, **setting.options, **prompt}


def serve_command(model: str, engine: dict[str, Any]) -> str:
    """Return the shell command that serves a model as it was measured, with no options of ours."""
    eager = " --enforce-eager" if engine.get("enforce_eager") else ""
    return f"vllm serve --model {shlex.quote(model)} --plugin adaskip{eager}"


def switch_on_command(setting: Setting, manifest: Manifest) -> str | None:
    """Return the shell command that serves the model with a setting for all requests."""
    if (found := options(setting)) is None:
        return None
    config = shlex.quote(json.dumps({"adaskip": found}))
    command = serve_command(manifest.model, manifest.engine)
    return f"{command} \\\n    --additional-config {config}"


def request_arguments(setting: Setting) -> str | None:
    """Return what a single request adds for the same plan, as JSON."""
    own = prompt_arguments(setting.prompt)
    if setting.skip:
        own["adaskip_skip"] = setting.skip
    elif setting.method != "none" and setting.budget < 1:
        own["adaskip_max_compute"] = setting.budget
    return json.dumps({"vllm_xargs": own}) if own else None


@dataclass(frozen=True)
class Losses:
    """Where skipping loses.

    Attributes:
        slower: settings with a batch size at which they take longer than dense.
        tasks: settings with the columns on which they are significantly worse than dense.
        random: settings that are significantly worse than random plans, with those plans'
            settings and the comparison.

    """

    slower: list[tuple[SettingSummary, list[int]]]
    tasks: list[tuple[SettingSummary, list[tuple[Column, Quality]]]]
    random: list[tuple[SettingSummary, list[str], Quality]]


def losses(summary: Summary, answers: list[Answer]) -> Losses:
    """Collect what a user should know before switching anything on."""
    slower = [
        (one, sorted(batch for batch, speed in one.speeds.items() if speed.median > 1))
        for one in summary.others
    ]
    tasks = [
        (one, [(column, quality) for column, quality in one.columns.items() if quality.worse])
        for one in summary.others
    ]
    return Losses(
        slower=[each for each in slower if each[1]],
        tasks=[each for each in tasks if each[1]],
        random=list(_worse_than_random(summary, answers)),
    )


def _worse_than_random(
    summary: Summary, answers: list[Answer]
) -> Iterator[tuple[SettingSummary, list[str], Quality]]:
    """Compare with the random settings that keep as much compute, to half a layer.

    What was really kept is compared, not the budgets: methods may stay below theirs.
    """
    by_setting: dict[str, dict[tuple[str, str], Answer]] = {}
    for answer in answers:
        if answer.metric != "perplexity":
            by_setting.setdefault(answer.setting, {})[answer.metric, answer.item] = answer
    draws = [one for one in summary.others if one.setting.family == "random" and one.score]
    for one in summary.others:
        peers = [each for each in draws if abs(each.kept - one.kept) <= 0.5 / summary.num_layers]
        if one.setting.family == "random" or not one.score or not peers:
            continue
        drawn = [by_setting[peer.name] for peer in peers]
        own = by_setting[one.name]
        shared = [key for key in own if all(key in each for each in drawn)]
        means = [
            drawn[0][key].model_copy(
                update={"score": float(np.mean([each[key].score for each in drawn]))}
            )
            for key in shared
        ]
        found = loss_to(means, [own[key] for key in shared])
        if found and found.worse:
            yield one, [peer.name for peer in peers], found
