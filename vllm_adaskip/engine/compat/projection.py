# SPDX-License-Identifier: Apache-2.0
"""K and V without Q: vLLM packs the three projections into one weight, and runs all of it.

Tokens that leave attention out need K and V alone. On the CPU vLLM packs a weight for its kernels
when it is loaded and lets go of it, so the rows of K and V are packed once more, before that; on
a GPU they are a view.

Uses ``LinearBase.quant_method``, ``UnquantizedLinearMethod``, ``QKVParallelLinear.num_heads`` and
``head_size``. Since 0.29. Remove when vLLM can project K and V alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import QKVParallelLinear, UnquantizedLinearMethod


class KeysAndValues(UnquantizedLinearMethod):
    """vLLM's method for a packed projection, which can also run K and V alone."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack the rows of K and V, then all."""
        assert isinstance(layer, QKVParallelLinear)
        queries = layer.num_heads * layer.head_size
        self._alone = nn.Module()
        for name in ("weight", "bias"):
            whole = getattr(layer, name, None)
            rows = None if whole is None else nn.Parameter(whole.data[queries:], False)
            self._alone.register_parameter(name, rows)
        super().process_weights_after_loading(self._alone)
        super().process_weights_after_loading(layer)

    def without_queries(self, hidden: Tensor) -> Tensor:
        """Return K and V ``[tokens, 2 * kv_heads * head_size]`` of ``[tokens, hidden]``."""
        made: Tensor = self.apply(self._alone, hidden, self._alone.bias)
        return made


def keep_apart(model: nn.Module) -> None:
    """Let a model that is not loaded yet project K and V alone, where its weights are plain."""
    for module in model.modules():
        is_ours = isinstance(module, QKVParallelLinear)
        if is_ours and type(module.quant_method) is UnquantizedLinearMethod:
            module.quant_method = KeysAndValues()


def project(projection: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return something in Q's place, K and V ``[tokens, heads * head_size]``.

    Q means nothing, but what rotates K wants to rotate both.
    """
    method = getattr(projection, "quant_method", None)
    if isinstance(method, KeysAndValues):
        key, value = method.without_queries(hidden).chunk(2, dim=-1)
        return torch.empty_like(key), key, value
    layer: Any = getattr(projection, "base_layer", projection)  # inside of an adapter's
    queries, keys = layer.num_heads * layer.head_size, layer.num_kv_heads * layer.head_size
    query, key, value = projection(hidden)[0].split([queries, keys, keys], dim=-1)
    return query, key, value
