# SPDX-License-Identifier: Apache-2.0
"""What drafts are worth: whole answers beside stock vLLM's, and beside its n-gram drafts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count, cycle, islice
from operator import eq
from typing import Any

from vllm_adaskip.lab.bench.engines import engine
from vllm_adaskip.lab.bench.rounds import Run, Spread, ratio, take_turns
from vllm_adaskip.lab.bench.variants import EAGER, STOCK

NGRAM = f"{STOCK}, n-gram drafts"

_numbers = count()


@dataclass(frozen=True)
class Answered:
    """How fast a variant answers.

    Attributes:
        batch: requests at once.
        variant: what drafts.
        per_token: seconds of a token of the whole batch, over the rounds.
        against_stock: compiled stock vLLM's seconds over these, round by round.
        per_step: tokens that a step gives a request, over all rounds.
        equal: answers that are stock vLLM's, token by token, and of how many.

    """

    batch: int
    variant: str
    per_token: Spread
    against_stock: Spread
    per_step: float
    equal: tuple[int, int]


@contextmanager
def started(
    model: str,
    options: Mapping[str, Mapping[str, Any]],
    tokens: int,
    profile: str = "",
    **vllm: Any,
) -> Iterator[dict[str, Any]]:
    """Start compiled engines with a model's weights: stock vLLM's, and one for each draft.

    Args:
        model: folder or hub id.
        options: name -> our option ``draft``.
        tokens: that n-gram drafts have at most.
        profile: that engines with our drafts serve; empty: none.
        vllm: options of all engines.

    """
    ngram = {"method": "ngram", "num_speculative_tokens": tokens, "prompt_lookup_max": 4}
    served = {"profile": profile} if profile else {}
    variants: dict[str, dict[str, Any]] = {
        STOCK: {},
        EAGER: {"enforce_eager": True},
        **{name: {"plugin": {"draft": dict(one), **served}} for name, one in options.items()},
        NGRAM: {"speculative_config": ngram},  # last, as no engine starts after what it imports
    }
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(engine(model, load_format="auto", **{**vllm, **one}))
            for name, one in variants.items()
        }


def compare(
    engines: Mapping[str, Any],
    prompts: Sequence[list[int]],
    batch: int,
    tokens: int,
    rounds: int,
    done: Callable[[], None],
) -> list[Answered]:
    """Let all engines answer, in turns; in each round all of them the same prompts."""
    turns = {name: Turns(llm, prompts, batch, tokens) for name, llm in engines.items()}
    variants: dict[str, Run] = {name: one.run for name, one in turns.items()}
    taken = take_turns(variants, rounds, done)
    stock = turns[STOCK].answers
    return [
        Answered(
            batch,
            name,
            Spread.of([seconds / (batch * (tokens - 1)) for seconds in taken[name]]),
            ratio(taken, STOCK, name),
            (tokens - 1) * (rounds + 1) / one.steps,
            (sum(map(eq, one.answers, stock)), len(stock)),
        )
        for name, one in turns.items()
    ]


class Turns:
    """One engine's answers, round by round.

    Attributes:
        answers: token ids of each.
        steps: that they took behind their first tokens.

    """

    def __init__(self, llm: Any, prompts: Sequence[list[int]], batch: int, tokens: int) -> None:
        self._llm, self._batch, self._tokens = llm, batch, tokens
        self._prompts = cycle(prompts)
        self.answers: list[list[int]] = []
        self.steps = 0

    def run(self) -> float:
        """Answer the next prompts; return the seconds behind their first tokens."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=self._tokens, ignore_eos=True, detokenize=False
        )
        core, answers = self._llm.llm_engine, dict[str, list[int]]()
        for prompt in islice(self._prompts, self._batch):
            name = f"drafts-{next(_numbers)}"
            core.add_request(name, {"prompt_token_ids": prompt}, params)
            answers[name] = []
        while not all(answers.values()):
            self._step(answers)
        start = time.perf_counter()
        while core.has_unfinished_requests():
            self._step(answers)
            self.steps += 1
        seconds = time.perf_counter() - start
        self.answers += answers.values()
        return seconds

    def _step(self, answers: dict[str, list[int]]) -> None:
        for output in self._llm.llm_engine.step():
            answers[output.request_id] = list(output.outputs[0].token_ids)
