# SPDX-License-Identifier: Apache-2.0
"""Keeps what was trained, in skops' format: nothing is pickled, and no server reads it."""

from __future__ import annotations

from pathlib import Path

FILE = "training.skops"


def write_artefact(trained: object, folder: Path) -> None:
    """Write objects of scikit-learn into a profile's folder."""
    from skops.io import dump

    dump(trained, folder / FILE)
