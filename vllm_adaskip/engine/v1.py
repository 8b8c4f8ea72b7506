# SPDX-License-Identifier: Apache-2.0
"""Feeds the sequence table from vLLM's V1 runner.

The V1 runner tells its logits processors of every change of the persistent batch before
each forward (`update_state`), and has the front end validate each request with them
(`validate_params`, whose ValueError becomes HTTP 400; `naming` adds it). So the feeder is a logits
processor that never touches logits. It is named in one engine's ``logits_processors``
option and is never an entry point, which would load it into every engine on the machine;
`naming` says how it knows the engine's options there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from vllm_adaskip.engine import compat, naming
from vllm_adaskip.engine.decide import SkipState
from vllm_adaskip.engine.request import Planner, is_one_answer

if TYPE_CHECKING:
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
        """Tell vLLM that greedy sampling need not call us."""
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits as they are."""
        return logits
