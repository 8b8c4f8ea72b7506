# SPDX-License-Identifier: Apache-2.0
"""Has vLLM generate a given answer, so that its probability under a plan can be read.

A prompt's own log-probabilities would not do: prompts run at full depth. Named in the
``logits_processors`` option of an evaluation's engine only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from vllm_adaskip.lab.evaluation.engine import FORCED

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Row = tuple[list[int], list[int]]


class ForcedAnswer(LogitsProcessor):
    """Lets a request draw no token but the next one of its answer."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        #: Row -> the answer, and the tokens generated so far (vLLM's own list, which grows).
        self._rows: dict[int, Row] = {}

    def is_argmax_invariant(self) -> bool:
        """Return False: greedy sampling must call us."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch: removed, then added, then moved rows."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, params, _, output in batch_update.added:
            self._rows.pop(row, None)
            if answer := (params.extra_args or {}).get(FORCED):
                self._rows[row] = answer, output
        for source, target, direction in batch_update.moved:
            moved, other = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved:
                self._rows[target] = moved
            if other and direction is MoveDirectionality.SWAP:
                self._rows[source] = other

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Leave ``[rows, vocabulary]`` logits finite at the next token of the answer alone."""
        for row, (answer, output) in self._rows.items():
            if len(output) < len(answer):
                token = answer[len(output)]
                kept = logits[row, token].clone()
                logits[row] = float("-inf")
                logits[row, token] = kept
        return logits
