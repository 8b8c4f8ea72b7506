# SPDX-License-Identifier: Apache-2.0
"""Draw the README's table of gains: ``python benchmarks/gains.py``.

It measures nothing. The figures stand in the table, beside links to the commands that printed them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Row(NamedTuple):
    """A row of the table; ``time`` is the time against compiled stock vLLM, below 1 is faster."""

    model: str
    mode: str
    left_out: str
    time: float


def rows(readme: str) -> list[Row]:
    """Return the rows of the one table that has a column ``time``."""
    start = readme.index("| model | engine mode |")
    lines = readme[start : readme.index("\n\n", start)].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return [Row(*cell[:3], float(re.findall(r"\d\.\d+", cell[3])[0])) for cell in cells]


def draw(found: list[Row], out: Path) -> None:
    """Draw a bar for each row, from 1 to its time, the fastest first."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    found = sorted(found, key=lambda row: row.time, reverse=True)
    figure, axes = plt.subplots(figsize=(10, 0.42 * len(found) + 1), layout="constrained")
    names = [f"{row.model}: {row.left_out.replace('`', '')}\n{row.mode}" for row in found]
    widths = [row.time - 1 for row in found]
    colours = ["#00897b" if width < 0 else "#c62828" for width in widths]
    bars = axes.barh(names, widths, left=1, color=colours)
    axes.bar_label(bars, [f"{row.time:.2f}" for row in found], padding=3, fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlim(0.5, 1.85)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("time against compiled stock vLLM: left of 1 is faster, right is slower")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(out, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    draw(rows((ROOT / "README.md").read_text()), ROOT / "docs" / "pictures" / "gains.png")
