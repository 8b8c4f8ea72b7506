# SPDX-License-Identifier: Apache-2.0
"""The scheduler's half of the canary: which finished answers are read again, and when."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from logging import getLogger
from random import Random
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from vllm_adaskip.engine.canary import CANARY, MOST_WAITING, READS, Canary, Reading
from vllm_adaskip.engine.compat.rereading import Request, RereadingScheduler, is_plainly_greedy
from vllm_adaskip.engine.naming import planner_of
from vllm_adaskip.engine.request import RequestArgs

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = getLogger("vllm.adaskip")

#: Seconds after which an answer is read though requests wait: else none is read under full load.
PATIENCE: Final = 10.0
#: Of a request that reads: at full depth, and nothing drafted.
_WHOLE: Final = {"adaskip": "off", "adaskip_draft": 0, READS: True}


class WatchingScheduler(RereadingScheduler):
    """Reads a share of answers under the server's plans again, one by one, while no request waits.

    The scheduler does so, because it sees all answers in all kinds of server, and what waits.
    """

    def __init__(self, *args: Any, vllm_config: VllmConfig, **kwargs: Any) -> None:
        super().__init__(*args, vllm_config=vllm_config, **kwargs)
        self._planner = planner_of(vllm_config)
        self._canary = Canary(self._planner.canary) if self._planner.canary else None
        self._random = Random(0)
        self._watched: dict[str, Request] = {}
        self._unread: deque[tuple[float, Request]] = deque()

    @property
    def plans_are_off(self) -> bool:
        """Whether sequences run dense whose request leaves it open."""
        return self._canary is not None and self._canary.is_off

    def with_canary(self, extra_args: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Return a request's arguments, with what the workers' report says of the canary."""
        if self._canary is None:
            return extra_args
        return {**(extra_args or {}), CANARY: self._canary.report()}

    def add_request(self, request: Request) -> None:
        """Add a request as vLLM does; a share of them is watched."""
        super().add_request(request)
        options = self._planner.canary
        if options is None or self.answer_begins(request) is not None:
            return
        if self._random.random() < options.share:
            self._watched[request.request_id] = request

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Reset as vLLM does, and let the canary begin anew: its plans are on again.

        Whoever puts other weights into a running engine does so, of which old readings say nothing;
        and nobody has another way to reach a scheduler.
        """
        if self._canary is not None:
            if self._canary.is_off:
                logger.warning("vllm-adaskip: plans are on again; the canary begins anew")
            self._canary.begin_anew()
            self._watched.clear()
            self._unread.clear()
        found: bool = super().reset_prefix_cache(*args, **kwargs)
        return found

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        """Finish as vLLM does; a stop string ends a request this way, too."""
        found = super().finish_requests(*args, **kwargs)
        self._look()
        return found

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """Update as vLLM does, then see which answers are finished."""
        outputs = super().update_from_output(*args, **kwargs)
        self._look()
        return outputs

    def _look(self) -> None:
        if self._canary is None:
            return
        for name in [name for name, one in self._watched.items() if one.is_finished()]:
            if self._is_readable(request := self._watched.pop(name)):
                self._unread.append((monotonic(), request))
        while len(self._unread) > MOST_WAITING:
            self._unread.popleft()
            self._canary.dropped += 1
        if self._unread and not self.is_reading:
            since, request = self._unread[0]
            if not self.waiting or monotonic() - since > PATIENCE:
                self._unread.popleft()
                self.read_again(request, _WHOLE)

    def _is_readable(self, request: Request) -> bool:
        """Return whether the server decided what an answer leaves out, and each token was greedy.

        A drawn token surprises the whole model, too, so it says nothing of a plan.
        """
        params = request.sampling_params
        if params is None or not request.num_output_tokens or not is_plainly_greedy(params):
            return False
        if request.resumable or request.num_prompt_tokens >= self.max_model_len - 1:
            return False
        if not RequestArgs.parse(params.extra_args).leaves_plan_open:
            return False
        wanted = self._planner.wanted(params.extra_args)
        shortened = wanted.prompt is not None and wanted.prompt == self._planner.prompt
        return shortened or wanted.may_leave_out

    def was_read(self, gaps: Sequence[float]) -> None:
        """Judge, see `Canary`."""
        assert self._canary is not None
        if gaps and self._canary.read(Reading.of(gaps)):
            logger.error(
                "vllm-adaskip: the canary has switched plans off, until the prefix cache is reset; "
                "requests that name a plan still follow it: %s, allowed: %s",
                self._canary.report(),
                self._planner.canary,
            )
