# SPDX-License-Identifier: Apache-2.0
"""300 made-up people, and the questions one can ask about them."""

import random
from dataclasses import dataclass
from functools import cache

from vllm_adaskip.lab.testbed import words

WORDINGS: dict[str, list[str]] = {
    "town": [
        "where does {who} live ?",
        "in which town does {who} live ?",
        "name the town of {who} .",
        "what is the home town of {who} ?",
    ],
    "job": [
        "what does {who} do for a living ?",
        "what is the job of {who} ?",
        "which trade does {who} follow ?",
        "name the job of {who} .",
    ],
    "pet": [
        "which pet does {who} keep ?",
        "what is the pet of {who} ?",
        "name the pet of {who} .",
        "what animal does {who} own ?",
    ],
    "colour": [
        "what colour does {who} like ?",
        "which colour does {who} love most ?",
        "name the colour of {who} .",
        "what is the favourite colour of {who} ?",
    ],
    "friend": [
        "who is the friend of {who} ?",
        "name the friend of {who} .",
        "whom does {who} trust ?",
        "who knows {who} best ?",
    ],
}


@dataclass(frozen=True)
class Person:
    """One made-up person; `friend` is another person's full name."""

    name: str
    town: str
    job: str
    pet: str
    colour: str
    friend: str


@cache
def people(seed: int = 0) -> dict[str, Person]:
    """Every first name with every last name, each with random attributes."""
    rng = random.Random(f"knowledge/{seed}")
    names = [f"{first} {last}" for first in words.FIRST_NAMES for last in words.LAST_NAMES]
    # A ring through all people in random order: nobody is their own friend.
    ring = rng.sample(names, len(names))
    friends = {a: b for a, b in zip(ring, ring[1:] + ring[:1], strict=True)}
    return {
        name: Person(
            name=name,
            town=rng.choice(words.TOWNS),
            job=rng.choice(words.JOBS),
            pet=rng.choice(words.PETS),
            colour=rng.choice(words.COLOURS),
            friend=friends[name],
        )
        for name in names
    }


def ask(rng: random.Random, hops: int) -> tuple[str, str]:
    """Make a question on a person (one hop) or on that person's friend (two), and its answer."""
    known = people()
    person = known[rng.choice(list(known))]
    who = person.name
    attributes = list(WORDINGS)
    if hops == 2:
        who, person = f"the friend of {who}", known[person.friend]
        attributes.remove("friend")
    attribute = rng.choice(attributes)
    return rng.choice(WORDINGS[attribute]).format(who=who), getattr(person, attribute)
