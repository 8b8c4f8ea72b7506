# SPDX-License-Identifier: Apache-2.0
"""Feeds the sequence table from Model Runner V2.

That runner asks the model for a *model state* (`get_model_state_cls`) and tells it of every
request that enters or leaves. A request keeps its slot while it runs, and each step's batch
puts some of them into an order of its own. Readers of the table take its first rows for the
batch (as under V1, where that is so anyway), so the rows are put into the batch's order here.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

from vllm_adaskip.classifiers import SkipPlan
from vllm_adaskip.engine import naming
from vllm_adaskip.engine.compat.graphs import PlanGraphs, Shared
from vllm_adaskip.engine.compat.model_state import (
    DefaultModelState,
    batch_lengths,
    generated,
    no_full_graphs,
)
from vllm_adaskip.engine.decide import shared_state
from vllm_adaskip.engine.graphs import Entry, GraphBook
from vllm_adaskip.engine.request import is_one_answer
from vllm_adaskip.engine.table import BatchOrder

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def __getattr__(name: str) -> type[Any]:
    """Return the class by which the front end of an engine checks requests (0.32 and later)."""
    if name.startswith("__"):  # Python asks for some at every import from here
        raise AttributeError(name)
    from vllm_adaskip.engine.compat.request_check import RequestCheck

    return naming.named_class(__name__, name, RequestCheck)


class AdaSkipModelState(DefaultModelState):
    """Mirrors Model Runner V2's requests into the engine's sequence table.

    What a step runs is decided in Python on the host, so no graph of the runner's may hold it: a
    dense step runs vLLM's piecewise graphs, a planned one the loop. Steps whose rows decode under
    one plan that is known when the engine starts replay a graph of ours, see `GraphBook`.
    """

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._state = shared_state(vllm_config)
        self._order = BatchOrder(self._state.table)
        self._graphs: dict[SkipPlan, PlanGraphs] = {}

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
        self._state.settle()
        self._state.lengths = batch_lengths(input_batch)

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """Drop graphs that vLLM had captured to measure their memory; the cache is another now."""
        super().initialize_kv_cache(*args, **kwargs)
        self._graphs, self._state.graphs = {}, None

    def capture_inner_cudagraphs(self, *runner: Any) -> None:
        """Capture a graph of each plan that is known now, for each size; from 0.32 on."""
        planner, table = self._state.planner, self._state.table
        most_rows = self.vllm_config.scheduler_config.max_num_seqs
        book = GraphBook(planner.known_plans, table.num_layers, most_rows)
        self._graphs = {}
        shared = Shared(self.vllm_config, book.sizes, super().prepare_attn, *runner)
        for plan in book.plans:
            bodies = cache(lambda size, plan=plan: self.model.body(book.step(Entry(plan, size))))
            self._graphs[plan] = graphs = PlanGraphs(shared)
            graphs.capture(bodies)
        self._state.graphs = book

    def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Choose the graph of the forward that comes next, and prepare for it, or for none."""
        state = self._state
        state.replay = None
        if (entry := self._entry()) is None:
            metadata: dict[str, Any] = super().prepare_attn(input_batch, *args, **kwargs)
            return metadata
        graphs = self._graphs[entry.plan]
        state.replay = partial(graphs.replay, entry.size)
        return graphs.shared.refresh(input_batch, entry.size)

    def _entry(self) -> Entry | None:
        """Return the graph for the batch that `preprocess_state` told of; None: there is none."""
        book, lengths, table = self._state.graphs, self._state.lengths, self._state.table
        if book is None or lengths is None:  # a warm-up has no lengths
            return None
        starts, seq_lens = lengths
        rows = len(seq_lens)
        entry = book.entry(table.skips[:rows], starts[1:], seq_lens, table.prompt_lens[:rows])
        book.replayed += entry is not None
        return entry

    def get_additional_cg_support(self) -> tuple[Any, str | None]:
        """Return that none of the runner's graphs may hold a whole step."""
        return no_full_graphs()
