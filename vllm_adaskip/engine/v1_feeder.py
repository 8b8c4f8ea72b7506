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
from vllm_adaskip.engine.facts import EngineFacts
from vllm_adaskip.engine.planner import Planner
from vllm_adaskip.engine.request import is_one_answer
from vllm_adaskip.engine.state import SkipState

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig

_PREFIX = "V1Feeder_"


def class_path(facts: EngineFacts) -> str:
    """Give the ``module:Class`` by which an engine with these facts names its feeder."""
    return f"{__name__}:{_PREFIX}{facts.to_json().encode().hex()}"


def planner_of(vllm_config: VllmConfig) -> Planner:
    """Give the planner of the feeder that an engine names."""
    (path,) = [
        one
        for one in vllm_config.model_config.logits_processors or ()
        if isinstance(one, str) and one.startswith(f"{__name__}:{_PREFIX}")
    ]
    return __getattr__(path.partition(":")[2]).planner


def __getattr__(name: str) -> type[V1Feeder]:
    if not name.startswith(_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _feeder_class(bytes.fromhex(name.removeprefix(_PREFIX)).decode())


@functools.lru_cache(maxsize=64)
def _feeder_class(facts: str) -> type[V1Feeder]:
    planner = Planner(EngineFacts.from_json(facts))
    return type("V1Feeder", (V1Feeder,), {"planner": planner})


class V1Feeder(LogitsProcessor):
    """Mirrors the V1 runner's persistent batch into the engine's sequence table."""

    planner: ClassVar[Planner]

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._state = SkipState(self.planner, vllm_config.scheduler_config.max_num_seqs)
        self._table = self._state.table
        compat.share_state(vllm_config, self._state)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse, in the front end, a request whose arguments are not allowed."""
        cls.planner.wanted(sampling_params.extra_args)

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch: removed, then added, then moved rows, as vLLM prescribes."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._table.remove(row)
        for row, params, prompt, output in batch_update.added:
            self._state.enter(
                row,
                params.extra_args,
                prompt or (),
                generated=len(output),
                one_answer=is_one_answer(params),
                allowed=params.allowed_token_ids,
            )
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
