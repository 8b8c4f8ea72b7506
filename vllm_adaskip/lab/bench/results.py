# SPDX-License-Identifier: Apache-2.0
"""What a benchmark found, as it stands in its JSON."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from vllm_adaskip.lab.bench.machine import Machine
from vllm_adaskip.lab.bench.rounds import Spread


@dataclass(frozen=True)
class Timing:
    """A variant's step.

    Attributes:
        model: name of the shape.
        case: what kind of step, such as ``decode, batch 64``.
        variant: what was run.
        seconds: of a step, over the rounds.
        against_stock: stock vLLM's seconds over these, round by round.
        roofline: seconds that the machine would need at least.

    """

    model: str
    case: str
    variant: str
    seconds: Spread
    against_stock: Spread
    roofline: float | None = None


@dataclass(frozen=True)
class Target:
    """A promise, and what was found.

    Attributes:
        model: name of the shape.
        name: what is promised.
        wanted: at least this ratio, or below this share where ``is_most``.
        found: the ratio or share.
        is_most: smaller is better.

    """

    model: str
    name: str
    wanted: float
    found: Spread
    is_most: bool = False

    @property
    def is_met(self) -> bool:
        """Whether the median keeps the promise."""
        return self.found.middle < self.wanted if self.is_most else self.found.middle >= self.wanted


@dataclass
class Results:
    """All of a run.

    Attributes:
        machine: its roof.
        timings: of every variant.
        targets: what is promised, see docs/performance.md.
        breakdowns: model -> case -> seconds of each part of a step.
        versions: of what was timed.

    """

    machine: Machine
    timings: list[Timing] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    breakdowns: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    versions: dict[str, str] = field(
        default_factory=lambda: {
            "python": platform.python_version(),
            **{name: version(name) for name in ("vllm", "torch", "vllm-adaskip")},
        }
    )

    def write(self, path: Path) -> None:
        """Write all of it as JSON, or leave the file that was there."""
        draft = path.with_name(path.name + ".part")
        draft.write_text(json.dumps(asdict(self), indent=1) + "\n")
        draft.replace(path)
