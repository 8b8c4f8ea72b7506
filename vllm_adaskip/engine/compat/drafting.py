# SPDX-License-Identifier: Apache-2.0
"""vLLM's speculative decoding, with drafts that come from the model itself.

vLLM loads the class that ``speculative_config`` names with method ``custom_class``, which it calls
experimental: a subclass of `RunnerDrafts`. It tells that class neither which request is in which
row nor of how many slots a row has, so a worker of ours (`engine/worker.py`) hands it the runner.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vllm_adaskip.engine.compat.forward import groups_of
from vllm_adaskip.engine.step import Ints

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.model_executor.layers.attention import Attention


class RunnerDrafts:
    """Stands where vLLM's V1 runner expects a drafter; a subclass sets ``drafts``.

    Since 0.29 (``custom_class``; `InputBatch.num_tokens_no_spec`, `req_ids`, `block_table`;
    `CachedRequestState`). Remove when vLLM documents drafters that run the target's own layers.
    """

    drafts: Drafts

    def __init__(self, vllm_config: VllmConfig) -> None:
        # vLLM's runner refuses any logits processor beside drafts, and reads the list after this;
        # the front end, which asks ours about requests, has its own by now.
        vllm_config.model_config.logits_processors = None
        self._runner: Any = None

    def attach(self, runner: Any) -> None:
        """Take the runner; before the model is loaded."""
        self._runner = runner

    @property
    def batch(self) -> list[str]:
        """Ids of the requests in the batch, row by row; the runner changes this list."""
        ids: list[str] = self._runner.input_batch.req_ids
        return ids

    def request(self, request_id: str) -> Any:
        """Return one of them: ``prompt_token_ids``, ``output_token_ids``, ``sampling_params``."""
        return self._runner.requests[request_id]

    def limits(self, row: int) -> tuple[int, frozenset[int]]:
        """Return how many tokens a row's sequence has at most, and the tokens that end it."""
        request = self.request(self.batch[row])
        params = request.sampling_params
        stops = frozenset({params.eos_token_id, *(params.stop_token_ids or ())} - {None})
        return request.num_prompt_tokens + params.max_tokens, stops

    def propose(
        self, sampled: list[list[int]], num_tokens: Any, token_ids: Any, slot_mappings: Any = None
    ) -> list[list[int]]:
        """Return drafts of each row, behind the tokens that it has just drawn."""
        rows = len(sampled)
        ends = np.asarray(num_tokens[:rows], dtype=np.int64)
        return self.drafts.propose(sampled, ends, self._slots(rows))

    def _slots(self, rows: int) -> Ints:
        """Return ``[rows]`` tokens for which each has slots, in all groups of layers."""
        tables = self._runner.input_batch.block_table.block_tables
        held = [each.num_blocks_per_row[:rows] * each.block_size for each in tables]
        found: Ints = np.minimum.reduce(held).astype(np.int64)
        return found


class Drafts(Protocol):
    """What makes drafts: `drafter.Drafter`."""

    def propose(self, sampled: Sequence[Sequence[int]], ends: Ints, slots: Ints) -> list[list[int]]:
        """Return each row's drafts, see there."""


def attach(runner: Any) -> None:
    """Hand a runner to its drafter, as soon as there is one.

    Steps without drafts are sampled as without speculation: vLLM's way to judge drafts takes 0.25
    ms more at batch 1, whether there are any or not. Since 0.29 (`GPUModelRunner.drafter`,
    `rejection_sampler`, `sampler`). Remove when vLLM does so.
    """
    runner.drafter.attach(runner)
    runner.rejection_sampler = _Judge(runner.rejection_sampler, runner.sampler)


class _Judge:
    """Stands before a runner's rejection sampler."""

    def __init__(self, rejection_sampler: Any, sampler: Any) -> None:
        self._rejection_sampler, self._sampler = rejection_sampler, sampler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rejection_sampler, name)

    def __call__(self, step: Any, draft_probs: Any, logits: Tensor, sampling: Any) -> Any:
        """Sample a step's tokens."""
        if not any(step.num_draft_tokens):
            return self._sampler(logits=logits, sampling_metadata=sampling)
        return self._rejection_sampler(step, draft_probs, logits, sampling)


def mend_sampling() -> None:
    """Have drafts verified at the temperature that requests ask for.

    On the CPU vLLM hands each draft's temperature, top-k and top-p on through a kernel that
    writes into a copy, so that drafts are judged by whatever was in memory (vLLM's issue 55005).
    A right one is registered where vLLM lets platforms do so, in workers that draft alone, unless
    the release at hand is right. Since 0.32 (``register_kernels``). Remove when that issue is
    closed in all releases that we support.
    """
    from vllm.triton_utils.dispatcher import register_kernels
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    values = torch.tensor([0.5, 2.0])
    found = expand_batch_to_tokens(values, torch.tensor([1, 3], dtype=torch.int32), 3)
    if found.tolist() != [0.5, 2.0, 2.0]:
        register_kernels({"vllm.v1.sample.rejection_sampler.expand_kernel": _expand})


def _expand(
    output: Tensor,
    values: Tensor,
    ends: Tensor,
    replace_from: float,
    replace_to: float,
    most: int | None = None,
) -> None:
    """Write each of ``[requests]`` values once a draft of it, which ends before ``ends``."""
    counts = ends.diff(prepend=ends.new_zeros(1))
    values = values.masked_fill(values == replace_from, replace_to)
    output.copy_(values.repeat_interleave(counts))


class DraftContexts:
    """Forward contexts in which some rows' attention sees one drafted token each.

    Its slots are those that vLLM keeps free behind each row for the tokens that come next, and
    verification writes over what drafts leave there. Since 0.26 (see `forward.SubBatches`). Remove
    with it.
    """

    def __init__(self, vllm_config: VllmConfig, layers: Sequence[Attention]) -> None:
        self._vllm_config = vllm_config
        self._layers = layers
        self._groups: list[tuple[list[str], Any, int]] = []
        self._step: ForwardContext | None = None
        self._tables: list[Tensor] = []

    def keep(self) -> None:
        """Remember the forward that runs now, whose rows may draft when it is done."""
        from vllm.forward_context import get_forward_context

        self._step = get_forward_context()

    def begin(self, rows: Ints) -> None:
        """Draft for these rows of it from now on."""
        assert self._step is not None and isinstance(self._step.attn_metadata, dict)
        metadata = self._step.attn_metadata
        if not self._groups:
            self._groups = [
                (
                    [self._layers[layer].layer_name for layer in own],
                    builder,
                    self._layers[own[0]].kv_cache.shape[2],
                )
                for own, builder in groups_of(self._vllm_config, self._layers, metadata)
            ]
        own_rows = torch.from_numpy(rows)
        self._starts = torch.arange(len(rows) + 1, dtype=torch.int32)
        self._tables = [
            metadata[names[0]].block_table.index_select(0, own_rows) for names, *_ in self._groups
        ]

    def at(self, positions: Tensor) -> AbstractContextManager[Any]:
        """Enter a context in which each row has one token, at ``[rows]`` int64 positions."""
        from vllm.forward_context import override_forward_context
        from vllm.v1.attention.backend import CommonAttentionMetadata

        assert self._step is not None
        seq_lens = (positions + 1).int()
        attn_metadata, slot_mapping = {}, {}
        for (names, builder, size), table in zip(self._groups, self._tables, strict=True):
            blocks = table.gather(1, (positions // size)[:, None])[:, 0]
            slots = blocks.long() * size + positions % size
            metadata = builder.build(
                0,
                CommonAttentionMetadata(
                    query_start_loc=self._starts,
                    query_start_loc_cpu=self._starts,
                    seq_lens=seq_lens,
                    num_reqs=len(positions),
                    num_actual_tokens=len(positions),
                    max_query_len=1,
                    max_seq_len=int(seq_lens.max()),
                    block_table_tensor=table,
                    slot_mapping=slots,
                    causal=True,
                ),
            )
            for name in names:
                attn_metadata[name], slot_mapping[name] = metadata, slots
        context = dataclasses.replace(
            self._step, attn_metadata=attn_metadata, slot_mapping=slot_mapping
        )
        entered: AbstractContextManager[Any] = override_forward_context(context)
        return entered
