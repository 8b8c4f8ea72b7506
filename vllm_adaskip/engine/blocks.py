# SPDX-License-Identifier: Apache-2.0
"""Which requests may find a request's KV blocks in the prefix cache (clean cache).

Blocks that hold nothing but prompt tokens were computed at full depth, and every request may find
them; under a prompt plan requests with an equal prompt plan may.
What a block with generated tokens holds depends on the request's plan and on where its
prompt ended. So its hash is mixed with a *mark* of both: it can be found by a sequence with
the same tokens, plan and prompt length, which in practice is the same sequence coming back
after preemption, and by no other. A block that lacks KV in some layer is given a mark
that never comes again, so no request finds it; nor a block of a plan that depends on the batch.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from functools import partial
from logging import getLogger
from time import monotonic
from typing import TYPE_CHECKING, Any

from vllm_adaskip.classifiers import SkipPlan
from vllm_adaskip.engine.busy import Levels, Load
from vllm_adaskip.engine.compat.scheduler import AsyncScheduler, Mark, MarkedBlocks, PromptMark
from vllm_adaskip.engine.compat.showing import ShowingScheduler
from vllm_adaskip.engine.prompt_plan import Busy, PromptOptions
from vllm_adaskip.engine.request import ADAPTER, Planner, RequestArgs, is_one_answer
from vllm_adaskip.engine.watch import WatchingScheduler

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


logger = getLogger("vllm.adaskip")


def unfindable() -> bytes:
    """Return a mark that never comes again."""
    return secrets.token_bytes(32)


def block_mark(
    planner: Planner, extra_args: Mapping[str, Any] | None, prompt_len: int
) -> Mark | None:
    """Return the mark of a request's blocks that reach past its prompt.

    None where these are like anybody's: every token is dense, and no method of this engine
    reads whole prompts. (A method that does needs its statistics of every token of a later
    prompt, and those of generated tokens are not kept.)
    """
    wanted = planner.wanted(extra_args)
    is_gated = wanted.gate == "token"
    plan, kv_fill = wanted.plan, planner.facts.kv_fill
    if planner.facts.guard and wanted.by_method and not (plan and plan.is_dense):
        return unfindable  # what it runs depends on the batch, so nothing we know here tells it
    if plan is None:
        # A coalesced plan also depends on the batch.
        holes = kv_fill == "none" or planner.facts.coalesce_regret > 0
        identity = f"budget {wanted.budget!r}"
    elif plan.is_dense and not is_gated and not planner.classifier.reads_whole_prompts:
        return None
    else:
        holes, identity = leaves_holes(plan, kv_fill), f"{plan.attention:x} {plan.mlp:x}"
    if holes:
        return unfindable
    # A gate decides by tokens, age and the engine's options, of which the last are all one here.
    gated = "gated " if is_gated else ""
    mark = f"{gated}{identity} after {prompt_len}".encode()
    return lambda: mark


def prompt_mark(
    planner: Planner, extra_args: Mapping[str, Any] | None, prompt_len: int
) -> PromptMark | None:
    """Return the mark of a block, by the position behind it; None: the prompt runs everything."""
    plan = planner.wanted(extra_args).prompt
    if plan is None or not (full_from := plan.full_from(prompt_len)):
        return None
    return partial(plan.mark, full_from)


class MarkingScheduler(MarkedBlocks, ShowingScheduler, WatchingScheduler):
    """Named in one engine's ``scheduler_cls`` option, where `startup` says that it is needed."""

    def __init__(self, *args: Any, vllm_config: VllmConfig, **kwargs: Any) -> None:
        super().__init__(*args, vllm_config=vllm_config, **kwargs)
        self._is_adapted = vllm_config.lora_config is not None
        options = self._planner.facts.prompt
        busy = None if options is None else PromptOptions.model_validate(dict(options)).busy
        self._busy = None if busy is None else Busy(busy)
        self._levels = None if self._planner.busy is None else Levels(self._planner.busy)
        #: With levels: requests that have not been scheduled yet.
        self._open: dict[str, Request] = {}
        if (draft := self._planner.draft) is not None:
            self.keep_free(draft.tokens)
        if self._planner.classifier.gate_scope == "answer":
            self.keep_apart(self._may_stop_early)

    def add_request(self, request: Request) -> None:
        """Write into the request's arguments, all that a feeder sees, what it does not say itself.

        That is its adapter's name, what the canary found, and, where few prompts wait or plans are
        off, that its own runs everything.
        """
        if (params := request.sampling_params) is not None:
            if self._is_adapted:
                name = request.lora_request and request.lora_request.lora_name
                params.extra_args = {**(params.extra_args or {}), ADAPTER: name}
            params.extra_args = self.with_canary(params.extra_args)
            if not self._shortens_now() or self.plans_are_off:
                params.extra_args = self._planner.with_whole_prompt(params.extra_args)
            if self._levels is not None:
                self._open[request.request_id] = request
            self._grade([request])
            if RequestArgs.parse(params.extra_args).shows_plan:
                self.show(request)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule as vLLM does, with the level of load written into what enters now."""
        if self._levels is not None:
            self._see_load(self._levels)
        output = super().schedule(*args, **kwargs)
        for entered in output.scheduled_new_reqs:
            self._open.pop(entered.req_id, None)
        return output

    def _see_load(self, levels: Levels) -> None:
        load = Load(len(self.waiting), len(self.running), self.kv_cache_manager.usage)
        if levels.saw(load, monotonic()):
            logger.info("vllm-adaskip: load level %d now: %s", levels.now, load)
            self._open = {name: one for name, one in self._open.items() if not one.is_finished()}
            self._grade(self._open.values())

    def _grade(self, requests: Iterable[Request]) -> None:
        if self._levels is None and not self.plans_are_off:
            return
        level = 0 if self._levels is None or self.plans_are_off else self._levels.now
        for request in requests:
            if (params := request.sampling_params) is not None:
                params.extra_args = self._planner.at_level(params.extra_args, level)

    def _shortens_now(self) -> bool:
        """Return whether prompts that come in now may be shortened."""
        if self._busy is None:
            return True
        read = (one.num_computed_tokens >= one.num_prompt_tokens for one in self.running)
        unread = len(self.waiting) + len(self.running) - sum(read)
        if self._busy.saw(unread):
            what = "shortened" if self._busy.now else "run whole"
            logger.info("vllm-adaskip: %d prompts wait; new ones are %s now", unread, what)
        return self._busy.now

    def marks_of(self, request: Request) -> tuple[Mark | None, PromptMark | None]:
        """Return the marks of a request's blocks, see `block_mark` and `prompt_mark`."""
        params = request.sampling_params
        if params is None:
            return None, None
        if (begins := self.answer_begins(request)) is not None:
            # Its rows are wanted from the token before the answer on, so these must run.
            return None, lambda end: unfindable() if end >= begins else b""
        # With levels its plan is known when it is scheduled, before a block is past its prompt.
        is_known = self._levels is None
        mark = self._mark_of(request) if is_known else partial(self._later_mark, request)
        return mark, prompt_mark(self._planner, params.extra_args, request.num_prompt_tokens)

    def _later_mark(self, request: Request) -> bytes:
        mark = self._mark_of(request)
        return b"" if mark is None else mark()

    def _mark_of(self, request: Request) -> Mark | None:
        assert request.sampling_params is not None
        arguments = request.sampling_params.extra_args
        return block_mark(self._planner, arguments, request.num_prompt_tokens)

    def shown_of(self, request: Request) -> Mapping[str, Any]:
        """Return what its client is shown, see `Planner.shown`."""
        assert request.sampling_params is not None
        return self._planner.shown(request.sampling_params.extra_args)

    def is_lasting(self, request: Request) -> bool:
        """Return whether a preempted request may find the blocks with its mark again."""
        return self._mark_of(request) is not unfindable

    def _may_stop_early(self, request: Request) -> bool:
        params = request.sampling_params
        if params is None or not is_one_answer(params):
            return False
        return self._planner.wanted(params.extra_args).is_gated(one_answer=True)


class AsyncMarkingScheduler(MarkingScheduler, AsyncScheduler):
    """The same where vLLM schedules a step before it knows the last one's tokens."""


def leaves_holes(plan: SkipPlan, kv_fill: str) -> bool:
    """Return whether generated tokens under a plan lack K/V in some layer.

    `copy` has nothing to copy for a plan that runs no attention at all.
    """
    if kv_fill == "copy":
        return plan.attention == (1 << plan.num_layers) - 1
    return kv_fill == "none" and plan.attention != 0
