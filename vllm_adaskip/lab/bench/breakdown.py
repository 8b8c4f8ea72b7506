# SPDX-License-Identifier: Apache-2.0
"""Where the time of a step goes, part by part, on the host's clock.

On the CPU that is all time there is. Parts are timed from outside, by wrapping what runs them while
the breakdown is made, so that the engine itself holds no clocks.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from vllm_adaskip.engine.v1 import V1Feeder
from vllm_adaskip.engine.window import Window
from vllm_adaskip.lab.bench.engines import Arguments, Batch

#: What a plan adds to a step, beside the sub-layers that it runs.
ADDED = ("table update", "step plan", "metadata", "gather and scatter", "fill", "loop")
#: All parts, in the order of a step.
PARTS = (*ADDED[:2], "attention", "MLP", *ADDED[2:], "rest of vLLM")


class Stopwatch:
    """Adds up the seconds of each part, without those of parts inside it."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._inside = [0.0]

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same and adds its time to a part."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                whole = time.perf_counter() - start
                self.spent[part] += whole - self._inside.pop()
                self._inside[-1] += whole

        return wrapper

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Time the parts of every step of the engine with this model of ours."""
        runtime = model.adaskip
        parts = (
            (V1Feeder, "update_state", "table update"),
            (runtime, "begin", "step plan"),
            (runtime, "end", "loop"),
            (runtime, "running", "metadata"),
            (Window, "show", "gather and scatter"),
            (runtime.fill, "begin", "fill"),
            (runtime.fill, "pass_by", "fill"),
            (runtime.fill, "finish", "fill"),
            (model, "run_attention", "attention"),
            (model, "run_mlp", "MLP"),
            (model, "project_kv", "fill"),
            (model, "_run_sub_layers", "loop"),
        )
        with ExitStack() as stack:
            for owner, name, part in parts:
                timed = self.timed(part, getattr(owner, name))
                stack.enter_context(patch.object(owner, name, timed))
            yield


def breakdown(llm: Any, arguments: Arguments, steps: int) -> dict[str, float]:
    """Return the seconds of each part of a decode step, mean over so many."""
    batch = Batch(llm, arguments, tokens=steps + 3)
    batch.prefill()
    batch.step()
    watch = Stopwatch()

    def watched(model: Any) -> float:
        with watch.watching(model):
            return sum(batch.step() for _ in range(steps))

    (whole,) = llm.apply_model(watched)
    batch.end()
    spent = {part: watch.spent[part] / steps for part in PARTS}
    spent["rest of vLLM"] = whole / steps - sum(spent.values())
    return spent


def host_share(parts: dict[str, float]) -> float:
    """Return the share of a step that goes into arranging it, beside moving rows, filling K/V."""
    arranging = [part for part in ADDED if part not in ("gather and scatter", "fill")]
    return sum(parts[part] for part in arranging) / sum(parts.values())
