# SPDX-License-Identifier: Apache-2.0
"""What Model Runner V2 hands a model's own state, and takes from it.

Since 0.26 (`DefaultModelState`; fields of `InputBatch` and `NewRequestData`). Remove when vLLM
documents `ModelState`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_adaskip.engine.step import Ints

__all__ = ["DefaultModelState", "batch_lengths", "generated", "no_full_graphs"]


def batch_lengths(batch: Any) -> tuple[Ints, Ints]:
    """Return ``query_start_loc`` ``[rows + 1]`` and ``seq_lens`` ``[rows]`` of an `InputBatch`.

    From its host copies. vLLM calls its lengths there an upper bound, for drafts of speculative
    decoding may be rejected; without these they are exact.
    """
    starts = batch.query_start_loc_np[: batch.num_reqs + 1]  # what follows is padding
    lengths = batch.num_computed_tokens_np + batch.num_scheduled_tokens
    return starts.astype(np.int64), lengths.astype(np.int64)


def generated(request: Any) -> int:
    """Return how many generated tokens a `NewRequestData` brings along, after preemption."""
    return len(request.prefill_token_ids) - len(request.prompt_token_ids)


def no_full_graphs() -> tuple[AttentionCGSupport, str | None]:
    """Return what a model state answers whose forward must be called at each step.

    vLLM then keeps to piecewise graphs, of the model's compiled pieces.
    """
    return AttentionCGSupport.NEVER, "vllm-adaskip"
