# SPDX-License-Identifier: Apache-2.0
"""The residual stream of a step, and the rows of it that are being worked on."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from vllm_adaskip.classifiers import Stream
from vllm_adaskip.engine.step import Part, Tokens


class Shown(Protocol):
    """What wants to know which rows are being worked on."""

    def show(self, tokens: Tokens | None, device: torch.device) -> None:
        """Take which tokens of the step the next layer works on; None: all."""


class Window:
    """The residual stream of a step, and the rows of it that a sub-layer works on.

    Rows are gathered when other tokens run the next sub-layer, and put back when they
    have run theirs.

    Attributes:
        stream: of the tokens that are shown.
        part: those tokens; None: all.

    """

    def __init__(self, stream: Stream, positions: Tensor, told: Shown | None = None) -> None:
        """Take the stream before the first sub-layer, and ``[tokens]`` positions.

        ``told`` is told of the tokens that are shown: adapters of requests, or taught layers.
        """
        self._told = told
        self.stream = self._whole = stream
        self.part: Part | None = None
        self._positions = self._own = positions
        self._of: Part | None = None

    @property
    def positions(self) -> Tensor:
        """Positions of the tokens that are shown."""
        if self._of is not self.part:
            whole, self._of = self._positions, self.part
            self._own = whole if self._of is None else rows(whole, self._of.on(whole.device))
        return self._own

    def show(self, part: Part | None) -> None:
        """Show other tokens; None: all."""
        if part is self.part:
            return
        device = self.stream.update.device
        whole = self.stream
        if self.part is not None:
            whole = scatter(self._whole, self.part.on(device), self.stream)
        self.part, self._whole = part, whole
        self.stream = whole if part is None else gather(whole, part.on(device))
        self.adapt(part)

    def adapt(self, tokens: Tokens | None) -> None:
        """Have the next layer take some tokens' weights; None: those of all."""
        if self._told is not None:
            self._told.show(tokens, self._positions.device)

    def of(self, tokens: Tokens) -> Stream:
        """Return the stream of some of the tokens that are shown; a copy, or a view."""
        return gather(self.stream, tokens.places(self.part).on(self.stream.update.device))

    def passing(self, tokens: Tokens) -> tuple[Tensor, Stream]:
        """Return positions and stream, copied, of tokens that are not shown; all may be."""
        index = tokens.on(self.stream.update.device)
        update, before = gather(self.stream if self.part is None else self._whole, index)
        if isinstance(index, slice):  # a view, and vLLM's norms work in place
            update, before = update.clone(), None if before is None else before.clone()
        return rows(self._positions, index), Stream(update, before)


def gather(stream: Stream, tokens: slice | Tensor) -> Stream:
    """Return some tokens' rows: copies, of a slice views."""
    update, before = stream
    return Stream(rows(update, tokens), None if before is None else rows(before, tokens))


def rows(values: Tensor, tokens: slice | Tensor) -> Tensor:
    """Return some rows of a tensor ``[tokens, ...]``."""
    # Plain indexing does the same, but takes twice as long to find out what is asked for.
    return values[tokens] if isinstance(tokens, slice) else values.index_select(0, tokens)


def scatter(stream: Stream, tokens: slice | Tensor, part: Stream) -> Stream:
    """Put a part's rows back; before any sub-layer has run the others' pair is (0, stream)."""
    update, before = stream
    if before is None:
        update, before = torch.zeros_like(update), update.clone()
    assert part.before is not None  # a sub-layer has run
    for whole, own in ((update, part.update), (before, part.before)):
        if isinstance(tokens, slice):
            whole[tokens] = own
        else:
            whole.index_copy_(0, tokens, own)
    return Stream(update, before)
