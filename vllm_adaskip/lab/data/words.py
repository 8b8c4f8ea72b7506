# SPDX-License-Identifier: Apache-2.0
"""Texts as words and numbers, as they are compared: case, punctuation and emphasis aside."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache
from unicodedata import category, normalize

ARTICLES = frozenset({"a", "an", "the"})
#: So many words of an answer may come before its label, and the label may be said of it.
NEAR_START = 12

_NEGATIONS = frozenset({
    "not", "never", "neither", "nor", "non", "cannot", "cant", "wont", "isnt", "arent", "wasnt",
    "werent", "dont", "doesnt", "didnt",
})  # fmt: skip
_NEGATED = (["instead", "of"], ["rather", "than"])
#: Words that may stand between a negation and what it negates.
_BETWEEN = frozenset(["a", "an", "the", "very", "really", "exactly", "quite", "be"])
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+|(?=\.\d))(?:\.\d+)?"
_ANY_NUMBER = re.compile(rf"(?:(?<![\w.)])[-+\u2212])?{_NUMBER}(?:[eE][-+]?\d{{1,3}}(?!\d))?")
#: A word that is nothing but a number, a sign and marks around.
_ONLY_NUMBER = re.compile(rf"\W*?([-+\u2212]?{_NUMBER})\W*")
#: A sign that does not end a word, as in C++ or A+.
_LOOSE_SIGN = re.compile(r"(?<![\w+#])[+#]+|[+#]+(?=\w)")
#: An article before what may be its noun; "A is right" has none.
_ARTICLE = re.compile(r"\b(?:[Aa]n?|[Tt]he)\s+(?=[a-z])(?!(?:is|was|because|since|and|or)\b)")


def words(text: str) -> list[str]:
    """Return a text's words: case, punctuation and emphasis of markdown aside; numbers whole."""
    plain = normalize("NFKC", text).casefold().translate({ord(mark): None for mark in "*`~"})
    found = []
    for word in plain.replace("_", " ").split():
        if number := _ONLY_NUMBER.fullmatch(word):
            found.append(str(_value(number[1])))
        else:
            found += "".join(map(_letter, _LOOSE_SIGN.sub(" ", word))).split()
    return found


def compared(text: str) -> list[str]:
    """Return words without articles; all words, or what is there, where else nothing is left."""
    found = words(text)
    return [word for word in found if word not in ARTICLES] or found or text.split()


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text, or None."""
    found = _ANY_NUMBER.findall(text)
    return _value(found[-1]) if found else None


def first_label(text: str, labels: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the label, as words, that an answer says first and does not negate; or None.

    Of labels that begin with one another the longest counts.
    """
    known = labels_as_words(labels)
    lengths = sorted({len(label) for label in known}, reverse=True)
    letters = any(ARTICLES.issuperset(label) for label in known)
    # Where "A" is a choice, not every "a" is an article.
    answer = words(_ARTICLE.sub("", text)) if letters else compared(text)
    for start in range(min(NEAR_START, len(answer))):
        said = (tuple(answer[start : start + length]) for length in lengths)
        label = next((one for one in said if one in known), None)
        if label and not _negated(answer[:start]):
            return label
    return None


@lru_cache(maxsize=1024)  # all items of a task have the same
def labels_as_words(labels: tuple[str, ...]) -> frozenset[tuple[str, ...]]:
    """Return labels as they are looked for."""
    return frozenset(tuple(compared(label)) for label in labels)


def _negated(before: Sequence[str]) -> bool:
    """Return whether what comes after these words is denied by them."""
    left = [word for word in before if word not in _BETWEEN]
    return left[-2:] in _NEGATED or bool(_NEGATIONS.intersection(left[-1:]))


def _letter(letter: str) -> str:
    """Return what a character is in a word: itself, nothing, or an end of the word."""
    if category(letter)[0] in "LMN" or letter in "+#":
        return letter
    return "" if letter in "'\u2019." else " "


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", "").replace("\u2212", "-"))
