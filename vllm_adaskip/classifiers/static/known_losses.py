# SPDX-License-Identifier: Apache-2.0
"""Losses of plans, each written down once it is known, so that a stopped search goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from vllm_adaskip.classifiers.plan import SkipPlan

FILE = "losses.json"


class KnownLosses:
    """A loss of plans that is not worked out twice, in this process or a later one.

    Args:
        folder: of the fit, which `start_or_resume` holds to one model and one set of examples.
        loss: what is asked for plans that are not known yet.

    """

    def __init__(self, folder: Path, loss: Callable[[SkipPlan], float]) -> None:
        self._path, self._loss = folder / FILE, loss
        self._known: dict[str, float] = {}
        if self._path.exists():
            self._known = json.loads(self._path.read_text())

    def __call__(self, plan: SkipPlan) -> float:
        """Give a plan's loss."""
        if (name := str(plan)) not in self._known:
            self._known[name] = self._loss(plan)
            (part := self._path.with_suffix(".part")).write_text(json.dumps(self._known))
            part.replace(self._path)
        return self._known[name]
