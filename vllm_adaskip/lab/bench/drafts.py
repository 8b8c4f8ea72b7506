# SPDX-License-Identifier: Apache-2.0
"""What drafts are worth: whole answers beside stock vLLM's, and beside its n-gram drafts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count, cycle, islice
from operator import eq
from typing import TYPE_CHECKING, Any

from vllm_adaskip.lab.bench.engines import engine
from vllm_adaskip.lab.bench.rounds import Run, Spread, ratio, take_turns
from vllm_adaskip.lab.bench.variants import CONTROL, EAGER, STOCK
from vllm_adaskip.lab.data.items import DataError

if TYPE_CHECKING:
    from vllm import SamplingParams

NGRAM = f"{STOCK}, n-gram drafts"

_numbers = count()


@dataclass(frozen=True)
class Answered:
    """How fast a variant answers.

    Attributes:
        batch: requests at once.
        variant: what drafts.
        per_token: seconds of a round over its tokens, the first of each answer left out.
        against_stock: compiled stock vLLM's over these, round by round.
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
    """Start compiled engines with a model's weights: stock vLLM twice, and one for each draft.

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
        CONTROL: {},
        EAGER: {"enforce_eager": True},
        **{name: {"plugin": {"draft": dict(one), **served}} for name, one in options.items()},
        NGRAM: {"speculative_config": ngram},  # last, as no engine starts after what it imports
    }
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(engine(model, load_format="auto", **{**vllm, **one}))
            for name, one in variants.items()
        }


def told(llm: Any, prompts: Sequence[list[int]], params: SamplingParams) -> list[list[int]]:
    """Return the prompts that are answered with more than one token: before it nothing drafts.

    Raises:
        DataError: there are none.

    """
    short = params.clone()
    short.max_tokens = 2
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], short, use_tqdm=False
    )
    found = [
        prompt
        for prompt, output in zip(prompts, outputs, strict=True)
        if len(output.outputs[0].token_ids) > 1
    ]
    if not found:
        raise DataError(
            f"none of {len(prompts)} questions is answered with more than one token; "
            "ask such as want longer answers"
        )
    return found


def compare(
    engines: Mapping[str, Any],
    prompts: Sequence[list[int]],
    batch: int,
    params: SamplingParams,
    rounds: int,
    done: Callable[[], None],
) -> list[Answered]:
    """Let all engines answer, in turns; in each round all of them the same prompts."""
    turns = {name: Turns(llm, prompts, batch, params) for name, llm in engines.items()}
    variants: dict[str, Run] = {name: one.run for name, one in turns.items()}
    taken = take_turns(variants, rounds, done)
    stock = turns[STOCK].answers
    return [
        Answered(
            batch,
            name,
            Spread.of(taken[name]),
            ratio(taken, STOCK, name),
            one.tokens / one.steps,
            (sum(map(eq, one.answers, stock)), len(stock)),
        )
        for name, one in turns.items()
    ]


class Turns:
    """One engine's answers, round by round.

    Attributes:
        answers: token ids of each.
        tokens: of all of them behind their first.
        steps: that they took, a request's each.

    """

    def __init__(
        self, llm: Any, prompts: Sequence[list[int]], batch: int, params: SamplingParams
    ) -> None:
        self._core, self._batch, self._params = llm.llm_engine, batch, params
        self._prompts = cycle(prompts)
        self.answers: list[list[int]] = []
        self.tokens = self.steps = 0

    def run(self) -> float:
        """Answer the next prompts; return the seconds of a token, the first ones left out."""
        answers = dict[str, list[int]]()
        for prompt in islice(self._prompts, self._batch):
            name = f"drafts-{next(_numbers)}"
            self._core.add_request(name, {"prompt_token_ids": prompt}, self._params)
            answers[name] = []
        while not all(answers.values()):
            self._step(answers)
        first = sum(map(len, answers.values()))
        start = time.perf_counter()
        while self._core.has_unfinished_requests():
            self.steps += self._step(answers)
        seconds = time.perf_counter() - start
        tokens = sum(map(len, answers.values())) - first
        self.tokens += tokens
        self.answers += answers.values()
        return seconds / max(tokens, 1)

    def _step(self, answers: dict[str, list[int]]) -> int:
        """Run a step; return how many requests got tokens."""
        outputs = self._core.step()
        for output in outputs:
            answers[output.request_id] = list(output.outputs[0].token_ids)
        return len(outputs)
