# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine that answers and times items under settings."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from vllm_adaskip.classifiers import DecoderShape, SkipPlan
from vllm_adaskip.evaluation.data import Item
from vllm_adaskip.evaluation.metrics import METRICS, PERPLEXITY
from vllm_adaskip.evaluation.results import Answer, Setting

#: Items between two writes to the results: what a killed run loses at most.
CHUNK = 64
#: Key of a request's ``extra_args``: the token ids it must generate (`forced`).
FORCED = "forced_answer"


class Engine:
    """A vLLM engine with one server method; settings choose per request."""

    def __init__(self, model: str, method: str, options: dict[str, Any], **engine: Any) -> None:
        from vllm_adaskip.launch import engine_args
        from vllm_adaskip.model_executors.registry import family_of

        self.llm = self._start(
            model,
            enable_prefix_caching=False,  # a repeated prompt would be timed without its prefill
            **engine,
            **engine_args(method=method, **options),
        )
        model_config = self.llm.llm_engine.model_config
        family = family_of(model_config.architecture)
        assert family is not None
        self.shape: DecoderShape = family.shape(model_config.hf_config)
        self._tokenizer = self.llm.get_tokenizer()
        self.is_warm = False

    def _start(self, model: str, **options: Any) -> Any:
        """Give vLLM's ``LLM``."""
        from vllm import LLM

        return LLM(
            model,
            logits_processors=["vllm_adaskip.evaluation.forced:ForcedAnswer"],
            **options,
        )

    def close(self) -> None:
        """Shut the engine down; the next may start."""
        self.llm.llm_engine.engine_core.shutdown()

    def answers(
        self, setting: Setting, items: Sequence[Item], max_tokens: int
    ) -> Iterator[list[Answer]]:
        """Give the greedy answers, scored, in parts that are worth storing."""
        for start in range(0, len(items), CHUNK):
            yield self._answered(setting, items[start : start + CHUNK], max_tokens)

    def _answered(self, setting: Setting, items: Sequence[Item], max_tokens: int) -> list[Answer]:
        from vllm import SamplingParams

        args = arguments(setting)
        params = [
            SamplingParams(temperature=0, max_tokens=max_tokens, extra_args=args)
            if item.metric != PERPLEXITY
            else self._forced(item, args)
            for item in items
        ]
        outputs = self.llm.generate([item.prompt for item in items], params, use_tqdm=False)
        return [
            self._scored(setting, item, output.outputs[0], skip)
            for item, output, skip in zip(items, outputs, self.plans(args, outputs), strict=True)
        ]

    def plans(self, args: dict[str, Any], outputs: Sequence[Any]) -> list[list[int | str]]:
        """Give the plans that requests with these arguments followed."""
        prompts = [(args, output.prompt_token_ids) for output in outputs]
        found: list[list[int | str] | None]
        found = self.llm.collective_rpc("adaskip_plans", args=(prompts,))[0]
        known = [skip for skip in found if skip is not None]
        if len(known) < len(found):
            raise ValueError(
                "a request has no one plan: its method decides token by token (ffn-skip with scope "
                "'token'), which cannot be evaluated yet; use scope 'sequence'"
            )
        return known

    def seconds(self, setting: Setting, prompts: Sequence[str], tokens: int) -> float:
        """Time one batch, every sequence giving the same number of tokens."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=arguments(setting)
        )
        start = time.perf_counter()
        self.llm.generate(list(prompts), params, use_tqdm=False)
        return time.perf_counter() - start

    def _forced(self, item: Item, args: dict[str, Any]) -> Any:
        from vllm import SamplingParams

        prompt = self._tokenizer.encode(item.prompt)
        whole = self._tokenizer.encode(f"{item.prompt} {item.references[0]}")
        answer = whole[len(prompt) :] if whole[: len(prompt)] == prompt else []
        answer = answer or self._tokenizer.encode(item.references[0], add_special_tokens=False)
        return SamplingParams(
            temperature=0,
            max_tokens=len(answer),
            ignore_eos=True,
            logprobs=0,
            extra_args={**args, FORCED: answer},
        )

    def _scored(self, setting: Setting, item: Item, output: Any, skip: list[int | str]) -> Answer:
        score_text = METRICS[item.metric]
        if score_text is None:
            chosen = zip(output.token_ids, output.logprobs, strict=True)
            mean = math.fsum(step[token].logprob for token, step in chosen) / len(output.token_ids)
            score = math.exp(-mean)
        else:
            score = score_text(output.text, item.references)
        return self.record(setting, item, skip, score, len(output.token_ids), output.text)

    def record(
        self,
        setting: Setting,
        item: Item,
        skip: list[int | str],
        score: float,
        tokens: int,
        text: str,
    ) -> Answer:
        """Give one answer as it is stored."""
        plan = SkipPlan.parse(skip, self.shape.num_layers)
        return Answer(
            setting=setting.name,
            item=item.item,
            task=item.task,
            metric=item.metric,
            score=score,
            kept=plan.share(self.shape),
            skip=skip,
            tokens=tokens,
            text=text,
        )


def arguments(setting: Setting) -> dict[str, Any]:
    """Give the request arguments that bring a setting about."""
    if setting.skip is not None:
        return {"adaskip_skip": setting.skip}
    return {"adaskip_budget": setting.budget}
