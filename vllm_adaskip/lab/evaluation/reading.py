# SPDX-License-Identifier: Apache-2.0
"""Reads answers again at full depth, to see whether the whole model would have written them.

A prompt runs at full depth. So an answer that was generated under a plan is given back to the same
engine as the end of its prompt, and the log-probabilities of the prompt are the whole model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_adaskip.engine.canary import Reading
from vllm_adaskip.lab.data.items import Item
from vllm_adaskip.lab.data.metrics import CHOICE, PERPLEXITY
from vllm_adaskip.lab.evaluation.engine import FORCED, Engine
from vllm_adaskip.lab.evaluation.results import Answer, Setting, Unread
from vllm_adaskip.lab.evaluation.settings import DENSE

#: Metrics whose answers are given, not generated.
_GIVEN = (PERPLEXITY, CHOICE)


@dataclass(frozen=True)
class Heard:
    """Token ids of a prompt, and of what was generated after it."""

    prompt: list[int]
    answer: list[int]


def heard(
    engine: Engine, setting: Setting, items: Sequence[Item], max_tokens: int
) -> Iterator[list[Answer | Unread]]:
    """Return what an engine answers, in parts.

    Unread is what it generated, but for answers of harness tasks, which the harness asks for.
    """
    llm = engine.llm
    engine.llm = listening = _Listening(llm)
    try:
        for part in engine.answers(setting, items, max_tokens):
            engine.llm = llm
            own, listening.heard = iter(listening.heard), []
            yield [_unread(one, own) for one in part]
            engine.llm = listening
    finally:
        engine.llm = llm


def _unread(answer: Answer, heard: Iterator[Heard]) -> Answer | Unread:
    if answer.metric in _GIVEN or (own := next(heard, None)) is None:
        return answer
    return Unread(answer=answer, prompt=own.prompt, generated=own.answer)


def read(engine: Engine, part: Sequence[Answer | Unread]) -> list[Answer]:
    """Return answers, those unread with `Answer.agreement` and `Answer.surprise`."""
    left = [one for one in part if isinstance(one, Unread)]
    heard = [Heard(one.prompt, one.generated) for one in left]
    found = iter(at_full_depth(engine.llm, heard, engine.arguments(DENSE)))
    return [
        one.answer.model_copy(update=next(found)) if isinstance(one, Unread) else one
        for one in part
    ]


class _Listening:
    """vLLM's ``LLM``, which keeps what it generates freely."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self.heard: list[Heard] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def generate(self, prompts: Any, params: Sequence[Any], **options: Any) -> Any:
        outputs = self._llm.generate(prompts, params, **options)
        self.heard += [
            Heard(list(output.prompt_token_ids), list(output.outputs[0].token_ids))
            for one, output in zip(params, outputs, strict=True)
            if FORCED not in (one.extra_args or {})
        ]
        return outputs


def at_full_depth(
    llm: Any, heard: Sequence[Heard], arguments: Mapping[str, Any]
) -> list[dict[str, float | None]]:
    """Have vLLM read answers as prompts; return what `measured` makes of each.

    ``arguments`` are the requests' ``extra_args``.
    """
    from vllm import SamplingParams, TokensPrompt

    longest = llm.llm_engine.model_config.max_model_len - 1  # vLLM generates a token after it
    params = SamplingParams(
        temperature=0,
        max_tokens=1,
        prompt_logprobs=1,
        detokenize=False,
        extra_args=dict(arguments),
    )
    prompts = [TokensPrompt(prompt_token_ids=(o.prompt + o.answer)[:longest]) for o in heard]
    outputs = llm.generate(prompts, params, use_tqdm=False) if prompts else []
    return [
        measured(output.prompt_logprobs[len(one.prompt) :], one.answer)
        for one, output in zip(heard, outputs, strict=True)
    ]


def measured(steps: Sequence[Mapping[int, Any]], answer: Sequence[int]) -> dict[str, float | None]:
    """Return agreement and surprise of an answer, from the whole model's log-probabilities.

    Args:
        steps: for each token of the answer, its log-probability and that of the likeliest token;
            fewer where the answer did not fit.
        answer: its token ids.

    """
    gaps = [
        max(one.logprob for one in step.values()) - step[token].logprob
        for step, token in zip(steps, answer, strict=False)
    ]
    if not gaps:
        return {"agreement": None, "surprise": None}
    return Reading.of(gaps)._asdict()
