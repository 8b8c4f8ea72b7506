# SPDX-License-Identifier: Apache-2.0
"""Which LoRA adapter each row runs with, as vLLM's layers see it while some rows are shown.

On the CPU vLLM's LoRA layers take the adapters of their rows from one place, which holds those of
the whole step in order. While other rows are shown, that place must hold those rows' adapters.

Since 0.26 (`LoRAModelManager.punica_wrapper_mapping`; of `PunicaWrapperCPU` the attributes below
and `token_lora_indices`). Remove when a LoRA layer takes its rows' adapters as an argument.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vllm_adaskip.engine.step import Tokens

#: Runs of consecutive rows with one adapter: their adapters, their lengths, and sums.
_FIELDS = ("_lora_indices_per_batch", "_seq_lengths", "batch_size", "token_nums")


class Adapters:
    """The adapters of a step's rows; without adapters there is no such object."""

    def __init__(self, model: Any) -> None:
        """Take a model whose layers have been wrapped, which is so when it has been loaded."""
        (self._punica,) = model.lora_manager.punica_wrapper_mapping.values()
        self._of_all: Tensor | None = None

    @contextmanager
    def during_step(self) -> Iterator[Adapters]:
        """Enter before rows are shown; the step's own are back when it ends, however it ends."""
        punica = self._punica
        before = [getattr(punica, name) for name in _FIELDS]
        self._of_all = None if punica.no_lora else punica.token_lora_indices
        try:
            yield self
        finally:
            for name, value in zip(_FIELDS, before, strict=True):
                setattr(punica, name, value)

    def show(self, tokens: Tokens | None, device: torch.device) -> None:
        """Have the next layers work on some tokens of the step; None: all."""
        if self._of_all is None:  # no row has an adapter
            return
        own = self._of_all if tokens is None else self._of_all[tokens.on(device)]
        self._set(own, torch.ones_like(own), len(own), len(own))

    def _set(self, *values: Any) -> None:
        for name, value in zip(_FIELDS, values, strict=True):
            setattr(self._punica, name, value)
