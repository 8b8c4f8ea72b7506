# SPDX-License-Identifier: Apache-2.0
"""Asks a method's gate, in the middle of a forward, what tokens leave out from there on.

A sequence's decision changes no other sequence's plan (isolation). All but the gate's own look at
the stream is host arithmetic on small arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vllm_adaskip.classifiers import Classifier, Gate, Stream
from vllm_adaskip.engine.step import Bools, Ints, Step, Tokens, ranges
from vllm_adaskip.engine.table import SequenceTable

#: Returns the stream of some tokens that ran the last sub-layer.
Show = Callable[[Tokens], Stream]


class Leaving(NamedTuple):
    """Tokens that leave out sub-layers from here on.

    Attributes:
        tokens: ``[leaving]`` positions in the step.
        left_out: ``[leaving, 2 * num_layers]``.

    """

    tokens: Ints
    left_out: Bools


class StepGate:
    """One engine's gate, step by step; it asks about no token if the method has none.

    Scope ``token`` asks about each generated token past the warm-up. Scope ``answer`` asks about
    the last prompt token of a request for one token, and all its prompt tokens of the step obey.

    Attributes:
        scope: see there; None: the method has no gate.
        is_open: whether anybody may be asked about in the step that runs now.

    """

    def __init__(self, gate: Gate | None, classifier: Classifier, table: SequenceTable) -> None:
        self._gate = gate
        self.scope = classifier.gate_scope
        self._gates_attention = classifier.gates_attention
        self._table = table
        self.is_open = False

    @property
    def may_leave_attention(self) -> bool:
        """Whether tokens may leave out attention too in the step that runs now."""
        return self.is_open and self._gates_attention

    def prompt_skips(self, seq_lens: Ints) -> Bools | None:
        """Return what prompt tokens leave out: with scope ``answer``, what the row's plan does.

        ``[rows, 2 * num_layers]``, in the step in which the prompt becomes complete; None: nothing.
        """
        if self.scope != "answer":
            return None
        rows = len(seq_lens)
        complete = self._table.gated[:rows] & (seq_lens >= self._table.prompt_lens[:rows])
        skips: Bools = self._table.skips[:rows] & complete[:, None]
        return skips

    def begin(self, step: Step, seq_lens: Ints) -> None:
        """Find the tokens to ask about in a step; ``[rows]`` tokens of each sequence."""
        self.is_open = False
        gated = self._table.gated[: len(seq_lens)]
        self._is_gated = self.scope is not None and bool(gated.any())
        if not self._is_gated:
            return
        self._past_prompt = seq_lens - self._table.prompt_lens[: len(seq_lens)]
        self._tokens = self._candidates(step, seq_lens, gated)
        spans = step.span_of(self._tokens)
        if self._gates_attention:
            self._deepest = self._planned_depths(step.runs[spans])
        if self._gate is None or not len(self._tokens):
            return
        self.is_open = True
        allowed = None
        if self._table.allowed:
            allowed = [self._table.allowed.get(row) for row in step.row[spans].tolist()]
        self._gate.begin(~step.runs[spans], allowed)

    def after(self, sub_layer: int, step: Step, show: Show) -> Leaving | None:
        """Ask behind a sub-layer, and tell the step; None: no token leaves anything out."""
        assert self._gate is not None
        if sub_layer not in self._gate.sub_layers:
            return None
        runs = step.runs[step.span_of(self._tokens), sub_layer:]
        (asked,) = (runs[:, 0] & runs[:, 1:].any(axis=1)).nonzero()
        if not len(asked):
            return None

        def look(chosen: Bools | None) -> Stream:
            return show(Tokens(self._tokens[asked if chosen is None else asked[chosen]]))

        left_out = self._gate.after(sub_layer, asked, look)
        if left_out is None:
            return None
        left_out[:, : sub_layer + 1] = False  # it has run
        if not self._gates_attention and left_out[:, 0::2].any():
            raise RuntimeError(
                f"vllm-adaskip: {type(self._gate).__name__} leaves out attention, which its method "
                "does not say; set gates_attention of the method to True"
            )
        chosen = left_out.any(axis=1)
        leaving = Leaving(self._tokens[asked[chosen]], left_out[chosen])
        if self.scope == "answer":
            leaving = _whole_prompts(step, leaving)
        step.leave(*leaving)
        return leaving

    def count(self, step: Step) -> None:
        """Count what gated sequences left out in a step, which has run."""
        if not self._is_gated:
            return
        counts, rows = self._table.counts, len(self._past_prompt)
        counts.add_gated(step, self._table.gated[:rows], self._past_prompt)
        if self._gates_attention:
            runs = step.runs[step.span_of(self._tokens)]
            counts.add_exits(_depths(runs), self._deepest)

    def _planned_depths(self, runs: Bools) -> Ints:
        """Return how deep tokens would go unasked; a prompt that its plan stops has exited."""
        if self.scope == "answer":
            return np.full(len(runs), self._table.num_layers)
        return _depths(runs)

    def _candidates(self, step: Step, seq_lens: Ints, gated: Bools) -> Ints:
        prompt_lens = self._table.prompt_lens[: len(seq_lens)]
        if self.scope == "answer":
            rows, tokens = step.prompt_ends(seq_lens, prompt_lens)
            return tokens[gated[rows]]
        assert self._gate is not None
        past_warm_up = (seq_lens - prompt_lens)[step.row] - self._gate.warm_up
        count = np.clip(past_warm_up, 0, step.length) * (step.generated & gated[step.row])
        return ranges(step.starts + step.length - count, count)


def _depths(runs: Bools) -> Ints:
    """Return ``[tokens]``, how many layers there are up to the last that each token runs."""
    layers = runs[:, 0::2] | runs[:, 1::2]
    depths: Ints = layers.shape[1] - layers[:, ::-1].argmax(axis=1)
    return depths


def _whole_prompts(step: Step, leaving: Leaving) -> Leaving:
    """Have all prompt tokens of a row obey what was decided about its last."""
    rows = step.row[step.span_of(leaving.tokens)]
    (spans,) = (np.isin(step.row, rows) & ~step.generated).nonzero()
    tokens = ranges(step.starts[spans], step.length[spans])
    owner = np.searchsorted(rows, step.row[step.span_of(tokens)])
    return Leaving(tokens, leaving.left_out[owner])
