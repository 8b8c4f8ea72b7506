# SPDX-License-Identifier: Apache-2.0
"""Early exits against their meaning, token by token, whatever plans, rows and decisions there are.

The decoder's loop is played here with K/V that say whose they are and of which layer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from vllm_adaskip import SkipPlan
from vllm_adaskip.classifiers import ExitGate
from vllm_adaskip.engine.kv_fill import KV_FILLS
from vllm_adaskip.engine.layout import Layout, Subset
from vllm_adaskip.engine.step_exits import StepExits
from vllm_adaskip.engine.step_plan import Check, Passing, StepPlan
from vllm_adaskip.engine.table import SequenceTable

LAYERS = 4
#: (computed, query, prompt length, left-out sub-layers, gated: depth of the plan, or None)
rows = st.tuples(
    st.integers(0, 6),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(0, (1 << (2 * LAYERS)) - 2),
    st.none() | st.integers(1, LAYERS),
)
batches = st.lists(rows, min_size=1, max_size=7)
checks = st.sets(st.integers(0, LAYERS - 2)).map(lambda layers: tuple(sorted(layers)))
Row = tuple[int, int, int, int, int | None]


class Told(ExitGate):
    """Lets tokens exit as it was told; knows them by their stream."""

    def __init__(self, check_layers: tuple[int, ...], warm_up: int, says: NDArray[Any]) -> None:
        self.check_layers, self.warm_up, self.says = check_layers, warm_up, says

    def begin(self, vocabularies: Sequence[Sequence[int] | None]) -> None:
        self.candidates = len(vocabularies)

    def exits(
        self, layer: int, tokens: NDArray[np.int64], before: Tensor, update: Tensor
    ) -> NDArray[np.bool_]:
        assert (before == update).all() and len(tokens) == len(before)
        assert (tokens < self.candidates).all()
        said: NDArray[np.bool_] = self.says[before[:, 0].numpy(), layer]
        return said


class Cache:
    """Remembers what is written: layer and token -> layer whose K/V they are, and whose token."""

    def __init__(self, tokens: int) -> None:
        self.kept: dict[tuple[int, int], list[int]] = {}
        self._tokens = tokens

    def slots(self) -> Tensor:
        return torch.arange(self._tokens)

    def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        self.write_many(torch.full((len(slots),), layer), key, value, slots)

    def write_many(self, layers: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
        assert (key == value).all() and len(key) == len(slots) == len(layers)
        for layer, token, own in zip(layers.tolist(), slots.tolist(), key.tolist(), strict=True):
            self.kept[layer, token] = own


class Attention(nn.Module):
    def forward(self, query: None, key: Tensor, value: Tensor) -> None:
        pass


@dataclass
class Played:
    """A step that has run."""

    exits: StepExits
    cache: Cache
    ran: dict[int, list[int]] = field(default_factory=dict)  # of each token


def mask_of(row: Row) -> NDArray[np.bool_]:
    *_, bits, depth = row
    if depth is not None:
        return np.arange(2 * LAYERS) >= 2 * depth
    return np.array([bits >> one & 1 for one in range(2 * LAYERS)], dtype=bool)


def play(batch: list[Row], scope: Any, gate: Told, kv_fill: str) -> Played:
    table = SequenceTable(LAYERS, len(batch))
    for row, (_, _, prompt, _, depth) in enumerate(batch):
        table.add(row, SkipPlan(LAYERS), prompt, gated=depth is not None)
        table.skips[row] = mask_of(batch[row])
    computed, query = (np.array([row[i] for row in batch]) for i in range(2))
    starts = np.concatenate(([0], np.cumsum(query)))
    total = int(starts[-1])
    layout = Layout.of(starts, computed + query, table.prompt_lens)
    layers = [Attention() for _ in range(LAYERS)]
    cache = Cache(total)
    fill = KV_FILLS[kv_fill](layers, cache)  # type: ignore[arg-type]
    exits = StepExits(scope, gate, table, fill)
    played = Played(exits, cache, {token: [] for token in range(total)})
    plan = StepPlan.build(
        table.skips, layout, with_passing=fill.wants_passing, checks=exits.arrange(layout)
    )
    exits.begin(computed + query)
    fill.begin(plan, table.skips, layout)
    everything = torch.arange(total)
    position = np.concatenate([np.arange(c, c + q) for c, q in zip(computed, query, strict=True)])
    row_of = np.repeat(np.arange(len(batch)), query)

    def look(tokens: Tensor) -> tuple[Tensor, Tensor]:
        return tokens[:, None], tokens[:, None]

    pieces = deque(plan.pieces)
    while pieces:
        piece = pieces.popleft()
        if isinstance(piece, Check):
            if rest := exits.after(piece.layer, look):
                pieces = deque(rest.pieces)
            continue
        if isinstance(piece, Passing):
            tokens = everything[piece.tokens]
            own = torch.stack((torch.full_like(tokens, piece.layer), tokens), dim=1)
            for token in tokens.tolist():
                assert (piece.layer, token) not in cache.kept
                assert not played.ran[token] or played.ran[token][-1] < 2 * piece.layer
            fill.write(piece, own, own)
            continue
        tokens = everything if piece.subset is None else everything[piece.subset.tokens]
        if piece.subset is not None and piece.attention:
            check_metadata(piece.subset, tokens, computed + query, position, row_of)
        for sub_layer in piece.sub_layers:
            for token in tokens.tolist():
                assert not played.ran[token] or played.ran[token][-1] < sub_layer
                played.ran[token].append(sub_layer)
            if sub_layer % 2 == 0:
                layer = sub_layer // 2
                own = torch.stack((torch.full_like(tokens, layer), tokens), dim=1)
                layers[layer](None, own, own)
                cache.kept |= {(layer, token): [layer, token] for token in tokens.tolist()}
                for token in tokens.tolist():  # it reads all before it
                    first = int(starts[row_of[token]])
                    assert all((layer, one) in cache.kept for one in range(first, token))
    fill.finish()
    exits.finish()
    return played


def check_metadata(
    subset: Subset,
    tokens: Tensor,
    seq_lens: NDArray[Any],
    position: NDArray[Any],
    row_of: NDArray[Any],
) -> None:
    """Each entry must be a run of one row's tokens, and end where its sequence is said to end."""
    bounds = subset.query_start_loc.tolist()
    assert bounds[-1] == len(tokens) == subset.num_tokens
    lengths = np.diff(bounds)
    assert subset.max_query_len == lengths.max() and (lengths > 0).all()
    entries = zip(subset.rows.tolist(), subset.dropped.tolist(), bounds, bounds[1:], strict=False)
    for row, dropped, start, end in entries:
        own = tokens[start:end].numpy()
        assert (row_of[own] == row).all()
        last = seq_lens[row] - dropped - 1
        assert position[own].tolist() == list(range(last - len(own) + 1, last + 1))


def depth_of(row: Row, offset: int, first: int, scope: str, gate: Told) -> int | None:
    """After how many layers the token at ``offset`` of a row's query leaves the step, if any."""
    computed, query, prompt, _, depth = row
    if depth is None:
        return None
    if scope == "token":
        token = first + offset
        if computed + offset - prompt < gate.warm_up:
            return None
    else:
        if not computed < prompt <= computed + query:
            return None
        token = first + prompt - computed - 1
    for layer in gate.check_layers:
        if layer + 1 < depth and gate.says[token, layer]:
            return layer + 1
    return depth if scope == "answer" else None


@pytest.mark.parametrize("kv_fill", ["none", "copy", "project"])
@pytest.mark.parametrize("scope", ["token", "answer"])
@settings(deadline=None, max_examples=150)
@given(batch=batches, at=checks, warm_up=st.integers(0, 3), seed=st.integers(0, 10_000))
def test_each_token_runs_what_it_needs_and_reads_what_is_there(
    scope: Any, kv_fill: str, batch: list[Row], at: tuple[int, ...], warm_up: int, seed: int
) -> None:
    if scope == "answer":  # its requests have no generated tokens but in a batch of others
        batch = [
            (c, q, max(p, c + q), bits, d) if d is not None else (c, q, p, bits, d)
            for c, q, p, bits, d in batch
        ]
    if scope == "token" and kv_fill == "none":  # refused; only plans would be left
        batch = [(*row[:4], None) for row in batch]
    total = sum(row[1] for row in batch)
    says = np.random.default_rng(seed).random((total, LAYERS)) < 0.5
    gate = Told(at, warm_up if scope == "token" else 0, says)
    played = play(batch, scope, gate, kv_fill)
    left_out, exits = np.zeros(2 * LAYERS, dtype=int), np.zeros(LAYERS, dtype=int)
    first = 0
    for row in batch:
        computed, query, prompt, *_ = row
        mask = mask_of(row)
        for offset in range(query):
            token, generated = first + offset, computed + offset >= prompt
            leaves = depth_of(row, offset, first, scope, gate)
            planned = [one for one in range(2 * LAYERS) if not (generated and mask[one])]
            ends = 2 * LAYERS if leaves is None else 2 * leaves
            assert played.ran[token] == [one for one in planned if one < ends]
            if generated:
                left_out[[one for one in planned if one >= ends]] += 1
            if leaves is not None and (scope == "token" or offset == query - 1):
                exits[leaves - 1] += leaves < LAYERS
            if generated:
                check_fill(played, token, kv_fill)
        first += query
    assert (played.exits.left_out == left_out).all()
    assert (played.exits.exits == exits).all()


def check_fill(played: Played, token: int, kv_fill: str) -> None:
    """Every layer has its own K/V of a generated token, or what the fill puts there."""
    ran = [one // 2 for one in played.ran[token] if one % 2 == 0]
    for layer in range(LAYERS):
        want: list[int] | None = [layer, token]
        if layer not in ran and kv_fill == "none":
            want = None
        elif layer not in ran and kv_fill == "copy":
            below = [one for one in ran if one < layer]
            want = [below[-1] if below else ran[0], token] if ran else None
        assert played.cache.kept.get((layer, token)) == want


def test_steps_without_candidates_are_what_they_were() -> None:
    table = SequenceTable(LAYERS, 2)
    table.add(0, SkipPlan(LAYERS), 3, gated=True)
    table.add(1, SkipPlan(LAYERS), 3)
    gate = Told((1,), 2, np.ones((9, LAYERS), dtype=bool))
    exits = StepExits("token", gate, table, KV_FILLS["none"]([], None))  # type: ignore[arg-type]

    def arranged(query: list[int], lengths: list[int]) -> frozenset[int]:
        starts, seq_lens = np.cumsum([0, *query]), np.array(lengths)
        found = exits.arrange(Layout.of(starts, seq_lens, table.prompt_lens[: len(query)]))
        exits.begin(seq_lens)
        return found

    assert arranged([3, 1], [3, 9]) == frozenset() and not exits.is_open  # a prompt, a dense one
    assert arranged([1, 1], [5, 9]) == {1} and not exits.is_open  # the warm-up
    assert arranged([1, 1], [6, 9]) == {1} and exits.is_open
