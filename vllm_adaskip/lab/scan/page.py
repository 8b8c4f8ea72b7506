# SPDX-License-Identifier: Apache-2.0
"""The page of a scan, in the look of the other pages; all text in it is escaped."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vllm_adaskip.lab.evaluation.heat import Cell, Heat
from vllm_adaskip.lab.evaluation.plots import PAINT, in_page_style, inline_svg
from vllm_adaskip.lab.evaluation.report import environment
from vllm_adaskip.lab.evaluation.results import PlanReading, Question, Results, WholeAnswer
from vllm_adaskip.lab.fixed_plans import Entry
from vllm_adaskip.lab.scan.answers import halves
from vllm_adaskip.lab.scan.order import LEAST
from vllm_adaskip.lab.scan.scan import Found
from vllm_adaskip.lab.scan.verdict import Confirmed

#: Answers that the page shows side by side.
_SHOWN = 6
#: What a bar shows that costs nothing, or less.
_NONE = 1e-4
_MARKERS = {"greedy": "o", "SLEB": "s", "even": "^", "late": "v", "random": "."}


def page(found: Found, results: Results, model: str, bound: float) -> str:
    """Return one self-contained page."""
    shown = found.verdict.chosen or found.plans[0]
    _, held_out = halves(results.read(WholeAnswer))
    drawn = dict(in_page_style([("curve", _curve(found, bound)), ("bars", _bars(found))]))
    return (
        environment()
        .get_template("scan.html.jinja")
        .render(
            found=found,
            manifest=results.manifest(),
            model=model,
            bound=bound,
            answers=len(held_out),
            batches=sorted(found.steps),
            map=_heat(found),
            shown=shown,
            chosen=_chosen(found),
            pairs=_pairs(results, shown.plan.entries(), held_out),
            **drawn,
        )
    )


def _chosen(found: Found) -> list[Confirmed]:
    """Return the rows that stand out."""
    chosen = [] if found.verdict.chosen is None else [found.verdict.chosen]
    if found.prompts and found.prompts.chosen:
        chosen.append(found.prompts.exits[found.prompts.chosen])
    return chosen


def _pairs(
    results: Results, skip: list[Entry], held_out: list[WholeAnswer]
) -> list[tuple[str, str, str]]:
    """Return questions with the whole model's answers and those under the plan."""
    asked = {one.item: one.prompt for one in results.read(Question)}
    (texts,) = [
        one.texts for one in results.read(PlanReading) if one.how == "answered" and one.skip == skip
    ]
    pairs = zip(held_out, texts, strict=True)
    return [(asked[one.item], one.text, text) for one, text in pairs][:_SHOWN]


def _heat(found: Found) -> Heat:
    """Show what stays if each sub-layer alone goes, attention above MLP."""
    kinds = {"attn": "attention", "mlp": "MLP"}
    rows: dict[str, list[Cell | None]] = {}
    for entry, one in found.singles.items():
        kind = kinds[entry.partition(":")[0]] if isinstance(entry, str) else "layer"
        share = float(np.mean(one.agreement))
        told = f"{entry}: surprise {np.mean(one.surprise):.3f} nats, loss {one.loss:.3f}"
        rows.setdefault(kind, []).append((1 - share, f"{100 * share:.0f}", told))
    columns = [str(layer) for layer in range(max(map(len, rows.values())))]
    return Heat("Agreement without it, by layer", [], columns, [*rows.items()])


def _axes(width: float, height: float) -> tuple[Any, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=PAINT["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _curve(found: Found, bound: float) -> Markup:
    figure, axes = _axes(5.6, 3.9)
    titles = {}
    for index, (family, points) in enumerate(found.curve.items()):
        paint = PAINT[f"f{index}"]
        style = "None" if family == "random" else "-"
        times, shares = zip(*sorted(points), strict=True)
        axes.plot(times, shares, linestyle=style, color=paint, linewidth=1.2, alpha=0.6)
        for place, (time, share) in enumerate(points):
            name = f"point{index}x{place}"
            axes.plot(time, share, _MARKERS[family], color=paint, markersize=6, gid=name)
            titles[name] = f"{family}: {time:.2f} of the time, {share:.1%} stay"
        axes.plot([], [], _MARKERS[family], color=paint, label=family)
    axes.axvline(1, color=PAINT["lose"], linestyle=":", linewidth=1.2)
    axes.axhline(bound, color=PAINT["soft"], linestyle=":", linewidth=1)
    axes.set(xlabel="time against compiled stock vLLM", ylabel="tokens that stay the same, %")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axes.legend(frameon=False, labelcolor=PAINT["ink"])
    return inline_svg(figure, axes, titles)


def _bars(found: Found) -> Markup:
    """Show what each candidate costs for the time that it saves, attention beside MLP."""
    figure, axes = _axes(5.6, 3.9)
    titles = {}
    for place, (entry, one) in enumerate(found.singles.items()):
        assert one.loss is not None
        saved = 1000 * max(found.saved[entry], LEAST)
        price = (one.loss - found.whole_loss) / saved
        paint = PAINT["f1" if str(entry).startswith("mlp") else "f0"]
        axes.bar(place, max(price, _NONE), width=0.8, gid=f"bar{place}", color=paint)
        titles[f"bar{place}"] = f"{entry}: {price:.3g} nats a millisecond"
    in_layer = len(found.singles) // found.num_layers
    ticks = range(0, len(found.singles), 5 * in_layer)
    axes.set(yscale="log", xlabel="layer", ylabel="nats a ms; attention blue, MLP orange")
    axes.set_xticks([*ticks], [str(tick // in_layer) for tick in ticks])
    return inline_svg(figure, axes, titles)
