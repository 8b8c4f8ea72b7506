# SPDX-License-Identifier: Apache-2.0
"""What the feeder and the model of one engine share: planner, sequence table, plan memo."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from logging import getLogger
from operator import ne
from typing import Any

from cachetools import LRUCache

from vllm_adaskip.classifiers import PromptStatistics, SkipPlan
from vllm_adaskip.engine.coalesce import Undrawn, coalesced
from vllm_adaskip.engine.layout import IntArray
from vllm_adaskip.engine.planner import Planner, Wanted
from vllm_adaskip.engine.table import Factors, SequenceTable, Undecided

logger = getLogger("vllm.adaskip")

#: Decided plans that are remembered. What is preempted comes back before anything new is let
#: in (vLLM puts it at the head of the queue), so far fewer than this lie between.
_REMEMBERED = 16_384

#: A plan, and what its left-out sub-layers multiply the stream by, if anything.
Decision = tuple[SkipPlan, Factors | None]


class SkipState:
    """One engine's plans: who sits in which row, and what was decided for which prompt.

    The memo makes a plan a function of prompt and options (purity, invariant 5) also where
    a prompt's statistics differ in their last bits because it was computed in other chunks,
    and gives a preempted sequence the plan under which its first tokens were generated. With
    `coalesce` there is no purity, and the memo alone does the latter.

    Attributes:
        lengths: of the forward that comes next, ``query_start_loc`` ``[rows + 1]`` and
            ``seq_lens`` ``[rows]``, from a feeder that knows them; None for a warm-up.
        is_told_lengths: whether the feeder does; if not, they stand in attention metadata.
        plans: sequences that entered, by plan: ``dense``, ``skipping``, or ``gated`` where the
            method may leave out more, token by token. Who waits for a plan is in none.
        coalesced: decisions so far that others in the batch changed, see `engine/coalesce.py`.

    """

    def __init__(self, planner: Planner, capacity: int, *, is_told_lengths: bool = False) -> None:
        self.planner = planner
        self.is_told_lengths = is_told_lengths
        self.coalesced = 0
        self.lengths: tuple[IntArray, IntArray] | None = None
        num_layers, scales = planner.facts.shape.num_layers, planner.classifier.scales
        self.table = SequenceTable(num_layers, capacity, scales=scales)
        self.plans = {"dense": 0, "skipping": 0, "gated": 0}
        self._memo: LRUCache[Undecided, Decision] = LRUCache(_REMEMBERED)

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
        wanted = self.planner.wanted(extra_args, one_answer=one_answer)
        plan: SkipPlan | Undecided | None = wanted.plan
        factors: Factors | None = None
        if plan is None:
            undecided = Undecided(_digest(prompt), wanted.budget)
            plan, factors = self._memo.get(undecided, (undecided, None))
            if generated and isinstance(plan, Undecided):
                logger.warning(
                    "vllm-adaskip: the plan of a preempted sequence was forgotten (more than %d "
                    "prompts since); its first %d tokens are replayed dense",
                    _REMEMBERED,
                    generated,
                )
        self.table.add(
            row, plan, len(prompt), factors=factors, is_new=not generated, gated=wanted.gated
        )
        if isinstance(plan, SkipPlan) and not generated:
            self._count(row, plan)
        if not wanted.gated:
            return
        if allowed is not None:
            self.table.allowed[row] = allowed
        # The last of its tokens has been drawn but has not run. Of a request for one token, the
        # prompt's last token is what counts.
        ran = -1 if self.planner.classifier.exits == "answer" else max(generated - 1, 0)
        self.table.tally.enter(row, _key(extra_args, prompt), ran)

    def plan_of(
        self, extra_args: Mapping[str, Any] | None, prompt: Sequence[int]
    ) -> SkipPlan | None:
        """Give the plan that a request has or had.

        None if its prompt was not read, or long ago, and if its tokens differ from each other.
        """
        wanted = self.planner.wanted(extra_args)
        found = self.table.tally.of(_key(extra_args, prompt))
        return None if wanted.gated or found else self._planned(wanted, prompt)

    def _planned(self, wanted: Wanted, prompt: Sequence[int]) -> SkipPlan | None:
        if wanted.plan is not None:
            return wanted.plan
        plan, _ = self._memo.get(Undecided(_digest(prompt), wanted.budget), (None, None))
        return plan

    def ran_of(
        self, extra_args: Mapping[str, Any] | None, prompt: Sequence[int]
    ) -> tuple[int, IntArray] | None:
        """Give what really ran of the requests with this prompt and just these arguments.

        That is, how many generated tokens ran, and ``[2 * num_layers]`` how many of them left
        out each sub-layer, by plan or by gate. None if no gate decided about them, or long ago.
        """
        if (found := self.table.tally.of(_key(extra_args, prompt))) is None:
            return None
        plan, (tokens, left_out) = self._planned(self.planner.wanted(extra_args), prompt), found
        return tokens, left_out + (tokens * plan.mask() if plan else 0)

    def decide(self, prompts: Mapping[int, PromptStatistics]) -> None:
        """Let the method decide the plans of undecided rows, whose prompts became complete now.

        Or give one what another row with the same prompt was given: they may find each other's
        blocks.
        """
        rows = {row: self.table.undecided[row] for row in prompts}
        new: dict[Undecided, PromptStatistics] = {}
        for row, undecided in rows.items():
            if undecided not in self._memo:
                new.setdefault(undecided, prompts[row])
        for (undecided, prompt), plan in zip(new.items(), self._plans(new), strict=True):
            self._memo[undecided] = plan, self.planner.classifier.factors(plan, prompt)
        for row, undecided in rows.items():
            plan, factors = self._memo[undecided]
            self.table.follow(row, plan, factors)
            self._count(row, plan)

    def _plans(self, new: Mapping[Undecided, PromptStatistics]) -> list[SkipPlan]:
        """Decide for these, which have no plan yet, each by itself or with a look at the batch."""
        classifier, facts = self.planner.classifier, self.planner.facts
        own = [classifier.decide(one.budget, prompt) for one, prompt in new.items()]
        if not facts.coalesce or not new:
            return own
        sequences = [
            Undrawn(plan, one.budget, prompt)
            for plan, (one, prompt) in zip(own, new.items(), strict=True)
        ]
        plans = coalesced(sequences, self.table.followed, classifier, facts.shape, facts.coalesce)
        self.coalesced += sum(map(ne, own, plans))
        return plans

    def _count(self, row: int, plan: SkipPlan) -> None:
        kind = "dense" if plan.is_dense else "skipping"
        self.plans["gated" if self.table.gated[row] else kind] += 1


def _key(extra_args: Mapping[str, Any] | None, prompt: Sequence[int]) -> bytes:
    """Tell requests apart, by arguments of others too."""
    return _digest(prompt, repr(sorted((extra_args or {}).items(), key=repr)))


def _digest(prompt: Sequence[int], arguments: str = "") -> bytes:
    return blake2b(array("q", prompt).tobytes() + arguments.encode(), digest_size=16).digest()
