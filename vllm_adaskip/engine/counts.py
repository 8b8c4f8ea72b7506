# SPDX-License-Identifier: Apache-2.0
"""What ran: counted once, at the end of each step, from the step's final ``runs``; and reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np
from cachetools import LRUCache

from vllm_adaskip.engine.step import Bools, Ints, Step

if TYPE_CHECKING:
    from vllm_adaskip.engine.decide import SkipState

Entries = list[int | str]
#: ``(extra_args, prompt_token_ids)``
Request = tuple[Mapping[str, Any] | None, Sequence[int]]

#: Keys that are remembered: some hundred bytes each, and a caller asks soon.
_REMEMBERED = 16_384


class Counts:
    """One engine's counters, and what gated sequences left out.

    A gated sequence's plan does not say what its tokens ran, so its tokens are counted by
    themselves: for each row of the batch, and, once the sequence leaves its row, under its key.
    Each generated token counts when it runs first: a sequence that comes back after preemption goes
    on where it was, and its replayed tokens are passed over. (vLLM may run one token more than
    it returns, when it learns late that a sequence is finished.)

    Attributes:
        prompt_tokens: prompt tokens that ran.
        shortened_tokens: those among them that were under a prompt plan.
        generated_tokens: generated tokens that ran.
        run: ``[2 * num_layers]`` generated tokens that ran each sub-layer.
        exits: ``[num_layers]`` tokens, or with scope ``answer`` requests, that stopped after each
            layer, though their plan, or the whole model, goes deeper.

    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.prompt_tokens = self.shortened_tokens = self.generated_tokens = 0
        self.run = np.zeros(2 * num_layers, dtype=np.int64)
        self.exits = np.zeros(num_layers, dtype=np.int64)
        self._before = np.zeros(capacity, dtype=np.int64)  # ran before they came into the row
        self._ran = np.zeros(capacity, dtype=np.int64)
        self._left_out = np.zeros((capacity, 2 * num_layers), dtype=np.int64)
        self._keys: list[bytes | None] = [None] * capacity
        self._gone: LRUCache[bytes, tuple[int, Ints]] = LRUCache(_REMEMBERED)

    def add(self, step: Step) -> None:
        """Count a step whose forward has run, or will run as it is."""
        generated = step.num_generated
        self.generated_tokens += generated
        if generated < step.num_tokens:  # most steps have no prompt tokens
            self.prompt_tokens += step.num_tokens - generated
            self.shortened_tokens += int(step.length[step.shortened].sum())
        self.run += step.counted

    def add_gated(self, step: Step, gated: Bools, past_prompt: Ints) -> None:
        """Count what gated sequences left out in a step.

        Args:
            step: it has run.
            gated: ``[rows]``.
            past_prompt: ``[rows]`` tokens of each sequence, less those of its prompt.

        """
        # Of each span the last tokens count, as far as they did not before.
        new = past_prompt[step.row] - step.behind - self._before[step.row]
        new = np.clip(new, 0, step.length) * gated[step.row]
        np.add.at(self._ran, step.row, new)
        np.add.at(self._left_out, step.row, new[:, None] * ~step.runs)

    def add_exits(self, depths: Ints, planned: Ints) -> None:
        """Count ``[tokens]`` that ran so many layers and might have run others too."""
        np.add.at(self.exits, depths[depths < planned] - 1, 1)

    def enter(self, row: int, key: bytes, ran: int) -> None:
        """Count for the sequence in a row, of which ``ran`` generated tokens are counted."""
        self._keys[row] = key
        self._before[row] = ran

    def leave(self, row: int) -> None:
        """Remember what was counted for the sequence in a row, if anything."""
        if (key := self._keys[row]) is None:
            return
        self._gone[key] = self._with(row, *self._gone.get(key, (0, 0)))
        self._keys[row] = None
        self._ran[row] = self._left_out[row] = 0

    def swap(self, one: int, other: int) -> None:
        """Exchange the sequences of two rows."""
        pair, swapped = [one, other], [other, one]
        for counts in (self._ran, self._before, self._left_out):
            counts[pair] = counts[swapped]
        self._keys[one], self._keys[other] = self._keys[other], self._keys[one]

    def of(self, key: bytes) -> tuple[int, Ints] | None:
        """Return generated tokens that ran, and ``[2 * num_layers]`` how many left out each.

        All sequences with the key together, those that are still in a row too; None where
        there was none, or too many since.
        """
        found = self._gone.get(key)
        for row, other in enumerate(self._keys):
            if other == key:
                found = self._with(row, *(found or (0, 0)))
        return found

    def _with(self, row: int, tokens: int, left_out: Ints | int) -> tuple[int, Ints]:
        return tokens + int(self._ran[row]), left_out + self._left_out[row]


class Report(TypedDict):
    """An engine's cumulative counters, and what is in the batch now.

    Attributes:
        num_layers: decoder layers.
        prompt_tokens: prompt tokens that ran.
        shortened_tokens: those among them that were under a prompt plan.
        decode_tokens: generated tokens that ran.
        attn_run: ``[num_layers]`` generated tokens that went through each attention.
        mlp_run: the same of each MLP.
        requests: sequences that entered.
        method: the server's.
        live_rows: sequences in the batch.
        plans: `SkipState.plans`.
        live_plans: distinct plans that they follow.
        coalesced: decisions that others in the batch changed.
        failures: `SkipState.failures`.
        graphs: where CUDA graphs hold plans: how many plans, dense among them, and steps that
            replayed one.
        compiled: where a CPU compiles plans: how many, steps that ran one, and what compiling
            took, in seconds and MiB of memory; and which ones it should know (`known_plans`), as
            most steps followed them and ran layer by layer: see `CompiledPlans.wanted`.
        guard: with the option: `Guard.report`.
        busy: with the option: the level of load at which the last sequence entered, and how many
            entered at each.
        canary: with the option, as of the last sequence that came in: `Canary.report`.
        drafts: where tokens are drafted: `Drafter.report`.
        exits: where a method lets tokens exit: ``[num_layers]`` tokens, or with scope ``answer``
            requests, that stopped after each layer.

    """

    num_layers: int
    prompt_tokens: int
    shortened_tokens: int
    decode_tokens: int
    attn_run: list[int]
    mlp_run: list[int]
    requests: int
    method: str
    live_rows: int
    plans: dict[str, int]
    live_plans: int
    coalesced: int
    failures: int
    graphs: NotRequired[dict[str, int]]
    compiled: NotRequired[dict[str, Any]]
    guard: NotRequired[dict[str, Any]]
    busy: NotRequired[dict[str, Any]]
    canary: NotRequired[dict[str, Any]]
    drafts: NotRequired[dict[str, Any]]
    exits: NotRequired[list[int]]


def report(state: SkipState) -> Report:
    """Return what an engine has counted."""
    if state.pulled is not None:
        state.pulled.update()  # sequences may have left since the last forward
    table, facts = state.table, state.planner.facts
    counts, run = table.counts, table.counts.run.tolist()
    found: Report = {
        "num_layers": table.num_layers,
        "prompt_tokens": counts.prompt_tokens,
        "shortened_tokens": counts.shortened_tokens,
        "decode_tokens": counts.generated_tokens,
        "attn_run": run[0::2],
        "mlp_run": run[1::2],
        "requests": table.requests,
        "method": facts.method,
        "live_rows": table.live_rows,
        "plans": dict(state.plans),
        "live_plans": table.live_plans,
        "coalesced": state.coalesced,
        "failures": state.failures,
    }
    if (graphs := state.graphs) is not None:
        found["graphs"] = {"plans": len(graphs.plans), "replayed": graphs.replayed}
    if (compiled := state.compiled) is not None:
        found["compiled"] = {
            "plans": len(compiled),
            "ran": compiled.ran,
            "seconds": round(compiled.seconds, 1),
            "mebibytes": round(compiled.mebibytes),
            "wanted": compiled.wanted(),
        }
    if (drafter := state.drafter) is not None:
        found["drafts"] = drafter.report()
    if state.guard is not None:
        found["guard"] = state.guard.report()
    if state.levels:
        found["busy"] = {"level": state.level, "entered": [*state.levels]}
    if state.canary:
        found["canary"] = dict(state.canary)
    if state.planner.classifier.gates_attention:
        found["exits"] = counts.exits.tolist()
    return found


class AdaSkipWorkerExtension:
    """What ``collective_rpc`` reaches in a worker, by vLLM's ``worker_extension_cls`` option."""

    def adaskip_report(self) -> Report:
        """Return this worker's cumulative counters."""
        return report(self._adaskip_state)

    def adaskip_plans(self, requests: Sequence[Request]) -> list[Entries | None]:
        """Return the plan of each request, also a decided one.

        None where a method reads the prompt and has not done so, or not of late, and where
        it decides token by token: then there is no one plan, see `adaskip_ran`.
        """
        plans = [self._adaskip_state.plan_of(*request) for request in requests]
        return [None if plan is None else plan.entries() for plan in plans]

    def adaskip_ran(self, requests: Sequence[Request]) -> list[dict[str, Any] | None]:
        """Return what really ran of each request that a gate decides about.

        Each is ``{"tokens": n, "left_out": [2 * num_layers ints]}``: generated tokens that have
        run (the last one drawn never does), each counted once whatever was replayed, and how
        many of them left out each sub-layer, attention 0, MLP 0, attention 1, ..., by plan
        or by gate. Requests with the same prompt and arguments, and parallel samples, are
        counted together from the first on; a key of others in ``extra_args`` tells them apart.
        None for requests that no gate decides about, and those not seen, or not of late.
        """
        ran = [self._adaskip_state.ran_of(*request) for request in requests]
        return [
            None if found is None else {"tokens": found[0], "left_out": found[1].tolist()}
            for found in ran
        ]

    @property
    def _adaskip_state(self) -> SkipState:
        state: SkipState = self.get_model().adaskip.state  # type: ignore[attr-defined]
        return state
