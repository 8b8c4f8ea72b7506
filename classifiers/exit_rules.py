# SPDX-License-Identifier: Apache-2.0
"""When an answer is settled: decision functions on what a check layer's prediction looks like.

Features are ``[tokens, 2]`` float64: ``top_prob``, the probability of the likeliest token, and
``gap``, its distance to that of the second. AdaInfer (arXiv 2403.02181) names the features and the
three kinds of classifier; kernel, scaling and the form of the CRF it leaves open. Pure NumPy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_adaskip.classifiers.profile import ProfileError

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
        """Give the parameters by the names under which a profile keeps them."""

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
        """Give ``top_prob`` and ``gap``."""
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
        """Give ``[tokens]`` sum_i dual_i k(x, s_i) + bias."""
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
        """Give one tensor for all layers, but support vectors layer by layer."""
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
        """Give ``unary`` and ``transition``."""
        return {"unary": self.unary, "transition": self.transition}


def load_rule(kind: str, folder: Path) -> ExitRule:
    """Read a profile's rule: ``threshold``, ``svm`` or ``crf``.

    Raises:
        ProfileError: no such file, a tensor that is missing, too many, of another shape, or not
            finite.

    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / FILE
    try:
        found: Mapping[str, NDArray[np.generic]] = load_file(path)
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise ProfileError(f"{path}: {error!r:.200}") from None
    return _Reader(path, found).rule(kind)


class _Reader:
    """Takes tensors out of a file one by one, and looks at each."""

    def __init__(self, path: Path, tensors: Mapping[str, NDArray[np.generic]]) -> None:
        self._path = path
        self._left = dict(tensors)

    def rule(self, kind: str) -> ExitRule:
        layers = self._layers()
        count = len(layers)
        rule: ExitRule
        if kind == "threshold":
            rule = Threshold(layers, self.take("top_prob", count), self.take("gap", count))
        elif kind == "crf":
            rule = Crf(layers, self.take("unary", count, 2, 3), self.take("transition", 2, 2))
        else:
            rule = Svm(
                layers,
                self.take("mean", count, 2),
                self._positive("scale", count, 2),
                self.take("bias", count),
                *self._vectors(layers),
                self._positive("gamma", count) if "gamma" in self._left else None,
            )
        if self._left:
            names = ", ".join(sorted(self._left))
            raise ProfileError(f"{self._path}: {names:.200}: unknown with classifier {kind!r}")
        return rule

    def take(self, name: str, *shape: int) -> FloatArray:
        """Take a tensor of this shape; -1 allows any length but 0."""
        if (tensor := self._left.pop(name, None)) is None:
            raise ProfileError(f"{self._path}: {name} is missing")
        fits = len(tensor.shape) == len(shape) and all(
            size == wanted or (wanted == -1 and size > 0)
            for size, wanted in zip(tensor.shape, shape, strict=True)
        )
        if not fits or tensor.dtype.kind not in "fi":
            raise ProfileError(
                f"{self._path}: {name} is {tensor.dtype} {tensor.shape}; allowed: numbers {shape}"
            )
        values = tensor.astype(np.float64)
        if not np.isfinite(values).all():
            raise ProfileError(f"{self._path}: {name} holds values that are not finite")
        return values

    def _positive(self, name: str, *shape: int) -> FloatArray:
        values = self.take(name, *shape)
        if not (values > 0).all():
            raise ProfileError(f"{self._path}: {name} holds values that are not positive")
        return values

    def _vectors(
        self, layers: tuple[int, ...]
    ) -> tuple[tuple[FloatArray, ...], tuple[FloatArray, ...]]:
        vectors = tuple(self.take(f"vectors.{layer}", -1, 2) for layer in layers)
        dual = tuple(
            self.take(f"dual.{layer}", len(own)) for layer, own in zip(layers, vectors, strict=True)
        )
        return vectors, dual

    def _layers(self) -> tuple[int, ...]:
        values = self.take("layers", -1)
        if (values != values.round()).any() or not (np.diff(values) > 0).all() or values[0] < 0:
            raise ProfileError(f"{self._path}: layers must be decoder layers in ascending order")
        return tuple(int(each) for each in values)
