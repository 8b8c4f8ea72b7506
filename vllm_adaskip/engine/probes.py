# SPDX-License-Identifier: Apache-2.0
"""What a guard times at start-up: whole forwards, and each kind of sub-layer by itself.

Without attention metadata, as in a warm-up: attention over the KV cache is not in it, and what it
takes shows while the engine serves (`Guard.saw`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from vllm_adaskip.classifiers import Stream
from vllm_adaskip.engine.step import Bools, Part, Step
from vllm_adaskip.engine.window import Window

if TYPE_CHECKING:
    from vllm_adaskip.engine.compiled import Body, Inputs
    from vllm_adaskip.engine.fill import KvFill
    from vllm_adaskip.engine.loop import SkippingDecoder


class Probes:
    """What is timed of a model's layers for some tokens; names are those of `guard.PARTS`."""

    def __init__(self, model: SkippingDecoder, ids: Tensor, positions: Tensor) -> None:
        """Take ``[tokens]`` ids and positions."""
        self._model, self._layers = model, [*model.stack.layers]
        self._inputs: Inputs = (ids, positions, None)
        self._embedded = model.embed(ids, positions, None)
        self._halves = _halves(len(positions))

    def _stream(self) -> Stream:
        return Stream(self._embedded.clone(), self._embedded.clone())

    def ends(self) -> None:
        """Run what comes before and after the layers."""
        self._model.finish(Stream(self._model.embed(*self._inputs), self._embedded.clone()))

    def attention(self) -> None:
        """Run the attention of all layers."""
        stream = self._stream()
        for layer in self._layers:
            stream = self._model.run_attention(layer, self._inputs[1], stream)

    def mlp(self) -> None:
        """Run the MLP of all layers."""
        stream = self._stream()
        for layer in self._layers:
            stream = self._model.run_mlp(layer, stream)

    def passing(self) -> None:
        """Project K/V of tokens that leave out the attention of all layers, where that is done."""
        if not self._model.adaskip.fill.projects:
            return
        for layer in self._layers:
            self._model.project_kv(layer, self._inputs[1], self._stream())

    def regroup(self) -> None:
        """Work on other rows at each layer."""
        if self._halves is None:
            return
        window = Window(self._stream(), self._inputs[1])
        for number, _ in enumerate(self._layers):
            window.show(self._halves[number % 2])
        window.show(None)

    def known(self, mask: Bools, body: Body) -> None:
        """Run the body that is compiled for a plan."""
        fill: KvFill = self._model.adaskip.fill
        fill.begin(Step.of_one_plan(mask, len(self._inputs[1])), may_change=False)
        body(*self._inputs)
        fill.abandon()


def runs(probes: Probes, bodies: Sequence[tuple[Bools, Body]]) -> list[Callable[[], Any]]:
    """Return what is timed behind a dense step, in the order of `guard.PARTS`, then the bodies."""
    own = [probes.ends, probes.attention, probes.mlp, probes.passing, probes.regroup]
    return [*own, *(partial(probes.known, *each) for each in bodies)]


def _halves(tokens: int) -> tuple[Part, Part] | None:
    """Return every other token, and the others; None: there is one token alone."""
    if tokens < 2:
        return None
    ones = np.ones(tokens, dtype=np.int64)
    skips = np.arange(tokens)[:, None] % 2 == np.arange(2)
    step = Step.of(np.arange(tokens + 1), ones + 1, ones, skips)
    one, other = step.part(0), step.part(1)
    assert one is not None and other is not None
    return one, other
