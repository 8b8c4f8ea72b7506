# SPDX-License-Identifier: Apache-2.0
"""The tokens of one step: whose they are, and parts of them.

Pure: made from arrays, without vLLM. Tokens of a step are flattened, row after row, as
vLLM does; a row's query is its new tokens, prompt tokens first, generated tokens last
(both at once only when a preempted request comes back).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a step come from; one entry per row of the batch.

    After some tokens have left in the middle of a step (`split`) a row may have several entries.

    Attributes:
        query_lens: ``[rows]`` new tokens of the row in this step.
        generated: ``[rows]`` how many of these, the last ones, are generated tokens; the
            others belong to the prompt.
        following: ``[rows]`` how many, the last ones, leave out what their entry's plan says;
            None: the generated ones.
        rows: ``[rows]`` the batch row of each entry; None: there is one entry for each.
        behind: ``[rows]`` tokens of the row's query that lie behind the entry; None with ``rows``.

    """

    query_lens: IntArray
    generated: IntArray
    following: IntArray | None = None
    rows: IntArray | None = None
    behind: IntArray | None = None

    @classmethod
    def of(cls, query_start_loc: IntArray, seq_lens: IntArray, prompt_lens: IntArray) -> Layout:
        """Split each row's query at the end of its prompt.

        Args:
            query_start_loc: ``[rows + 1]`` start of each row's tokens in the step.
            seq_lens: ``[rows]`` tokens of the sequence, this step's included.
            prompt_lens: ``[rows]`` tokens of the prompt.

        """
        # Plain ufuncs: this runs in every step, and np.diff and np.clip cost twice as much.
        query_lens = query_start_loc[1:] - query_start_loc[:-1]
        past_prompt = np.maximum(seq_lens - prompt_lens, 0)
        return cls(query_lens, np.minimum(past_prompt, query_lens))

    def split(self, leaving: BoolArray) -> tuple[Layout, IntArray]:
        """Cut entries wherever tokens that leave meet tokens that stay.

        So what the backend sees of a row stays a run of its tokens, each of which attends to all
        before it in the cache, wherever the others have gone.

        Args:
            leaving: ``[tokens]``, True where a token leaves out all that its new entry's plan says.

        Returns:
            The new entries, and of each the old one that it was cut from.

        """
        ends = np.cumsum(self.query_lens)
        entry = np.repeat(np.arange(len(ends)), self.query_lens)
        is_first = np.ones(len(entry), dtype=np.bool_)
        is_first[1:] = (entry[1:] != entry[:-1]) | (leaving[1:] != leaving[:-1])
        starts = np.flatnonzero(is_first)
        lengths = np.diff(starts, append=len(entry))
        source = entry[starts]
        tail = ends[source] - starts - lengths  # what was cut off behind
        generated, following = (
            np.clip(last[source] - tail, 0, lengths)
            for last in (
                self.generated,
                self.generated if self.following is None else self.following,
            )
        )
        following = np.where(leaving[starts], lengths, following)
        if self.rows is None or self.behind is None:
            return Layout(lengths, generated, following, source, tail), source
        behind = tail + self.behind[source]
        return Layout(lengths, generated, following, self.rows[source], behind), source

    def equals(self, other: Layout) -> bool:
        """Tell whether both split the same rows in the same way."""
        return np.array_equal(self.query_lens, other.query_lens) and np.array_equal(
            self.generated, other.generated
        )


class Tokens:
    """The tokens that go through a sub-layer when not all of the step do.

    Attributes:
        tokens: index of these tokens in the step, a slice where they lie together and an
            int64 tensor where they do not.
        num_tokens: how many.

    """

    _elsewhere: torch.Tensor | None = None

    def __init__(self, tokens: IntArray) -> None:
        """Take the ascending indices of at least one token."""
        self.num_tokens = len(tokens)
        first, last = int(tokens[0]), int(tokens[-1])
        together = last - first + 1 == self.num_tokens
        self.tokens = slice(first, last + 1) if together else torch.from_numpy(tokens)

    def on(self, device: torch.device) -> slice | torch.Tensor:
        """Give `tokens` as an index of tensors on a device, copied there once."""
        if isinstance(self.tokens, slice) or self.tokens.device == device:
            return self.tokens
        if self._elsewhere is None or self._elsewhere.device != device:
            self._elsewhere = self.tokens.to(device)
        return self._elsewhere

    @property
    def index(self) -> slice | IntArray:
        """The same index for arrays on the host."""
        return self.tokens if isinstance(self.tokens, slice) else self.tokens.numpy()


class Subset(Tokens):
    """Such tokens with what the backend's attention must know of them.

    Attributes:
        rows: int64 tensor ``[kept rows]``, batch rows with at least one such token; one that
            was split may come several times.
        query_start_loc: int32 tensor ``[kept rows + 1]``, their start in the sub-batch.
        max_query_len: the longest query among them.
        dropped: int32 tensor ``[kept rows]``, tokens of the row's query behind those kept; what
            is kept is the beginning of the query, or of a part of it.

    """

    def __init__(self, layout: Layout, skipping: BoolArray) -> None:
        following = layout.generated if layout.following is None else layout.following
        dropped = np.where(skipping, following, 0)
        kept = layout.query_lens - dropped
        rows = np.flatnonzero(kept)
        starts = (np.cumsum(layout.query_lens) - layout.query_lens)[rows]
        query_start_loc = np.concatenate(([0], np.cumsum(kept[rows])))
        self.num_tokens = int(query_start_loc[-1])
        self.tokens = _token_index(starts, kept[rows], query_start_loc)
        self.rows = torch.from_numpy(rows if layout.rows is None else layout.rows[rows])
        self.query_start_loc = torch.from_numpy(query_start_loc.astype(np.int32))
        self.max_query_len = int(kept.max(initial=0))
        behind = dropped[rows] if layout.behind is None else (dropped + layout.behind)[rows]
        self.dropped = torch.from_numpy(behind.astype(np.int32))


def _token_index(
    starts: IntArray, lengths: IntArray, query_start_loc: IntArray
) -> slice | torch.Tensor:
    """Index of the tokens ``starts[i] .. starts[i] + lengths[i]`` of every row ``i``."""
    if len(starts) and np.array_equal(starts[1:], starts[:-1] + lengths[:-1]):
        return slice(int(starts[0]), int(starts[-1] + lengths[-1]))
    offsets = np.repeat(starts - query_start_loc[:-1], lengths)
    return torch.from_numpy(offsets + np.arange(query_start_loc[-1]))


def generated_tokens(layout: Layout, rows: BoolArray) -> slice | torch.Tensor:
    """Index in the step of the generated tokens of some rows, as in `Subset`."""
    lengths = np.where(rows, layout.generated, 0)
    chosen = np.flatnonzero(lengths)
    starts = (np.cumsum(layout.query_lens) - lengths)[chosen]
    query_start_loc = np.concatenate(([0], np.cumsum(lengths[chosen])))
    return _token_index(starts, lengths[chosen], query_start_loc)
