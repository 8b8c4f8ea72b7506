# SPDX-License-Identifier: Apache-2.0
"""Reads the commands out of the README and other pages, so that tests run what users read."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: As in a user's shell: `vllm`, `adaskip` and `python` of the environment that runs the
#: tests, and vLLM with processes of its own.
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"},
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "VLLM_LOGGING_LEVEL": "INFO",
}


def blocks(language: str, page: str = "README.md") -> list[str]:
    """Return a page's code blocks in one language, in order."""
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def block(start: str, page: str = "README.md") -> str:
    """Return the one block of shell commands that begins so."""
    (found,) = [text for text in blocks("bash", page) if text.startswith(start)]
    return found
