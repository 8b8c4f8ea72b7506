# SPDX-License-Identifier: Apache-2.0
"""Names that users wrote before 0.2. They work until 0.3, and each is warned of once a process.

When 0.3 comes, remove this file and what fails without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from logging import getLogger
from typing import Any, Final

logger = getLogger("vllm.adaskip")

SINCE: Final = "0.2"
REMOVED: Final = "0.3"

SERVER: Final = "option adaskip."
BUSY: Final = "option adaskip.busy."
LEVEL: Final = "option adaskip.busy.levels[]."
PROFILE: Final = "adaskip.json: "
ARGUMENT: Final = "request argument "
REQUEST: Final = "vllm_adaskip.request: "
METHOD: Final = "method "
COMMAND: Final = "adaskip "

#: Where a name stands -> its old form -> its new one.
NEW: Final[dict[str, dict[str, str]]] = {
    SERVER: {"budget": "max_compute", "coalesce": "coalesce_regret", "speculate": "draft"},
    BUSY: {"dwell": "min_seconds"},
    LEVEL: {"budget": "max_compute"},
    PROFILE: {"budget": "max_compute"},
    ARGUMENT: {"adaskip_budget": "adaskip_max_compute"},
    REQUEST: {"budget": "max_compute"},
    METHOD: {"similarity": "adaskip"},
    COMMAND: {
        "--budget": "--max-compute",
        "--max-drop": "--max-loss",
        "--speculate": "--draft",
        "fit similarity": "fit adaskip",
    },
}
_warned: set[tuple[str, str]] = set()


def renamed(given: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return a mapping with the new names of a place in the place of old ones.

    Raises:
        ValueError: an old name stands beside its new one; the message names both.

    """
    found = {}
    for key, value in given.items():
        if (new := NEW[place].get(key)) is None:
            found[key] = value
            continue
        if new in given:
            raise ValueError(f"{new} does not go with {key}, its old name; leave {key} out")
        _warn(place, key, new)
        found[new] = value
    return found


def method(name: str) -> str:
    """Return the name that a method has now."""
    if (new := NEW[METHOD].get(name)) is None:
        return name
    _warn(METHOD, name, new)
    return new


def arguments(written: list[str], say: Callable[[str], object]) -> list[str]:
    """Return the arguments of the `adaskip` command by their new names, and say which were old.

    `adaskip serve` passes its arguments to vLLM, so they stay.

    Raises:
        ValueError: an old option stands beside its new one; the message names both.

    """
    if written[:1] == ["serve"]:
        return written
    found = [*written]
    if (old := " ".join(written[:2])) in NEW[COMMAND]:
        _warn(COMMAND, old, NEW[COMMAND][old], say)
        found[:2] = NEW[COMMAND][old].split()
    options = {each.partition("=")[0] for each in written}
    for place, each in enumerate(found):
        old, equals, value = each.partition("=")
        if (new := NEW[COMMAND].get(old)) is None:
            continue
        if new in options:
            raise ValueError(f"{new} does not go with {old}, its old name; leave {old} out")
        _warn(COMMAND, old, new, say)
        found[place] = f"{new}{equals}{value}"
    return found


def _warn(place: str, old: str, new: str, say: Callable[[str], object] | None = None) -> None:
    if (place, old) not in _warned:
        _warned.add((place, old))
        (say or logger.warning)(
            f"vllm-adaskip: {place}{old} is called {new} since {SINCE}; the old name works until "
            f"{REMOVED}"
        )
