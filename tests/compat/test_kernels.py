# SPDX-License-Identifier: Apache-2.0
"""Kernels of steps that run layer by layer give what vLLM's own give."""

from __future__ import annotations

import pytest
import torch
from vllm.model_executor.layers.activation import SiluAndMul

from vllm_adaskip.engine.compat.kernels import SLICE, _silu_and_mul


@pytest.mark.parametrize("tokens", [1, SLICE, SLICE + 1, 3 * SLICE + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_activation_in_slices_is_the_same_bit_for_bit(tokens: int, dtype: torch.dtype) -> None:
    values = torch.randn(tokens, 2 * 48, dtype=dtype)
    made = _silu_and_mul(values)
    assert made.is_contiguous() and torch.equal(made, SiluAndMul.forward_native(values))
