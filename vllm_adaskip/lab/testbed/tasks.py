# SPDX-License-Identifier: Apache-2.0
"""The tasks: questions with one right answer, made from a seed.

Nothing here needs torch or transformers. A generator takes a random source and a level between
0 (short) and 1 (full length) and returns the question's text and its answer.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from vllm_adaskip.lab.testbed import knowledge, words

Generator = Callable[[random.Random, float], tuple[str, str]]
SPLITS = ("train", "tune", "test")


@dataclass(frozen=True)
class Sample:
    """One question: the prompt as the model sees it, and the right answer."""

    task: str
    prompt: str
    answer: str


def _upto(rng: random.Random, least: int, most: int, level: float) -> int:
    """Draw a length between `least` and `most`; the level lowers the longest one."""
    return rng.randint(least, least + round((most - least) * level))


def _sentiment(rng: random.Random, level: float) -> tuple[str, str]:
    good = rng.random() < 0.5
    clauses = []
    # Short reviews are the most frequent: the smaller of two draws.
    count = min(_upto(rng, 1, 8, level), _upto(rng, 1, 8, level))
    for noun in rng.sample(words.REVIEWED, count):
        # "not" turns an adjective round, so single words do not give the answer away.
        negated = rng.random() < 0.3
        adjective = rng.choice(words.GOOD if good != negated else words.BAD)
        what = (
            f"not {adjective}" if negated else rng.choice(("", "", "very ", "truly ")) + adjective
        )
        frame = rng.choice(
            ("the {n} was {a} .", "i found the {n} {a} .", "in our view the {n} was {a} .")
        )
        clauses.append(frame.format(n=noun, a=what))
    return " ".join(clauses), "positive" if good else "negative"


_TOPIC_FRAMES = (
    "today we talked about the {a} .",
    "people asked about a {a} .",
    "there was a big {a} near the old {b} .",
    "i saw the {a} and then the {b} .",
    "after a long morning we found some {a} .",
    "many talked of the {a} in the evening .",
)


def _topic(rng: random.Random, level: float) -> tuple[str, str]:
    topic = rng.choice(list(words.TOPICS))
    count = min(_upto(rng, 2, 9, level), _upto(rng, 2, 9, level))
    # One sentence may be about something else; the topic is what most words are about.
    stray = rng.randrange(count) if count > 2 and rng.random() < 0.5 else -1
    sentences = []
    for index in range(count):
        about = rng.choice([t for t in words.TOPICS if t != topic]) if index == stray else topic
        a, b = rng.sample(words.TOPICS[about], 2)
        frame = rng.choice(_TOPIC_FRAMES[:2] if index == stray else _TOPIC_FRAMES)
        sentences.append(frame.format(a=a, b=b))
    return " ".join(sentences), topic


def _fact(rng: random.Random, level: float) -> tuple[str, str]:
    return knowledge.ask(rng, hops=1)


def _hop(rng: random.Random, level: float) -> tuple[str, str]:
    return knowledge.ask(rng, hops=2)


def _noun_group(noun: str, adjectives: list[str]) -> tuple[list[str], list[str]]:
    """Source order is adjectives, noun; the target language puts the noun first."""
    return [*adjectives, noun], [words.DICTIONARY[word] for word in (noun, *adjectives)]


def _translate(rng: random.Random, level: float) -> tuple[str, str]:
    nouns = rng.sample(words.SOURCE_NOUNS, 2)
    adjectives = rng.sample(words.SOURCE_ADJECTIVES, 4)
    verb = rng.choice(words.SOURCE_VERBS)
    most = round(2 * level)
    subject = _noun_group(nouns[0], adjectives[: rng.randint(0, most)])
    object_ = _noun_group(nouns[1], adjectives[2 : 2 + rng.randint(0, most)])
    # Subject verb object becomes subject object verb.
    source = [*subject[0], verb, *object_[0]]
    target = [*subject[1], *object_[1], words.DICTIONARY[verb]]
    return " ".join(source) + " .", " ".join(target)


def _key(rng: random.Random, level: float) -> tuple[str, str]:
    # The three sentences share words, so a word alone does not tell what follows it.
    bag = rng.sample(words.PLAIN, 12)
    sentences = [" ".join(rng.sample(bag, _upto(rng, 3, 7, level))) for _ in range(3)]
    chosen = rng.randrange(3)
    marked = [f"* {s} ." if i == chosen else f"{s} ." for i, s in enumerate(sentences)]
    return " ".join(marked), sentences[chosen]


def _steps(rng: random.Random, level: float) -> tuple[str, str]:
    value = rng.randrange(10)
    parts, values = [f"start at {value} ."], []
    for _ in range(_upto(rng, 1, 6, level)):
        by, change = rng.randrange(1, 10), rng.choice(("add", "take", "double"))
        parts.append("double ." if change == "double" else f"{change} {by} .")
        # Only the last digit is kept after every step, and all of these are asked for.
        value = {"add": value + by, "take": value - by, "double": 2 * value}[change] % 10
        values.append(str(value))
    return " ".join(parts), " ".join(values)


def _spaced(number: int | str) -> str:
    return " ".join(str(number))


def _operands(rng: random.Random, digits: int) -> tuple[int, int, str]:
    """Two numbers written with equally many digits, zeros in front, and the question."""
    a, b = rng.randrange(10**digits), rng.randrange(10**digits)
    return a, b, f"{_spaced(f'{a:0{digits}}')} + {_spaced(f'{b:0{digits}}')} = ?"


def _sum(rng: random.Random, level: float) -> tuple[str, str]:
    a, b, text = _operands(rng, _upto(rng, 2, 3, level))
    return text, _spaced(a + b)


def _column(rng: random.Random, level: float) -> tuple[str, str]:
    a, b, text = _operands(rng, _upto(rng, 2, 4, level))
    # As one adds in columns on paper: the sum is given from the ones digit upwards.
    return text, _spaced(str(a + b)[::-1])


def _copy(rng: random.Random, level: float) -> tuple[str, str]:
    text = " ".join(rng.sample(words.PLAIN, _upto(rng, 2, 8, level)))
    return text + " .", text


def _gloss(rng: random.Random, level: float) -> tuple[str, str]:
    source = rng.sample(list(words.DICTIONARY), _upto(rng, 1, 5, level))
    return " ".join(source) + " .", " ".join(words.DICTIONARY[word] for word in source)


TASKS: dict[str, Generator] = {
    "sentiment": _sentiment,
    "topic": _topic,
    "fact": _fact,
    "hop": _hop,
    "translate": _translate,
    "key": _key,
    "sum": _sum,
    "column": _column,
    "steps": _steps,
}
EASY = ("sentiment", "topic", "fact", "hop")
# Exercises that only help training: copying, and translating word for word in the same order.
EXERCISES: dict[str, Generator] = {"copy": _copy, "gloss": _gloss}


def split_of(task: str, text: str) -> str:
    """Which split a question belongs to, by its text alone: 4 % tune, 4 % test, the rest train."""
    bucket = zlib.crc32(f"{task}/{text}".encode()) % 100
    return "test" if bucket < 4 else "tune" if bucket < 8 else "train"


def prompt_of(task: str, text: str) -> str:
    """Return a question in the form that all of them have."""
    return f"{task} : {text} answer :"


def draw(task: str, split: str, rng: random.Random, level: float = 1.0) -> Sample:
    """One question of this task that belongs to this split."""
    generator = TASKS.get(task) or EXERCISES[task]
    while True:
        text, answer = generator(rng, level)
        if split_of(task, text) == split:
            return Sample(task, prompt_of(task, text), answer)


def samples(task: str, split: str, seed: int, n: int) -> list[Sample]:
    """`n` questions, the same for the same arguments."""
    return list(islice(stream(task, split, seed), n))


def stream(task: str, split: str, seed: int) -> Iterator[Sample]:
    """Questions without end."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    rng = random.Random(f"{seed}/{task}/{split}")
    while True:
        yield draw(task, split, rng)
