# SPDX-License-Identifier: Apache-2.0
"""What a gate is asked, and what runs, is filled and is counted after it, token by token.

The engine's own loop runs here, over layers that write down who came by.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from vllm_adaskip import SkipPlan
from vllm_adaskip.classifiers import Gate, Look, Stream
from vllm_adaskip.engine.fill import KV_FILLS
from vllm_adaskip.engine.gate import StepGate
from vllm_adaskip.engine.loop import SkippingDecoder, SkipRuntime
from vllm_adaskip.engine.step import NOBODY, Step
from vllm_adaskip.engine.table import SequenceTable
from vllm_adaskip.engine.taught import Layers
from vllm_adaskip.engine.window import Window

LAYERS = 4
SUB_LAYERS = 2 * LAYERS
#: (computed, query, prompt length, left-out sub-layers as bits, gated)
Row = tuple[int, int, int, int, bool]
rows = st.tuples(
    st.integers(0, 6),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(0, (1 << SUB_LAYERS) - 1),
    st.booleans(),
)
#: Rows whose plans leave out the last layers, as those of methods whose tokens exit do.
exiting = st.tuples(
    st.integers(0, 6),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, LAYERS).map(lambda depth: -1 << 2 * depth & (1 << SUB_LAYERS) - 1),
    st.booleans(),
)
asked_behind = st.frozensets(st.sampled_from([1, 3, 5]), min_size=1)


class Told(Gate):
    """Decides what it is told, by token and sub-layer; writes down whom it is asked about."""

    def __init__(self, sub_layers: frozenset[int], warm_up: int, says: NDArray[np.bool_]) -> None:
        self.sub_layers = sub_layers
        self.warm_up = warm_up
        self.says = says  # [tokens of the step, sub-layer asked behind, left out]
        self.asked: list[tuple[int, int]] = []
        self.planned: NDArray[np.bool_] | None = None

    def begin(self, planned: NDArray[np.bool_], allowed: Any) -> None:
        self.planned = planned

    def after(
        self, sub_layer: int, tokens: NDArray[np.int64], look: Look
    ) -> NDArray[np.bool_] | None:
        update, before = look(None)
        assert before is not None and len(update) == len(tokens)
        seen = (update + before)[:, 0].long().numpy()
        some = np.arange(len(tokens)) % 2 == 0
        assert (look(some).update == update[torch.from_numpy(some)]).all()
        self.asked += [(token, sub_layer) for token in seen.tolist()]
        left_out = self.says[seen, sub_layer] & (np.arange(SUB_LAYERS) > sub_layer)
        return left_out if left_out.any() else None


class Cache:
    """Who has K/V where: ``(layer, token) -> (layer, token)`` it is of."""

    device = torch.device("cpu")

    def __init__(self, tokens: int) -> None:
        self.kept: dict[tuple[int, int], list[int]] = {}
        self._tokens = tokens

    def slots(self, layer: int | None = None) -> Tensor:
        return torch.arange(self._tokens)

    def slots_in(self, layers: Tensor, tokens: Tensor) -> Tensor:
        return tokens

    def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        self.write_many(torch.full_like(slots, layer), key, value, slots)

    def write_many(self, layers: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
        assert (key == value).all() and len(key) == len(slots) == len(layers)
        for layer, token, own in zip(layers.tolist(), slots.tolist(), key.tolist(), strict=True):
            assert (layer, token) not in self.kept  # written once
            self.kept[layer, token] = own


class Attention(nn.Module):
    def forward(self, query: None, key: Tensor, value: Tensor) -> None:
        pass


class Batches:
    """Keeps what attention was told last of each layer."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def arrange(self, parts: list[Any], start: int) -> None:
        self.parts[start:] = parts


@dataclass
class Decoder(SkippingDecoder):
    """The loop over layers that write down who came by."""

    step: Step
    cache: Cache
    attention: list[Attention]
    firsts: NDArray[np.int64]  # of each token, the first of its sequence in the step
    ran: dict[int, list[int]] = field(default_factory=dict)
    batches: Any = None

    def run(self, stream: Stream, sub_layer: int) -> Stream:
        whole = self.whole(stream)
        for token in whole[:, 0].long().tolist():
            assert not self.ran[token] or self.ran[token][-1] < sub_layer
            self.ran[token].append(sub_layer)
        update = torch.zeros_like(whole)
        update[:, 1] = 1 << sub_layer
        return Stream(update, whole)

    def whole(self, stream: Stream) -> Tensor:
        """Of each token shown its number, and what it ran; no token's share may be lost."""
        whole = stream.update + (0 if stream.before is None else stream.before)
        for token, ran in whole.long().tolist():
            assert ran == sum(1 << one for one in self.ran[token])
        return whole

    def run_attention(self, layer: int, positions: Tensor, stream: Stream) -> Stream:
        told = self.batches.parts[layer]
        shown = range(self.step.num_tokens) if told is None else told.positions.tolist()
        result = self.run(stream, 2 * layer)
        assert result.before is not None
        tokens = result.before[:, 0].long()
        assert tokens.tolist() == list(shown) and positions.tolist() == tokens.tolist()
        own = torch.stack((torch.full_like(tokens, layer), tokens), dim=1)
        self.attention[layer](None, own, own)
        self.cache.kept |= {(layer, token): [layer, token] for token in tokens.tolist()}
        for token in tokens.tolist():
            before = range(int(self.firsts[token]), token)
            self.missed |= {(layer, one) for one in before if (layer, one) not in self.cache.kept}
        return result

    def run_mlp(self, layer: int, stream: Stream) -> Stream:
        return self.run(stream, 2 * layer + 1)

    def project_kv(self, layer: int, positions: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        tokens = self.whole(stream)[:, 0].long()
        assert positions.tolist() == tokens.tolist()
        for token in tokens.tolist():
            assert not self.ran[token] or self.ran[token][-1] < 2 * layer
        own = torch.stack((torch.full_like(tokens, layer), tokens), dim=1)
        return own, own

    def finish(self, stream: Stream) -> Tensor:
        raise AssertionError


def play(batch: list[Row], scope: Any, gate: Told, kv_fill: str) -> Any:
    """Run one step; return what ran, the cache and the table's counts."""
    table = SequenceTable(LAYERS, len(batch))
    for row, (computed, _, prompt, bits, gated) in enumerate(batch):
        table.add(row, SkipPlan(LAYERS), prompt, gated=gated)
        table.skips[row] = mask_of(bits)
        if gated:
            before = -1 if scope == "answer" else max(computed - prompt, 0)
            table.counts.enter(row, bytes([row]), before)
    computed, query = (np.array([row[i] for row in batch]) for i in range(2))
    starts, seq_lens = np.concatenate(([0], np.cumsum(query))), computed + query
    attention = [Attention() for _ in range(LAYERS)]
    cache = Cache(int(starts[-1]))
    kind: Any = SimpleNamespace(gate_scope=scope, gates_attention=True)
    runtime = object.__new__(SkipRuntime)
    runtime.gate = StepGate(gate, kind, table)
    runtime.fill = KV_FILLS[kv_fill](attention, cache)  # type: ignore[arg-type]
    runtime.prompt_fill = KV_FILLS["project"](attention, cache)  # type: ignore[arg-type,assignment]
    runtime.reader = SimpleNamespace(is_open=False)  # type: ignore[assignment]
    planned = Step.of(
        starts, seq_lens, table.prompt_lens, table.skips, runtime.gate.prompt_skips(seq_lens)
    )
    runtime.gate.begin(planned, seq_lens)
    runtime.step = step = planned.fork()
    runtime.batches = Batches(step.attention_parts)  # type: ignore[assignment]
    decoder = object.__new__(Decoder)
    firsts = np.repeat(starts[:-1], query)
    decoder.__dict__.update(
        step=step, cache=cache, attention=attention, firsts=firsts, batches=runtime.batches
    )
    decoder.__dict__.update(adaskip=runtime, missed=set())
    decoder.ran = {token: [] for token in range(step.num_tokens)}
    runtime.fill.begin(step, may_change=runtime.gate.is_open)
    tokens = torch.arange(step.num_tokens)
    stream = torch.stack((tokens, torch.zeros_like(tokens)), dim=1).double()
    window = Window(Stream(stream, None), tokens)
    layers = Layers(range(LAYERS), range(LAYERS), None)
    decoder._run_sub_layers(step, window, layers, fills=True)
    assert decoder.whole(window.stream)[:, 0].tolist() == tokens.tolist()
    runtime.fill.finish()
    table.counts.add(step)
    runtime.gate.count(step)
    for sub_layer in range(SUB_LAYERS):
        assert (step.part(sub_layer) is NOBODY) == (
            not any(sub_layer in ran for ran in decoder.ran.values())
        )
    return SimpleNamespace(ran=decoder.ran, cache=cache, table=table, missed=decoder.missed)


def mask_of(bits: int) -> NDArray[np.bool_]:
    return np.array([bits >> one & 1 for one in range(SUB_LAYERS)], dtype=bool)


@dataclass
class Token:
    """What becomes of a token of a step."""

    row: int
    generated: bool
    asks: bool  # whether the gate may be asked about it
    runs: list[int] = field(default_factory=list)
    #: Attention that it left out because of a gate -> what it had run by then.
    left: dict[int, list[int]] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)


def lived(batch: list[Row], scope: str, gate: Told) -> list[Token]:
    """Follow each token by itself."""
    tokens, first = [], 0
    for row, (computed, query, prompt, bits, gated) in enumerate(batch):
        answers = scope == "answer" and gated and computed < prompt <= computed + query
        last = first + prompt - computed - 1
        for token in range(first, first + query):
            position = computed + token - first
            generated = position >= prompt
            asks = gated and generated and position - prompt >= gate.warm_up
            if scope == "answer":
                asks = token == last and answers
            obeys = last if answers and not generated else token if asks else None
            mask = mask_of(bits) if generated or obeys is not None else np.zeros(SUB_LAYERS, bool)
            tokens.append(follow(Token(row, generated, asks), mask, obeys, gate))
        first += query
    return tokens


def follow(token: Token, mask: NDArray[np.bool_], obeys: int | None, gate: Told) -> Token:
    runs = ~mask
    for sub_layer in range(SUB_LAYERS):
        if not runs[sub_layer]:
            continue
        token.runs.append(sub_layer)
        if obeys is None or sub_layer not in gate.sub_layers or not runs[sub_layer + 1 :].any():
            continue
        token.asked.append(sub_layer)
        left = gate.says[obeys, sub_layer] & (np.arange(SUB_LAYERS) > sub_layer)
        for layer in np.flatnonzero(left[0::2]).tolist():
            token.left.setdefault(layer, [one for one in token.runs if one % 2 == 0])
        runs = runs & ~left
    return token


def says_of(kind: str, tokens: int, seed: int) -> NDArray[np.bool_]:
    draw = np.random.default_rng(seed)
    leaves = draw.random((tokens, SUB_LAYERS, 1)) < 0.5
    what = draw.random((tokens, SUB_LAYERS, SUB_LAYERS)) < 0.5
    if kind == "exit":
        what[:] = True
    elif kind == "mlp":
        what[:, :, 0::2] = False
    elif kind == "both":  # some leave MLPs, some leave the step
        exits = draw.random((tokens, SUB_LAYERS)) < 0.3
        what[:, :, 0::2] = False
        what[exits] = True
    return leaves & what


@pytest.mark.parametrize("kv_fill", ["none", "copy", "project"])
@pytest.mark.parametrize("kind", ["exit", "mlp", "both", "any"])
@settings(max_examples=120)
@given(
    batch=st.lists(st.one_of(rows, exiting), min_size=1, max_size=6),
    at=asked_behind,
    warm_up=st.integers(0, 3),
    seed=st.integers(0, 10_000),
)
@example(  # a gate of kind "any" says twice that a token leaves the same attention out
    batch=[
        (3, 4, 4, 32, True),
        (5, 2, 3, 252, True),
        (1, 1, 6, 188, False),
        (0, 3, 5, 192, True),
        (0, 4, 7, 252, True),
        (5, 3, 1, 28, False),
    ],
    at=frozenset([1, 3]),
    warm_up=2,
    seed=33,
)
def test_each_token_runs_what_it_needs_and_reads_what_is_there(
    kind: str, kv_fill: str, batch: list[Row], at: frozenset[int], warm_up: int, seed: int
) -> None:
    total = sum(row[1] for row in batch)
    gate = Told(at, warm_up, says_of(kind, total, seed))
    played, want = play(batch, "token", gate, kv_fill), lived(batch, "token", gate)
    for number, token in enumerate(want):
        assert played.ran[number] == token.runs
        check_fill(played.cache, number, token, kv_fill)
    asked = [(number, one) for number, token in enumerate(want) for one in token.asked]
    assert sorted(gate.asked) == asked
    check_counts(played.table, batch, want)
    # A token that has run no attention yet is filled at the end, from the lowest that it runs.
    if kv_fill == "project" or (kv_fill == "copy" and not any(row[3] & 1 for row in batch)):
        assert not played.missed
    depths = [token.runs[-1] // 2 + 1 for token in want if token.asks and token.runs]
    planned = [depth_of(batch[token.row][3]) for token in want if token.asks and token.runs]
    exits = [depths.count(layer + 1) for layer in range(LAYERS)]
    kept = [d for d, p in zip(depths, planned, strict=True) if d == p]
    exits = [count - kept.count(layer + 1) for layer, count in enumerate(exits)]
    assert played.table.counts.exits.tolist() == exits


@pytest.mark.parametrize("kind", ["exit", "any"])
@pytest.mark.parametrize("kv_fill", ["none", "copy", "project"])
@settings(max_examples=120)
@given(
    batch=st.lists(exiting, min_size=1, max_size=6),
    at=asked_behind,
    seed=st.integers(0, 10_000),
)
def test_prompts_that_ask_for_one_token_stop_where_it_is_settled_or_their_plan_ends(
    kind: str, kv_fill: str, batch: list[Row], at: frozenset[int], seed: int
) -> None:
    batch = [(c, q, max(p, c + q) if gated else p, b, gated) for c, q, p, b, gated in batch]
    total = sum(row[1] for row in batch)
    gate = Told(at, 0, says_of(kind, total, seed))
    played, want = play(batch, "answer", gate, kv_fill), lived(batch, "answer", gate)
    for number, token in enumerate(want):
        assert played.ran[number] == token.runs
        if token.generated:
            check_fill(played.cache, number, token, kv_fill)
        else:  # nobody reads the K/V of such a prompt
            layers = {one // 2 for one in token.runs if one % 2 == 0}
            assert {layer for layer, one in played.cache.kept if one == number} == layers
    exits = np.zeros(LAYERS + 1, dtype=int)
    for token in want:
        exits[token.runs[-1] // 2] += token.asks
        if token.asks:
            tokens, left_out = played.table.counts.of(bytes([token.row]))
            assert tokens == 1
            ran = [one for one in range(SUB_LAYERS) if not left_out[one]]
            assert ran == token.runs
    assert played.table.counts.exits[:-1].tolist() == exits[: LAYERS - 1].tolist()


def depth_of(bits: int) -> int:
    return int(np.flatnonzero(~mask_of(bits))[-1]) // 2 + 1


def check_fill(cache: Cache, number: int, token: Token, kv_fill: str) -> None:
    """Every layer has its own K/V of a generated token, or what the fill puts there."""
    ran = [one // 2 for one in token.runs if one % 2 == 0]
    for layer in range(LAYERS):
        want: list[int] | None = [layer, number]
        if layer not in ran and (kv_fill == "none" or not token.generated):
            want = None
        elif layer not in ran and kv_fill == "copy":
            by_then = token.left.get(layer)
            sources = [one // 2 for one in by_then] if by_then else ran
            below = [one for one in sources if one < layer]
            want = [below[-1] if below else sources[0], number] if sources else None
        assert cache.kept.get((layer, number)) == want


def check_counts(table: SequenceTable, batch: list[Row], want: list[Token]) -> None:
    generated = [token for token in want if token.generated]
    assert table.counts.generated_tokens == len(generated)
    for sub_layer in range(SUB_LAYERS):
        ran = sum(sub_layer in token.runs for token in generated)
        assert table.counts.run[sub_layer] == ran
    for row, (*_, gated) in enumerate(batch):
        own = [token for token in generated if token.row == row]
        if not gated:
            assert table.counts.of(bytes([row])) is None
            continue
        found = table.counts.of(bytes([row]))
        assert found is not None and found[0] == len(own)
        for sub_layer in range(SUB_LAYERS):
            assert found[1][sub_layer] == sum(sub_layer not in token.runs for token in own)


def test_a_gate_is_told_what_plans_leave_out_and_what_requests_allow() -> None:
    table = SequenceTable(LAYERS, 3)
    for row, gated in enumerate((True, False, True)):
        table.add(row, SkipPlan.parse([row], LAYERS), 3, gated=gated)
    table.allowed[2] = [7, 8]
    told: list[Any] = []
    gate = Told(frozenset({1}), 0, says_of("exit", 3, 0))
    gate.begin = lambda planned, allowed: told.append((planned, allowed))  # type: ignore[method-assign]
    kind: Any = SimpleNamespace(gate_scope="token", gates_attention=True)
    step = Step.of(np.arange(4), np.array([5, 5, 5]), table.prompt_lens, table.skips)
    StepGate(gate, kind, table).begin(step, np.array([5, 5, 5]))
    ((planned, allowed),) = told
    assert (planned == table.skips[[0, 2]]).all() and allowed == [None, [7, 8]]


def test_a_gate_that_leaves_out_attention_must_say_so() -> None:
    table = SequenceTable(LAYERS, 1)
    table.add(0, SkipPlan(LAYERS), 3, gated=True)
    kind: Any = SimpleNamespace(gate_scope="token", gates_attention=False)
    seq_lens = np.array([5])
    step = Step.of(np.array([0, 1]), seq_lens, table.prompt_lens, table.skips)
    told = Told(frozenset({3}), 0, np.ones((1, SUB_LAYERS, SUB_LAYERS), dtype=bool))
    gate = StepGate(told, kind, table)
    gate.begin(step, seq_lens)
    shown = Stream(torch.zeros(1, 1), torch.zeros(1, 1))
    with pytest.raises(RuntimeError, match="Told leaves out attention"):
        gate.after(3, step, lambda tokens: shown)


def test_steps_without_candidates_are_what_they_were() -> None:
    table = SequenceTable(LAYERS, 2)
    table.add(0, SkipPlan(LAYERS), 3, gated=True)
    table.add(1, SkipPlan(LAYERS), 3)
    told = Told(frozenset({3}), 2, says_of("exit", 9, 0))
    kind: Any = SimpleNamespace(gate_scope="token", gates_attention=True)
    gate = StepGate(told, kind, table)

    def is_open(query: list[int], lengths: list[int]) -> bool:
        starts, seq_lens = np.cumsum([0, *query]), np.array(lengths)
        prompt_lens, skips = (each[: len(query)] for each in (table.prompt_lens, table.skips))
        gate.begin(Step.of(starts, seq_lens, prompt_lens, skips), seq_lens)
        return gate.is_open

    assert not is_open([3, 1], [3, 9])  # a prompt, a dense sequence
    assert not is_open([1, 1], [5, 9])  # the warm-up
    assert is_open([1, 1], [6, 9])
    assert not is_open([1], [3])  # what was open is closed again
    table.remove(0)
    assert not is_open([1, 1], [0, 9])
