# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2's logits processor interface, of which only the front end's question is used.

Since 0.32. Remove when a plugin may check requests without being a logits processor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

if TYPE_CHECKING:
    from torch import Tensor
    from vllm import SamplingParams


class RequestCheck(LogitsProcessor):
    """Touches no request's logits; `naming.named_class` adds what refuses bad requests."""

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Return False: this request's logits stay as they are."""
        return False

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Return the logits as they are."""
        return logits
