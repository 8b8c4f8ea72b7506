# SPDX-License-Identifier: Apache-2.0
"""Where the bundled trained model lies, and the profiles that were fitted to it."""

from __future__ import annotations

from pathlib import Path

_TESTBED = Path(__file__).parent / "lab" / "testbed"


def bundled_model() -> str:
    """Return the path of the bundled model, for `vllm serve`, `LLM` and transformers.

    Raises:
        FileNotFoundError: its weights are not there (a checkout without them).

    """
    path = _TESTBED / "model"
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the bundled model's weights are missing in {path}; "
            "train them with: python -m vllm_adaskip.lab.testbed.train --out <that directory>"
        )
    return str(path)


def bundled_profile(method: str) -> str:
    """Return the path of the ready profile of a method for the bundled model.

    Raises:
        ValueError: there is none for this method.

    """
    folder = _TESTBED / "profiles"
    ready = sorted(one.name for one in folder.iterdir() if one.is_dir())
    if method not in ready:
        raise ValueError(f"no bundled profile for {method!r:.80}; there are: {', '.join(ready)}")
    return str(folder / method)
