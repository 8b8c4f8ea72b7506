# SPDX-License-Identifier: Apache-2.0
"""Whether plans pay on this machine: what steps take, and which sequences run dense.

Pure: arrays and seconds, no vLLM. `probes.py` says what is timed at start-up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # which imports torch
    from vllm_adaskip.engine.step import Bools, Ints

Floats = NDArray[np.float64]
#: How a step runs: stock vLLM's own forward, a known plan's compiled body, or the loop.
Kind = Literal["dense", "known", "loop"]
KINDS: tuple[Kind, ...] = ("dense", "known", "loop")
#: What becomes of a sequence, see `Guard.sequences`.
VERDICTS = ("followed", "slower", "margin")
#: What is timed, each at all sizes; the bodies of known plans follow.
PARTS = ("dense", "ends", "attention", "mlp", "passing", "regroup")

#: Rows of the steps that are timed; between them times are interpolated, beyond the last extended.
SIZES = (1, 4, 16, 64)
#: Turns of each; the fastest counts, as whatever disturbs a step only adds to it.
TURNS = 4
#: What plans must save of a dense step before they are followed again. Once they are, they are
#: followed until they cost more than it, so that a batch near the limit does not flap.
AGAIN = 0.03
#: How far one step moves what was measured while serving, the first ones further; and by what
#: factor it counts at most.
RATE, FAR = 1 / 16, 1.5
#: What steps of the loop are taken to take over what was measured, until some were seen: attention
#: over the KV cache and the planning of a step are not in it, and never slower is what is promised.
DOUBT = 1.25
#: Steps after which a sort that did not run is taken to change as the one that does, and how fast
#: what was seen of it is then forgotten, so that what was disturbed once is tried again.
STALE, FORGET = 64, 1 / 1024
#: Sorts of steps whose times are learnt apart: kind, up to how many rows, what share is left out.
#: What the table reckons wrong of one sort says nothing of another.
SHARES = 5
SORTS = (len(KINDS), len(SIZES) + 1, SHARES)
Sort = tuple[int, int, int]


class Costs:
    """What a step's forward takes, by what its rows leave out.

    Attributes:
        table: ``[parts, sizes]`` seconds: `PARTS`, of attention, MLP and K/V that are projected in
            passing for one layer, of a regroup for one; then the known plans.

    """

    def __init__(self, sizes: Sequence[int], table: Floats, known: Sequence[Bools]) -> None:
        """Take a table; ``known`` are the masks ``[2 * num_layers]`` of its last rows."""
        self.table = table
        self._sizes = np.array(sizes)
        self._of = dict(zip(PARTS, table, strict=False))
        bodies = table[len(PARTS) :]
        self._known = {mask.tobytes(): row for mask, row in zip(known, bodies, strict=True)}

    def step(self, skips: Bools) -> tuple[Kind, float]:
        """Return how rows that leave out ``[rows, 2 * num_layers]`` run, and how many seconds."""
        rows = len(skips)
        if not skips.any():
            return "dense", float(self._at("dense", rows))
        if (known := self._known.get(skips[0].tobytes())) is not None and (skips == skips[0]).all():
            return "known", float(at_rows(self._sizes, known, rows))
        runs = rows - skips.sum(axis=0)
        attention, mlp = runs[0::2], runs[1::2]
        seconds = self._at("ends", rows) + self._at("regroup", rows) * _regroups(skips, runs)
        for part, each in (("attention", attention), ("mlp", mlp), ("passing", rows - attention)):
            seconds = seconds + self._at(part, each).sum()
        return "loop", float(seconds)

    def _at(self, part: str, rows: Ints | int) -> Floats:
        return at_rows(self._sizes, self._of[part], rows)


def at_rows(sizes: Ints, seconds: Floats, rows: Ints | int) -> Floats:
    """Return what so many rows take, by ``[sizes]`` seconds; beyond the last size extended."""
    found: Floats = np.interp(rows, [0, *sizes], [0.0, *seconds])
    if len(sizes) > 1:
        slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
        found = found + np.maximum(np.asarray(rows) - sizes[-1], 0) * slope
    return found


def _regroups(skips: Bools, runs: Ints) -> int:
    """Count sub-layers that other rows run than the one before, of those that any row runs."""
    launched = skips[:, runs > 0]
    before = np.zeros_like(launched)
    before[:, 1:] = launched[:, :-1]
    return int((launched != before).any(axis=0).sum())


def sort_of(kind: Kind, skips: Bools) -> Sort:
    """Return the sort of a step whose rows leave out ``[rows, 2 * num_layers]``."""
    rows = int(np.searchsorted(SIZES, len(skips)))
    return KINDS.index(kind), rows, round(float(skips.mean()) * (SHARES - 1))


def measured(runs: Callable[[int], Sequence[Callable[[], Any]]], sizes: Sequence[int]) -> Floats:
    """Time, for each size, what ``runs`` returns for it.

    Returns:
        ``[runs, sizes]`` seconds.

    """
    columns = []
    for size in sizes:
        own = runs(size)
        turns = [[_seconds(run) for run in own] for _ in range(TURNS)]
        columns.append(np.min(turns, axis=0))
    table = np.array(columns).T
    # More rows never take less: what says so was disturbed at fewer.
    found: Floats = np.minimum.accumulate(table[:, ::-1], axis=1)[:, ::-1]
    return found


def _seconds(run: Callable[[], Any]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


class Guard:
    """Says of sequences whose plan a method decided whether they follow it, or run dense.

    Attributes:
        costs: measured at start-up; None: not yet.
        seconds: that measuring took.
        factors: shaped `SORTS`, what steps of each sort take while serving, over `costs`.
        sequences: that entered, by what became of them: ``followed`` their plan, or dense
            because it would be ``slower``, or save less than `AGAIN` where plans were not followed.

    """

    def __init__(
        self, costs: Callable[..., Costs], of_rank_0: Callable[[Floats], Floats] = np.array
    ) -> None:
        """Take what measures costs, and what returns rank 0's values on all ranks."""
        self.costs: Costs | None = None
        self.seconds = 0.0
        self._measured, self._of_rank_0 = costs, of_rank_0
        self.factors = np.ones(SORTS)
        self.factors[KINDS.index("loop")] = DOUBT
        self.sequences = dict.fromkeys(VERDICTS, 0)
        self._follows = True
        self._last: dict[str, float | int] = {}
        self._steps = 0
        self._seen = np.zeros(SORTS, dtype=np.int64)
        self._times = np.ones(SORTS, dtype=np.int64)
        self._runs: Bools | None = None
        self._reckoned: tuple[Sort, float] = (0, 0, 0), 0.0

    def measure(self, *inputs: Any) -> None:
        """Measure costs, once; on the inputs of a warm-up, or without any."""
        if self.costs is None:
            start = perf_counter()
            self.costs = self._measured(*inputs)
            self.seconds = perf_counter() - start

    def admits(self, wanted: Bools, least: Bools, waiting: int) -> bool:
        """Return whether sequences that wait now follow their plans; the others keep theirs.

        Args:
            wanted: ``[rows, 2 * num_layers]`` what the batch leaves out if all sequences whose
                plan a method decided follow it.
            least: the same if none of them does.
            waiting: sequences that this is asked for.

        """
        self.measure()
        assert self.costs is not None
        self.factors = self._of_rank_0(self.factors)
        planned, dense = (self.expected(each) for each in (wanted, least))
        limit = dense if self._follows else dense * (1 - AGAIN)
        self._follows = planned <= limit
        self._last = {"rows": len(wanted), "planned": planned, "dense": dense}
        reason = "followed" if self._follows else "slower" if planned > dense else "margin"
        self.sequences[reason] += waiting
        return self._follows

    def expected(self, skips: Bools) -> float:
        """Return what a step will take whose rows leave out ``[rows, 2 * num_layers]``."""
        sort, seconds = self._reckon(skips)
        return float(seconds * self.factors[sort])

    def _reckon(self, skips: Bools) -> tuple[Sort, float]:
        assert self.costs is not None
        kind, seconds = self.costs.step(skips)
        return sort_of(kind, skips), seconds

    def saw(self, runs: Bools, seconds: float) -> None:
        """Learn from a step in which all rows decode and run ``[rows, 2 * num_layers]``.

        The same array stands for the same step, as long as no row changes.
        """
        if self.costs is None:
            return
        if runs is not self._runs:
            self._runs, self._reckoned = runs, self._reckon(~runs)
        sort, reckoned = self._reckoned
        old = self.factors[sort]
        now = np.clip(seconds / reckoned, old / FAR, old * FAR)
        self._steps += 1
        self._seen[sort] = self._steps
        self._times[sort] += 1
        rate = max(RATE, 1 / self._times[sort])
        self.factors[sort] = new = old + rate * (now - old)
        # What moves a sort that was just met is what had been reckoned wrong of it, no drift.
        stale = (self._steps - self._seen > STALE) & (rate == RATE)
        unseen = self._seen == 0
        if KINDS[sort[0]] == "loop":  # which says nothing of steps that run compiled
            unseen[: KINDS.index("loop")] = False
        self.factors[stale | unseen] *= new / old
        self.factors[stale] += FORGET * (new - self.factors[stale])

    def report(self) -> dict[str, Any]:
        """Return what became of sequences, and what that rests on; times in milliseconds.

        ``factors`` has, of each kind, that of the sort which ran last.
        """
        last = {
            key: value if key == "rows" else round(1e3 * value, 3)
            for key, value in self._last.items()
        }
        factors = {
            kind: round(float(own.flat[seen.argmax()]), 3) if seen.any() else 1.0
            for kind, own, seen in zip(KINDS, self.factors, self._seen, strict=True)
        }
        return {
            **self.sequences,
            "measured_seconds": round(self.seconds, 3),
            "factors": factors,
            "last": last,
        }
