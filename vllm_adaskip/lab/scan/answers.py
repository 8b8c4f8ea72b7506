# SPDX-License-Identifier: Apache-2.0
"""What a scan asks, and what the engine answers: whole, and under plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from vllm_adaskip.classifiers.plan import SkipPlan
from vllm_adaskip.lab.data.chat import ChatTemplate
from vllm_adaskip.lab.data.items import DataError, Item
from vllm_adaskip.lab.data.tokens import prompt_tokens
from vllm_adaskip.lab.evaluation.reading import Heard, at_full_depth
from vllm_adaskip.lab.evaluation.results import PlanReading, WholeAnswer
from vllm_adaskip.offline import request

#: Fewer answers of two tokens or more say nothing.
LEAST = 4


def everyday(model: str) -> list[Item]:
    """Return the built-in prompts, under the model's chat template if it has one."""
    from transformers import AutoTokenizer

    chat = ChatTemplate(model) if AutoTokenizer.from_pretrained(model).chat_template else None
    return [
        Item(
            f"everyday/{number}",
            "everyday",
            chat.prompt([{"role": "user", "content": text}]) if chat else text,
            ("",),
            "exact_match",
        )
        for number, text in enumerate(EVERYDAY)
    ]


def tokenised(items: Sequence[Item], model: str, tokens: int) -> tuple[list[list[int]], int]:
    """Return the prompts' tokens, and how long a sequence may become.

    Raises:
        DataError: a prompt without tokens, or one that leaves no room for an answer.

    """
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [prompt_tokens(item.prompt, tokenizer) for item in items]
    config = AutoConfig.from_pretrained(model).get_text_config()
    allowed = getattr(config, "max_position_embeddings", None) or 1 << 20
    for item, one in zip(items, prompts, strict=True):
        if not 0 < len(one) < allowed - tokens:
            raise DataError(
                f"{item.item}: a prompt of {len(one)} tokens; allowed: 1 to "
                f"{allowed - tokens - 1}, as the model takes {allowed}, with {tokens} of an answer"
            )
    return prompts, min(allowed, max(max(map(len, prompts)) + tokens + 1, 128))


def generated(
    llm: Any, prompts: Sequence[list[int]], arguments: dict[str, Any], tokens: int
) -> list[tuple[list[int], str]]:
    """Return the greedy answers to requests with these arguments: tokens and text of each."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=tokens, extra_args=arguments)
    asked = [TokensPrompt(prompt_token_ids=one) for one in prompts]
    outputs = llm.generate(asked, params, use_tqdm=False)
    return [(list(one.outputs[0].token_ids), one.outputs[0].text) for one in outputs]


def whole_answers(
    llm: Any, items: Sequence[Item], prompts: Sequence[list[int]], tokens: int
) -> list[WholeAnswer]:
    """Return the whole model's answers."""
    made = zip(items, prompts, generated(llm, prompts, {}, tokens), strict=True)
    return [
        WholeAnswer(item=item.item, prompt=one, answer=answer, text=text)
        for item, one, (answer, text) in made
    ]


def halves(answers: Sequence[WholeAnswer]) -> tuple[list[WholeAnswer], list[WholeAnswer]]:
    """Return the half on which the order is found, and the half that is held out.

    Raises:
        DataError: too few have two tokens; the first comes of the prompt, under any plan.

    """
    told = [one for one in answers if len(one.answer) > 1]
    if len(told) < LEAST:
        raise DataError(
            f"{len(told)} of {len(answers)} answers of the whole model have two tokens or more; "
            f"at least {LEAST} are needed: ask more questions, or such as want longer answers"
        )
    return told[0::2], told[1::2]


def answered(llm: Any, asked: Sequence[WholeAnswer], plan: SkipPlan, tokens: int) -> PlanReading:
    """Have the engine answer under a plan, and read the answers again at full depth.

    The first token is not counted: it comes of the prompt, which runs at full depth.
    """
    arguments = request(skip=plan.entries())
    answers = generated(llm, [one.prompt for one in asked], arguments, tokens)
    heard = [
        Heard([*one.prompt, *answer[:1]], answer[1:])
        for one, (answer, _) in zip(asked, answers, strict=True)
        if len(answer) > 1
    ]
    return _read(llm, heard, "answered", plan, [text for _, text in answers])


def shortened(
    llm: Any, asked: Sequence[WholeAnswer], plan: SkipPlan, layers: int, tokens: int
) -> PlanReading:
    """Have the engine answer prompts of which so many layers run, and read the answers again.

    All tokens are counted, the first one too, as it comes of a prompt that leaves out ``plan``.
    """
    arguments = request(prompt_exit=layers)
    answers = generated(llm, [one.prompt for one in asked], arguments, tokens)
    heard = [Heard(one.prompt, answer) for one, (answer, _) in zip(asked, answers, strict=True)]
    return _read(llm, heard, "shortened", plan, [text for _, text in answers])


def _read(
    llm: Any,
    heard: Sequence[Heard],
    how: Literal["answered", "shortened"],
    plan: SkipPlan,
    texts: list[str],
) -> PlanReading:
    """Return how far the whole model would have given these answers."""
    found = at_full_depth(llm, heard, request(skip=[]))
    return PlanReading(
        how=how,
        skip=plan.entries(),
        agreement=[one["agreement"] or 0.0 for one in found],
        surprise=[one["surprise"] or 0.0 for one in found],
        texts=texts,
    )


EVERYDAY = (
    "What is the capital of France, and what is it known for?",
    "Write a short note to a neighbour who watered my plants.",
    "Explain in simple words why the sky is blue.",
    "Give me three ideas for a quick dinner with eggs.",
    "What should I pack for a weekend by the sea?",
    "Is this review good or bad? 'The room was cold and the staff were rude.' Say why.",
    "How do I get a coffee stain out of a white shirt?",
    "Tell me a story about a fox who could not sleep, in a few sentences.",
    "What is the difference between weather and climate?",
    "Put this more politely: 'Send me the file now.'",
    "How many days are in a leap year, and why?",
    "Write a Python function that adds up the even numbers of a list.",
    "Name five animals that live in the desert.",
    "I have an interview tomorrow. What should I do tonight?",
    "Sum this up in one sentence: 'The bridge was closed in March. It opened again in June.'",
    "What does a heart do in the body?",
    "Suggest a name for a small bakery, and a slogan.",
    "Why do leaves turn red in autumn?",
    "Translate into French: 'Good morning, where is the station?'",
    "How can I fall asleep faster?",
    "If I buy three apples at 40 cents and pay with two dollars, what do I get back?",
    "Describe a rainy street at night.",
    "What are the planets of the solar system, in order?",
    "Write an invitation to a birthday party on Saturday.",
    "How does a bicycle stay upright?",
    "Give me tips for speaking in front of many people.",
    "Who wrote 'Romeo and Juliet', and what is it about?",
    "What is a good way to learn the names of many new people?",
    "List the steps to change a light bulb safely.",
    "What is inflation? Explain it to a child.",
    "Compare cats and dogs as pets.",
    "Write two lines of a poem about the moon.",
)
