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
        tokenizer = _tokenizer(self._model)
        if not tokenizer.chat_template:
            raise DataError(
                f"messages want a chat template, and {self._model} has none; allowed: prompts"
            )
        begun = messages[-1]["role"] == "assistant"
        try:
            text = tokenizer.apply_chat_template(
                [*messages],
                tools=tools,
                tokenize=False,
                add_generation_prompt=not begun,
                continue_final_message=begun,
            )
        except Exception as error:  # templates are others' programs
            raise DataError(f"the chat template of {self._model}: {error}") from None
        return str(text)


@cache
def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)
