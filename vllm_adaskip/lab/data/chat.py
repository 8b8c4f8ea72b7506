# SPDX-License-Identifier: Apache-2.0
"""Messages as the prompt that a model's own chat template makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from vllm_adaskip.lab.data.items import DataError

Message = dict[str, Any]


class ChatTemplate:
    """The chat template of a model; its tokenizer is read when it is first asked for.

    Args:
        model: path or hub id.

    """

    def __init__(self, model: str) -> None:
        self._model = model

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """Return messages as a prompt; if the last is the assistant's, the answer goes on there.

        Raises:
            DataError: the model has no template, or it does not take these messages.

        """
        return self._rendered(messages, messages[-1]["role"] != "assistant", tools=tools)

    def of_harness(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """Return what lm-evaluation-harness's own vLLM backend makes of a chat."""
        try:
            return self._rendered(chat_history, add_generation_prompt, enable_thinking=None)
        except DataError:
            turns = [one for one in chat_history if one["role"] != "system"]
            if len(turns) == len(chat_history):
                raise
            return self._rendered(turns, add_generation_prompt, enable_thinking=None)

    def _rendered(self, messages: Sequence[Message], answers: bool, **options: Any) -> str:
        """Render; ``answers``: the assistant is next, else its last turn goes on."""
        tokenizer = _tokenizer(self._model)
        if not tokenizer.chat_template:
            raise DataError(
                f"messages want a chat template, and {self._model} has none; allowed: prompts"
            )
        try:
            text = tokenizer.apply_chat_template(
                [*messages],
                tokenize=False,
                add_generation_prompt=answers,
                continue_final_message=not answers,
                **options,
            )
        except Exception as error:  # templates are others' programs
            raise DataError(f"the chat template of {self._model}: {error}") from None
        return str(text)


@cache
def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)
