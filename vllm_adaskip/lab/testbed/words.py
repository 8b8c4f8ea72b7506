# SPDX-License-Identifier: Apache-2.0
"""Word lists the tasks draw from. All lower case, one token each."""

import random


def _words(text: str) -> list[str]:
    return text.split()


GOOD = _words(
    "lovely fresh bright friendly tasty superb charming clean comfortable delightful elegant "
    "excellent generous gentle helpful honest kind lively perfect pleasant"
)
BAD = _words(
    "dull stale gloomy rude awful broken boring dirty dreadful horrible lazy messy nasty noisy "
    "poor rotten shabby sour terrible weak"
)
REVIEWED = _words(
    "soup film room hotel waiter bread concert book hall service coffee garden show bed driver "
    "menu play cake guide chair"
)

TOPICS: dict[str, list[str]] = {
    "sport": _words("goal match team coach player race runner stadium league trophy referee ball"),
    "food": _words("butter pepper oven recipe onion cheese pasta sauce salad kitchen cook rice"),
    "music": _words("violin drum song melody choir piano singer guitar chord rhythm opera flute"),
    "weather": _words("rain storm cloud snow wind thunder frost fog sunshine hail breeze flood"),
    "science": _words(
        "atom cell laser planet theory orbit molecule magnet fossil gene proton comet"
    ),
    "travel": _words(
        "train airport ticket luggage passport harbour ferry journey map border tent road"
    ),
}

FIRST_NAMES = _words(
    "mira tobin alda berek cosma darin elva fenn greta hollis ivo jora kelan lise marek nola orin "
    "petra quill rona"
)
LAST_NAMES = _words(
    "tolen varga brint castell dorn ekholm farrow gault henning isker jansky korda lund moreau nyby"
)
TOWNS = _words(
    "brask celmo dunvar estil farnby golvik hestad irond jarlo kestow lormark mardun nesk ostly "
    "pelham querne rothay silden tarn ulvik"
)
JOBS = _words(
    "baker carpenter doctor farmer judge lawyer miner nurse painter pilot plumber porter sailor "
    "smith soldier tailor teacher weaver writer dancer"
)
PETS = _words("cat dog parrot rabbit tortoise horse goat hamster canary ferret snake goose")
COLOURS = _words("red blue green yellow purple orange black white brown pink")

# Words for the key sentence and for the copying exercise.
PLAIN = _words(
    "apple arrow basket bell bottle bridge brush bucket button candle carpet castle chain clock "
    "coin crown desk door engine fence flag fork glass glove hammer hat island jacket jar kettle "
    "kite ladder lamp leaf letter lock mirror nail needle paper pencil pillow plate pocket "
    "ribbon ring rope sail shelf shoe spoon stone table tower tunnel vase wagon wall wheel window"
)


def _invented(count: int, syllables: tuple[str, ...], seed: str) -> list[str]:
    """Made-up words of two or three syllables, always the same ones."""
    rng = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(syllables, k=rng.choice((2, 3))))] = None
    return list(words)


_SOURCE = _invented(36, ("za", "ko", "mu", "ti", "re", "pu", "vo", "nai"), "source language")
_TARGET = _invented(36, ("lish", "gra", "eth", "dro", "wyn", "sk", "ull", "orn"), "target language")
# The bilingual vocabulary: the k-th word of one language is the k-th of the other.
DICTIONARY = dict(zip(_SOURCE, _TARGET, strict=True))
SOURCE_NOUNS, SOURCE_ADJECTIVES, SOURCE_VERBS = _SOURCE[:16], _SOURCE[16:26], _SOURCE[26:]

DIGITS = list("0123456789")
# Everything else that prompts and answers are made of.
FRAME = _words(
    "sentiment topic fact hop translate key sum column steps copy gloss answer positive negative "
    ": . ? + = * , "
    "the was not and i found today we it very a truly in our view "
    "people asked about near talked saw there once more some of with then by after many small "
    "big old morning evening long "
    "where does live which town name what is home do for living job trade follow pet keep "
    "animal own colour like love most favourite who friend whom trust knows best start at "
    "add take double"
)


def vocabulary() -> list[str]:
    """All words, each once, in a fixed order."""
    lists = [FRAME, DIGITS, GOOD, BAD, REVIEWED, list(TOPICS), *TOPICS.values(), FIRST_NAMES,
             LAST_NAMES, TOWNS, JOBS, PETS, COLOURS, PLAIN, _SOURCE, _TARGET]  # fmt: skip
    return list(dict.fromkeys(word for words in lists for word in words))
