# SPDX-License-Identifier: Apache-2.0
"""What the feeder and the model of one engine share: planner, sequence table, plan memo."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from logging import getLogger
from typing import Any

from cachetools import LRUCache

from vllm_adaskip.classifiers import PromptStatistics, SkipPlan
from vllm_adaskip.engine.planner import Planner
from vllm_adaskip.engine.table import SequenceTable, Undecided

logger = getLogger("vllm.adaskip")

#: Decided plans that are remembered. What is preempted comes back before anything new is let
#: in (vLLM puts it at the head of the queue), so far fewer than this lie between.
_REMEMBERED = 16_384


class SkipState:
    """One engine's plans: who sits in which row, and what was decided for which prompt.

    The memo makes a plan a function of prompt and options (purity, invariant 5) also where
    a prompt's statistics differ in their last bits because it was computed in other chunks,
    and gives a preempted sequence the plan under which its first tokens were generated.
    """

    def __init__(self, planner: Planner, capacity: int) -> None:
        self.planner = planner
        self.table = SequenceTable(planner.facts.shape.num_layers, capacity)
        self._memo: LRUCache[Undecided, SkipPlan] = LRUCache(_REMEMBERED)

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
        if plan is None:
            undecided = Undecided(_digest(prompt), wanted.budget)
            plan = self._memo.get(undecided, undecided)
            if generated and isinstance(plan, Undecided):
                logger.warning(
                    "vllm-adaskip: the plan of a preempted sequence was forgotten (more than %d "
                    "prompts since); its first %d tokens are replayed dense",
                    _REMEMBERED,
                    generated,
                )
        self.table.add(row, plan, len(prompt), is_new=not generated, gated=wanted.gated)
        if wanted.gated and allowed is not None:
            self.table.allowed[row] = allowed

    def plan_of(
        self, extra_args: Mapping[str, Any] | None, prompt: Sequence[int]
    ) -> SkipPlan | None:
        """Give the plan that a request has or had.

        None if its prompt was not read, or long ago, and if its tokens differ from each other.
        """
        wanted = self.planner.wanted(extra_args, one_answer=True)
        if wanted.gated:
            return None
        if wanted.plan is not None:
            return wanted.plan
        return self._memo.get(Undecided(_digest(prompt), wanted.budget))

    def decide(self, row: int, prompt: PromptStatistics) -> None:
        """Let the method decide the plan of an undecided row, whose prompt is complete."""
        undecided = self.table.undecided[row]
        plan = self.planner.classifier.decide(undecided.budget, prompt)
        self._memo[undecided] = plan
        self.table.follow(row, plan)


def _digest(prompt: Sequence[int]) -> bytes:
    return blake2b(array("q", prompt).tobytes(), digest_size=16).digest()
