# SPDX-License-Identifier: Apache-2.0
"""Draws what a benchmark found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllm_adaskip.lab.bench.regimes import Regime
from vllm_adaskip.lab.bench.results import Results


def draw(results: Results, path: Path) -> None:
    """Draw a panel for each model: decode throughput against stock vLLM, by batch size."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    decodes = [one for one in results.timings if one.case.startswith("decode")]
    models = list(dict.fromkeys(one.model for one in decodes))
    variants = list(dict.fromkeys(one.variant for one in decodes))
    figure = Figure(figsize=(6.4 * len(models), 4.6), layout="constrained")
    for place, (model, axes) in enumerate(
        zip(models, figure.subplots(1, len(models), squeeze=False)[0], strict=True)
    ):
        cases = list(dict.fromkeys(one.case for one in decodes if one.model == model))
        width = 0.85 / len(variants)
        for index, variant in enumerate(variants):
            found = {
                one.case: one.against_stock
                for one in decodes
                if (one.model, one.variant) == (model, variant)
            }
            at = [cases.index(case) + (index - len(variants) / 2) * width for case in found]
            middle = [spread.middle for spread in found.values()]
            low = [spread.middle - spread.low for spread in found.values()]
            high = [spread.high - spread.middle for spread in found.values()]
            axes.bar(
                at,
                middle,
                width,
                yerr=[low, high],
                label=variant,
                color=colormaps["tab20"](index),
                error_kw={"lw": 0.8},
            )
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(cases)), [case.removeprefix("decode, ") for case in cases])
        axes.set(title=model, ylabel="" if place else "decode throughput against stock vLLM")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8
    )
    figure.savefig(path, dpi=130)


def draw_regimes(found: Sequence[Regime], path: Path) -> None:
    """Draw what each kind of plan gains over dense, a line a batch, by context."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(kind for one in found for kind in one.gains))
    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    panels = figure.subplots(2, -(-len(kinds) // 2), sharex=True, sharey=True).ravel()
    for kind, axes in zip(kinds, panels, strict=False):
        for batch in dict.fromkeys(one.batch for one in found):
            cells = [one for one in found if one.batch == batch and kind in one.gains]
            gains = [one.gains[kind].middle for one in cells]
            axes.plot([one.context for one in cells], gains, "o-", label=f"batch {batch}")
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set(title=kind, xscale="log", xlabel="context, tokens", ylabel="dense / planned")
        contexts = sorted({one.context for one in found})
        axes.set_xticks(contexts, [str(context) for context in contexts], minor=False)
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=130)
