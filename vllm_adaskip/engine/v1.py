# SPDX-License-Identifier: Apache-2.0
"""Feeds the sequence table from vLLM's V1 runner, which tells of its batch, or is asked.

The V1 runner tells its logits processors of every change of the persistent batch before
each forward (`update_state`), and has the front end validate each request with them
(`validate_params`, whose ValueError becomes HTTP 400; `naming` adds it). So the feeder is a logits
processor that never touches logits. It is named in one engine's ``logits_processors``
option and is never an entry point, which would load it into every engine on the machine;
`naming` says how it knows the engine's options there.

Where drafts are verified vLLM allows no logits processor. The front end asks ours all the same;
the table is fed by looking at the batch before each forward (`PulledBatch`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from vllm_adaskip.engine import compat, naming
from vllm_adaskip.engine.decide import SkipState
from vllm_adaskip.engine.request import Planner, is_one_answer
from vllm_adaskip.engine.table import BatchOrder

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from vllm.config import VllmConfig


def __getattr__(name: str) -> type[V1Feeder]:
    return naming.named_class(__name__, name, V1Feeder)


class V1Feeder(LogitsProcessor):
    """Mirrors the V1 runner's persistent batch into the engine's sequence table."""

    planner: ClassVar[Planner]

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._state = SkipState(self.planner, vllm_config.scheduler_config.max_num_seqs)
        self._table = self._state.table
        compat.share(vllm_config, self._state)

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch: removed, then added, then moved rows, as vLLM prescribes."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._table.remove(row)
        for row, params, prompt, output in batch_update.added:
            self._state.enter(
                row,
                params.extra_args,
                prompt or (),
                generated=len(output),
                one_answer=is_one_answer(params),
                allowed=params.allowed_token_ids,
            )
        for source, target, direction in batch_update.moved:
            if direction is MoveDirectionality.SWAP:
                self._table.swap(source, target)
            else:
                self._table.move(source, target)
        self._state.settle()

    def is_argmax_invariant(self) -> bool:
        """Return True: greedy sampling need not call us."""
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits as they are."""
        return logits


class Batch(Protocol):
    """What tells of the runner's batch: `compat.drafting.RunnerDrafts`."""

    @property
    def batch(self) -> Sequence[str]:
        """Ids of its requests, row by row."""

    def request(self, request_id: str) -> Any:
        """Return a request as the runner has it."""


class PulledBatch:
    """Brings the table in line with the V1 runner's batch."""

    def __init__(self, state: SkipState, source: Batch) -> None:
        self._state, self._source = state, source
        self._order = BatchOrder(state.table)
        self._seen: list[str] = []

    def update(self) -> None:
        """Follow the batch; call it before each forward of requests."""
        batch = self._source.batch
        if batch == self._seen:
            return
        self._seen = [*batch]
        self._order.leave_but(batch)
        for name in batch:
            if name not in self._order:
                self._enter(name)
        self._order.arrange(batch)
        self._state.settle()

    def _enter(self, name: str) -> None:
        request = self._source.request(name)
        params = request.sampling_params
        self._state.enter(
            self._order.enter(name),
            params.extra_args,
            request.prompt_token_ids or (),
            generated=len(request.output_token_ids),
            one_answer=is_one_answer(params),
            allowed=params.allowed_token_ids,
        )
