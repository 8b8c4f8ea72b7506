# SPDX-License-Identifier: Apache-2.0
"""Resident memory of an engine, each in a process of its own.

python -m vllm_adaskip.lab.bench.memory MODEL stock
"""

from __future__ import annotations

import json
import subprocess
import sys

from vllm_adaskip.lab.bench.engines import alone, decode, engine, following
from vllm_adaskip.lab.bench.plans import distinct

_BATCH = 64
_STEPS = 30


def resident(model: str, *, plugin: bool) -> int:
    """Return the bytes that a fresh process with an engine has resident after some decoding."""
    command = [sys.executable, "-m", __name__, model, "plugin" if plugin else "stock"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"no memory measured: {done.stderr[-2000:]}")
    return int(json.loads(done.stdout.splitlines()[-1])["resident"])


def _main(model: str, which: str) -> None:
    import psutil

    alone()
    # Eager: what a compiler needs while it works is not what stays.
    plugin: dict[str, str] | None = {} if which == "plugin" else None
    with engine(model, plugin=plugin, enforce_eager=True) as llm:
        layers = llm.llm_engine.model_config.hf_config.num_hidden_layers
        plans = following(distinct(layers, _BATCH)) if which == "plugin" else [None] * _BATCH
        decode(llm, plans, _STEPS)
        print(json.dumps({"resident": psutil.Process().memory_info().rss}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
