# SPDX-License-Identifier: Apache-2.0
"""Reads an exit rule out of a profile, which is hostile input: each tensor is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_adaskip.classifiers.adainfer.rules import FILE, Crf, ExitRule, FloatArray, Svm, Threshold
from vllm_adaskip.classifiers.profile import ProfileError


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
