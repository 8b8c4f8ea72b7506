# SPDX-License-Identifier: Apache-2.0
"""Kernels for steps that run layer by layer, where vLLM would run many small operations.

Under compilation vLLM turns its kernels for rotary embeddings and the like off (``custom_ops:
none``), for the compiler fuses their PyTorch forms, and compiles activations one by one, whose
calls then take longer than what they do. On the CPU, norms have no kernel in vLLM's dispatch at
all, though one is built: measured at hidden size 192, 2 us against 13 at batch 1, 5 against 21 at
batch 64. Of SiluAndMul the plain PyTorch form is the faster one there: 3.8 us against the kernel's
2.5 at batch 1, but 7.6 against 16 at 16 and 19 against 59 at 64. In slices of 512 tokens, what it
makes in between stays in the cache: 8,000 tokens of 1536 values take 22 ms so, and 45 at once.

Uses ``CustomOp._forward_method``, ``_enforce_enable``, ``dispatch_forward``, and the operators
``_C::rms_norm`` and ``_C::fused_add_rms_norm``.
Since 0.26. Remove when vLLM chooses kernels at call time, or planned steps are compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.platforms import current_platform

from vllm_adaskip.engine.compat.modules import alike, twin

#: Tokens of which an activation is made at once.
SLICE = 512

Forward = Callable[..., Any]
Module = TypeVar("Module", bound=nn.Module)


def with_kernels(stack: Module) -> Module:
    """Return the twin of a stack of layers that shares its weights, but whose ops have kernels.

    The stack itself stays what stock vLLM made, for stock vLLM and the compiler. Called while
    the model is made, as vLLM chooses the ops' methods then.
    """
    counted = get_current_vllm_config().compilation_config.enabled_custom_ops
    before = counted.copy()
    own = twin(stack, _with_kernel)
    counted.clear()  # what vLLM counts for its log
    counted.update(before)
    return own


def _with_kernel(op: nn.Module) -> nn.Module | None:
    kernel = _kernel(op)
    return None if kernel is None else alike(op, _forward_method=kernel)


def _kernel(op: nn.Module) -> Forward | None:
    """Return what an op should run by itself; None: as it is, or no op."""
    if type(op) is RMSNorm and op.variance_size_override is None:
        return _norm(op)
    if current_platform.is_cpu() and isinstance(op, SiluAndMul):
        return _silu_and_mul
    if isinstance(op, RMSNorm | RotaryEmbedding | SiluAndMul):
        return _dispatched(op)
    return None


def _dispatched(op: CustomOp) -> Forward:
    enforced, op._enforce_enable = op._enforce_enable, True
    try:
        chosen: Forward = op.dispatch_forward(compile_native=False)
    finally:
        op._enforce_enable = enforced
    return chosen


def _silu_and_mul(values: Tensor) -> Tensor:
    """Return ``[tokens, size]`` of ``[tokens, 2 * size]``, as the op's plain form, bit for bit."""
    if len(values) <= SLICE:
        plain: Tensor = SiluAndMul.forward_native(values)
        return plain
    made = values.new_empty(*values.shape[:-1], values.shape[-1] // 2)
    for own, out in zip(torch.split(values, SLICE), torch.split(made, SLICE), strict=True):
        gate, up = own.chunk(2, dim=-1)
        torch.mul(functional.silu(gate), up, out=out)
    return made


def _norm(op: RMSNorm) -> Forward:
    """Norm ``[..., hidden]``; with a residual both are written in place, as vLLM does on a GPU."""

    def forward(x: Tensor, residual: Tensor | None = None) -> Any:
        weight = op.weight.data
        if not x.is_contiguous() or weight.dtype != x.dtype:
            return op.forward_native(x, residual)
        if residual is None:
            torch.ops._C.rms_norm(out := torch.empty_like(x), x, weight, op.variance_epsilon)
            return out
        torch.ops._C.fused_add_rms_norm(x, residual, weight, op.variance_epsilon)
        return x, residual

    return forward
