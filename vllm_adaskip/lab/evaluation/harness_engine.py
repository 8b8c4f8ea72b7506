# SPDX-License-Identifier: Apache-2.0
"""Answers harness tasks through the harness's own vLLM backend, each request under a setting.

The harness makes the prompts, cuts the answers and scores them, as `lm_eval --model vllm` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from numbers import Real
from typing import Any

from vllm_adaskip.lab.data.harness import FEWSHOT_SEED, HarnessItem, HarnessTask
from vllm_adaskip.lab.data.items import DataError, Item
from vllm_adaskip.lab.evaluation.engine import (
    CHUNK,
    Engine,
    Ran,
    forced,
    likeliest,
    log_likelihood,
)
from vllm_adaskip.lab.evaluation.results import Answer, Setting
from vllm_adaskip.lab.evaluation.settings import DENSE


class HarnessEngine(Engine):
    """An engine that the harness starts and asks."""

    def _start(self, model: str, **options: Any) -> Any:
        from lm_eval.models.vllm_causallms import VLLM

        self._backend = VLLM(model, batch_size=CHUNK, **options)
        llm = self._backend.model
        self._planned = self._backend.model = _Planned(self, llm)
        # A continuation is generated; the harness would read it as part of a prompt.
        self._backend._loglikelihood_tokens = self._log_likelihoods
        # The harness's progress bar would run through ours.
        for name in ("generate_until", "loglikelihood"):
            ask = partial(getattr(self._backend, name), disable_tqdm=True)
            setattr(self._backend, name, ask)
        return llm

    def answers(
        self, setting: Setting, items: Sequence[Item], max_tokens: int
    ) -> Iterator[list[Answer]]:
        """Return the greedy answers, task by task; a task says itself how long they may be."""
        asked = [one for one in items if isinstance(one, HarnessItem)]
        self._check_lengths(asked)
        for _, members in groupby(asked, key=lambda one: one.task):
            yield self._of_task(setting, list(members))

    def _of_task(self, setting: Setting, items: Sequence[HarnessItem]) -> list[Answer]:
        """Have the whole task done: few-shot examples depend on all documents before."""
        task = items[0].source
        self._planned.setting = setting
        self._planned.done.clear()
        samples = run_task(task, self._backend)
        return [self._of_item(setting, item, samples[item.document]) for item in items]

    def _of_item(self, setting: Setting, item: HarnessItem, sample: Mapping[str, Any]) -> Answer:
        asked = item.pairs or (tuple(self._backend.tok_encode(item.prompt)),)
        if missing := [one for one in asked if one not in self._planned.done]:
            raise DataError(
                f"{item.item} has another prompt each time, {missing[0]!r:.60}; allowed: always "
                "the same"
            )
        rans, tokens = zip(*(self._planned.done[one] for one in asked), strict=True)
        score, text = sample.get(item.source.metric), sample["resps"][0][0]
        if not isinstance(score, Real):
            raise DataError(f"{item.item} has a {item.source.metric} of {score!r:.80}, no number")
        if item.pairs:
            text = _likeliest(item.pairs, [one[0] for one in sample["resps"]])
        ran = self._together(rans, tokens)
        return self.record(setting, item, ran, float(score), sum(tokens), text)

    def _log_likelihoods(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return log-probability and greediness of continuations, generated under the setting."""
        found = []
        for start in range(0, len(requests), CHUNK):
            pairs, contexts, continuations = zip(*requests[start : start + CHUNK], strict=True)
            outputs = self._planned.generate(
                [{"prompt_token_ids": one} for one in contexts],
                [forced(tokens, {}) for tokens in continuations],
                asked=pairs,
                use_tqdm=False,
            )
            found += [log_likelihood(one.outputs[0]) for one in outputs]
        return found

    def _check_lengths(self, items: Sequence[HarnessItem]) -> None:
        """Refuse what the harness would cut a prompt for; it only warns, in its log."""
        room = self._backend.max_length
        for item in items:
            asked = [context + continuation for context, continuation in item.pairs]
            prompt = max(len(self._backend.tok_encode(one)) for one in asked or [item.prompt])
            answer = item.longest or 1  # a context that is empty becomes a token
            if prompt + answer > room:
                raise DataError(
                    f"{item.item}: {prompt} tokens and up to {answer} of the answer are more than "
                    f"{room}; allowed: --max-model-len {prompt + answer} or more"
                )


def _likeliest(pairs: Sequence[tuple[str, str]], each: Sequence[tuple[float, bool]]) -> str:
    """Return the text of the likeliest continuation; of a single one if it is greedy."""
    if len(pairs) == 1:
        return pairs[0][1] if each[0][1] else ""
    place = likeliest([value for value, _ in each])
    return "" if place is None else pairs[place][1]


class _Planned:
    """vLLM's ``LLM`` as the harness sees it: it puts a setting into requests, and keeps count.

    The harness's ``gen_kwargs`` would reach most requests too, but become part of the task, and
    a task that makes its own requests leaves them out.
    """

    def __init__(self, engine: Engine, llm: Any) -> None:
        self._engine, self._llm = engine, llm
        self.setting = DENSE
        #: Prompt, or context and continuation -> what ran, and how many tokens were generated.
        self.done: dict[tuple[Any, ...], tuple[Ran, int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def generate(
        self,
        prompts: Any,
        sampling_params: Sequence[Any],
        asked: Sequence[tuple[str, str]] | None = None,
        **options: Any,
    ) -> Any:
        """Generate greedily, also where a task says nothing, which lm_eval 0.4.13 draws.

        ``asked``: what is kept count of, in place of the prompts.
        """
        for one in sampling_params:
            one.temperature = 0.0
            one.extra_args = {**(one.extra_args or {}), **self._engine.arguments(self.setting)}
        outputs = self._llm.generate(prompts, sampling_params=sampling_params, **options)
        names = asked or [tuple(one.prompt_token_ids) for one in outputs]
        rans = self._engine.ran(sampling_params, outputs)
        for name, one, ran in zip(names, outputs, rans, strict=True):
            self.done[name] = ran, len(one.outputs[0].token_ids)
        return outputs


def run_task(task: HarnessTask, backend: Any) -> dict[int, Mapping[str, Any]]:
    """Have the harness ask and score; give what it says of each document."""
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        model=backend,
        tasks=[task.own],
        limit=task.limit,
        apply_chat_template=task.chat,
        task_manager=task.manager,
        fewshot_random_seed=FEWSHOT_SEED,
        bootstrap_iters=0,
    )
    samples = found["samples"][task.name]
    return {one["doc_id"]: one for one in samples if one["filter"] == task.way}
