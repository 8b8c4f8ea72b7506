# SPDX-License-Identifier: Apache-2.0
"""Where a prompt ends and its answer begins, in tokens: the same for all that reads answers.

A server is sent the prompt, and reads all of it before it answers. So an answer's tokens are those
that come after all of the prompt's, whatever a tokenizer would make of both in one text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unicodedata import category, east_asian_width


def prompt_tokens(prompt: str, tokenizer: Any) -> list[int]:
    """Return a prompt's tokens; a beginning that a template wrote already is not added again."""
    start = tokenizer.bos_token
    written = bool(start) and prompt.startswith(start)
    return list(tokenizer.encode(prompt, add_special_tokens=not written))


def answer_tokens(prompt: str, answer: str, tokenizer: Any) -> list[int]:
    """Return the tokens of an answer that follows this prompt, without an end."""
    before = prompt_tokens(prompt, tokenizer)
    text = space(prompt, answer, tokenizer) + answer
    whole = prompt_tokens(prompt + text, tokenizer)
    if whole[: len(before)] == before:
        return whole[len(before) :]
    # The prompt's last token would have grown by the answer's first letters.
    return list(tokenizer.encode(text, add_special_tokens=False))


def first_tokens(answer: str, tokenizer: Any) -> set[int]:
    """Return the tokens by which a model may begin an answer.

    As it is written, with a capital letter and without, and in capitals; after a space and at once.
    """
    words = {answer, answer.lower(), answer[:1].upper() + answer[1:], answer.upper()}
    begun = {
        tuple(tokenizer.encode(f"{gap}{word}", add_special_tokens=False)[:1])
        for gap in ("", " ")
        for word in words
    }
    # A space alone begins any answer, and so does what the tokenizer does not know.
    any_ones = {*tokenizer.encode(" ", add_special_tokens=False), tokenizer.unk_token_id}
    return {token for one in begun for token in one if token not in any_ones}


def space(prompt: str, answer: str, tokenizer: Any) -> str:
    """Return what stands between a prompt and its answer: a space where words would touch."""
    last, first = prompt[-1:], answer[:1]
    if not last or not first or last.isspace() or first.isspace():
        return ""
    opening = category(last) in ("Ps", "Pi")  # brackets and quotation marks
    if opening or any(east_asian_width(one) in "WF" for one in (last, first)):
        return ""
    marks = tokenizer.get_added_vocab()
    return "" if any(mark and prompt.endswith(mark) for mark in marks) else " "


def end_tokens(model: str, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer, by the model's generation config or its tokenizer.

    Empty where neither names one.
    """
    from transformers import GenerationConfig

    try:
        named = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # it has none
        named = None
    if named is None:
        named = tokenizer.eos_token_id
    return [] if named is None else [named] if isinstance(named, int) else list(named)


def end_after(prompt: Sequence[int], ends: Sequence[int], tokenizer: Any) -> list[int]:
    """Return the token, of several, that ends an answer to this prompt; empty if there is none.

    A chat's turns end with the token that will end the answer. Without turns it is the tokenizer's
    own, if the model names it too.
    """
    turns = [token for token in prompt if token in ends]
    own = [tokenizer.eos_token_id] if tokenizer.eos_token_id in ends else []
    return [*turns[-1:], *own, *ends][:1]
