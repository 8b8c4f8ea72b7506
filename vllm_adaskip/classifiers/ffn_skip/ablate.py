# SPDX-License-Identifier: Apache-2.0
"""What in FFN-SkipLLM does the work: the ablations of arXiv 2404.03865, and its neighbours.

Adaptive against fixed and random sets of as many MLPs, without cold regions, with longer
warm-ups, over thresholds; and, at equal compute, the sub-layer methods that skip attention too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vllm_adaskip.classifiers.ffn_skip.fit import FfnSkipSettings, fit_ffn_skip
from vllm_adaskip.classifiers.ffn_skip.method import FfnSkipOptions
from vllm_adaskip.classifiers.plan import DecoderShape
from vllm_adaskip.lab.evaluation.results import Setting
from vllm_adaskip.lab.evaluation.settings import DENSE, distinct
from vllm_adaskip.lab.fitting.similarity import Similarities
from vllm_adaskip.lab.fixed_plans import Entry, at_random, evenly, units

#: The paper's shares of MLPs left out, and two that tell apart what a robust model hides there.
TARGETS = (0.05, 0.15, 0.25, 0.35, 0.5, 0.6)
#: Share that single comparisons are made at.
SINGLE = 0.25
WARM_UPS = (5, 10, 25, 50)
THRESHOLDS = (0.999, 0.998, 0.996, 0.994, 0.99, 0.98, 0.96, 0.9)
DRAWS = 3
#: Name of a scope in tables -> its value.
SCOPES: dict[str, Any] = {"by prompt": "sequence", "by token": "token"}
#: Families that are rows of a table of their own, not points beside the others.
ASIDE = ("warm-up", "threshold")


def settings(
    found: Similarities,
    greedy_mlps: Sequence[Entry],
    greedy_layers: Sequence[Entry],
    shape: DecoderShape,
    targets: Sequence[float] = TARGETS,
) -> list[Setting]:
    """Return everything that is compared, dense first.

    Args:
        found: similarities on training examples; thresholds and cold regions are fitted to them.
        greedy_mlps: MLPs in the order in which a greedy search leaves them out.
        greedy_layers: the same of layers (SLEB).
        shape: of the decoder.
        targets: shares of MLPs to leave out.

    """

    def compared() -> Iterator[Setting]:
        for target in targets:
            yield from _adaptive(found, target)
            yield from _fixed(found, greedy_mlps, target, shape.num_layers)
            yield from _at_equal_compute(greedy_layers, target, shape)
        yield from _warm_ups(found, SINGLE)
        yield from _sweep()

    return distinct([DENSE, *compared()])


def _adaptive(found: Similarities, target: float) -> Iterator[Setting]:
    for name, scope in SCOPES.items():
        for more, ends in (("", {}), (", no cold regions", {"keep_first": 0, "keep_last": 0})):
            yield _decided(f"{name}{more}", target, _fitted(found, target, scope, **ends))


def _fitted(found: Similarities, target: float, scope: Any, **ends: int) -> FfnSkipOptions:
    method = FfnSkipOptions(scope=scope, warm_up=0)  # warm-ups are compared by themselves
    told = FfnSkipSettings(target_skip=target, method=method, **ends)
    return fit_ffn_skip(found, told).options.model_copy(update={"calibration": []})


def _decided(family: str, target: float, options: FfnSkipOptions) -> Setting:
    return Setting(
        name=f"{family} -{target:.0%}",
        family=family,
        method="ffn-skip",
        options=options.model_dump(exclude_unset=True),
    )


def _fixed(
    found: Similarities, greedy: Sequence[Entry], target: float, num_layers: int
) -> Iterator[Setting]:
    """Return sets of MLPs that all sequences leave out; the first and the last layer's stay."""
    inner = units("mlp", range(1, num_layers - 1))
    count = round(target * num_layers)
    mean = np.average(found.prompts, axis=0, weights=found.weights)[3:-1:2]
    similar = [inner[place] for place in np.argsort(-mean, kind="stable")]
    plans: Mapping[str, Sequence[Entry]] = {
        "static, most similar": similar[:count],
        "static, greedy": greedy[:count],
        "static, uniform": evenly(inner, count),
    }
    for family, skip in plans.items():
        yield Setting(name=f"{family} -{target:.0%}", family=family, skip=[*skip])
    for draw in range(DRAWS):
        skip = at_random(inner, count, draw)
        yield Setting(name=f"random #{draw} -{target:.0%}", family="random", skip=skip)


def _at_equal_compute(
    greedy_layers: Sequence[Entry], target: float, shape: DecoderShape
) -> Iterator[Setting]:
    """Return what leaves out attention too, with as much compute kept as without the MLPs."""
    less = target * shape.mlp_parameters / shape.layer_parameters
    yield Setting(
        name=f"AdaSkip -{target:.0%}", family="AdaSkip", method="adaskip", budget=1 - less
    )
    if count := round(less * shape.num_layers):
        skip = [*greedy_layers[:count]]
        yield Setting(name=f"SLEB, layers -{target:.0%}", family="SLEB, layers", skip=skip)


def _warm_ups(found: Similarities, target: float) -> Iterator[Setting]:
    options = _fitted(found, target, "token")
    for tokens in WARM_UPS:
        later = options.model_copy(update={"warm_up": tokens})
        yield _decided(f"warm-up {tokens}", target, later)


def _sweep() -> Iterator[Setting]:
    for name, scope in SCOPES.items():
        for threshold in THRESHOLDS:
            options = {"scope": scope, "threshold": threshold, "warm_up": 0}
            yield Setting(
                name=f"threshold {threshold:g}, {name}",
                family=f"threshold {threshold:g}, {name}",
                method="ffn-skip",
                options=options,
            )
