# SPDX-License-Identifier: Apache-2.0
"""What AdaInfer (arXiv 2403.02181) saves and costs, task by task, and what it has to beat.

Its classifiers, fitted on all tasks and on one alone (transfer), against all cases' exit at one
depth, and against exits at random: as many at each depth as the classifier's, of any cases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vllm_adaskip.lab.evaluation.quality import Interval, interval
from vllm_adaskip.lab.evaluation.results import Answer, Setting
from vllm_adaskip.lab.evaluation.settings import DENSE, distinct

CLASSIFIERS = ("svm", "crf", "threshold")
#: What K/V a token finds above where an earlier one stopped.
FILLS = ("copy", "project")
EXIT = "exit"


def answer_settings(fits: Mapping[str, Path], num_layers: int) -> list[Setting]:
    """Return what is compared where an answer is one token, dense first.

    Args:
        fits: name -> profile of scope ``answer``.
        num_layers: of the model.

    """
    fitted = [_profiled(name, folder) for name, folder in fits.items()]
    exits = [
        Setting(
            name=f"{EXIT} {depth}/{num_layers}",
            family=EXIT,
            method="exit",
            options={"layers": depth, "scope": "answer"},
        )
        for depth in range(1, num_layers)
    ]
    return distinct([DENSE, *fitted, *exits])


def generation_settings(
    prompt: Mapping[str, Path], token: Mapping[str, Path], num_layers: int
) -> list[Setting]:
    """Return what is compared where answers are texts, dense first.

    Args:
        prompt: name -> profile of scope ``prompt``.
        token: name -> profile of scope ``token``; each is served with both `FILLS`.
        num_layers: of the model.

    """
    fitted = [_profiled(name, folder) for name, folder in prompt.items()]
    fitted += [
        _profiled(f"{name}, {fill}", folder, kv_fill=fill)
        for name, folder in token.items()
        for fill in FILLS
    ]
    exits = [
        Setting(name=f"{EXIT} {depth}/{num_layers}", family=EXIT, skip=[*range(depth, num_layers)])
        for depth in range(num_layers // 2, num_layers)
    ]
    return distinct([DENSE, *fitted, *exits])


def _profiled(name: str, folder: Path, **more: str) -> Setting:
    options = {"profile": str(folder), **more}
    return Setting(name=name, family=name, method="adainfer", options=options)


@dataclass(frozen=True)
class TaskRow:
    """One setting on one task.

    Attributes:
        pruned: share of decoder compute left out.
        score: mean.
        loss: to dense, paired by item.
        at_random: mean score if as many exits at each depth fell to anybody.

    """

    setting: str
    task: str
    pruned: float
    score: float
    loss: Interval
    at_random: float | None


def rows(answers: Iterable[Answer], num_layers: int) -> list[TaskRow]:
    """Compare each classifier with dense and with exits at random, tasks in order of name."""
    found: dict[tuple[str, str], dict[str, Answer]] = {}
    for one in answers:
        found.setdefault((one.setting, one.task), {})[one.item] = one
    return [
        _row(setting, task, own, found, num_layers)
        for (setting, task), own in sorted(found.items())
        if setting != DENSE.name and not setting.startswith(EXIT)
    ]


def _row(
    setting: str,
    task: str,
    own: Mapping[str, Answer],
    found: Mapping[tuple[str, str], Mapping[str, Answer]],
    num_layers: int,
) -> TaskRow:
    dense = found[DENSE.name, task]
    losses = np.array([dense[item].score - one.score for item, one in own.items()])
    depths = [depth(one, num_layers) for one in own.values()]
    mean = {num_layers: _mean(dense)}
    for each in set(depths) - {num_layers}:
        mean[each] = _mean(found.get((f"{EXIT} {each}/{num_layers}", task), {}))
    at_random = float(np.mean([mean[each] for each in depths]))
    return TaskRow(
        setting=setting,
        task=task,
        pruned=1 - float(np.mean([one.kept for one in own.values()])),
        score=_mean(own),
        loss=interval(losses),
        at_random=None if np.isnan(at_random) else at_random,
    )


def depth(answer: Answer, num_layers: int) -> int:
    """Return after how many layers a whole answer stopped."""
    left_out = answer.left_out or [0.0] * 2 * num_layers
    return round(num_layers - sum(left_out[::2]))


def _mean(answers: Mapping[str, Answer]) -> float:
    scores: Sequence[float] = [one.score for one in answers.values()]
    return float(np.mean(scores)) if scores else float("nan")
