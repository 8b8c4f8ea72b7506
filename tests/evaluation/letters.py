# SPDX-License-Identifier: Apache-2.0
"""A tokenizer of letters, with a start token and marks of turns, as chat models have them."""

from __future__ import annotations

import re
from dataclasses import dataclass

START, TURN, TEXT_END = "<s>", "<|turn|>", "<|text_end|>"
MARKS = {START: 0, TURN: 1, TEXT_END: 2}


@dataclass
class Letters:
    """Reads so many letters at a time; adds its start token as most tokenizers do."""

    size: int = 1
    bos_token: str | None = START
    eos_token_id: int | None = 2
    unk_token_id: int | None = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [MARKS[START]] if add_special_tokens and self.bos_token else []
        for part in re.split("(" + "|".join(map(re.escape, MARKS)) + ")", text):
            if part in MARKS:
                ids.append(MARKS[part])
                continue
            pairs = [part[start : start + self.size] for start in range(0, len(part), self.size)]
            ids += [sum(map(ord, pair)) for pair in pairs]
        return ids

    def get_added_vocab(self) -> dict[str, int]:
        return MARKS


def text(ids: list[int]) -> str:
    """Spell what a tokenizer of single letters made."""
    names = {number: mark for mark, number in MARKS.items()}
    return "".join(names.get(one) or chr(one) for one in ids)
