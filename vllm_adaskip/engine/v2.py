# SPDX-License-Identifier: Apache-2.0
"""Feeds the sequence table from Model Runner V2.

That runner asks the model for a *model state* (`get_model_state_cls`) and tells it of every
request that enters or leaves. A request keeps its slot while it runs, and each step's batch
puts some of them into an order of its own. Readers of the table take its first rows for the
batch (as under V1, where that is so anyway), so the rows are put into the batch's order here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_adaskip.engine import naming
from vllm_adaskip.engine.compat.model_state import (
    DefaultModelState,
    batch_lengths,
    generated,
    no_cuda_graphs,
)
from vllm_adaskip.engine.decide import shared_state
from vllm_adaskip.engine.request import is_one_answer
from vllm_adaskip.engine.table import SequenceTable

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def __getattr__(name: str) -> type[Any]:
    """Return the class by which the front end of an engine checks requests (0.32 and later)."""
    from vllm_adaskip.engine.compat.request_check import RequestCheck

    return naming.named_class(__name__, name, RequestCheck)


class BatchOrder:
    """Which request is in which row of the table."""

    def __init__(self, table: SequenceTable, capacity: int) -> None:
        self._table = table
        self._requests: list[str | None] = [None] * capacity
        self._rows: dict[str, int] = {}

    def enter(self, request: str) -> int:
        """Give a request an empty row."""
        row = self._requests.index(None)
        self._requests[row], self._rows[request] = request, row
        return row

    def leave(self, request: str) -> None:
        """Empty the row of a request, if it has one."""
        if (row := self._rows.pop(request, None)) is not None:
            self._requests[row] = None
            self._table.remove(row)

    def arrange(self, batch: Sequence[str]) -> None:
        """Bring the batch's requests into the first rows, in its order; others go behind them."""
        for row, request in enumerate(batch):
            if (source := self._rows[request]) == row:
                continue
            other = self._requests[row]
            self._table.swap(row, source)
            self._requests[row], self._requests[source] = request, other
            self._rows[request] = row
            if other is not None:
                self._rows[other] = source


class AdaSkipModelState(DefaultModelState):
    """Mirrors Model Runner V2's requests into the engine's sequence table.

    Eager: what a step runs is decided in Python on the host, so no CUDA graph may hold it.
    """

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._state = shared_state(vllm_config)
        self._order = BatchOrder(self._state.table, vllm_config.scheduler_config.max_num_seqs)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Put a request into a row that enters, or comes back after preemption.

        Then its generated tokens are part of what vLLM calls its prefill; its prompt stays
        what it was.
        """
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        self._state.enter(
            self._order.enter(new_req_data.req_id),
            params.extra_args,
            new_req_data.prompt_token_ids,
            generated=generated(new_req_data),
            one_answer=is_one_answer(params),
            allowed=params.allowed_token_ids,
        )

    def remove_request(self, req_id: str) -> None:
        """Empty the row of a request that is finished, aborted or preempted."""
        super().remove_request(req_id)
        self._order.leave(req_id)

    def preprocess_state(self, input_batch: Any, *args: Any, **kwargs: Any) -> None:
        """Arrange the rows for a forward; vLLM calls this for real batches only.

        (`prepare_inputs` is called for made-up ones too, whose requests never entered.)
        """
        super().preprocess_state(input_batch, *args, **kwargs)
        self._order.arrange(input_batch.req_ids)
        self._state.lengths = batch_lengths(input_batch)

    def get_additional_cg_support(self) -> tuple[Any, str | None]:
        """Tell the runner that no step may be in a CUDA graph."""
        return no_cuda_graphs()
