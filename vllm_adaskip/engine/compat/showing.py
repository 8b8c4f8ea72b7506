# SPDX-License-Identifier: Apache-2.0
"""What the scheduler tells a client beside a request's tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.scheduler import Scheduler

if TYPE_CHECKING:
    from vllm.v1.request import Request

__all__ = ["ShowingScheduler"]


class ShowingScheduler(Scheduler):
    """Puts what a subclass says of a request into each of its outputs.

    It goes as ``kv_transfer_params``, the one field that vLLM hands on from the scheduler to
    `RequestOutput` and to the answers of its OpenAI server, streamed ones aside. An output without
    tokens is none of a client's. Each output has it, as a stop string ends a request in the front
    end. Since 0.26 (``EngineCoreOutput.kv_transfer_params``). Remove when a plugin may add fields.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shown: dict[str, Callable[[], Mapping[str, Any]]] = {}

    @abstractmethod
    def shown_of(self, request: Request) -> Mapping[str, Any]:
        """Return what is shown of a request that has been scheduled."""

    def show(self, request: Request) -> None:
        """Show it of this request, from now on; it is asked for once."""
        self._shown[request.request_id] = cache(partial(self.shown_of, request))

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        """Finish as vLLM does; requests that are shown may be among them."""
        found = super().finish_requests(*args, **kwargs)
        self._shown = {name: one for name, one in self._shown.items() if name in self.requests}
        return found

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """Update as vLLM does, and add to the outputs of requests that are shown."""
        outputs = super().update_from_output(*args, **kwargs)
        if self._shown:
            for each in outputs.values():
                for one in each.outputs:
                    if (shown := self._shown.get(one.request_id)) is not None:
                        one.kv_transfer_params = {"adaskip": shown()}
                        if one.finish_reason is not None:
                            del self._shown[one.request_id]
        return outputs
