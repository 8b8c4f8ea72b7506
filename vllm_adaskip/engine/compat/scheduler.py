# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler, with marks in the hashes of blocks that hold generated tokens."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.request import Request

    Hasher = Callable[[Request], list[BlockHash]]

__all__ = ["AsyncScheduler", "Mark", "MarkedBlocks", "PromptMark"]

#: Returns the mark of one more block that reaches past the prompt; empty: it has none.
Mark = Callable[[], bytes]
#: Returns the mark of a block by the position behind its last token.
PromptMark = Callable[[int], bytes]


class MarkedBlocks(Scheduler):
    """Asks a subclass for each request's mark.

    vLLM hashes a request's full prompt blocks when it makes the request, before it is added
    here, and every later block by ``request._block_hasher`` when a token fills it. So
    replacing that hasher reaches exactly the blocks with generated tokens; where the prompt's own
    have a mark, they are hashed once more.

    vLLM makes blocks findable when it schedules them, before it is known what they will hold. So
    the step in which a prompt becomes complete is kept out of the cache where it may leave holes;
    every request may find what such a request finds itself, and earlier chunks, which run at full
    depth.

    Since 0.26 (`Request._block_hasher`, `Request.block_hashes`, `_preempt_request`;
    ``allocate_slots`` with ``delay_cache_blocks``, made for blocks from elsewhere). Remove when a
    request can bring a salt for the blocks past its prompt, and can be kept out of the
    prefix cache from a token on. The base is the synchronous scheduler, which is vLLM's own on
    the CPU; `AsyncScheduler` goes behind it elsewhere.
    """

    @abstractmethod
    def marks_of(self, request: Request) -> tuple[Mark | None, PromptMark | None]:
        """Return what is mixed into the hashes of later blocks, and of all; None: nothing."""

    @abstractmethod
    def is_lasting(self, request: Request) -> bool:
        """Return whether a request that comes back after preemption has the same mark again."""

    def keep_free(self, tokens: int) -> None:
        """Keep slots for so many tokens behind each sequence's last, in which drafts are made.

        vLLM does so for drafters of its own. Since 0.26 (`Scheduler.num_lookahead_tokens`).
        Remove when it does for ``custom_class``.
        """
        self.num_lookahead_tokens = tokens

    def keep_apart(self, may_leave_holes: Callable[[Request], bool]) -> None:
        """Keep the last step of the prompts of some requests out of the prefix cache."""
        self.kv_cache_manager: Any = _KeepingApart(self.kv_cache_manager, may_leave_holes)

    def add_request(self, request: Request) -> None:
        """Have the request's later blocks marked, then add it."""
        if (hasher := request._block_hasher) is not None:
            mark, prompt_mark = self.marks_of(request)
            if mark is not None or prompt_mark is not None:
                request._block_hasher = _marking(hasher, mark, prompt_mark, self.hash_block_size)
            if prompt_mark is not None:
                request.block_hashes.clear()
                request.update_block_hashes()
        super().add_request(request)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Mark blocks with holes anew, so that not even their own sequence finds them."""
        super()._preempt_request(request, *args, **kwargs)
        if hasattr(request._block_hasher, "plain") and not self.is_lasting(request):
            del request.block_hashes[request.num_prompt_tokens // self.hash_block_size :]
            request.update_block_hashes()


class _KeepingApart:
    """Stands before the scheduler's KV cache manager: blocks that may get holes are not cached."""

    def __init__(self, manager: Any, may_leave_holes: Callable[[Request], bool]) -> None:
        self._manager = manager
        self._may_leave_holes = may_leave_holes

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
        is_last = computed + num_new_tokens >= request.num_prompt_tokens
        if is_last and self._may_leave_holes(request):
            kwargs["delay_cache_blocks"] = True
        return self._manager.allocate_slots(
            request, num_new_tokens, num_new_computed_tokens, *args, **kwargs
        )


def _marking(
    hasher: Hasher, mark: Mark | None, prompt_mark: PromptMark | None, block_size: int
) -> Hasher:
    """Mix marks into each hash; the next block's is chained to the mixed one."""

    def marks(request: Request, end: int) -> bytes:
        own = b"" if prompt_mark is None else prompt_mark(end)
        return own if mark is None or end <= request.num_prompt_tokens else own + mark()

    def marked(request: Request) -> list[BlockHash]:
        ends = count((len(request.block_hashes) + 1) * block_size, block_size)
        pairs = zip(hasher(request), ends, strict=False)
        return [_mixed(plain, marks(request, end)) for plain, end in pairs]

    marked.plain = hasher  # type: ignore[attr-defined]
    return marked


def _mixed(plain: BlockHash, mark: bytes) -> BlockHash:
    return hashlib.sha256(plain + mark).digest() if mark else plain
