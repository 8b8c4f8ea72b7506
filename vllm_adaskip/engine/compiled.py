# SPDX-License-Identifier: Apache-2.0
"""Decode steps of one plan, compiled whole, as stock vLLM compiles dense ones on a CPU.

On a GPU such steps replay a graph (`graphs.py`). A CPU has none, and running layer by layer costs
it what the compiler saves: fused operations, and calls from Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from logging import getLogger
from time import perf_counter
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor

from vllm_adaskip.classifiers import SkipPlan
from vllm_adaskip.engine.step import Bools, Step

if TYPE_CHECKING:
    from vllm_adaskip.engine.fill import KvFill


logger = getLogger("vllm.adaskip")

#: Plans that are compiled at most: each takes some seconds at start-up.
MOST = 4


class Made(NamedTuple):
    """What a body returns.

    Attributes:
        hidden: ``[tokens, width]`` what the LM head takes.
        passed: of each attention that the plan leaves out, K and V ``[tokens, kv_heads *
            head_size]`` that its own projection makes; empty where they are not wanted.

    """

    hidden: Tensor
    passed: list[tuple[Tensor, Tensor]]


#: ``[tokens]`` ids, ``[tokens]`` positions, ``[tokens, hidden]`` embeddings in the ids' stead.
Inputs = tuple[Tensor | None, Tensor, Tensor | None]
Body = Callable[[Tensor | None, Tensor, Tensor | None], Made]


class CompiledPlans:
    """The bodies of an engine, one a plan that is known when it starts.

    Attributes:
        ran: steps that ran a compiled body so far.
        seconds: that compiling took.
        mebibytes: by which compiling made this process larger.

    """

    def __init__(self, plans: Iterable[SkipPlan], body: Callable[[Bools], Body]) -> None:
        """Take the plans, of which `MOST` are compiled, and what returns the body of a mask."""
        self.ran, self.seconds, self.mebibytes = 0, 0.0, 0.0
        self._uncompiled, self._body = [*islice(plans, MOST)], body
        self._bodies: dict[bytes, Body] = {}

    def __len__(self) -> int:
        return len(self._bodies)

    def compile(self, fill: KvFill, options: Mapping[str, Any], *inputs: *Inputs) -> None:
        """Compile all bodies, on the inputs of a warm-up, with inductor's options; once.

        The fill is told of a step as it will be, as the compiler follows what it does then. A plan
        that cannot be compiled runs layer by layer, which the log says.
        """
        start, before = perf_counter(), _resident()
        for plan in self._uncompiled:
            fill.begin(Step.of_one_plan(plan.mask(), len(inputs[1])), may_change=False)
            try:
                body = _compiled(self._body(plan.mask()), options, inputs)
                self._bodies[plan.mask().tobytes()] = body
            except Exception as error:  # whatever a compiler may say
                reason = str(error).strip().partition("\n")[0]
                logger.warning(
                    "'%s' runs layer by layer, as it cannot be compiled: %s", plan, reason
                )
            finally:
                fill.abandon()
        self._uncompiled = []
        self.seconds += perf_counter() - start
        self.mebibytes += _resident() - before

    @property
    def bodies(self) -> list[tuple[Bools, Body]]:
        """The mask ``[2 * num_layers]`` and the body of each plan that is compiled."""
        return [(np.frombuffer(mask, dtype=np.bool_), body) for mask, body in self._bodies.items()]

    def of(self, step: Step) -> Body | None:
        """Return the body of a step whose tokens are all generated under one plan, if known."""
        runs = step.runs
        if step.num_generated < step.num_tokens or (runs != runs[0]).any():
            return None
        return self._bodies.get((~runs[0]).tobytes())


def _resident() -> float:
    return float(psutil.Process().memory_info().rss) / (1 << 20)


def _compiled(body: Body, options: Mapping[str, Any], inputs: Inputs) -> Body:
    """Compile a body without guards, as vLLM does: what it closes over never changes.

    The compiler finds what it compiled by the code object, and bodies of different plans share
    theirs; so each gets a code object of its own.
    """
    assert isinstance(body, FunctionType)
    code: CodeType = body.__code__.replace()
    own = FunctionType(code, body.__globals__, body.__name__, body.__defaults__, body.__closure__)
    unguarded = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    found: Body = torch.compile(
        own, fullgraph=True, dynamic=False, backend="inductor", options={**options, **unguarded}
    )
    for each in inputs:
        if each is not None:
            torch._dynamo.mark_dynamic(each, 0)
    found(*inputs)
    return found
