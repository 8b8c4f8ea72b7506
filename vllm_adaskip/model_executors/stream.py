# SPDX-License-Identifier: Apache-2.0
"""The residual stream as a pair of tensors, and some tokens' rows of it."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_adaskip.engine.scaling import Scaling

#: ``(update, before)``, each ``[tokens, hidden]``; before the first sub-layer ``(stream, None)``.
Stream = tuple[Tensor, Tensor | None]


def scale(stream: Stream, scaling: Scaling) -> None:
    """Multiply some rows of both halves of the stream, in place as vLLM's norms are."""
    for half in stream:
        if half is not None:
            half[scaling.tokens] *= scaling.factors.to(half.device)


def pair(stream: Stream, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Give ``(before, update)`` of some tokens, copied, once a sub-layer has run."""
    update, before = gather(stream, tokens)
    assert before is not None
    return before, update


def gather(stream: Stream, tokens: slice | Tensor) -> Stream:
    """Give some tokens' rows: copies, of a slice views."""
    update, before = stream
    return rows(update, tokens), None if before is None else rows(before, tokens)


def rows(values: Tensor, tokens: slice | Tensor) -> Tensor:
    """Give some rows of a tensor ``[tokens, ...]``."""
    # Plain indexing does the same, but takes twice as long to find out what is asked for.
    if isinstance(tokens, slice):
        return values[tokens]
    return values.index_select(0, tokens.to(values.device))


def scatter(stream: Stream, tokens: slice | Tensor, part: Stream) -> Stream:
    """Put the part's rows back; before any sub-layer has run the others' pair is (0, stream)."""
    update, before = stream
    if before is None:
        update, before = torch.zeros_like(update), update.clone()
    part_update, part_before = part
    assert part_before is not None  # a sub-layer has run
    for whole, rows in ((update, part_update), (before, part_before)):
        if isinstance(tokens, slice):
            whole[tokens] = rows
        else:
            whole.index_copy_(0, tokens, rows)
    return update, before
