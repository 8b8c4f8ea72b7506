# SPDX-License-Identifier: Apache-2.0
"""One forward: which tokens go through which sub-layers. Pure: arrays, no vLLM.

vLLM lays the tokens of a step out sequence after sequence. A *span* is a run of consecutive
tokens of one sequence that share their fate, so ``runs[span, sub_layer]`` says it all. It is set
when the step begins, and afterwards only cleared. Everything else is read from it: what attention
must be told, which tokens pass a sub-layer by, what K/V to fill in, and what is counted.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Tokens:
    """Some tokens of a step.

    Attributes:
        count: how many.
        index: of arrays, a slice where the tokens lie together, else int64 ``[count]``.

    """

    def __init__(self, tokens: Ints) -> None:
        """Take ascending positions in the step."""
        self.count = len(tokens)
        together = not self.count or int(tokens[-1] - tokens[0]) + 1 == self.count
        start = int(tokens[0]) if self.count else 0
        self.index = slice(start, start + self.count) if together else tokens
        self._on: torch.Tensor | None = None

    @property
    def positions(self) -> Ints:
        """The positions, int64 ``[count]``."""
        index = self.index
        return np.arange(index.start, index.stop) if isinstance(index, slice) else index

    def on(self, device: torch.device) -> slice | torch.Tensor:
        """Return `index` for tensors on a device, copied there once."""
        if isinstance(self.index, slice):
            return self.index
        if self._on is None or self._on.device != device:
            self._on = torch.from_numpy(self.index).to(device)
        return self._on

    def places(self, of: Tokens | None) -> Tokens:
        """Return where these tokens lie among others that hold them; None: among all."""
        return self if of is None else Tokens(np.searchsorted(of.positions, self.positions))


class Part(Tokens):
    """The tokens that run a sub-layer, as the backend's attention must be told of them.

    Spans that touch become one *entry*, a sequence of its own to the backend. A sequence has
    several entries where tokens between them leave the sub-layer out.

    Attributes:
        rows: ``[entries]`` row of the batch.
        starts: int32 tensor ``[entries + 1]``, where each entry starts among these tokens.
        behind: ``[entries]`` tokens of the row's query behind the entry.
        longest: tokens of the longest entry.

    """

    def __init__(self, tokens: Ints, rows: Ints, starts: Ints, behind: Ints) -> None:
        super().__init__(tokens)
        self.rows = rows
        self.starts = torch.from_numpy(starts.astype(np.int32))
        self.behind = behind
        self.longest = int((starts[1:] - starts[:-1]).max(initial=0))


NOBODY = Part(*(np.zeros(n, dtype=np.int64) for n in (0, 0, 1, 0)))


class Step:
    """Spans x sub-layers of one forward.

    Sub-layers are in running order: attention ``2 * l`` and MLP ``2 * l + 1`` of layer ``l``.

    Attributes:
        row: ``[spans]`` row of the batch.
        length: ``[spans]`` tokens.
        behind: ``[spans]`` tokens of the row's query behind the span.
        generated: ``[spans]`` True for generated tokens, False for a prompt's.
        shortened: ``[spans]`` True for a prompt's tokens under a prompt plan, whose K/V later
            tokens read in every layer.
        runs: ``[spans, 2 * num_layers]``, True where the span runs the sub-layer. Change it by
            `leave` alone.
        num_tokens: tokens of the step.
        num_generated: generated tokens among them.

    """

    def __init__(
        self,
        row: Ints,
        length: Ints,
        behind: Ints,
        generated: Bools,
        runs: Bools,
        shortened: Bools | None = None,
    ) -> None:
        self.row, self.length, self.behind, self.generated = row, length, behind, generated
        self.shortened = np.zeros_like(generated) if shortened is None else shortened
        # One sub-layer's column is read far more often than one span's row.
        self.runs = np.ascontiguousarray(runs.T).T
        self.num_tokens = int(length.sum())
        self.num_generated = int(length[generated].sum())
        self._columns: dict[bytes, Part | None] = {}
        self._parts: list[Part | Literal["?"] | None] = ["?"] * runs.shape[1]
        self._counted: Ints | None = None
        self._starts: Ints | None = None
        self._leaving: Bools | None = None

    @classmethod
    def of(
        cls,
        query_start_loc: Ints,
        seq_lens: Ints,
        prompt_lens: Ints,
        skips: Bools,
        prompt_skips: Bools | None = None,
        shortened: tuple[Ints, Bools] | None = None,
    ) -> Step:
        """Lay out a step.

        Args:
            query_start_loc: ``[rows + 1]`` where each row's tokens start.
            seq_lens: ``[rows]`` tokens of the sequence, this step's included.
            prompt_lens: ``[rows]`` tokens of its prompt.
            skips: ``[rows, 2 * num_layers]`` what the row's generated tokens leave out.
            prompt_skips: the same for prompt tokens; None: these run everything.
            shortened: ``[rows]`` the first position of each prompt whose token is under no prompt
                plan, and ``[rows, 2 * num_layers]`` what the tokens before leave out; None: there
                are no prompt plans.

        """
        # Plain ufuncs: this runs whenever the batch changes, and np.diff takes twice as long.
        query = query_start_loc[1:] - query_start_loc[:-1]
        new = np.minimum(np.maximum(seq_lens - prompt_lens, 0), query)
        rows = np.arange(len(query))
        if (new == query).all():
            return cls(rows, query, np.zeros_like(query), np.ones(len(query), bool), ~skips)
        short = np.zeros_like(new)
        left_out = np.zeros((len(rows), 3, skips.shape[1]), dtype=np.bool_)
        left_out[:, 2] = skips
        if prompt_skips is not None:
            left_out[:, :2] = prompt_skips[:, None]
        if shortened is not None:
            short = np.clip(shortened[0] - (seq_lens - query), 0, query - new)
            left_out[:, 0] |= shortened[1]
        # Of each row the shortened tokens of its prompt, the others, and generated ones.
        length = np.stack((short, query - new - short, new), axis=1)
        behind = query[:, None] - length.cumsum(axis=1)
        is_there = length > 0
        row, kind = is_there.nonzero()
        runs = ~left_out[is_there]
        return cls(row, length[is_there], behind[is_there], kind == 2, runs, kind == 0)

    @classmethod
    def of_one_plan(cls, left_out: Bools, rows: int) -> Step:
        """Lay out a step in which every row decodes and leaves out ``[2 * num_layers]``."""
        return cls.of_decodes(np.tile(left_out, (rows, 1)))

    @classmethod
    def of_decodes(cls, skips: Bools) -> Step:
        """Lay out a step of one generated token a row; ``[rows, 2 * num_layers]`` is left out."""
        rows = len(skips)
        ones = np.ones(rows, dtype=np.int64)
        return cls.of(np.arange(rows + 1), ones + 1, ones, skips)

    def fork(self) -> Step:
        """Return a step of its own with the same spans, for a forward that may clear some."""
        runs, shortened = self.runs.copy(), self.shortened.copy()
        other = Step(self.row, self.length, self.behind, self.generated, runs, shortened)
        other._columns, other._parts = self._columns.copy(), self._parts.copy()
        return other

    @property
    def starts(self) -> Ints:
        """``[spans]`` position of each span's first token in the step."""
        if self._starts is None:
            self._starts = np.cumsum(self.length) - self.length
        return self._starts

    @property
    def leaving(self) -> Bools:
        """``[tokens]`` whose plan leaves something out; the same array each time."""
        if self._leaving is None:
            self._leaving = np.repeat(~self.runs.all(axis=1), self.length)
        return self._leaving

    @property
    def is_dense(self) -> bool:
        """Whether every token runs every sub-layer."""
        return bool(self.runs.all())

    @property
    def counted(self) -> Ints:
        """``[2 * num_layers]`` generated tokens that run each sub-layer."""
        if self._counted is None:
            self._counted = (self.length * self.generated) @ self.runs
        return self._counted

    def part(self, sub_layer: int) -> Part | None:
        """Return the tokens that run a sub-layer; None: all. One object for the same tokens."""
        part = self._parts[sub_layer]
        if part == "?":
            column = self.runs[:, sub_layer]
            key = column.tobytes()
            if key not in self._columns:
                self._columns[key] = self._part(column)
            part = self._parts[sub_layer] = self._columns[key]
        return part

    @property
    def attention_parts(self) -> list[Part | None]:
        """The tokens that run the attention of each layer, as `part`."""
        return [self.part(sub_layer) for sub_layer in range(0, self.runs.shape[1], 2)]

    def tokens(self, spans: Bools) -> Tokens:
        """Return the tokens of some spans."""
        (chosen,) = spans.nonzero()
        return Tokens(ranges(self.starts[chosen], self.length[chosen]))

    @property
    def is_shortened(self) -> bool:
        """Whether there are tokens under a prompt plan."""
        return bool(self.shortened.any())

    def passing(self, sub_layer: int, *, generated: bool = True) -> Tokens:
        """Return the tokens that leave a sub-layer out and whose K/V may be read.

        Those under a prompt plan, and with ``generated`` those too.
        """
        read = self.shortened | self.generated if generated else self.shortened
        return self.tokens(read & ~self.runs[:, sub_layer])

    def span_of(self, tokens: Ints) -> Ints:
        """Return the span of each token."""
        return np.searchsorted(self.starts, tokens, side="right") - 1

    def prompt_ends(self, seq_lens: Ints, prompt_lens: Ints) -> tuple[Ints, Ints]:
        """Return the rows whose prompt becomes complete here, and their last prompt tokens."""
        ends = seq_lens[self.row] - self.behind == prompt_lens[self.row]
        (spans,) = ends.nonzero()
        return self.row[spans], (self.starts + self.length)[spans] - 1

    def leave(self, tokens: Ints, left_out: Bools) -> None:
        """Have tokens leave out sub-layers that are still to run; spans are cut where they must.

        Args:
            tokens: ``[leaving]`` positions in the step.
            left_out: ``[leaving, 2 * num_layers]``.

        """
        spans = self.span_of(tokens)
        if (self.length[spans] > 1).any():
            self._cut(tokens, left_out)
            spans = self.span_of(tokens)
            self._parts = ["?"] * len(self._parts)
        self.runs[spans] &= ~left_out
        self.shortened[spans] = False  # no token reads a prompt that stops for good
        self._counted = None
        for sub_layer in np.flatnonzero(left_out.any(axis=0)).tolist():
            self._parts[sub_layer] = "?"

    def _cut(self, tokens: Ints, left_out: Bools) -> None:
        """Cut spans so that the tokens of each leave out the same."""
        fate = np.zeros((self.num_tokens, left_out.shape[1]), dtype=np.bool_)
        fate[tokens] = left_out
        span = np.repeat(np.arange(len(self.length)), self.length)
        opens = np.ones(self.num_tokens, dtype=np.bool_)
        opens[1:] = (span[1:] != span[:-1]) | np.any(fate[1:] != fate[:-1], axis=1)
        (starts,) = opens.nonzero()
        source, length = span[starts], np.diff(starts, append=self.num_tokens)
        ends = (self.starts + self.length)[source]
        self.behind = self.behind[source] + ends - starts - length
        self.row, self.generated = self.row[source], self.generated[source]
        self.shortened = self.shortened[source]
        self.length, self._starts = length, starts
        self.runs = np.ascontiguousarray(self.runs.T[:, source]).T

    def _part(self, column: Bools) -> Part | None:
        if column.all():
            return None
        (spans,) = column.nonzero()
        if not len(spans):
            return NOBODY
        starts, row, length = self.starts[spans], self.row[spans], self.length[spans]
        opens = np.ones(len(spans), dtype=np.bool_)
        opens[1:] = (row[1:] != row[:-1]) | (starts[1:] != starts[:-1] + length[:-1])
        (first,) = opens.nonzero()
        last = np.append(first[1:], len(spans)) - 1
        stops = np.cumsum(length)
        entries = np.concatenate(([0], stops[last]))
        return Part(ranges(starts, length), row[first], entries, self.behind[spans][last])


def ranges(starts: Ints, lengths: Ints) -> Ints:
    """Return ``starts[i] .. starts[i] + lengths[i]`` of every ``i``, one after the other."""
    stops = np.cumsum(lengths)
    total = int(stops[-1]) if len(stops) else 0
    if total == len(lengths) and (lengths == 1).all():
        return starts
    found: Ints = np.repeat(starts - stops + lengths, lengths) + np.arange(total)
    return found
