# SPDX-License-Identifier: Apache-2.0
"""When an answer is settled: decision functions on what a check layer's prediction looks like.

Features are ``[tokens, 2]`` float64: ``top_prob``, the probability of the likeliest token, and
``gap``, its distance to that of the second. AdaInfer (arXiv 2403.02181) names the features and the
three kinds of classifier; kernel, scaling and the form of the CRF it leaves open. Pure NumPy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

FILE = "adainfer.safetensors"


@dataclass(frozen=True)
class ExitRule(ABC):
    """A decision function fitted at some layers.

    Attributes:
        layers: these, ascending; parameters stand in this order.

    """

    layers: tuple[int, ...]

    @abstractmethod
    def settled(
        self, layer: int, features: FloatArray, seen: FloatArray
    ) -> tuple[BoolArray, FloatArray]:
        """Decide for some tokens after a layer.

        Args:
            layer: one of ``layers``.
            features: ``[tokens, 2]``.
            seen: ``[tokens, 2]`` what the rule remembers of the layers below; zeros at first.

        Returns:
            ``[tokens]``, True where deeper layers are not needed, and what to remember.

        """

    @abstractmethod
    def tensors(self) -> dict[str, NDArray[np.float64]]:
        """Return the parameters by the names under which a profile keeps them."""

    def save(self, folder: Path) -> None:
        """Write the parameters into a profile's folder."""
        from safetensors.numpy import save_file  # here: serving without a profile needs none

        layers = np.array(self.layers, dtype=np.int64)
        save_file({"layers": layers, **self.tensors()}, folder / FILE)


@dataclass(frozen=True)
class Threshold(ExitRule):
    """Settled where both features reach what the layer asks; ``[layers]`` each."""

    top_prob: FloatArray
    gap: FloatArray

    def settled(
        self, layer: int, features: FloatArray, seen: FloatArray
    ) -> tuple[BoolArray, FloatArray]:
        """Compare."""
        at = self.layers.index(layer)
        top_prob, gap = features.T
        return (top_prob >= self.top_prob[at]) & (gap >= self.gap[at]), seen

    def tensors(self) -> dict[str, NDArray[np.float64]]:
        """Return ``top_prob`` and ``gap``."""
        return {"top_prob": self.top_prob, "gap": self.gap}


@dataclass(frozen=True)
class Svm(ExitRule):
    """A support vector machine per layer, by its own support vectors; settled where it is >= 0.

    Attributes:
        mean: ``[layers, 2]``, and ``scale``: features are brought to ``(x - mean) / scale``.
        scale: see ``mean``.
        bias: ``[layers]``.
        vectors: of each layer ``[its vectors, 2]``, already standardised.
        dual: of each layer ``[its vectors]``, the dual coefficients with their labels' signs.
        gamma: ``[layers]`` of the kernel ``exp(-gamma |x - s|^2)``; None: linear.

    """

    mean: FloatArray
    scale: FloatArray
    bias: FloatArray
    vectors: tuple[FloatArray, ...]
    dual: tuple[FloatArray, ...]
    gamma: FloatArray | None = None

    def settled(
        self, layer: int, features: FloatArray, seen: FloatArray
    ) -> tuple[BoolArray, FloatArray]:
        """Take the sign of the decision function."""
        return self.decision(layer, features) >= 0, seen

    def decision(self, layer: int, features: FloatArray) -> FloatArray:
        """Return ``[tokens]`` sum_i dual_i k(x, s_i) + bias."""
        at = self.layers.index(layer)
        points = (features - self.mean[at]) / self.scale[at]
        vectors = self.vectors[at]
        if self.gamma is None:
            kernel = points @ vectors.T
        else:
            distances = ((points[:, None, :] - vectors) ** 2).sum(axis=2)
            kernel = np.exp(-self.gamma[at] * distances)
        decision: FloatArray = kernel @ self.dual[at] + self.bias[at]
        return decision

    def tensors(self) -> dict[str, NDArray[np.float64]]:
        """Return one tensor for all layers, but support vectors layer by layer."""
        tensors = {"mean": self.mean, "scale": self.scale, "bias": self.bias}
        for layer, vectors, dual in zip(self.layers, self.vectors, self.dual, strict=True):
            tensors |= {f"vectors.{layer}": vectors, f"dual.{layer}": dual}
        return tensors if self.gamma is None else {**tensors, "gamma": self.gamma}


@dataclass(frozen=True)
class Crf(ExitRule):
    """A linear chain over the check layers with two labels, 1 for settled.

    Decided by P(label of this layer is 1 | features of the layers so far) >= 0.5, for which the
    forward messages are all that must be remembered. What comes first in the chain matters, so it
    is checked at the layers it was fitted at and at no others.

    Attributes:
        unary: ``[layers, 2, 3]`` of each label the weights of top_prob, gap and 1.
        transition: ``[2, 2]`` from the label below to the label here.

    """

    unary: FloatArray
    transition: FloatArray

    def settled(
        self, layer: int, features: FloatArray, seen: FloatArray
    ) -> tuple[BoolArray, FloatArray]:
        """Pass the messages on by one layer."""
        at = self.layers.index(layer)
        scores = features @ self.unary[at, :, :2].T + self.unary[at, :, 2]
        if at:
            scores = scores + np.logaddexp.reduce(seen[:, :, None] + self.transition, axis=1)
        scores = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
        return scores[:, 1] >= scores[:, 0], scores

    def tensors(self) -> dict[str, NDArray[np.float64]]:
        """Return ``unary`` and ``transition``."""
        return {"unary": self.unary, "transition": self.transition}
