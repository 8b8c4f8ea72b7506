# SPDX-License-Identifier: Apache-2.0
"""Measures from how many rows on a sub-layer is cheaper run for everybody.

Inside real steps: each layer of a batch is needed by another number of rows, and every sub-layer
that some need is run both ways, one after the other in either order, on copies of the stream.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import numpy as np
from scipy.stats import theilslopes

from vllm_adaskip.classifiers import SkipPlan
from vllm_adaskip.engine.crossover import Crossover, Kind
from vllm_adaskip.engine.joined_subsets import JoinedSubsets
from vllm_adaskip.engine.layout import Tokens
from vllm_adaskip.engine.step_plan import Segment
from vllm_adaskip.lab.bench.engines import Batch, following

#: Tokens of a step that are measured.
SIZES = (2, 4, 8, 16, 32, 64, 128)
KINDS: tuple[Kind, ...] = ("attention", "mlp", "layer")
#: Tokens of each sequence's prompt.
CONTEXT = 64
#: Kind, tokens that need it -> seconds gathered, seconds run for all; of each turn.
Times = dict[tuple[Kind, int], list[tuple[float, float]]]


def measure(
    llm: Any, sizes: tuple[int, ...] = SIZES, *, steps: int = 40, context: int = CONTEXT
) -> Iterator[tuple[int, Times]]:
    """Give for each size of step what its sub-layers took both ways, after so long prompts."""
    (layers,) = llm.apply_model(lambda model: model.adaskip.report()["num_layers"])
    for size in sizes:
        times: Times = defaultdict(list)
        turns = range(max(1, -(-(size - 1) // layers)))
        for turn, whole in product(turns, (False, True)):
            plans = _graded(layers, size, turn, whole=whole)
            batch = Batch(llm, following(plans), prompt=context, tokens=steps + 4)
            batch.prefill()
            watch = partial(_watch, batch=batch, steps=steps, times=times, whole=whole)
            llm.apply_model(watch)
            batch.end()
        yield size, times


def _watch(model: Any, batch: Batch, steps: int, times: Times, *, whole: bool) -> None:
    with _Both(model, times, whole=whole).watching():
        for _ in range(steps):
            batch.step()


def crossover(measured: dict[int, Times], context: int = CONTEXT) -> Crossover:
    """Give the table: a line through the advantage of a gather over the rows, and its zero."""
    rows = {
        kind: tuple(
            (size, _first(size, advantages(times, kind))) for size, times in measured.items()
        )
        for kind in KINDS
    }
    return Crossover.model_validate({"context": context, **rows})


def advantages(times: Times, kind: Kind) -> dict[int, float]:
    """Give for numbers of running rows the median of what running all saves, in seconds."""
    return {
        running: statistics.median(gathered - everybody for gathered, everybody in taken)
        for (one, running), taken in sorted(times.items())
        if one == kind
    }


def _first(size: int, advantage: dict[int, float]) -> int:
    """Give from how many rows on running all is cheaper; ``size``, all of them, for never."""
    if len(advantage) == 1:
        ((running, saved),) = advantage.items()
        return running if saved > 0 else size
    # Theil and Sen's line, the median of slopes: a turn that the machine disturbed counts once.
    slope, start, *_ = theilslopes(list(advantage.values()), list(advantage), method="joint")
    if slope <= 0:  # a gather gets no dearer with its rows: all or nothing
        return 1 if start > 0 else size
    return int(np.clip(np.ceil(-start / slope), 1, size))


def _graded(layers: int, size: int, turn: int, *, whole: bool) -> list[SkipPlan]:
    """Give each of ``size`` rows a plan, so that layers are needed by 1 to ``size - 1`` rows.

    The same rows need attention and MLP if ``whole``. They lie anywhere, so that a gather is one.
    Everybody needs the first layer.
    """
    wanted = {1 + one: 1 + (turn * layers + one) % (size - 1) for one in range(layers - 1)}
    plans = []
    for row in np.random.default_rng(turn).permutation(size).tolist():
        attention = sum(1 << layer for layer, need in wanted.items() if row >= need)
        mlp = sum(1 << layer for layer, need in wanted.items() if row >= size - need)
        plans.append(SkipPlan(layers, attention, attention if whole else mlp))
    return plans


class _Both:
    """Runs what some rows of a step need both ways, and keeps the times."""

    def __init__(self, model: Any, times: Times, *, whole: bool) -> None:
        self._model, self._times, self._whole = model, times, whole
        self._run = model._run_segment
        self._batches = model.adaskip._sub_batches
        self._make = self._batches._make_parts
        self._turn = 0
        self._metadata = 0.0  # of a part, in this step

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the steps that are run meanwhile."""
        with (
            patch.object(self._model, "_run_segment", self._segment),
            patch.object(self._batches, "_make_parts", self._make_parts),
        ):
            yield

    def _make_parts(self, joined: JoinedSubsets) -> None:
        start = time.perf_counter()
        self._make(joined)
        self._metadata = (time.perf_counter() - start) / len(joined.subsets)

    def _segment(self, segment: Segment, positions: Any, stream: Any) -> Any:
        if segment.subset is None:
            return self._run(segment, positions, stream)
        parts = [segment.sub_layers] if self._whole else [(one,) for one in segment.sub_layers]
        for sub_layers in parts:
            stream = self._both(sub_layers, segment.subset, positions, stream)
        return stream

    def _both(
        self, sub_layers: tuple[int, ...], subset: Tokens, positions: Any, stream: Any
    ) -> Any:
        others = Tokens(np.delete(np.arange(len(positions)), subset.index))
        ways = [Segment(sub_layers, subset), Segment(sub_layers, subset, others)]
        self._turn += 1
        taken, result = [0.0, 0.0], None
        for way in (0, 1) if self._turn % 2 else (1, 0):
            copied = tuple(None if half is None else half.clone() for half in stream)
            if attention := ways[way].attention:
                self._batches.show(attention, None if way else subset)
            start = time.perf_counter()
            result = self._run(ways[way], positions, copied)
            taken[way] = time.perf_counter() - start
        if ways[0].attention:
            taken[0] += self._metadata
        kind: Kind = "layer" if self._whole else KINDS[sub_layers[0] % 2]
        self._times[kind, subset.num_tokens].append((taken[0], taken[1]))
        return result
