# SPDX-License-Identifier: Apache-2.0
"""Draws what a benchmark found."""

from __future__ import annotations

from pathlib import Path

from vllm_adaskip.bench.results import Results


def draw(results: Results, path: Path) -> None:
    """Draw a panel for each model: decode throughput against stock vLLM, by batch size."""
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
            axes.bar(at, middle, width, yerr=[low, high], label=variant, error_kw={"lw": 0.8})
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(cases)), [case.removeprefix("decode, ") for case in cases])
        axes.set(title=model, ylabel="" if place else "decode throughput against stock vLLM")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8
    )
    figure.savefig(path, dpi=130)
