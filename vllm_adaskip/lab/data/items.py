# SPDX-License-Identifier: Apache-2.0
"""One question of a data set."""

from __future__ import annotations

from dataclasses import dataclass

BUNDLED = "bundled"
HARNESS = "lm-eval"


class DataError(ValueError):
    """A data set that cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        item: unique within the data set, ``sum/12``.
        references: right answers, at least one.
        metric: how an answer is scored, a key of `METRICS`; of a harness task its own name.
        labels: all right answers of the task, where they are labels; of metric ``accuracy``.
        choices: what may be answered, of which the reference is one; of metric ``choice``.

    """

    item: str
    task: str
    prompt: str
    references: tuple[str, ...]
    metric: str
    labels: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
