# SPDX-License-Identifier: Apache-2.0
"""``docs/leaderboard.md``, made of profiles' own figures.

``python -m vllm_adaskip.lab.scan.leaderboard docs/leaderboard`` writes the page beside the folder
of entries, each the ``adaskip.json`` of a profile that `adaskip scan` wrote. Entries come from
anybody, so each is bounded, and whatever has another form than a scan's is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_adaskip.classifiers.hub import cell
from vllm_adaskip.classifiers.profile import LARGEST, Profile, refuse_special

HEAD = """\
# Leaderboard

What leaving out layers wins and loses, each line measured by `adaskip scan` on its own machine
([scan.md](scan.md)). Compare lines of one machine only. Agreement: share of answer tokens that
stay the whole model's. Time: a decode step against compiled stock vLLM. Brackets: 95 % intervals.
To add a line see [CONTRIBUTING.md](../CONTRIBUTING.md#a-line-of-the-leaderboard). The page is
made by `python -m vllm_adaskip.lab.scan.leaderboard docs/leaderboard`.

"""
_COLUMNS = (
    "model",
    "left out",
    "agreement",
    "surprise, nats",
    "time, batch 16",
    "time, batch 1",
    "machine",
    "vLLM",
    "command",
)
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Ratio = Annotated[float, Field(gt=0, lt=100, allow_inf_nan=False)]
Text = Annotated[str, Field(pattern=r"^[ -~]{1,300}$")]


class LeaderboardError(ValueError):
    """An entry that is refused; the message names the file and the figure."""


class Figures(BaseModel):
    """The metrics of a profile of `adaskip scan`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?$")]
    left_out: Annotated[str, Field(pattern=r"^[a-z0-9:, -]{1,300}$")]
    compute_kept: Share
    agreement: Share
    agreement_low: Share
    agreement_high: Share
    surprise: Annotated[float, Field(ge=0, lt=100, allow_inf_nan=False)]
    time_ratio_batch_1: Ratio
    time_ratio_batch_1_low: Ratio
    time_ratio_batch_1_high: Ratio
    time_ratio_batch_16: Ratio
    time_ratio_batch_16_low: Ratio
    time_ratio_batch_16_high: Ratio
    machine: Text
    engine: Text
    vllm: Text
    command: Text

    def row(self) -> list[str]:
        """Return the cells of the entry's line."""
        batch_16 = self._interval("time_ratio_batch_16", "{:.2f}")
        batch_1 = self._interval("time_ratio_batch_1", "{:.2f}")
        told = (self.machine, self.vllm, self.command)
        return [
            cell(self.model),
            cell(self.left_out),
            self._interval("agreement", "{:.1%}"),
            f"{self.surprise:.3f}",
            batch_16,
            batch_1,
            *map(cell, told),
        ]

    def _interval(self, name: str, form: str) -> str:
        middle, low, high = (form.format(getattr(self, name + end)) for end in _ENDS)
        return f"{middle} ({low} to {high})"


_ENDS = ("", "_low", "_high")


def entry(path: Path) -> Figures:
    """Read one entry.

    Raises:
        LeaderboardError: no profile of a scan, or a figure that cannot be.

    """
    try:
        refuse_special(path)
        if path.stat().st_size > LARGEST:
            raise ValueError(f"larger than {LARGEST} bytes")
        profile = Profile.model_validate_json(path.read_text(encoding="utf-8"))
        found = Figures.model_validate(profile.metrics)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise LeaderboardError(f"{path}: {where}: {first['msg']}") from None
    except (ValueError, OSError) as error:
        raise LeaderboardError(f"{path}: {error}") from None
    for name in ("agreement", "time_ratio_batch_1", "time_ratio_batch_16"):
        middle, low, high = (getattr(found, name + end) for end in _ENDS)
        if not low <= middle <= high:
            raise LeaderboardError(f"{path}: {name} {middle:g} is outside {low:g} to {high:g}")
    return found


def page(entries: Iterable[Figures]) -> str:
    """Return the page, fastest first."""
    ordered = sorted(entries, key=lambda one: (one.time_ratio_batch_16, one.model, one.left_out))
    if not ordered:
        return HEAD + "No entries yet.\n"
    rows = [_COLUMNS, ["---"] * len(_COLUMNS), *(one.row() for one in ordered)]
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def read(folder: Path) -> list[Figures]:
    """Read all entries of a folder."""
    return [entry(path) for path in sorted(folder.glob("*.json"))]


def main(folder: Path) -> None:
    """Write the page beside the folder."""
    folder.with_suffix(".md").write_text(page(read(folder)), encoding="utf-8")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except (LeaderboardError, IndexError) as error:
        sys.exit(f"error: {error}; usage: leaderboard FOLDER")
