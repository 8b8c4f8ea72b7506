# SPDX-License-Identifier: Apache-2.0
"""Drafts tokens with the model's own layers, on its own paged K/V."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vllm_adaskip.engine import compat, naming
from vllm_adaskip.engine.compat.drafting import DraftContexts, RunnerDrafts
from vllm_adaskip.engine.compat.head import DraftHead, Head
from vllm_adaskip.engine.compiled import CompiledPlans
from vllm_adaskip.engine.draft_weights import read_weights
from vllm_adaskip.engine.drafts import SIZES, Drafted, Pace, Terms, Times, goes_on
from vllm_adaskip.engine.fill import KvFill
from vllm_adaskip.engine.guard import Floats, measured
from vllm_adaskip.engine.step import Ints, Step
from vllm_adaskip.engine.v1 import PulledBatch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention import Attention

    from vllm_adaskip.engine.compiled import Inputs
    from vllm_adaskip.engine.loop import SkippingDecoder

#: Without `adapt` nothing is weighed.
FREE = Terms(a_pass=0.0, a_token=0.0, rate=1.0)
#: Steps without drafts of which one is learnt from.
SELDOM = 8


def __getattr__(name: str) -> type[SelfDraft]:
    return naming.named_class(__name__, name, SelfDraft)


class SelfDraft(RunnerDrafts):
    """What an engine's ``speculative_config`` names; its name carries the engine's facts."""

    def load_model(self, target: SkippingDecoder) -> None:
        """Take the model, which drafts, and feed its table from the runner's batch."""
        assert target.drafter is not None
        self.drafts = target.drafter
        self.drafts.limits = self.limits
        state = target.adaskip.state
        state.pulled = PulledBatch(state, self)


class Ran(NamedTuple):
    """A forward that has run.

    Attributes:
        starts: ``[rows + 1]``, where each row's tokens start in it.
        seconds: that it took.
        hidden: ``[tokens, hidden]`` what it returned.

    """

    starts: Ints
    seconds: float
    hidden: Tensor


class Asked(NamedTuple):
    """What a pass takes.

    Attributes:
        rows: ``[rows]`` of the batch, that draft.
        ids: ``[rows]`` of each one's last token.
        positions: ``[rows]`` of these, int64.
        heard: ``[rows, hidden]`` what the LM head took to say them; None: drafts hear nothing.

    """

    rows: Ints
    ids: Ints
    positions: Tensor
    heard: Tensor | None


class Drafter:
    """Makes the drafts of an engine.

    Attributes:
        pace: how much is drafted; None: always all that is allowed.
        drafted: counters.
        compiled: the draft's body, on a CPU where vLLM compiles.
        limits: says of a row how many tokens its sequence has at most, and which tokens end it.

    """

    def __init__(
        self,
        model: SkippingDecoder,
        vllm_config: VllmConfig,
        attention: Sequence[Attention],
        head: Head,
    ) -> None:
        """Take the model with its attention and head, before its weights are loaded."""
        self._whole = self._model = model
        self._vllm_config = vllm_config
        self._state = model.adaskip.state
        draft = self._state.planner.draft
        assert draft is not None
        self._draft, self._mask = draft, draft.plan.mask()
        self._longest = vllm_config.model_config.max_model_len
        self._contexts = DraftContexts(vllm_config, attention)
        self._fill = KvFill(attention, model.adaskip.cache)
        self._head = DraftHead(model, head)
        self._head.limit(None if draft.vocabulary is None else torch.arange(draft.vocabulary))
        self.pace = Pace(self._times, compat.of_rank_0) if draft.adapt else None
        self.drafted = Drafted(draft.tokens)
        self.compiled: CompiledPlans | None = None
        self.limits: Callable[[int], tuple[int, frozenset[int]]]
        self._hears: Tensor | None = None
        self._step: tuple[bytes, Step] | None = None
        self._ran: Ran | None = None
        self._seconds = 0.0
        self._steps = 0
        self._ended = perf_counter()

    def load(self) -> bool:
        """Load the profile's layers, behind the model's own; return whether there are any."""
        if self._draft.profile is None:
            return False
        plan = self._draft.plan
        first = plan.num_layers - plan.attention.bit_count()
        config = self._vllm_config.model_config
        read = read_weights(self._draft.profile, first, config.get_hidden_size())
        self._model = self._whole.with_own_layers(first, read.layers)
        self._head.limit(read.vocabulary)
        self._hears = None if read.hears is None else read.hears.to(config.dtype)
        return True

    def warm_up(self, options: Mapping[str, Any] | None, *inputs: *Inputs) -> None:
        """Compile the draft's body, with inductor's options, and time it.

        Args:
            options: None: where vLLM compiles nothing.
            inputs: of a warm-up.

        """
        ids, positions, _ = inputs
        if ids is not None and options is not None and self.compiled is None:
            body = partial(self._model.body_of, fills=False)
            self.compiled = CompiledPlans([self._draft.plan], body)
            self.compiled.compile(self._fill, options, *self._inputs(ids, positions))
        if self.pace is not None:
            self.pace.measure(ids, positions)

    def report(self) -> dict[str, Any]:
        """Return what was drafted, and what it gained."""
        return {**self.drafted.report(), **({} if self.pace is None else self.pace.report())}

    def ran(self, starts: Ints, seconds: float, hidden: Tensor) -> None:
        """Remember the forward that has just run, see `Ran`."""
        self._contexts.keep()
        self._ran = Ran(starts, seconds, hidden)

    def propose(self, sampled: Sequence[Sequence[int]], ends: Ints, slots: Ints) -> list[list[int]]:
        """Return drafts of each row, behind the tokens that it has just drawn.

        Args:
            sampled: tokens of each row of the step; none where its prompt is not complete.
            ends: ``[rows]`` tokens of each row's sequence, with these.
            slots: ``[rows]`` tokens for which it has slots.

        """
        last = self._last(sampled)
        self._learn(sampled, perf_counter())
        drafts: list[list[int]] = [[] for _ in sampled]
        may_draft = int(np.count_nonzero(self._state.table.drafts[: len(sampled)]))
        terms = self._terms(len(sampled), may_draft) if may_draft else None
        if terms is not None:
            caps, stops = self._caps(sampled, ends, slots)
            (rows,) = caps.nonzero()
            if len(rows):
                ids = np.array([sampled[row][-1] for row in rows])
                asked = Asked(rows, ids, torch.from_numpy(ends[rows] - 1), self._heard(last[rows]))
                self._fill_in(drafts, asked, caps[rows], stops, terms)
        self._ended = perf_counter()
        return drafts

    def _last(self, sampled: Sequence[Sequence[int]]) -> Ints:
        """Return ``[rows]``, behind which token of the last forward each drew its last one."""
        assert self._ran is not None
        starts = self._ran.starts
        found: Ints = starts[1:] - 1
        for row in self._state.table.drafted:
            found[row] = starts[row] + len(sampled[row]) - 1
        return found

    def _heard(self, tokens: Ints) -> Tensor | None:
        """Return what the whole model made of tokens of the last forward, if drafts hear it."""
        assert self._ran is not None
        return None if self._hears is None else self._ran.hidden[torch.from_numpy(tokens)]

    def _learn(self, sampled: Sequence[Sequence[int]], now: float) -> None:
        """Learn what became of the drafts that the last forward verified, and what it took."""
        waiting, verified, accepted = self._state.table.drafted, 0, 0
        self._steps += 1
        if not (waiting or self._seconds) and self._steps % SELDOM:
            return
        assert self._ran is not None
        starts, seconds, _ = self._ran
        lengths = np.diff(starts)
        for row, confidence in waiting.items():
            tried = min(len(confidence), int(lengths[row]) - 1)  # vLLM may leave some out
            right = min(len(sampled[row]) - 1, tried)
            self.drafted.saw(tried, right)
            if self.pace is not None:
                self.pace.calibration.learn(confidence[:tried], right)
            verified, accepted = verified + tried, accepted + right
        waiting.clear()
        seconds_drafting, self._seconds = self._seconds, 0.0
        if self.pace is None or self.pace.times is None:
            return
        if seconds_drafting:
            self.pace.saw(len(lengths), verified, accepted, seconds_drafting)
        if all(map(len, sampled)) and (lengths <= self._draft.tokens + 1).all():  # no prompts
            rest = now - self._ended - seconds
            self.pace.times.saw_forward(int(starts[-1]), seconds, rest, verifies=verified > 0)

    def _caps(
        self, sampled: Sequence[Sequence[int]], ends: Ints, slots: Ints
    ) -> tuple[Ints, dict[int, frozenset[int]]]:
        """Return ``[rows]`` tokens that each row may draft, and what ends those that may.

        No more than its request wants, as one token more comes with them.
        """
        table, rows = self._state.table, len(sampled)
        drew = np.array([bool(tokens) for tokens in sampled])
        nothing = (table.skips[:rows] | self._mask).all(axis=1)
        room = np.minimum(slots - ends + 1, self._longest - ends)
        found: Ints = np.where(drew & ~nothing, np.minimum(table.drafts[:rows], room), 0)
        stops = {}
        for row in (found > 0).nonzero()[0].tolist():
            most, stops[row] = self.limits(row)
            found[row] = min(found[row], most - ends[row] - 1)
        return found.clip(min=0), stops

    def _terms(self, rows: int, drafting: int) -> Terms | None:
        if self.pace is None:
            return FREE
        terms = self.pace.terms(rows, drafting)
        self.drafted.off += terms is None
        return terms

    def _fill_in(
        self,
        drafts: list[list[int]],
        asked: Asked,
        caps: Ints,
        stops: Mapping[int, frozenset[int]],
        terms: Terms,
    ) -> None:
        """Draft pass by pass, for rows that are still worth it, before a token that ends them."""
        rows, reach = asked.rows, np.ones(len(asked.rows))
        start = perf_counter()
        self._contexts.begin(rows)
        for place in range(int(caps.max())):
            picked, confidence, hidden = self._pass(asked)
            if self.pace is not None:
                reach = reach * self.pace.calibration.of(confidence)
            kept = reach >= terms.a_token
            for at in kept.nonzero()[0].tolist():
                row, token = int(rows[at]), int(picked[at])
                if token in stops[row]:  # which verification says by itself, as its last token
                    kept[at] = False
                    continue
                drafts[row].append(token)
                self._state.table.drafted.setdefault(row, []).append(float(confidence[at]))
            self.drafted.drafted += int(kept.sum())
            start = self._took(len(rows), start)
            alive = kept & (caps > place + 1)
            if not alive.any() or not goes_on(reach[alive], terms):
                break
            if not alive.all():
                rows, caps, reach = rows[alive], caps[alive], reach[alive]
                self._contexts.begin(rows)
            heard = None if self._hears is None else hidden[torch.from_numpy(alive)]
            asked = Asked(rows, picked[alive], asked.positions[alive] + 1, heard)

    def _pass(self, asked: Asked) -> tuple[Ints, Floats, Tensor]:
        """Return each row's likeliest next token, its probability, and what the head took."""
        step = self._step_of(asked.rows)
        with self._contexts.at(asked.positions):
            # As in vLLM's own steps: what is compiled without guards takes these types alone.
            ids = torch.from_numpy(asked.ids.astype(np.int32))
            hidden = self._hidden(step, *self._inputs(ids, asked.positions, asked.heard))
        confidence, picked = self._head(hidden)
        self.drafted.passes += 1
        return picked.numpy(), confidence.numpy(), hidden

    def _took(self, rows: int, start: float) -> float:
        """Learn what a pass took, with all around it; return when it ended."""
        now = perf_counter()
        if self.pace is not None and self.pace.times is not None:
            self.pace.times.saw_pass(rows, now - start)
            self._seconds += self.pace.times.a_pass(rows)
        return now

    def _inputs(self, ids: Tensor, positions: Tensor, heard: Tensor | None = None) -> Inputs:
        """Return what a body takes, of ``[rows, hidden]`` that drafts hear; None: nothing yet."""
        if self._hears is None:
            return ids, positions, None
        embedded = self._whole.embed(ids, positions, None)
        if heard is None:
            heard = torch.zeros_like(embedded)
        return None, positions, embedded + nn.functional.linear(heard, self._hears)

    def _hidden(self, step: Step, *inputs: *Inputs) -> Tensor:
        body = None if self.compiled is None else self.compiled.of(step)
        if body is not None:
            return body(*inputs).hidden
        return self._model.run(step, *inputs, fills=False)

    def _times(self, ids: Tensor | None = None, positions: Tensor | None = None) -> Times:
        """Time a whole forward, and a pass, by how many tokens; on all ranks together."""
        if ids is None or positions is None:  # no warm-up: vLLM compiles nothing
            most = self._vllm_config.scheduler_config.max_num_seqs
            ids, positions = torch.zeros(most, dtype=torch.int32), torch.zeros(most).long()
        sizes = [size for size in SIZES if size <= len(positions)]

        def timed(size: int) -> list[Callable[[], Any]]:
            some = ids[:size], positions[:size]
            step = Step.of_decodes(np.tile(self._mask, (size, 1)))
            return [
                partial(self._whole.dense, *some),
                lambda: self._head(self._hidden(step, *self._inputs(*some))),
            ]

        with compat.warm_up(self._vllm_config):
            return Times(sizes, compat.of_rank_0(measured(timed, sizes)))

    def _step_of(self, rows: Ints) -> Step:
        """Return the step in which rows leave out what the draft does and what they do anyway."""
        table = self._state.table
        key = rows.tobytes() + table.version.to_bytes(8)
        if self._step is None or self._step[0] != key:
            self._step = key, Step.of_decodes(table.skips[rows] | self._mask)
        return self._step[1]
