# SPDX-License-Identifier: Apache-2.0
"""Draws one plot of settings as inline SVG, in the page's own colours."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vllm_adaskip.lab.evaluation.summary import SettingSummary, Summary

#: Matplotlib wants colours where the page wants its own, which follow light and dark: each of
#: these stands for a CSS variable and is replaced in the SVG.
PAINT = {name: f"#0{index}fe0{index}" for index, name in enumerate(("ink", "soft", "line", "lose"))}
PAINT |= {f"f{index}": f"#1{index}fe1{index}" for index in range(6)}
#: Marker and the character of the same shape, for legends.
_SHAPES = [("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚")]


@dataclass(frozen=True)
class Look:
    """How a family is drawn: a shape beside the colour, for those who see colours otherwise."""

    paint: str
    marker: str
    sign: str


#: A setting's value with the ends of its bar.
Point = tuple[SettingSummary, float, float, float]


def looks_of(summary: Summary) -> dict[str, Look]:
    """Give each family its look; dense has its own."""
    families = dict.fromkeys(one.setting.family for one in summary.others)
    looks = {
        family: Look(f"f{index % 6}", *_SHAPES[(index + index // 6) % 6])
        for index, family in enumerate(families)
    }
    return {summary.dense.setting.family: Look("ink", "*", "★")} | looks


def figure(ylabel: str, *, percent: bool) -> tuple[Any, Any]:
    """Give an empty figure and its axes; x is the share of compute kept."""
    figure = Figure(figsize=(5.6, 3.9), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=PAINT["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set(xlabel="share of decoder compute kept", ylabel=ylabel)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    return figure, axes


def draw(
    figure: Any,
    axes: Any,
    points: Sequence[Point],
    looks: dict[str, Look],
    chosen: SettingSummary | None,
) -> Markup:
    """Add the settings, each with its interval and a tooltip, and give the SVG."""
    titles = {}
    for index, ((one, y, low, high), x) in enumerate(zip(points, _aside(points), strict=True)):
        look = looks[one.setting.family]
        paint = PAINT[look.paint]
        axes.plot([x, x], [low, high], color=paint, linewidth=1.3, alpha=0.7)
        size = 13 if look.marker == "*" else 8
        axes.plot(x, y, look.marker, color=paint, markersize=size, gid=f"point{index}")
        titles[f"point{index}"] = (
            f"{one.name}: {100 * one.kept:.0f}% of compute kept, {y:.3f} ({low:.3f} to {high:.3f})"
        )
        if one is chosen:
            axes.plot(x, y, "o", color=paint, markersize=17, fillstyle="none")
    return _svg(figure, axes, titles)


def _aside(points: Sequence[Point]) -> list[float]:
    """Give x of each point: families that keep the same compute stand side by side."""
    step = 0.012 * (1.05 - min((one.kept for one, *_ in points), default=0))
    taken: dict[float, list[str]] = {}
    for one, *_ in points:
        families = taken.setdefault(round(one.kept, 2), [])
        if one.setting.family not in families:
            families.append(one.setting.family)
    shifts = []
    for one, *_ in points:
        families = taken[round(one.kept, 2)]
        middle = (len(families) - 1) / 2
        shifts.append(one.kept + 2 * step * (families.index(one.setting.family) - middle))
    return shifts


def _svg(figure: Any, axes: Any, titles: dict[str, str]) -> Markup:
    """Give the figure as inline SVG with the page's colours and with tooltips."""
    for part in ("xaxis", "yaxis"):
        axis = getattr(axes, part)
        axis.label.set_color(PAINT["ink"])
        axis.set_tick_params(colors=PAINT["soft"], labelcolor=PAINT["ink"])
    axes.spines[:].set_color(PAINT["soft"])
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    for variable, paint in PAINT.items():
        svg = svg.replace(paint, f"var(--{variable})")
    for name, title in titles.items():
        svg = svg.replace(f'<g id="{name}">', f"<g><title>{escape(title)}</title>")
    # Several figures share a page: only what is referred to keeps its id, and those are hashes
    # of what they hold.
    svg = re.sub(
        r' id="(?:figure|patch|axes|matplotlib|line2d|xtick|ytick|text|oracle)[\w.]*"', "", svg
    )
    return Markup(svg.replace("<svg", '<svg role="img"', 1))
