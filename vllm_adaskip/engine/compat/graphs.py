# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of whole decode steps, one a plan and size, beside the runner's own.

The runner chooses its graphs by counts alone, before it asks a model state anything, so it is
told to keep to piecewise graphs, between which our forward is called. That forward then replays
one of these graphs, dense among them. vLLM does the same for some layers of DeepSeek V4.1.

Since 0.32 (`ModelState.capture_inner_cudagraphs`, `CudaGraphManager`, `InputBatch.make_dummy`,
`AttentionGroup.create_metadata_builders`). Remove when vLLM takes a key of ours for its graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.forward_context import set_forward_context

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Returns attention metadata by layer: `DefaultModelState.prepare_attn`.
Prepare = Callable[..., dict[str, Any]]
#: Runs the model on ``[size]`` input ids and positions; returns ``[size, width]``.
Run = Callable[[Tensor, Tensor], Tensor]


class PlanGraphs:
    """One plan's graphs; all plans share inputs, metadata and output.

    Attributes:
        shared: what a graph reads and writes.

    """

    def __init__(self, shared: Shared) -> None:
        from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

        self.shared = shared
        self._manager = CudaGraphManager(
            shared.vllm_config, shared.device, CUDAGraphMode.FULL_DECODE_ONLY, 1
        )
        self._by_size: dict[int, Any] = {}

    def capture(self, run: Callable[[int], Run]) -> None:
        """Capture every size; ``run(size)`` returns the same body for warm-up and capture.

        Bodies stay, for what they made on the device is read by the graphs.
        """
        shared, self._bodies = self.shared, run

        def create_forward_fn(desc: Any, warmup: bool) -> Callable[[CUDAGraphMode], None]:
            size = desc.num_tokens
            self._by_size[size] = desc
            context, body = shared.captured_context(size), run(size)
            ids, positions = shared.buffers.input_ids[:size], shared.buffers.positions[:size]

            def forward(_: CUDAGraphMode) -> None:
                with set_forward_context(vllm_config=shared.vllm_config, **context):
                    shared.keep(body(ids, positions))

            return forward

        self._manager.capture(create_forward_fn, "Capturing a plan's CUDA graphs")

    def replay(self, size: int) -> Tensor:
        """Run the graph; return its ``[size, width]`` output, which the next replay overwrites."""
        self._manager.run_fullgraph(self._by_size[size])
        return self.shared.output[:size]


class Shared:
    """What all graphs of an engine read and write, at addresses that stay.

    Attributes:
        vllm_config: a copy by which metadata builders keep their tensors in place.
        buffers: the runner's inputs.
        output: ``[largest size, width]``.

    """

    output: Tensor

    def __init__(
        self,
        vllm_config: VllmConfig,
        sizes: list[int],
        prepare: Prepare,
        buffers: Any,
        block_tables: Any,
        attn_groups: list[list[Any]],
        kv_cache_config: Any,
    ) -> None:
        """Take what the runner hands to `capture_inner_cudagraphs`."""
        self.vllm_config = copy(vllm_config)
        self.vllm_config.compilation_config = compilation = copy(vllm_config.compilation_config)
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        compilation.cudagraph_capture_sizes = sizes
        compilation.max_cudagraph_capture_size = sizes[-1]
        self.device = buffers.device
        self.buffers = buffers
        self._prepare, self._tables, self._kv_cache_config = prepare, block_tables, kv_cache_config
        self._groups = [[self._own(group) for group in groups] for groups in attn_groups]

    def _own(self, group: Any) -> Any:
        """Copy an attention group, with a builder of its own: it keeps what it built."""
        own = replace(group, metadata_builders=[])
        own.create_metadata_builders(self.vllm_config, self.device, group.kernel_block_size)
        return own

    def captured_context(self, size: int) -> dict[str, Any]:
        """Return what the forward context needs where a graph is captured."""
        from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
        from vllm.v1.worker.gpu.input_batch import InputBatch

        slots = self._tables.get_dummy_slot_mappings(size)
        parallel = self.vllm_config.parallel_config.data_parallel_size
        return {
            "attn_metadata": self._prepare(
                InputBatch.make_dummy(size, size, self.buffers, max_query_len=1),
                CUDAGraphMode.NONE,
                self._tables.get_dummy_block_tables(size),
                slots,
                self._groups,
                self._kv_cache_config,
                for_capture=True,
            ),
            "num_tokens": size,
            "num_tokens_across_dp": torch.full((parallel,), size, dtype=torch.int32)
            if parallel > 1
            else None,
            "slot_mapping": build_slot_mappings_by_layer(slots, self._kv_cache_config),
        }

    def keep(self, output: Tensor) -> None:
        """Copy a body's output to where it stays; the largest size comes first."""
        if not hasattr(self, "output"):
            self.output = torch.empty_like(output)
        self.output[: len(output)] = output

    def refresh(self, batch: Any, size: int) -> dict[str, Any]:
        """Write a real batch's metadata where the graphs read them, padded to a size.

        The runner has zeroed lengths, repeated the last query start and marked the slots of all
        rows behind the batch's; their block tables are old, and of length zero.
        """
        rows = batch.num_reqs
        starts = np.full(size + 1, rows, dtype=batch.query_start_loc_np.dtype)
        starts[: rows + 1] = batch.query_start_loc_np[: rows + 1]
        bound = batch.seq_lens_cpu_upper_bound.new_zeros(size)
        bound[:rows] = batch.seq_lens_cpu_upper_bound[:rows]
        padded = replace(
            batch,
            num_reqs_after_padding=size,
            num_tokens_after_padding=size,
            query_start_loc=self.buffers.query_start_loc[: size + 1],
            query_start_loc_np=starts,
            seq_lens=self.buffers.seq_lens[:size],
            seq_lens_cpu_upper_bound=bound,
            positions=self.buffers.positions[:size],
            max_query_len=1,
        )
        return self._prepare(
            padded,
            CUDAGraphMode.FULL,
            tuple(table[:size] for table in self._tables.input_block_tables),
            self._tables.slot_mappings[:, :size],
            self._groups,
            self._kv_cache_config,
        )
