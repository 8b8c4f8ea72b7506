# SPDX-License-Identifier: Apache-2.0
"""Feeds the sequence table from vLLM's V1 runner.

The V1 runner tells its logits processors of every change of the persistent batch before
each forward (`update_state`), and has the front end validate each request with them
(`validate_params`, whose ValueError becomes HTTP 400). So the feeder is a logits
processor that never touches logits. It is named in one engine's ``logits_processors``
option and is never an entry point, which would load it into every engine on the machine.

vLLM hands `validate_params` the request alone, not the engine's config. The class must
therefore know the model's depth and the server's options, and must be found by name in
every process: `class_path` writes these facts into the name, module ``__getattr__`` reads
them back. Nothing is kept anywhere, so two engines cannot meet here.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ClassVar

from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from vllm_adaskip.engine import compat
from vllm_adaskip.engine.planner import Planner, PlannerConfig
from vllm_adaskip.engine.table import SequenceTable

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig

_PREFIX = "V1Feeder_"


def class_path(config: PlannerConfig) -> str:
    """Give the ``module:Class`` by which an engine with this planner names its feeder."""
    return f"{__name__}:{_PREFIX}{config.to_json().encode().hex()}"


def __getattr__(name: str) -> type[V1Feeder]:
    if not name.startswith(_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _feeder_class(bytes.fromhex(name.removeprefix(_PREFIX)).decode())


@functools.lru_cache(maxsize=64)
def _feeder_class(facts: str) -> type[V1Feeder]:
    planner = Planner(PlannerConfig.from_json(facts))
    return type("V1Feeder", (V1Feeder,), {"planner": planner})


class V1Feeder(LogitsProcessor):
    """Mirrors the V1 runner's persistent batch into the engine's sequence table."""

    planner: ClassVar[Planner]

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        num_layers = self.planner.config.shape.num_layers
        self._table = SequenceTable(num_layers, vllm_config.scheduler_config.max_num_seqs)
        compat.share_table(vllm_config, self._table)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse, in the front end, a request whose arguments are not allowed."""
        cls.planner.plan_for(sampling_params.extra_args)

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch: removed, then added, then moved rows, as vLLM prescribes."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._table.remove(row)
        for row, params, prompt, output in batch_update.added:
            plan = self.planner.plan_for(params.extra_args)
            self._table.add(row, plan, len(prompt or ()), is_new=not output)
        for source, target, direction in batch_update.moved:
            if direction is MoveDirectionality.SWAP:
                self._table.swap(source, target)
            else:
                self._table.move(source, target)

    def is_argmax_invariant(self) -> bool:
        """Tell vLLM that greedy sampling need not call us."""
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits as they are."""
        return logits
