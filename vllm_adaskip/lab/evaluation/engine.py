# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine that answers and times items under settings."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from typing import Any

from vllm_adaskip.classifiers import DecoderShape, SkipPlan
from vllm_adaskip.engine.prompt_plan import PromptPlan
from vllm_adaskip.lab.data.harness import HarnessItem
from vllm_adaskip.lab.data.items import Item
from vllm_adaskip.lab.data.metrics import CHOICE, PERPLEXITY, score_of
from vllm_adaskip.lab.data.tokens import answer_tokens, prompt_tokens
from vllm_adaskip.lab.evaluation.results import PROMPT_KEY, Answer, Setting, prompt_arguments

#: Items between two writes to the results: what a killed run loses at most.
CHUNK = 64
#: Key of a request's ``extra_args``: the token ids it must generate (`forced`).
FORCED = "forced_answer"
#: Key of a request's ``extra_args``: a number of its own, by which the engine tells what it ran.
ASKED = "asked"


@dataclass(frozen=True)
class Ran:
    """What a request went through.

    Attributes:
        kept: share of decoder compute, of its generated tokens.
        skip: their plan, as `Answer` has it; so is ``left_out``.
        read: tokens of its prompt, where this is under a prompt plan.
        read_kept: what those kept, in tokens that run everything.

    """

    kept: float
    skip: list[int | str]
    left_out: list[float] | None = None
    read: int = 0
    read_kept: float = 0.0

    def kept_of_all(self, tokens: int) -> float:
        """Return the share that the prompt kept, if it was shortened, and so many tokens."""
        if not self.read:
            return self.kept
        return (self.read_kept + tokens * self.kept) / (self.read + tokens)


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
            # A profile's guard would not follow plans that do not pay; we ask what they do. What it
            # says of prompts is the setting's, as dense runs here too.
            **engine_args(method=method, **{"prompt": None, **options, "guard": False}),
        )
        model_config = self.llm.llm_engine.model_config
        family = family_of(model_config.architecture)
        assert family is not None
        self.shape: DecoderShape = family.shape(model_config.hf_config)
        self._tokenizer = self.llm.get_tokenizer()
        self.is_warm = False
        self._asked = count()

    def _start(self, model: str, **options: Any) -> Any:
        """Return vLLM's ``LLM``."""
        from vllm import LLM

        return LLM(model, **options)

    def close(self) -> None:
        """Shut the engine down; the next may start."""
        self.llm.llm_engine.engine_core.shutdown()

    def answers(
        self, setting: Setting, items: Sequence[Item], max_tokens: int
    ) -> Iterator[list[Answer]]:
        """Return the greedy answers, scored, in parts that are worth storing."""
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
        """Return the ``extra_args`` of one request."""
        own = prompt_arguments(setting.prompt)
        own[ASKED] = next(self._asked)
        if setting.skip is not None:
            return {"adaskip_skip": setting.skip, **own}
        return {"adaskip_max_compute": setting.budget, **own}

    def ran(self, params: Sequence[Any], outputs: Sequence[Any]) -> list[Ran]:
        """Return what ran of requests that were just answered."""
        requests = [
            (one.extra_args, output.prompt_token_ids)
            for one, output in zip(params, outputs, strict=True)
        ]
        plans, gated = (
            self.llm.collective_rpc(name, args=(requests,))[0]
            for name in ("adaskip_plans", "adaskip_ran")
        )
        rans = [self._ran(*one) for one in zip(plans, gated, strict=True)]
        return [self._with_prompt(*one) for one in zip(rans, requests, strict=True)]

    def _with_prompt(self, ran: Ran, request: tuple[Mapping[str, Any], Sequence[int]]) -> Ran:
        args, prompt = request
        named = {
            key.removeprefix(PROMPT_KEY): value
            for key, value in args.items()
            if key.startswith(PROMPT_KEY)
        }
        plan = PromptPlan.of_options(named, self.shape.num_layers) if named else None
        if plan is None:
            return ran
        whole = len(prompt) - plan.full_from(len(prompt))
        kept = whole + (len(prompt) - whole) * plan.plan.share(self.shape)
        return replace(ran, read=len(prompt), read_kept=kept)

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
        read, read_kept = sum(one.read for one in rans), sum(one.read_kept for one in rans)
        if all((one.skip, one.left_out) == (rans[0].skip, rans[0].left_out) for one in rans):
            return replace(rans[0], read=read, read_kept=read_kept)
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
        return Ran(kept(shares, self.shape), [], shares, read, read_kept)

    def record(
        self,
        setting: Setting,
        item: Item,
        ran: Ran,
        score: float,
        tokens: int,
        text: str,
    ) -> Answer:
        """Return one answer as it is stored."""
        return Answer(
            setting=setting.name,
            item=item.item,
            task=item.task,
            metric=item.metric,
            score=score,
            kept=ran.kept_of_all(tokens),
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
