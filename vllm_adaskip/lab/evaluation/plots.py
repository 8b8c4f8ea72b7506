# SPDX-License-Identifier: Apache-2.0
"""The plots of a run, quality and time against compute kept, as SVG in the page's own colours."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vllm_adaskip.lab.data.metrics import PERPLEXITY
from vllm_adaskip.lab.evaluation.recommend import Recommendation
from vllm_adaskip.lab.evaluation.results import OraclePoint
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
    """Return the look of each family; dense has its own."""
    families = dict.fromkeys(one.setting.family for one in summary.others)
    looks = {
        family: Look(f"f{index % 6}", *_SHAPES[(index + index // 6) % 6])
        for index, family in enumerate(families)
    }
    return {summary.dense.setting.family: Look("ink", "*", "★")} | looks


def figure(ylabel: str, *, percent: bool) -> tuple[Any, Any]:
    """Return an empty figure and its axes; x is the share of compute kept."""
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
    return inline_svg(figure, axes, titles)


def _aside(points: Sequence[Point]) -> list[float]:
    """Return x of each point: families that keep the same compute stand side by side."""
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


def inline_svg(figure: Any, axes: Any, titles: dict[str, str]) -> Markup:
    """Return the figure as inline SVG with the page's colours and with tooltips."""
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


def in_page_style(plots: Iterable[tuple[str, Markup]]) -> list[tuple[str, Markup]]:
    """Have plots drawn as the page wants them."""
    style = {
        "svg.fonttype": "none",  # text stays text, in the page's own font
        "svg.hashsalt": "adaskip",  # the same run gives the same page
        "text.parse_math": False,  # names may hold dollars
        "font.size": 10.5,
    }
    with matplotlib.rc_context(style):
        return list(plots)


def plots(
    summary: Summary,
    advice: Recommendation,
    looks: dict[str, Look],
    oracle: Sequence[OraclePoint],
) -> Iterable[tuple[str, Markup]]:
    """Return title and SVG of each plot."""
    rest = (looks, advice.setting)
    if summary.dense.score:
        whole = summary.dense.score.mean
        points = [
            # Against dense on the same items, so that an unfinished setting stands right too.
            (one, whole - q.loss.mean, whole - q.loss.high, whole - q.loss.low)
            for one in summary.settings
            if (q := one.score)
        ]
        canvas, axes = figure("mean score", percent=True)
        axes.axhline(whole - advice.max_loss, color=PAINT["soft"], linestyle=":", linewidth=1)
        scored = {metric for _, metric in summary.columns if metric != PERPLEXITY}
        for (candidates, metric), line in _frontiers(oracle).items():
            style = "-" if candidates == "skip" else "--"
            x, y = zip(*[(p.layers / summary.num_layers, p.score) for p in line], strict=True)
            axes.plot(x, y, style, color=PAINT["soft"], linewidth=1.4, gid="oracle")
            label = f"oracle {candidates}" + f" ({metric})" * (len(scored) > 1)
            axes.annotate(label, (x[0], y[0]), (9, -2), textcoords="offset points",
                          color=PAINT["soft"], va="top")  # fmt: skip
        yield "Quality against compute kept", draw(canvas, axes, points, *rest)
    if summary.dense.perplexity:
        factors = [
            (one, p.loss.mean, p.loss.low, p.loss.high)
            for one in summary.settings
            if (p := one.perplexity)
        ]
        canvas, axes = figure("perplexity against dense", percent=False)
        yield (
            "Perplexity against compute kept (lower is better)",
            draw(canvas, axes, factors, *rest),
        )
    for batch in sorted({batch for one in summary.others for batch in one.speeds}, reverse=True):
        times = [
            (one, s.median, s.low, s.high)
            for one in summary.settings
            if (s := one.speeds.get(batch))
        ]
        canvas, axes = figure("time against dense", percent=False)
        top = max(1.15, 1.06 * max(point[3] for point in times))
        left = min(0.9, min(one.kept for one, *_ in times) - 0.04)
        axes.axhspan(1, top, color=PAINT["lose"], alpha=0.10, linewidth=0)
        axes.plot([left, 1], [left, 1], "--", color=PAINT["soft"], linewidth=1)
        axes.text(left, top, " slower than dense", color=PAINT["lose"], va="top")
        axes.annotate("perfect saving ", (0.5 + left / 2, 0.5 + left / 2), color=PAINT["soft"],
                      ha="left", va="top")  # fmt: skip
        axes.set(ylim=(min(left, *(p[2] for p in times)) - 0.03, top), xlim=(left, 1.02))
        yield f"Time against compute kept, batch {batch}", draw(canvas, axes, times, *rest)


def _frontiers(points: Iterable[OraclePoint]) -> dict[tuple[str, str], list[OraclePoint]]:
    """Return the oracles' lines; one of perplexity has no place among scores."""
    lines: dict[tuple[str, str], list[OraclePoint]] = {}
    for point in sorted(points, key=lambda point: point.layers):
        if point.metric != PERPLEXITY:
            lines.setdefault((point.candidates, point.metric), []).append(point)
    return lines
