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
from vllm_adaskip.lab.evaluation.engine import CHUNK, Engine, Ran
from vllm_adaskip.lab.evaluation.results import Answer, Setting
from vllm_adaskip.lab.evaluation.settings import DENSE


class HarnessEngine(Engine):
    """An engine that the harness starts and asks."""

    def _start(self, model: str, **options: Any) -> Any:
        from lm_eval.models.vllm_causallms import VLLM

        self._backend = VLLM(model, batch_size=CHUNK, **options)
        llm = self._backend.model
        self._planned = self._backend.model = _Planned(self, llm)
        # The harness's progress bar would run through ours.
        self._backend.generate_until = partial(self._backend.generate_until, disable_tqdm=True)
        return llm

    def answers(
        self, setting: Setting, items: Sequence[Item], max_tokens: int
    ) -> Iterator[list[Answer]]:
        """Give the greedy answers, task by task; a task says itself how long they may be."""
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
        found = []
        for item in items:
            prompt, sample = tuple(self._backend.tok_encode(item.prompt)), samples[item.document]
            if prompt not in self._planned.done:
                raise DataError(
                    f"{item.item} has another prompt each time; allowed: always the same"
                )
            ran, tokens = self._planned.done[prompt]
            score, text = sample.get(task.metric), sample["resps"][0][0]
            if not isinstance(score, Real):
                raise DataError(f"{item.item} has a {task.metric} of {score!r:.80}, no number")
            found.append(self.record(setting, item, ran, float(score), tokens, text))
        return found

    def _check_lengths(self, items: Sequence[HarnessItem]) -> None:
        """Refuse what the harness would cut a prompt for; it only warns, in its log."""
        room = self._backend.max_length
        for item in items:
            prompt, answer = len(self._backend.tok_encode(item.prompt)), item.longest
            if prompt + answer > room:
                raise DataError(
                    f"{item.item}: {prompt} tokens and up to {answer} of the answer are more than "
                    f"{room}; allowed: --max-model-len {prompt + answer} or more"
                )


class _Planned:
    """vLLM's ``LLM`` as the harness sees it: it puts a setting into requests, and keeps count.

    The harness's ``gen_kwargs`` would reach most requests too, but become part of the task, and
    a task that makes its own requests leaves them out.
    """

    def __init__(self, engine: Engine, llm: Any) -> None:
        self._engine, self._llm = engine, llm
        self.setting = DENSE
        #: Prompt -> what ran, and how many tokens were generated.
        self.done: dict[tuple[int, ...], tuple[Ran, int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def generate(self, prompts: Any, sampling_params: Sequence[Any], **options: Any) -> Any:
        """Generate greedily, also where a task says nothing, which lm_eval 0.4.13 draws."""
        for one in sampling_params:
            one.temperature = 0.0
            one.extra_args = {**(one.extra_args or {}), **self._engine.arguments(self.setting)}
        outputs = self._llm.generate(prompts, sampling_params=sampling_params, **options)
        for one, ran in zip(outputs, self._engine.ran(sampling_params, outputs), strict=True):
            self.done[tuple(one.prompt_token_ids)] = ran, len(one.outputs[0].token_ids)
        return outputs


def run_task(task: HarnessTask, backend: Any) -> dict[int, Mapping[str, Any]]:
    """Have the harness ask and score; give what it says of each document."""
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        model=backend,
        tasks=[task.own],
        limit=task.limit,
        task_manager=task.manager,
        fewshot_random_seed=FEWSHOT_SEED,
        bootstrap_iters=0,
    )
    samples = found["samples"][task.name]
    return {one["doc_id"]: one for one in samples if one["filter"] == task.way}
