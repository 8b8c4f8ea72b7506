# SPDX-License-Identifier: Apache-2.0
"""What a row of a data file may say, and the question that it makes."""

from __future__ import annotations

from math import isfinite
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vllm_adaskip.lab.data.chat import ChatTemplate, Message
from vllm_adaskip.lab.data.items import DataError, Item
from vllm_adaskip.lab.data.metrics import CHOICE, METRICS
from vllm_adaskip.lab.data.words import last_number


def _number_as_text(value: Any) -> Any:
    if isinstance(value, float) and isfinite(value):
        return str(int(value) if value.is_integer() else value)
    return str(value) if type(value) is int else value


def _encodable(text: str) -> str:
    text.encode()  # raises `UnicodeEncodeError`, a ValueError, for half of a surrogate pair
    return text


def _has_role(message: Message) -> Message:
    if not isinstance(message.get("role"), str):
        raise ValueError(f"role is {message.get('role')!r:.40}; a text is wanted")
    return message


Text = Annotated[str, AfterValidator(_encodable)]
#: A text, or a number, which is meant as one.
Short = Annotated[Text, BeforeValidator(_number_as_text)]
Turn = Annotated[Message, AfterValidator(_has_role)]


class Row(BaseModel):
    """One row: a prompt or messages, and what is right."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Text | None = Field(default=None, min_length=1)
    reference: Short | None = None
    references: list[Short] | None = None
    messages: list[Turn] | None = Field(default=None, min_length=1)
    tools: list[dict[str, Any]] | None = None
    choices: list[Short] | None = Field(default=None, min_length=2)
    label: int | str | None = None
    id: Short | None = None
    task: Short | None = None
    metric: str | None = None


def item_of(
    facts: dict[str, Any],
    number: int,
    task: str,
    metric: str,
    template: ChatTemplate | None,
    chat: bool,
) -> Item:
    """Make a row's item.

    Args:
        facts: the row, nothing checked.
        number: of the row in its file.
        task: of a row that names none.
        metric: of a row that names none and has no choices.
        template: of messages.
        chat: whether a prompt is a user's message too.

    Raises:
        DataError: the message names the key, and what is allowed.

    """
    row = _checked(facts)
    metric = row.metric or (CHOICE if row.choices else metric)
    if metric not in METRICS:
        raise DataError(f"metric {metric!r:.80}; allowed: {', '.join(METRICS)}")
    if metric == CHOICE and not row.choices:
        raise DataError(f"metric {metric!r} needs choices and a label")
    messages = _messages(row, chat)
    references = _references(row, messages)
    if not references or not all(one.strip() for one in references):
        raise DataError(f"metric {metric!r} needs a reference that is not empty")
    if metric == "number" and None in map(last_number, references):
        raise DataError("metric 'number' needs references with a number")
    task = row.task or task
    return Item(
        row.id or f"{task}/{number}",
        task,
        _prompt(row, messages, template),
        tuple(references),
        metric,
        choices=tuple(row.choices or ()),
    )


def _checked(facts: dict[str, Any]) -> Row:
    """Refuse keys and values that no row has; null is as good as absent."""
    given = {key: value for key, value in facts.items() if value is not None}
    if unknown := [key for key in given if key not in Row.model_fields]:
        raise DataError(
            f"{', '.join(map(repr, unknown)):.80}: not known; allowed keys: "
            f"{', '.join(Row.model_fields)}; --columns PROMPT,REFERENCE reads others"
        )
    try:
        row = Row.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(f"{key}: {first['msg']}, not {first['input']!r:.60}") from None
    for pair in (
        ("prompt", "messages"),
        ("reference", "references"),
        ("label", "reference"),
        ("label", "references"),
    ):
        if given.keys() >= set(pair):
            raise DataError(f"{pair[0]} and {pair[1]}; allowed: either")
    if row.prompt is None and row.messages is None:
        raise DataError(f"no prompt and no messages; there is {', '.join(given) or 'nothing'}")
    if (row.choices is None) != (row.label is None) and row.reference is None:
        raise DataError("choices and label go together")
    return row


def _messages(row: Row, chat: bool) -> list[Message]:
    """Return the turns to be rendered; none of a plain prompt."""
    if row.messages is not None:
        return [*row.messages]
    return [{"role": "user", "content": row.prompt}] if chat else []


def _references(row: Row, messages: list[Message]) -> list[str]:
    """Return what is right, if need be the last turn, which is taken away."""
    if row.choices is not None:
        return [_right(row, row.choices)]
    if row.references is not None or row.reference is not None:
        return row.references or [one for one in [row.reference] if one is not None]
    if messages and messages[-1]["role"] == "assistant":
        content = messages.pop().get("content")
        if not messages:
            raise DataError("messages: nothing comes before the last turn, which is the answer")
        return [content] if isinstance(content, str) else []
    return []


def _right(row: Row, choices: list[str]) -> str:
    """Return the right choice: the one that the label names, else the one of its number."""
    if len(set(choices)) < len(choices) or not all(one.strip() for one in choices):
        raise DataError(f"choices: {choices!r:.80}; allowed: different ones, none empty")
    label = row.reference if row.label is None else row.label
    stripped = [one.strip() for one in choices]
    if isinstance(label, str):
        if label.strip() in stripped:
            return choices[stripped.index(label.strip())]
        if row.label is not None and label.isdecimal():
            label = int(label)
    if isinstance(label, int) and 0 <= label < len(choices):
        return choices[label]
    raise DataError(
        f"label {label!r:.80}: no choice; allowed: 0 to {len(choices) - 1}, or one of {choices!r}"
    )


def _prompt(row: Row, messages: list[Message], template: ChatTemplate | None) -> str:
    if not messages:
        assert row.prompt is not None
        return row.prompt
    if template is None:
        raise DataError("messages want a model's chat template, which is not read here")
    try:
        return _encodable(template.prompt(messages, row.tools))
    except UnicodeEncodeError as error:
        raise DataError(f"messages: {error}") from None
