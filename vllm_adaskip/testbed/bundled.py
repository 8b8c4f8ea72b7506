# SPDX-License-Identifier: Apache-2.0
"""Where the bundled trained model lies."""

from __future__ import annotations

from pathlib import Path


def bundled_model() -> str:
    """Give the path of the bundled model, for `vllm serve`, `LLM` and transformers.

    Raises:
        FileNotFoundError: its weights are not there (a checkout without them).

    """
    path = Path(__file__).parent / "model"
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the bundled model's weights are missing in {path}; "
            "train them with: python -m vllm_adaskip.testbed.train --out <that directory>"
        )
    return str(path)
