# SPDX-License-Identifier: Apache-2.0
"""The plots of a run: quality and time, both against compute kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import matplotlib
from markupsafe import Markup

from vllm_adaskip.lab.data.metrics import PERPLEXITY
from vllm_adaskip.lab.evaluation.drawing import PAINT, Look, draw, figure
from vllm_adaskip.lab.evaluation.recommend import Recommendation
from vllm_adaskip.lab.evaluation.results import OraclePoint
from vllm_adaskip.lab.evaluation.summary import Summary


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
    """Give title and SVG of each plot."""
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
        axes.axhline(whole - advice.max_drop, color=PAINT["soft"], linestyle=":", linewidth=1)
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
    """Give the oracles' lines; one of perplexity has no place among scores."""
    lines: dict[tuple[str, str], list[OraclePoint]] = {}
    for point in sorted(points, key=lambda point: point.layers):
        if point.metric != PERPLEXITY:
            lines.setdefault((point.candidates, point.metric), []).append(point)
    return lines
