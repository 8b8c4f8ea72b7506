# SPDX-License-Identifier: Apache-2.0
"""Every vLLM name that vLLM does not document, in one place.

Each carries *since* (first release it was seen in, of those we support, 0.26 to 0.33) and
*remove when*. Nothing here changes vLLM but `extend_parser`, which wraps the argument
parser's builder once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_adaskip.engine.step_plan import IntArray, Subset
from vllm_adaskip.engine.table import SequenceTable

if TYPE_CHECKING:
    from argparse import Namespace

    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.model_executor.layers.attention import Attention

_TABLE_KEY = "adaskip.sequence_table"


def share_table(vllm_config: VllmConfig, table: SequenceTable) -> None:
    """Put the feeder's table where the model of the same engine finds it.

    The runner's logits processor and the model meet at nothing but the engine's own
    config object; its ``static_forward_context`` holds "layer objects that need to be
    accessed outside model code" and dies with the engine, so two engines in one process
    never share a table.

    Since 0.26. Remove when the runner hands its model per-request state (V2 does).
    """
    vllm_config.compilation_config.static_forward_context[_TABLE_KEY] = table


def shared_table(vllm_config: VllmConfig) -> SequenceTable:
    """Give the table of this engine; the runner makes its feeder before its model.

    Raises:
        RuntimeError: nobody feeds plans to this engine, which would be silently dense.

    Since and remove when: see `share_table`.
    """
    table = vllm_config.compilation_config.static_forward_context.get(_TABLE_KEY)
    if not isinstance(table, SequenceTable):
        raise RuntimeError(
            "vllm-adaskip: no feeder runs in this engine, so it would ignore every plan; "
            "start it with --plugin adaskip, or with vllm_adaskip.engine_args()"
        )
    return table


def register_config_hook(architecture: str, prepare: Callable[[VllmConfig], None]) -> None:
    """Have ``prepare`` check and complete the config of every engine of one architecture.

    Since 0.26. Remove when `ModelRegistry.register_model` takes a config hook.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class Hook(VerifyAndUpdateConfig):
        verify_and_update_config = staticmethod(prepare)

    MODELS_CONFIG_MAP[architecture] = Hook


def extend_parser(
    add_arguments: Callable[[Any], None], finish: Callable[[Namespace], None]
) -> None:
    """Add arguments to vLLM's engine parser, and a last look at what was parsed.

    ``finish`` runs when all arguments are known, so that their order does not matter; its
    ValueError becomes the parser's usage error.
    Safe to call twice. Since 0.26. Remove when plugins may add engine arguments.
    """
    from vllm.engine.arg_utils import EngineArgs

    build = EngineArgs.add_cli_args
    if getattr(build, "_adaskip", False):
        return

    def add_cli_args(parser: Any) -> Any:
        parser = build(parser)
        add_arguments(parser)
        parse = parser.parse_known_args

        def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
            namespace, rest = parse(args, namespace)
            try:
                finish(namespace)
            except ValueError as error:
                parser.error(str(error))
            return namespace, rest

        parser.parse_known_args = parse_known_args
        return parser

    add_cli_args._adaskip = True  # type: ignore[attr-defined]
    EngineArgs.add_cli_args = staticmethod(add_cli_args)


def is_probe(hf_config: Any) -> bool:
    """Tell whether a config is the made-up one by which vLLM asks what an override does.

    Since 0.29. Remove when vLLM stops calling ``hf_overrides`` on a config of its own.
    """
    return str(getattr(hf_config, "model_type", "")).startswith("dummy_")


def enable_amx() -> None:
    """Ask the kernel for AMX in this process, where the CPU attention kernel will use it.

    Without it vLLM's bf16 attention dies with SIGILL. Since 0.26 (x86 with AMX only).
    Remove when vLLM's CPU worker does it.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def step_lengths(metadata: Any) -> tuple[IntArray, IntArray]:
    """Give ``query_start_loc`` ``[rows + 1]`` and ``seq_lens`` ``[rows]`` of a step on the host.

    On the CPU backend these are views, no copies and no synchronisation. Since 0.26.
    Remove when the runner hands its model the step's layout (V2 does).
    """
    starts: IntArray = metadata.query_start_loc.numpy()
    lengths: IntArray = metadata.seq_lens.numpy()
    return starts.astype(np.int64), lengths.astype(np.int64)


class SubBatches:
    """Makes forward contexts in which vLLM's layers see a part of the step's tokens.

    Attention metadata of the part come from the backend's own builder. Since 0.26
    (`CommonAttentionMetadata`, `override_forward_context`, names of metadata fields).
    Remove when vLLM runs layers on subsets itself.
    """

    def __init__(self, vllm_config: VllmConfig, layers: Iterable[Attention]) -> None:
        self._vllm_config = vllm_config
        self._layers = list(layers)
        self._names = [layer.layer_name for layer in self._layers]
        self._builder: Any = None

    def step_metadata(self) -> Any | None:
        """Give the attention metadata of the step that runs now; None in a warm-up."""
        from vllm.forward_context import get_forward_context

        metadata = get_forward_context().attn_metadata
        return metadata[self._names[0]] if isinstance(metadata, dict) else None

    @staticmethod
    def enter(context: ForwardContext) -> AbstractContextManager[Any]:
        """Make a forward context the current one for a while."""
        from vllm.forward_context import override_forward_context

        entered: AbstractContextManager[Any] = override_forward_context(context)
        return entered

    def context(self, subset: Subset) -> ForwardContext:
        """Give the current forward context narrowed to a subset of its tokens."""
        from vllm.forward_context import get_forward_context
        from vllm.v1.attention.backend import CommonAttentionMetadata

        step = get_forward_context()
        whole = step.attn_metadata[self._names[0]]
        slots = step.slot_mapping[self._names[0]][subset.tokens]
        if self._builder is None:
            self._builder = self._make_builder(step)
        part = self._builder.build(
            0,
            CommonAttentionMetadata(
                query_start_loc=subset.query_start_loc,
                query_start_loc_cpu=subset.query_start_loc,
                seq_lens=whole.seq_lens[subset.rows] - subset.dropped,
                num_reqs=len(subset.rows),
                num_actual_tokens=subset.num_tokens,
                max_query_len=subset.max_query_len,
                max_seq_len=whole.max_seq_len,
                block_table_tensor=whole.block_table[subset.rows],
                slot_mapping=slots,
                causal=True,
            ),
        )
        return dataclasses.replace(
            step,
            attn_metadata=dict.fromkeys(self._names, part),
            slot_mapping=dict.fromkeys(self._names, slots),
        )

    def _make_builder(self, step: ForwardContext) -> Any:
        """Make the backend's builder, once the KV cache is laid out."""
        metadata = step.attn_metadata
        assert isinstance(metadata, dict)
        if len({id(metadata[name]) for name in self._names}) > 1:
            raise NotImplementedError(
                "vllm-adaskip: this model's attention layers are in several KV cache groups "
                "(sliding window?), which skipping does not support yet"
            )
        first = self._layers[0]
        return first.attn_backend.get_builder_cls()(
            first.get_kv_cache_spec(self._vllm_config),
            self._names,
            self._vllm_config,
            metadata[self._names[0]].query_start_loc.device,
        )
