# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler, with marks in the hashes of blocks that hold generated tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.scheduler import Scheduler

from vllm_adaskip.engine.block_mark import Mark, block_mark, unfindable
from vllm_adaskip.engine.naming import planner_of
from vllm_adaskip.engine.planner import Planner
from vllm_adaskip.engine.request import is_one_answer

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.request import Request

    Hasher = Callable[[Request], list[BlockHash]]


class MarkingScheduler(Scheduler):
    """Named in one engine's ``scheduler_cls`` option, when prefix caching is on.

    vLLM hashes a request's full prompt blocks when it makes the request, before it is added
    here, and every later block by ``request._block_hasher`` when a token fills it. So
    replacing that hasher reaches exactly the blocks with generated tokens.

    Since 0.26 (`Request._block_hasher`, `Request.block_hashes`, `_preempt_request`). Remove
    when a request can bring a salt for the blocks past its prompt. The base is the synchronous
    scheduler, which is vLLM's own on the CPU; elsewhere asynchronous scheduling is switched off.
    """

    def __init__(self, *args: Any, vllm_config: VllmConfig, **kwargs: Any) -> None:
        super().__init__(*args, vllm_config=vllm_config, **kwargs)
        self._planner = planner_of(vllm_config)
        if self._planner.classifier.exits == "answer":
            self.kv_cache_manager: Any = _KeepingAnswersApart(self.kv_cache_manager, self._planner)

    def add_request(self, request: Request) -> None:
        """Have the request's later blocks marked, then add it."""
        params, hasher = request.sampling_params, request._block_hasher
        if hasher is not None and params is not None:
            mark = block_mark(self._planner, params.extra_args, request.num_prompt_tokens)
            if mark is not None:
                request._block_hasher = _marking(hasher, mark)
        super().add_request(request)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Mark blocks with holes anew, so that not even their own sequence finds them."""
        super()._preempt_request(request, *args, **kwargs)
        if getattr(request._block_hasher, "mark", None) is unfindable:
            del request.block_hashes[request.num_prompt_tokens // self.hash_block_size :]
            request.update_block_hashes()


class _KeepingAnswersApart:
    """Stands before the scheduler's KV cache manager: blocks that may get holes are not cached.

    A request for one token may leave out deep layers for its prompt, in the step in which that
    becomes complete. vLLM makes blocks findable when it schedules them, before anybody knows. So
    what such a step computes for such a request never is; what it finds itself, and earlier chunks,
    which run at full depth, stay everybody's.

    Since 0.26 (``allocate_slots`` with ``delay_cache_blocks``, made for blocks that come from
    elsewhere). Remove when a request can be kept out of the prefix cache from a token on.
    """

    def __init__(self, manager: Any, planner: Planner) -> None:
        self._manager = manager
        self._planner = planner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Allocate as vLLM does."""
        computed = request.num_computed_tokens + num_new_computed_tokens
        if computed + num_new_tokens >= request.num_prompt_tokens and self._may_exit(request):
            kwargs["delay_cache_blocks"] = True
        return self._manager.allocate_slots(
            request, num_new_tokens, num_new_computed_tokens, *args, **kwargs
        )

    def _may_exit(self, request: Request) -> bool:
        params = request.sampling_params
        if params is None or not is_one_answer(params):
            return False
        return self._planner.wanted(params.extra_args, one_answer=True).gated


def _marking(hasher: Hasher, mark: Mark) -> Hasher:
    """Mix a mark into each hash; the next block's is chained to the mixed one."""

    def marked(request: Request) -> list[BlockHash]:
        return [hashlib.sha256(plain + mark()).digest() for plain in hasher(request)]

    marked.mark = mark  # type: ignore[attr-defined]
    return marked
