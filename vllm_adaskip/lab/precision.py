# SPDX-License-Identifier: Apache-2.0
"""In how many bits training computes on this machine."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch


def in_16_bits(device: torch.device) -> AbstractContextManager[Any]:
    """Enter what computes products in bfloat16; in float32 on CPUs that are slow at it."""
    enabled = device.type != "cpu" or is_fast_in_16_bits()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def is_fast_in_16_bits() -> bool:
    """Return whether this CPU multiplies bfloat16, which others do in many more steps."""
    return bool(torch.cpu._is_avx512_bf16_supported())
