# SPDX-License-Identifier: Apache-2.0
"""Fits FFN-SkipLLM (arXiv 2404.03865): cold regions and the threshold, from a few examples.

The paper finds its cold regions by eye, as the layers at both ends where the similarity drops, and
gives no threshold. Here the middle reaches from the first to the last layer whose mean similarity
is at least some level: the highest that, taken as the threshold too, leaves out as much as wanted.
A layer more in the middle may add much at once; then the threshold goes up again, in that middle.
What is counted is the rule on the stream of the whole model: that leaving out changes the stream
for the layers that follow, as it will on a server, is not seen.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from vllm_adaskip.classifiers.ffn_skip.method import FfnSkipOptions
from vllm_adaskip.lab.fitting.similarity import Floats, Similarities

#: Thresholds that are tried, and points of the calibration that is stored.
_TRIED, _STORED = 512, 48


class FfnSkipSettings(BaseModel):
    """What a fit of FFN-SkipLLM is told.

    Attributes:
        target_skip: share of all MLPs to leave out on average, over generated tokens; of scope
            ``token`` over those past the warm-up.
        keep_first: layers at the beginning that are kept; None: found.
        keep_last: the same at the end.
        method: the options that are not found.

    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    target_skip: float = Field(default=0.25, gt=0, lt=1)
    keep_first: int | None = Field(default=None, ge=0)
    keep_last: int | None = Field(default=None, ge=0)
    method: FfnSkipOptions = FfnSkipOptions()

    def check(self, num_layers: int) -> None:
        """Refuse ends that leave nothing of a model of this depth (`ValueError`)."""
        self.with_ends(1, 1).inner(num_layers)

    def with_ends(self, first: int, last: int) -> FfnSkipOptions:
        """Return the method's options with the ends that the user set, and these for the others."""
        ends = {
            "keep_first": first if self.keep_first is None else self.keep_first,
            "keep_last": last if self.keep_last is None else self.keep_last,
        }
        return self.method.model_copy(update=ends)


@dataclass(frozen=True)
class Fitted:
    """What came of a fit.

    Attributes:
        options: of the method, complete.
        skipped: share of MLPs left out, by the examples.
        by_layer: ``[num_layers]`` share of sequences, or tokens, that leave out each MLP.

    """

    options: FfnSkipOptions
    skipped: float
    by_layer: Floats


def fit_ffn_skip(found: Similarities, settings: FfnSkipSettings) -> Fitted:
    """Find cold regions and threshold.

    Raises:
        ValueError: so much cannot be left out; no token is past the warm-up.

    """
    values, weights = _cases(found, settings.method)
    mean = np.average(values, axis=0, weights=weights)

    def share(options: FfnSkipOptions | None) -> float:
        return 0.0 if options is None else _share(values, weights, options)

    def highest(levels: Floats, made: Callable[[float], FfnSkipOptions | None]) -> float | None:
        """Return the highest of ascending levels at which enough is left out."""
        enough = bisect_left(levels[::-1], True, key=lambda one: share(made(one)) >= target)
        return None if enough == len(levels) else float(levels[::-1][enough])

    target = settings.target_skip
    level = highest(levels := _grid(values), lambda one: _with_middle(settings, mean, one))
    if level is None:
        raise ValueError(
            f"target_skip {target:g}; allowed here: up to "
            f"{share(_with_middle(settings, mean, levels[0])):.3g}, with what keep_first, "
            "keep_last, max_skip and the scope leave to be skipped"
        )
    options = _with_middle(settings, mean, level)
    assert options is not None
    inner = _grid(_inner(values, options))
    threshold = highest(inner, lambda one: options.model_copy(update={"threshold": one}))
    return _calibrated(values, weights, options.model_copy(update={"threshold": threshold}))


def mlps_left_out(values: Floats, options: FfnSkipOptions) -> NDArray[np.bool_]:
    """Return ``[cases, num_layers]``, True where the rule leaves an MLP out.

    Args:
        values: ``[cases, num_layers]`` similarities at MLPs: of prompts, or of tokens past the
            warm-up if the options' scope is ``token``.
        options: with their threshold.

    """
    middle, inner = options.inner(values.shape[1]), _inner(values, options)
    most = min(options.max_skip or len(middle), len(middle))
    left_out = np.zeros(values.shape, dtype=np.bool_)
    if options.scope == "sequence":
        rank = np.argsort(np.argsort(-inner, axis=1, kind="stable"), axis=1)
        chosen = (inner >= options.threshold) & (rank < most)
    else:  # all after the first that has saturated
        after = np.cumsum(inner >= options.threshold, axis=1) > 0
        chosen = np.zeros_like(after)
        chosen[:, 1:] = after[:, :-1]
        chosen &= np.cumsum(chosen, axis=1) <= most
    left_out[:, middle.start : middle.stop] = chosen
    return left_out


def _cases(found: Similarities, options: FfnSkipOptions) -> tuple[Floats, NDArray[np.int64]]:
    """Return what is decided about, similarities at its MLPs, and how much each counts."""
    if options.scope == "sequence":
        return found.prompts[:, 1::2], found.weights
    past = found.ages >= options.warm_up
    if not past.any():
        raise ValueError(
            f"warm_up {options.warm_up}: the examples' answers have at most "
            f"{found.ages.max(initial=-1) + 1} tokens that are fed; allowed: fewer, "
            "or longer answers"
        )
    tokens = found.tokens[past][:, 1::2]
    return tokens, np.ones(len(tokens), dtype=np.int64)


def _with_middle(settings: FfnSkipSettings, mean: Floats, level: float) -> FfnSkipOptions | None:
    """Return a threshold and its middle: between the user's ends, or at least one layer at each.

    None where no layer is so similar.
    """
    allowed = settings.with_ends(1, 1).inner(len(mean))
    warm = [layer for layer in allowed if mean[layer] >= level]
    if not warm:
        return None
    ends = settings.with_ends(warm[0], len(mean) - 1 - warm[-1])
    return ends.model_copy(update={"threshold": float(level)})


def _calibrated(values: Floats, weights: NDArray[np.int64], options: FfnSkipOptions) -> Fitted:
    """Add what the share is at other thresholds."""
    found: dict[float, list[float]] = {0.0: [round(float(values.max()) + 1e-6, 6)]}
    grid = _grid(_inner(values, options))[::-1]
    for threshold in grid[:: max(1, len(grid) // _STORED)]:
        there = options.model_copy(update={"threshold": float(threshold)})
        share = round(_share(values, weights, there), 6)
        found.setdefault(share, []).append(round(float(threshold), 6))
    points = [[(same[0] + same[-1]) / 2, share] for share, same in sorted(found.items())]
    by_layer: Floats = np.average(mlps_left_out(values, options), axis=0, weights=weights)
    complete = options.model_copy(update={"calibration": points})
    return Fitted(complete, float(by_layer.mean()), by_layer)


def _share(values: Floats, weights: NDArray[np.int64], options: FfnSkipOptions) -> float:
    return float(np.average(mlps_left_out(values, options).mean(1), weights=weights))


def _inner(values: Floats, options: FfnSkipOptions) -> Floats:
    middle = options.inner(values.shape[1])
    return values[:, middle.start : middle.stop]


def _grid(values: Floats) -> Floats:
    """Return ascending thresholds, as many similarities between any two."""
    own = np.unique(values)
    # Between neighbouring similarities, so that rounding another way changes nothing.
    middles = np.concatenate([own[:1] - 1e-6, (own[1:] + own[:-1]) / 2])
    chosen = np.quantile(middles, np.linspace(0, 1, _TRIED), method="nearest")
    return np.unique(chosen)
