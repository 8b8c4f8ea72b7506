# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine that answers and times items under settings."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any

from vllm_adaskip.classifiers import DecoderShape, SkipPlan
from vllm_adaskip.lab.data.harness import HarnessItem
from vllm_adaskip.lab.data.items import Item
from vllm_adaskip.lab.data.metrics import CHOICE, PERPLEXITY, score_of
from vllm_adaskip.lab.data.tokens import answer_tokens, prompt_tokens
from vllm_adaskip.lab.evaluation.results import Answer, Setting

#: Items between two writes to the results: what a killed run loses at most.
CHUNK = 64
#: Key of a request's ``extra_args``: the token ids it must generate (`forced`).
FORCED = "forced_answer"
#: Key of a request's ``extra_args``: a number of its own, by which the engine tells what it ran.
ASKED = "asked"


@dataclass(frozen=True)
class Ran:
    """What a request's generated tokens went through, as `Answer` has it."""

    kept: float
    skip: list[int | str]
    left_out: list[float] | None = None


class Engine:
    """A vLLM engine with one server method; settings choose per request."""

    def __init__(self, model: str, method: str, options: dict[str, Any], **engine: Any) -> None:
        from vllm_adaskip.launch import engine_args
        from vllm_adaskip.model_executors.registry import family_of

        self.llm = self._start(
            model,
            logits_processors=["vllm_adaskip.lab.evaluation.forced:ForcedAnswer"],
            enable_prefix_caching=False,  # a repeated prompt would be timed without its prefill
            **engine,
            # A profile's guard would not follow plans that do not pay; we ask what they do.
            **engine_args(method=method, **{**options, "guard": False}),
        )
        model_config = self.llm.llm_engine.model_config
        family = family_of(model_config.architecture)
        assert family is not None
        self.shape: DecoderShape = family.shape(model_config.hf_config)
        self._tokenizer = self.llm.get_tokenizer()
        self.is_warm = False
        self._asked = count()

    def _start(self, model: str, **options: Any) -> Any:
        """Give vLLM's ``LLM``."""
        from vllm import LLM

        return LLM(model, **options)

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
        asked = [self._requests(setting, item, max_tokens) for item in items]
        params = [*chain(*asked)]
        texts = [item.prompt for item, own in zip(items, asked, strict=True) for _ in own]
        outputs = self.llm.generate(self._prompts(texts), params, use_tqdm=False)
        done = zip((one.outputs[0] for one in outputs), self.ran(params, outputs), strict=True)
        return [
            self._scored(setting, item, [*islice(done, len(own))])
            for item, own in zip(items, asked, strict=True)
        ]

    def _requests(self, setting: Setting, item: Item, max_tokens: int) -> list[Any]:
        """Return the parameters of an item's requests: one for each choice, else a single one."""
        from vllm import SamplingParams

        if pairs := forced_pairs(item):
            return [
                forced(answer_tokens(*pair, self._tokenizer), self.arguments(setting))
                for pair in pairs
            ]
        args = self.arguments(setting)
        return [SamplingParams(temperature=0, max_tokens=max_tokens, extra_args=args)]

    def _prompts(self, texts: Sequence[str]) -> list[Any]:
        from vllm import TokensPrompt

        tokens = (prompt_tokens(text, self._tokenizer) for text in texts)
        return [TokensPrompt(prompt_token_ids=one) for one in tokens]

    def arguments(self, setting: Setting) -> dict[str, Any]:
        """Give the ``extra_args`` of one request."""
        own = {f"adaskip_prompt_{key}": value for key, value in setting.prompt.items()}
        own[ASKED] = next(self._asked)
        if setting.skip is not None:
            return {"adaskip_skip": setting.skip, **own}
        return {"adaskip_budget": setting.budget, **own}

    def ran(self, params: Sequence[Any], outputs: Sequence[Any]) -> list[Ran]:
        """Give what ran of requests that were just answered."""
        requests = [
            (one.extra_args, output.prompt_token_ids)
            for one, output in zip(params, outputs, strict=True)
        ]
        plans, gated = (
            self.llm.collective_rpc(name, args=(requests,))[0]
            for name in ("adaskip_plans", "adaskip_ran")
        )
        return [self._ran(*one) for one in zip(plans, gated, strict=True)]

    def _ran(self, skip: list[int | str] | None, gated: Mapping[str, Any] | None) -> Ran:
        if skip is not None:
            return Ran(SkipPlan.parse(skip, self.shape.num_layers).share(self.shape), skip)
        if gated is None:
            raise RuntimeError("the engine does not know what it ran of a request just answered")
        shares = [tokens / max(gated["tokens"], 1) for tokens in gated["left_out"]]
        return Ran(kept(shares, self.shape), [], shares)

    def seconds(self, setting: Setting, prompts: Sequence[str], tokens: int) -> float:
        """Time one batch, every sequence giving the same number of tokens."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=self.arguments(setting)
        )
        start = time.perf_counter()
        self.llm.generate(self._prompts(prompts), params, use_tqdm=False)
        return time.perf_counter() - start

    def _scored(self, setting: Setting, item: Item, done: Sequence[tuple[Any, Ran]]) -> Answer:
        outputs, rans = zip(*done, strict=True)
        text = outputs[0].text
        if item.metric == PERPLEXITY:
            score = math.exp(-log_likelihood(outputs[0])[0] / len(outputs[0].token_ids))
        elif item.metric == CHOICE:
            each = [
                log_likelihood(output)[0] / len(choice.encode())
                for output, choice in zip(outputs, item.choices, strict=True)
            ]
            place = likeliest(each)
            text = "" if place is None else item.choices[place]
            score = float(text == item.references[0])
        else:
            score = score_of(item, text)
        tokens = [len(one.token_ids) for one in outputs]
        return self.record(setting, item, self._together(rans, tokens), score, sum(tokens), text)

    def _together(self, rans: Sequence[Ran], tokens: Sequence[int]) -> Ran:
        """Return what the tokens of several requests went through."""
        if all(one == rans[0] for one in rans):
            return rans[0]
        own = [
            one.left_out
            or SkipPlan.parse(one.skip, self.shape.num_layers).mask().astype(float).tolist()
            for one in rans
        ]
        fed = [one - 1 for one in tokens]  # the first token comes of the prompt
        shares = [
            math.fsum(count * share for count, share in zip(fed, each, strict=True))
            / max(sum(fed), 1)
            for each in zip(*own, strict=True)
        ]
        return Ran(kept(shares, self.shape), [], shares)

    def record(
        self,
        setting: Setting,
        item: Item,
        ran: Ran,
        score: float,
        tokens: int,
        text: str,
    ) -> Answer:
        """Give one answer as it is stored."""
        return Answer(
            setting=setting.name,
            item=item.item,
            task=item.task,
            metric=item.metric,
            score=score,
            kept=ran.kept,
            skip=ran.skip,
            tokens=tokens,
            text=text,
            left_out=ran.left_out,
        )


def forced_pairs(item: Item) -> tuple[tuple[str, str], ...]:
    """Return the prompts and answers of an item that are not generated freely; else nothing."""
    if isinstance(item, HarnessItem):
        return item.pairs
    texts = {CHOICE: item.choices, PERPLEXITY: item.references[:1]}.get(item.metric, ())
    return tuple((item.prompt, text) for text in texts)


def of_one_token(items: Sequence[Item], tokenizer: Any) -> int:
    """Count items whose forced answers are all of one token, which comes of the prompt."""
    return sum(
        all(len(answer_tokens(*pair, tokenizer)) == 1 for pair in pairs)
        for pairs in map(forced_pairs, items)
        if pairs
    )


def forced(tokens: Sequence[int], args: Mapping[str, Any]) -> Any:
    """Return the parameters of a request that generates these tokens, with their probabilities."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0,
        max_tokens=len(tokens),
        ignore_eos=True,
        logprobs=0,
        extra_args={**args, FORCED: [*tokens]},
    )


def log_likelihood(output: Any) -> tuple[float, bool]:
    """Return a forced answer's log-probability in nats, and whether each token is the likeliest."""
    chosen = [step[token] for token, step in zip(output.token_ids, output.logprobs, strict=True)]
    return math.fsum(one.logprob for one in chosen), all(one.rank == 1 for one in chosen)


def likeliest(each: Sequence[float]) -> int | None:
    """Return the place of the largest value; None if several are equal, or one is no number."""
    best = max(range(len(each)), key=each.__getitem__)
    others = [value for place, value in enumerate(each) if place != best]
    return best if all(each[best] > value for value in others) else None


def kept(left_out: Sequence[float], shape: DecoderShape) -> float:
    """Share of decoder compute that is kept, weighted by parameters as in `SkipPlan.share`.

    Args:
        left_out: ``[2 * num_layers]`` share of tokens that leave out each sub-layer.
        shape: the model's.

    """
    attention, mlp = (math.fsum(left_out[first::2]) for first in (0, 1))
    return shape.kept(attention, mlp)
