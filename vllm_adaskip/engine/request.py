# SPDX-License-Identifier: Apache-2.0
"""The per-request arguments: ``adaskip``, ``adaskip_skip``, ``adaskip_budget``.

They arrive as ``vllm_xargs`` over HTTP and as ``SamplingParams.extra_args`` offline.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import SamplingParams

KEYS = ("adaskip", "adaskip_skip", "adaskip_budget")
UNKNOWN = "unknown"
#: Why requests are refused: the argument that is wrong, or one that there is not. Few, however
#: many names clients make up.
REASONS = (*KEYS, UNKNOWN)


class RequestError(ValueError):
    """A bad per-request argument; the message names the key, the value and what is allowed.

    Attributes:
        reason: one of `REASONS`, for who counts.

    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.reason = key if key in KEYS else UNKNOWN


@dataclass(frozen=True, slots=True)
class RequestArgs:
    """What one request asks for; ``skip`` is still as it came, `Planner` knows the model."""

    off: bool = False
    skip: object | None = None
    budget: float | None = None

    @classmethod
    def parse(cls, extra_args: Mapping[str, Any] | None) -> RequestArgs:
        """Pick our keys out of a request's extra arguments; those of others are left alone.

        Raises:
            RequestError: a bad value, an unknown key that begins with ``adaskip``, or
                ``"adaskip": "off"`` together with another key of ours.

        """
        ours = {key: value for key, value in (extra_args or {}).items() if _is_ours(key)}
        if not ours:
            return cls()
        for key in ours:
            if key not in KEYS:
                raise RequestError(key, f"unknown argument{_nearest(key)}; allowed: {_listed()}")
        switch = ours.get("adaskip", "on")
        if switch not in ("on", "off"):
            raise RequestError("adaskip", f"{switch!r:.80} is not allowed; allowed: 'on', 'off'")
        if switch == "off" and len(ours) > 1:
            others = " and ".join(sorted(ours.keys() - {"adaskip"}))
            raise RequestError("adaskip", f"'off' means dense and does not go with {others}")
        return cls(switch == "off", ours.get("adaskip_skip"), _budget(ours.get("adaskip_budget")))


def is_one_answer(params: SamplingParams) -> bool:
    """Tell whether a request is done with one token, and wants to know no more than that.

    Log-probabilities of the prompt would have to come from layers that an answer may leave out.
    """
    return params.max_tokens == 1 and params.prompt_logprobs is None


def _is_ours(key: object) -> bool:
    return isinstance(key, str) and key.lower().startswith("adaskip")


def _nearest(key: str) -> str:
    near = difflib.get_close_matches(key.lower(), KEYS, n=1, cutoff=0.0)
    return f" (did you mean {near[0]}?)"


def _listed() -> str:
    return ", ".join(KEYS)


def _budget(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise RequestError(
            "adaskip_budget",
            f"{value!r:.80} is not allowed; allowed: a number in (0, 1], the "
            "largest share of decoder compute the plan may keep",
        )
    return float(value)
