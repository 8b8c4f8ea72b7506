# SPDX-License-Identifier: Apache-2.0
"""Steps of known plans, compiled as stock vLLM compiles dense ones on a CPU.

Decode steps of one plan are compiled whole. Steps with prompts that stop after some layers, beside
sequences that leave out nothing, are compiled in two pieces: what comes behind those layers reads
K/V that have to be in the cache by then. On a GPU decode steps replay a graph (`graphs.py`). A CPU
has none, and running layer by layer costs it what the compiler saves: fused operations, and calls
from Python.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from vllm_adaskip.engine.prompt_plan import PromptPlan, exit_of
from vllm_adaskip.engine.step import Bools, Step

if TYPE_CHECKING:
    from vllm_adaskip.engine.fill import KvFill


logger = getLogger("vllm.adaskip")

#: Plans that are compiled at most: each takes some seconds at start-up.
MOST = 4
#: Plans that were missed and are remembered at most.
REMEMBERED = 256


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


class Headed(NamedTuple):
    """What the first piece of a step with shortened prompts returns.

    Attributes:
        update, before: ``[going, hidden]`` the stream of the tokens that go on.
        positions: ``[going]`` theirs.
        passed: of each layer behind the exit, K and V ``[stopping, kv_heads * head_size]`` that
            its own projection makes of the others.

    """

    update: Tensor
    before: Tensor
    positions: Tensor
    passed: list[tuple[Tensor, Tensor]]


class Pieces(NamedTuple):
    """What runs a step with shortened prompts.

    Attributes:
        exit: layers that all tokens run, of `depth`.
        first: takes a step's inputs, and int64 ``[going]`` and ``[stopping]`` tokens.
        rest: takes update, before and positions of `Headed`; returns ``[going, width]``, what the
            LM head takes.

    """

    exit: int
    depth: int
    first: Callable[..., Headed]
    rest: Callable[[Tensor, Tensor, Tensor], Tensor]


class CompiledPlans:
    """The bodies of an engine, one a plan that is known when it starts, and one for its prompts.

    Attributes:
        ran: steps that ran a compiled body so far.
        missed: steps that followed one plan that is not known, by its mask.
        seconds: that compiling took.
        mebibytes: by which compiling made this process larger.

    """

    def __init__(
        self,
        plans: Iterable[SkipPlan],
        body: Callable[[Bools], Body],
        prompt: PromptPlan | None = None,
        pieces: Callable[[int], Pieces | None] | None = None,
    ) -> None:
        """Take what is compiled.

        Args:
            plans: of sequences, of which `MOST` are compiled.
            body: returns the body of a mask.
            prompt: the server's prompt plan, compiled if it stops after some layers.
            pieces: returns the pieces of such an exit, or None where it has none.

        """
        self.ran, self.seconds, self.mebibytes = 0, 0.0, 0.0
        self.missed: Counter[bytes] = Counter()
        self._uncompiled, self._body = [*islice(plans, MOST)], body
        self._bodies: dict[bytes, Body] = {}
        self._exit = None if prompt is None else exit_of(prompt.plan)
        self._pieces_of = pieces
        self._pieces: Pieces | None = None

    def __len__(self) -> int:
        return len(self._bodies) + (self._pieces is not None)

    def compile(self, fill: KvFill, options: Mapping[str, Any], *inputs: *Inputs) -> None:
        """Compile all bodies, on the inputs of a warm-up, with inductor's options; once.

        The fill is told of a step as it will be, as the compiler follows what it does then. A plan
        that cannot be compiled runs layer by layer, which the log says.
        """
        start, before = perf_counter(), _resident()
        for plan in self._uncompiled:
            with _rehearsal(f"'{plan}'", fill, plan.mask(), len(inputs[1])):
                body = _compiled(self._body(plan.mask()), options, inputs)
                self._bodies[plan.mask().tobytes()] = body
        self._uncompiled = []
        if self._exit is not None:
            self._compile_pieces(self._exit, fill, options, inputs)
            self._exit = None
        self.seconds += perf_counter() - start
        self.mebibytes += _resident() - before

    def _compile_pieces(
        self, exit: int, fill: KvFill, options: Mapping[str, Any], inputs: Inputs
    ) -> None:
        """Compile the pieces of an exit, as if half of the tokens stopped there."""
        assert self._pieces_of is not None
        if (plain := self._pieces_of(exit)) is None:
            return
        tokens = torch.arange(len(inputs[1]))
        going, stopping = tokens[1::2].clone(), tokens[0::2].clone()
        nothing = np.zeros(2 * plain.depth, dtype=np.bool_)  # of generated tokens
        what = f"a prompt that stops after {exit} layers"
        with _rehearsal(what, fill, nothing, len(tokens)):
            first = _compiled(plain.first, options, (*inputs, going, stopping))
            made = first(*inputs, going, stopping)
            rest = _compiled(plain.rest, options, made[:3])
            self._pieces = plain._replace(first=first, rest=rest)

    @property
    def bodies(self) -> list[tuple[Bools, Body]]:
        """The mask ``[2 * num_layers]`` and the body of each plan that is compiled."""
        return [(np.frombuffer(mask, dtype=np.bool_), body) for mask, body in self._bodies.items()]

    def pieces_of(self, step: Step) -> Pieces | None:
        """Return the pieces of a step in which prompts' tokens alone leave anything out, if known.

        That is, all layers behind the exit.
        """
        if (pieces := self._pieces) is None or not step.is_shortened:
            return None
        runs, stops = step.runs, step.shortened
        fits = runs[~stops].all() and runs[:, : 2 * pieces.exit].all()
        if not fits or runs[stops, 2 * pieces.exit :].any():
            return None
        # The compiler takes one token, or none, for another shape than several.
        stopping = int(step.length[stops].sum())
        return pieces if min(stopping, step.num_tokens - stopping) > 1 else None

    def of(self, step: Step) -> Body | None:
        """Return the body of a step whose tokens are all generated under one plan, if known."""
        plan = _one_plan(step)
        return None if plan is None else self._bodies.get(plan)

    def miss(self, step: Step) -> None:
        """Count a step that ran layer by layer, if it need not have: its plan was not known."""
        plan = _one_plan(step)
        if plan is None or plan in self._bodies or not any(plan):
            return
        if plan in self.missed or len(self.missed) < REMEMBERED:
            self.missed[plan] += 1

    def wanted(self) -> list[dict[str, Any]]:
        """Return the plans that most steps missed, ``{"plan": its entries, "steps": n}``."""
        return [
            {"plan": SkipPlan.of_mask(np.frombuffer(mask, dtype=np.bool_)).entries(), "steps": n}
            for mask, n in self.missed.most_common(MOST)
        ]


def _one_plan(step: Step) -> bytes | None:
    """Return the mask of the plan that all tokens of a step follow, if all are generated."""
    runs = step.runs
    if step.num_generated < step.num_tokens or (runs != runs[0]).any():
        return None
    mask: bytes = (~runs[0]).tobytes()
    return mask


def _resident() -> float:
    return float(psutil.Process().memory_info().rss) / (1 << 20)


@contextmanager
def _rehearsal(what: str, fill: KvFill, left_out: Bools, tokens: int) -> Iterator[None]:
    """Tell the fill of a step as it will be; log that what cannot be compiled runs in the loop."""
    fill.begin(Step.of_one_plan(left_out, tokens), may_change=False)
    try:
        yield
    except Exception as error:  # whatever a compiler may say
        reason = str(error).strip().partition("\n")[0]
        logger.warning("%s runs layer by layer, as it cannot be compiled: %s", what, reason)
    finally:
        fill.abandon()


def _compiled(
    body: Callable[..., Any], options: Mapping[str, Any], inputs: Sequence[Tensor | None]
) -> Callable[..., Any]:
    """Compile a body without guards, as vLLM does: what it closes over never changes.

    The compiler finds what it compiled by the code object, and bodies of different plans share
    theirs; so each gets a code object of its own.
    """
    assert isinstance(body, FunctionType)
    code: CodeType = body.__code__.replace()
    own = FunctionType(code, body.__globals__, body.__name__, body.__defaults__, body.__closure__)
    unguarded = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    found: Callable[..., Any] = torch.compile(
        own, fullgraph=True, dynamic=False, backend="inductor", options={**options, **unguarded}
    )
    for each in inputs:
        if each is not None:
            torch._dynamo.mark_dynamic(each, 0)
    found(*inputs)
    return found
