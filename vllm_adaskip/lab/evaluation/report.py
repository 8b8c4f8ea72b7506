# SPDX-License-Identifier: Apache-2.0
"""Makes one self-contained HTML page of a run: what to switch on, what it loses, what it wins.

Everything in a results folder may be hostile (task names, prompts, outputs), so the template
escapes all text, and the page forbids scripts and requests by its own policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined

from vllm_adaskip.lab.data.metrics import PERPLEXITY
from vllm_adaskip.lab.evaluation.heat import fixed_plans, sweeps, varying_plans
from vllm_adaskip.lab.evaluation.plots import in_page_style, looks_of, plots
from vllm_adaskip.lab.evaluation.recommend import (
    Recommendation,
    losses,
    options,
    recommend,
    request_arguments,
    switch_on_command,
)
from vllm_adaskip.lab.evaluation.results import (
    Answer,
    OraclePoint,
    Question,
    Results,
    SweepCell,
    Timing,
)
from vllm_adaskip.lab.evaluation.summary import SettingSummary, Summary, summarise

#: Answers that the page shows side by side.
SHOWN = 6


@dataclass(frozen=True)
class Pair:
    """One question answered by dense and under a setting; None: the question was not stored."""

    question: Question | None
    dense: Answer
    planned: Answer


@dataclass(frozen=True)
class Report:
    """The page, and what the command line says about it."""

    html: str
    headline: str
    recommendation: Recommendation


def make_report(results: Results, max_loss: float) -> Report:
    """Read a results folder and make the page.

    Raises:
        ResultsError: the folder cannot be used.

    """
    manifest, answers = results.manifest(), results.read(Answer)
    summary = summarise(manifest, answers, results.read(Timing))
    advice = recommend(summary, max_loss)
    looks = looks_of(summary)
    fixed = [one for one in summary.settings if one.plan is not None]
    page = environment().get_template("page.html.jinja")
    html = page.render(
        manifest=manifest,
        summary=summary,
        advice=advice,
        headline=headline(advice),
        command=switch_on_command(advice.setting.setting, manifest) if advice.setting else None,
        per_request=request_arguments(advice.setting.setting) if advice.setting else None,
        losses=losses(summary, answers),
        looks=looks,
        batches=sorted({batch for one in summary.others for batch in one.speeds}),
        plots=in_page_style(plots(summary, advice, looks, results.read(OraclePoint))),
        plans=[
            fixed_plans(fixed, summary.num_layers),
            *(varying_plans(one, summary.num_layers) for one in summary.others if not one.plan),
        ],
        sweeps=sweeps(results.read(SweepCell)),
        rest=[one for one in advice.doubts.all if one not in advice.why],
        shown=(shown := _shown(summary, advice)),
        pairs=side_by_side(summary, shown, answers, results.read(Question)) if shown else [],
        options=options,
    )
    return Report(html, headline(advice), advice)


def side_by_side(
    summary: Summary, setting: SettingSummary, answers: list[Answer], questions: list[Question]
) -> list[Pair]:
    """Return answers of dense and of a setting, those that lost most, then surprise most, first."""
    by_setting: dict[str, dict[tuple[str, str], Answer]] = {}
    for one in answers:
        if one.metric != PERPLEXITY:
            by_setting.setdefault(one.setting, {})[one.metric, one.item] = one
    asked = {one.item: one for one in questions}
    planned = by_setting.get(setting.name, {})
    pairs = [
        Pair(asked.get(one.item), one, planned[key])
        for key, one in by_setting.get(summary.dense.name, {}).items()
        if key in planned
    ]

    def worst(pair: Pair) -> tuple[float, bool, float]:
        same = pair.dense.text == pair.planned.text
        return pair.planned.score - pair.dense.score, same, -(pair.planned.surprise or 0)

    return sorted(pairs, key=worst)[:SHOWN]


def _shown(summary: Summary, advice: Recommendation) -> SettingSummary | None:
    """Return the setting whose answers are shown: the recommended one, else the best."""
    scored = [(one.score.mean, one) for one in summary.others if one.score]
    return advice.setting or max(scored, key=lambda each: each[0], default=(0, None))[1]


def headline(advice: Recommendation) -> str:
    """Say in one sentence what to switch on."""
    points = f"{100 * advice.max_loss:g} point{'s' * (advice.max_loss != 0.01)}"
    match advice.verdict:
        case "on":
            assert advice.setting is not None
            return f"Switch on {advice.setting.name}"
        case "doubt":
            assert advice.setting is not None
            return f"Leave it off for now: the numbers of {advice.setting.name} are in doubt"
        case "slow":
            than = "is faster than dense" if advice.batch else "keeps less compute than dense"
            return f"Leave it off: nothing that surely loses at most {points} {than}"
        case "lossy":
            return f"Leave it off: no setting surely loses at most {points}"
    return "Nothing to recommend: no setting can be compared with dense and switched on"


def environment() -> Environment:
    """Return the templates of all pages; they escape all text."""
    env = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    env.lstrip_blocks = True
    env.filters["start"] = lambda text: text if len(text) <= 600 else f"{text[:600]} …"
    env.filters["end"] = lambda text: text if len(text) <= 600 else f"… {text[-600:]}"
    env.filters["share"] = lambda value: f"{100 * value:.0f}%"
    env.filters["score"] = lambda value: f"{100 * value:.1f}"
    env.filters["change"] = _change
    env.filters["nats"] = lambda value: f"{value:.3f}"
    env.filters["factor"] = lambda value: f"{value:.2f}"
    env.filters["worst"] = lambda found: sorted(found, key=lambda each: -each[1].loss.low)
    env.tests["perplexity"] = lambda metric: metric == PERPLEXITY
    return env


def _template(name: str) -> str:
    return files("vllm_adaskip.lab.evaluation").joinpath(name).read_text("utf-8")


def _change(loss: float) -> str:
    """Return a loss as a change in points, with a sign unless it rounds to nothing."""
    points = round(-100 * loss, 1)
    return f"{points:+.1f}".replace("-", "\N{MINUS SIGN}") if points else "0.0"
