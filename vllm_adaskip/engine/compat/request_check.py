# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2's logits processor interface, of which only the front end's question is used.

Since 0.32. Remove when a plugin may check requests without being a logits processor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from vllm_adaskip.engine import naming
from vllm_adaskip.engine.facts import EngineFacts
from vllm_adaskip.engine.planner import Planner

if TYPE_CHECKING:
    from torch import Tensor
    from vllm import SamplingParams


def class_path(facts: EngineFacts) -> str:
    """Give the ``module:Class`` by which an engine with these facts names its check."""
    return naming.class_path(__name__, "RequestCheck", facts)


def __getattr__(name: str) -> type[RequestCheck]:
    return naming.named_class(name, RequestCheck)


class RequestCheck(LogitsProcessor):
    """Refuses bad requests; no request's logits are touched."""

    planner: ClassVar[Planner]

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse, in the front end, a request whose arguments are not allowed."""
        cls.planner.admit(sampling_params.extra_args)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Tell the runner that this request's logits stay as they are."""
        return False

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Return the logits as they are."""
        return logits
