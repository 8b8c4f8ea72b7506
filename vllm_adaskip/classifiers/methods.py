# SPDX-License-Identifier: Apache-2.0
"""The methods by name, and those that somebody else wrote, by path."""

from __future__ import annotations

import pkgutil

from vllm_adaskip.classifiers.adainfer.method import AdaInfer
from vllm_adaskip.classifiers.adaskip.method import AdaSkip
from vllm_adaskip.classifiers.base import Classifier, MethodOptions
from vllm_adaskip.classifiers.dense import Dense
from vllm_adaskip.classifiers.early_exit import EarlyExit
from vllm_adaskip.classifiers.ffn_skip.method import FfnSkip
from vllm_adaskip.classifiers.first.method import First
from vllm_adaskip.classifiers.plan import reason, shown
from vllm_adaskip.classifiers.static.method import Static

#: Every method of ours by the name that users write, hyphens included.
METHODS: dict[str, type[Classifier]] = {
    "adainfer": AdaInfer,
    "adaskip": AdaSkip,
    "exit": EarlyExit,
    "ffn-skip": FfnSkip,
    "first": First,
    "none": Dense,
    "static": Static,
}


def is_path(name: str) -> bool:
    """Return whether a method is named by a path, which imports code of the server's operator."""
    return ":" in name


def method_of(name: str) -> type[Classifier]:
    """Return the method of ours with a name, or import the class at ``module:Class``.

    Never call it with a name that a client or a profile brought.

    Raises:
        ValueError: there is no such method; the message says why.

    """
    if name in METHODS:
        return METHODS[name]
    if not is_path(name):
        raise ValueError(
            f"{shown(name)} is no method; allowed: {', '.join(METHODS)}, or module:Class, a "
            "subclass of vllm_adaskip.Classifier"
        )
    try:
        found = pkgutil.resolve_name(name)
    except (Exception, SystemExit) as error:  # whatever the module may raise
        raise ValueError(
            f"method {shown(name)} cannot be imported ({reason(error)}); "
            "allowed: module:Class, which Python finds in every process of the engine"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Classifier)):
        raise ValueError(
            f"method {shown(name)} is {shown(found)}; allowed: a subclass of "
            "vllm_adaskip.Classifier"
        )
    if not (isinstance(found.Options, type) and issubclass(found.Options, MethodOptions)):
        raise ValueError(
            f"method {shown(name)} has Options {shown(found.Options)}; allowed: a subclass of "
            "vllm_adaskip.MethodOptions"
        )
    return found
