# SPDX-License-Identifier: Apache-2.0
"""What prompts win and lose whose tokens, but the last, stop after some layers.

Beside whole prompts in the same engine: how far the answers, which all layers make, are the whole
model's, and the time to the first token against compiled stock vLLM, at the questions' length.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vllm_adaskip.classifiers.plan import DecoderShape, SkipPlan
from vllm_adaskip.engine.prompt_plan import TAIL, exit_plan
from vllm_adaskip.lab.bench.engines import first_tokens
from vllm_adaskip.lab.bench.rounds import Run
from vllm_adaskip.lab.evaluation.doubt import Doubt
from vllm_adaskip.lab.evaluation.results import PlanReading, Results, StepTime, WholeAnswer
from vllm_adaskip.lab.scan.answers import shortened
from vllm_adaskip.lab.scan.timing import STOCK, Engines, in_turns, known_or_timed, variant_of
from vllm_adaskip.lab.scan.verdict import Confirmed, against, confirmed, stays
from vllm_adaskip.offline import request


@dataclass(frozen=True)
class Prompts:
    """What was found of them.

    Attributes:
        tokens: of the prompts that were timed.
        whole: prompts of which all layers run.
        exits: by how many layers run.
        chosen: the one that is recommended, of ``exits``.
        sentence: what to do.
        doubts: what speaks against it.

    """

    tokens: int
    whole: Confirmed
    exits: dict[int, Confirmed]
    chosen: int | None
    sentence: str
    doubts: list[Doubt]


def measured(
    results: Results,
    engines: Engines,
    asked: Sequence[WholeAnswer],
    exits: Sequence[int],
    shape: DecoderShape,
    bound: float,
    *,
    rounds: int,
    tokens: int,
    say: Callable[[str, int], Callable[[], None]],
) -> Prompts:
    """Measure, of these exits, all that an earlier scan has not.

    Args:
        results: of the scan.
        engines: of vLLM.
        asked: the held-out answers of the whole model, and their prompts.
        exits: how many layers run, of each; fewer than all.
        shape: of the model.
        bound: share of tokens that must stay the whole model's.
        rounds: of each timing.
        tokens: of an answer, at most.
        say: is told of each phase.

    Raises:
        PlanError: the model has not so many layers.

    """
    layers = [shape.num_layers, *sorted({*exits}, reverse=True)]
    plans = {one: exit_plan(one, shape.num_layers) for one in layers}
    known = {(*one.skip,): one for one in results.read(PlanReading) if one.how == "shortened"}
    done = say("answering shortened prompts", len(layers))
    for run, plan in plans.items():
        if (*plan.entries(),) not in known:
            llm = engines.shortening(shape.num_layers)
            known[(*plan.entries(),)] = one = shortened(llm, asked, plan, run, tokens)
            results.append([one])
        done()
    length = round(statistics.median(len(one.prompt) for one in asked))
    times = _times(results, engines, plans, length, rounds, say)
    readings = [known[(*plan.entries(),)] for plan in plans.values()]
    tail = min(TAIL, length) / length
    whole, *others = (
        replace(one, kept=tail + (1 - tail) * one.kept) for one in confirmed(readings, times, shape)
    )
    return verdict(length, whole, dict(zip(layers[1:], others, strict=True)), bound)


def _times(
    results: Results,
    engines: Engines,
    plans: Mapping[int, SkipPlan],
    length: int,
    rounds: int,
    say: Callable[[str, int], Callable[[], None]],
) -> list[StepTime]:
    stage, (whole, *_) = f"first token of {length}", plans

    def timed(batch: int, done: Callable[[], None]) -> list[StepTime]:
        stock, ours = engines.stock(), engines.shortening(whole)
        variants: dict[str, Run] = {STOCK: partial(first_tokens, stock, [None] * batch, length)}
        for run, plan in plans.items():
            arguments: list[Any] = [request(prompt_exit=run)] * batch
            variants[variant_of(plan)] = partial(first_tokens, ours, arguments, length)
        return in_turns(stage, variants, batch, rounds, done)

    found = known_or_timed(
        results,
        stage,
        {STOCK, *map(variant_of, plans.values())},
        rounds,
        lambda batch, turns: say(f"timing first tokens, batch {batch}", turns),
        timed,
    )
    return [one for times in found.values() for one in times]


def verdict(tokens: int, whole: Confirmed, exits: dict[int, Confirmed], bound: float) -> Prompts:
    """Say how far prompts should run: as `scan.verdict` does of plans for answers."""
    layers = whole.plan.num_layers
    doubts = [doubt for one in exits.values() for doubt in against(one, whole)]
    found = Prompts(tokens, whole, exits, None, "", doubts)
    good = [run for run, one in exits.items() if one.agreement.mean >= bound]
    if not good:
        run = max(exits, key=lambda run: exits[run].agreement.mean)
        sentence = (
            f"Read whole prompts: with {run} of {layers} layers {stays(exits[run])} of answer "
            f"tokens stay the whole model's, and {bound:.0%} are wanted"
        )
        return replace(found, sentence=sentence)
    run = min(good, key=lambda run: exits[run].speed.median)
    speed, batch = exits[run].speed, exits[run].batch
    if speed.sure[1] >= 1:
        sentence = (
            f"Read whole prompts: of those exits that keep {bound:.0%} of answer tokens, none is "
            f"surely faster than compiled stock vLLM. The fastest, {run} of {layers} layers, takes "
            f"{speed.median:.2f} of its time to the first token at batch {batch} "
            f"({speed.sure[0]:.2f} to {speed.sure[1]:.2f})"
        )
        return replace(found, sentence=sentence)
    if doubtful := [d for d in against(exits[run], whole) if d.kind in ("faster", "better")]:
        sentence = f"Read whole prompts for now. {doubtful[0].text.removesuffix('.')}"
        return replace(found, sentence=sentence)
    sentence = (
        f"Prompts may stop after {run} of {layers} layers: {1 - speed.median:.0%} less time to the "
        f"first token at batch {batch} than compiled stock vLLM ({1 - speed.sure[1]:.0%} to "
        f"{1 - speed.sure[0]:.0%}), {stays(exits[run])} of answer tokens stay the whole model's"
    )
    return replace(found, sentence=sentence, chosen=run)
