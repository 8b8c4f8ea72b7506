# SPDX-License-Identifier: Apache-2.0
"""Where plans are decided: by a request's arguments as it enters, or once its prompt was read."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from logging import getLogger
from operator import ne
from typing import TYPE_CHECKING, Any

from cachetools import LRUCache

from vllm_adaskip.classifiers import PromptStatistics, SkipPlan
from vllm_adaskip.engine import compat
from vllm_adaskip.engine.busy import LEVEL
from vllm_adaskip.engine.canary import CANARY, READS, Canary
from vllm_adaskip.engine.coalesce import Undrawn, coalesced
from vllm_adaskip.engine.naming import planner_of
from vllm_adaskip.engine.request import ADAPTER, Planner, Wanted
from vllm_adaskip.engine.step import Ints
from vllm_adaskip.engine.table import SequenceTable, Undecided

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import VllmConfig

    from vllm_adaskip.engine.compiled import CompiledPlans
    from vllm_adaskip.engine.drafter import Drafter
    from vllm_adaskip.engine.graphs import GraphBook
    from vllm_adaskip.engine.guard import Guard
    from vllm_adaskip.engine.v1 import PulledBatch

logger = getLogger("vllm.adaskip")

#: Decided plans that are remembered. What is preempted comes back before anything new is let
#: in (vLLM puts it at the head of the queue), so far fewer than this lie between.
_REMEMBERED = 16_384


class SkipState:
    """One engine's plans: which sequence is in which row, and what was decided for which prompt.

    The memo makes a plan a function of prompt and options (purity) also where a prompt's
    statistics differ in their last bits because it was computed in other chunks, and gives a
    preempted sequence the plan under which its first tokens were generated. With `coalesce_regret`
    there is no purity, and the memo alone does the latter.

    Attributes:
        table: the rows of the batch.
        memo: decided plans.
        guard: says which of them are followed; None: all.
        given: what sequences follow since the guard was asked, for those that come back.
        lengths: of the forward that comes next, ``query_start_loc`` ``[rows + 1]`` and
            ``seq_lens`` ``[rows]``, from a feeder that knows them; None for a warm-up.
        is_told_lengths: whether the feeder does; if not, they stand in attention metadata.
        replay: of the forward that comes next, what runs it as a graph; None: there is none.
        graphs: the engine's graphs; None: it has none.
        compiled: its compiled plans, on a CPU; None: it compiles none.
        pulled: feeds the table where the runner does not report its batch; None: it does.
        drafter: drafts tokens; None: the engine does not.
        plans: sequences that entered, by plan: ``dense``, ``skipping``, or ``gated`` where the
            method may leave out more, token by token. Sequences that wait for a plan are in none.
        coalesced: decisions so far that others in the batch changed, see `engine/coalesce.py`.
        failures: sequences that run dense because the method failed to decide their plan.
        levels: with option ``busy``: sequences that entered at each level of load.
        level: at which the last one did.
        canary: what the scheduler's canary had found when the last sequence came in.

    """

    def __init__(self, planner: Planner, capacity: int, *, is_told_lengths: bool = False) -> None:
        self.planner = planner
        self.is_told_lengths = is_told_lengths
        self.coalesced = self.failures = 0
        self.lengths: tuple[Ints, Ints] | None = None
        self.replay: Callable[[], Tensor] | None = None
        self.graphs: GraphBook | None = None
        self.compiled: CompiledPlans | None = None
        self.table = SequenceTable(planner.facts.shape.num_layers, capacity)
        self.plans = {"dense": 0, "skipping": 0, "gated": 0}
        self.memo: LRUCache[Undecided, SkipPlan] = LRUCache(_REMEMBERED)
        self.guard: Guard | None = None
        self.given: LRUCache[Undecided, SkipPlan] = LRUCache(_REMEMBERED)
        self.pulled: PulledBatch | None = None
        self.drafter: Drafter | None = None
        self.levels = [0] * (1 + len(planner.busy.levels)) if planner.busy else []
        self.level = 0
        self.canary = Canary(planner.canary).report() if planner.canary else {}
        self._level_of: LRUCache[bytes, int] = LRUCache(_REMEMBERED)

    def enter(
        self,
        row: int,
        extra_args: Mapping[str, Any] | None,
        prompt: Sequence[int],
        *,
        generated: int,
        one_answer: bool = False,
        allowed: Sequence[int] | None = None,
    ) -> None:
        """Put a request's sequence into a row.

        Args:
            row: of the persistent batch.
            extra_args: the request's.
            prompt: its token ids.
            generated: how many tokens it brings along when it comes back.
            one_answer: it asks for one token, see `is_one_answer`.
            allowed: token ids that it may draw, where it says so.

        """
        if self.canary:
            extra_args = self._hear_canary(extra_args)
        is_new = not generated and READS not in (extra_args or ())
        if LEVEL in (extra_args or ()) and is_new:
            self._enter_level(extra_args, prompt)
        wanted = self.planner.wanted(extra_args)
        plan = self._known(wanted, extra_args, prompt, is_new=not generated)
        if generated and isinstance(plan, Undecided):
            logger.warning(
                "vllm-adaskip: the plan of a preempted sequence was forgotten (more than %d "
                "prompts since); its first %d tokens are replayed dense",
                _REMEMBERED,
                generated,
            )
        gated = wanted.is_gated(one_answer)
        self.table.add(
            row,
            plan,
            len(prompt),
            is_new=is_new,
            gated=gated,
            prompt=wanted.prompt,
            drafts=wanted.drafts,
        )
        if isinstance(plan, SkipPlan) and is_new:
            self._count(row, plan, failed=wanted.by_method and plan is self.planner.dense)
        if not gated:
            return
        if allowed is not None:
            self.table.allowed[row] = allowed
        # The last of its tokens has been drawn but has not run. Of a request for one token, the
        # prompt's last token is what counts.
        ran = -1 if wanted.gate == "answer" else max(generated - 1, 0)
        self.table.counts.enter(row, _key(extra_args, prompt), ran)

    def _hear_canary(self, extra_args: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """Take what the scheduler says of the canary; return the arguments without it.

        A sequence that comes back after preemption says what held before.
        """
        own = dict(extra_args or {})
        found = own.pop(CANARY, self.canary)
        if found["answers"] >= self.canary["answers"]:
            self.canary = found
        return own

    def _enter_level(self, extra_args: Mapping[str, Any] | None, prompt: Sequence[int]) -> None:
        own = dict(extra_args or {})
        self.level = own.pop(LEVEL)
        if self.levels:
            self.levels[self.level] += 1
        self._level_of[_key(own, prompt)] = self.level

    def plan_of(
        self, extra_args: Mapping[str, Any] | None, prompt: Sequence[int]
    ) -> SkipPlan | None:
        """Return the plan that a request has or had.

        None if its prompt was not read, or long ago, and if its tokens differ from each other. With
        levels of load it is that of the last such request.
        """
        level = self._level_of.get(_key(extra_args, prompt))
        if level is None and self.planner.busy is not None:
            return None
        if level is not None:
            extra_args = self.planner.at_level(extra_args, level)
        wanted = self.planner.wanted(extra_args)
        plan = self._known(wanted, extra_args, prompt)
        if wanted.gate == "token" or self.ran_of(extra_args, prompt) is not None:
            return None
        return plan if isinstance(plan, SkipPlan) else None

    def ran_of(
        self, extra_args: Mapping[str, Any] | None, prompt: Sequence[int]
    ) -> tuple[int, Ints] | None:
        """Return what really ran of the requests with this prompt and just these arguments.

        That is, how many generated tokens ran, and ``[2 * num_layers]`` how many of them left
        out each sub-layer, by plan or by gate. None if no gate decided about them, or long ago.
        """
        return self.table.counts.of(_key(extra_args, prompt))

    def decide(self, prompts: Mapping[int, PromptStatistics]) -> None:
        """Let the method decide the plans of undecided rows, whose prompts became complete now.

        A row with the prompt of another gets the same plan: they may find each other's blocks.
        """
        rows = {row: self.table.undecided[row] for row in prompts}
        new: dict[Undecided, PromptStatistics] = {}
        for row, undecided in rows.items():
            if undecided not in self.memo:
                new.setdefault(undecided, prompts[row])
        self.memo.update(self._plans(new))
        self._follow({row: self.memo[undecided] for row, undecided in rows.items()})

    def settle(self) -> None:
        """Ask the guard about rows that wait for nothing else; all that enter now are in."""
        if self.guard is not None:
            plans = {row: self._own(undecided) for row, undecided in self.table.undecided.items()}
            self._follow({row: plan for row, plan in plans.items() if plan is not None})

    def _own(self, undecided: Undecided) -> SkipPlan | None:
        """Return the plan that the method decided, or decides without the prompt; else None."""
        if self.planner.classifier.width:
            return self.memo.get(undecided)
        return self.planner.decide(undecided.budget, None)

    def _follow(self, plans: Mapping[int, SkipPlan]) -> None:
        """Let rows follow the plans that were decided for them, unless the guard says no."""
        table, dense = self.table, self.planner.dense
        undecided = {row: table.undecided[row] for row in plans}
        for row, plan in plans.items():
            table.follow(row, plan, wants=plan)
        is_admitted = self._admits(len(plans))
        for row, plan in plans.items():
            given = plan if is_admitted else dense
            if given is not plan:
                table.follow(row, given, wants=plan)
            if self.guard is not None:
                self.given[undecided[row]] = given
            self._count(row, given, failed=plan is dense)

    def _admits(self, waiting: int) -> bool:
        if self.guard is None or not waiting:
            return True
        own, wanted = (each[self.table.has_plan] for each in (self.table.skips, self.table.wants))
        if not wanted.any():
            return True
        return self.guard.admits(own | wanted, own & ~wanted, waiting)

    def _known(
        self,
        wanted: Wanted,
        extra_args: Mapping[str, Any] | None,
        prompt: Sequence[int],
        *,
        is_new: bool = False,
    ) -> SkipPlan | Undecided:
        """Return a request's plan, or what it waits for; with a guard a new one always waits."""
        if wanted.plan is not None and not self._is_guarded(wanted):
            return wanted.plan
        beside = (extra_args or {}).get(ADAPTER), wanted.prompt
        undecided = Undecided(_digest(prompt, repr(beside) if any(beside) else ""), wanted.budget)
        if self._is_guarded(wanted):
            return undecided if is_new else self.given.get(undecided, undecided)
        return self.memo.get(undecided, undecided)

    def _is_guarded(self, wanted: Wanted) -> bool:
        return self.guard is not None and wanted.by_method

    def _plans(self, new: Mapping[Undecided, PromptStatistics]) -> dict[Undecided, SkipPlan]:
        """Decide for these, which have no plan yet, each by itself or with a look at the batch."""
        planner = self.planner
        plans = {each: planner.decide(each.budget, prompt) for each, prompt in new.items()}
        own = {each: plan for each, plan in plans.items() if plan is not planner.dense}  # a failure
        if not planner.facts.coalesce_regret or not own:
            return plans
        drawn = coalesced(
            [Undrawn(plan, each.budget, new[each]) for each, plan in own.items()],
            self.table.followed,
            planner.classifier,
            planner.facts.shape,
            planner.facts.coalesce_regret,
        )
        self.coalesced += sum(map(ne, own.values(), drawn))
        return {**plans, **dict(zip(own, drawn, strict=True))}

    def _count(self, row: int, plan: SkipPlan, *, failed: bool) -> None:
        self.failures += failed
        kind = "dense" if plan.is_dense else "skipping"
        self.plans["gated" if self.table.gated[row] else kind] += 1


def shared_state(vllm_config: VllmConfig) -> SkipState:
    """Return the state that the feeder and the model of an engine share.

    The V1 runner makes its feeder before its model. Under V2, and with drafts, the model comes
    first, and the feeder with it or later, so the first of them that asks makes the state.

    Raises:
        RuntimeError: nothing feeds plans to this engine, which would be silently dense.

    """
    state = compat.shared(vllm_config)
    if isinstance(state, SkipState):
        return state
    is_v2, drafts = vllm_config.use_v2_model_runner, vllm_config.speculative_config is not None
    if not (is_v2 or drafts):
        raise RuntimeError(
            "vllm-adaskip: no feeder runs in this engine, so it would ignore every plan; "
            "start it with --plugin adaskip, or with vllm_adaskip.engine_args()"
        )
    capacity = vllm_config.scheduler_config.max_num_seqs
    state = SkipState(planner_of(vllm_config), capacity, is_told_lengths=is_v2)
    compat.share(vllm_config, state)
    return state


def _key(extra_args: Mapping[str, Any] | None, prompt: Sequence[int]) -> bytes:
    """Return what tells requests apart: prompt and all arguments, those of others too."""
    return _digest(prompt, repr(sorted((extra_args or {}).items(), key=repr)))


def _digest(prompt: Sequence[int], arguments: str = "") -> bytes:
    return blake2b(array("q", prompt).tobytes() + arguments.encode(), digest_size=16).digest()
