# SPDX-License-Identifier: Apache-2.0
"""What `kv_fill` costs against a full layer, and what reading prompts costs at prefill.

Engines live in one process and take turns, round by round, so that drift of the machine
falls on all. First table: one batch decodes under one plan; what a strategy adds to the step,
for each layer it fills, is set against the time of a layer that runs. Second table: one
batch of prompts; the parts of reading them are timed inside the forward.

    python benchmarks/paged_kv.py --rounds 15
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    OMP_NUM_THREADS="1",
)

#: Layers that everybody leaves out, of the bundled model's 12.
SKIP = [3, 4, 5, 6, 7, 8]
BATCHES = (1, 16, 64)
DECODED = 48


def main(rounds: Annotated[int, typer.Option(min=3)] = 15) -> None:
    """Time fills and prompt statistics on the bundled model."""
    from vllm import LLM

    from vllm_adaskip import bundled_model, engine_args

    common: dict[str, Any] = {
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 4096,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "uni",
    }

    def make(**options: Any) -> Any:
        return LLM(bundled_model(), **common, **engine_args(**options))

    fills = {fill: make(kv_fill=fill) for fill in ("none", "copy", "project")}
    Console().print(fill_table(fills, rounds))
    Console().print(prompt_table(make(method="similarity", budget=0.75), rounds))


def fill_table(engines: dict[str, Any], rounds: int) -> Table:
    """Decode times under one plan, by strategy, and dense."""
    table = Table(
        "batch", "a full layer", "copy, of a layer", "project, of a layer",
        title="what filling one layer costs (medians, quartiles)",
    )  # fmt: skip
    for batch in BATCHES:
        layer: list[float] = []
        share: dict[str, list[float]] = {"copy": [], "project": []}
        for round_ in track(range(rounds + 1), f"batch {batch}"):
            order = list(engines) if round_ % 2 else list(reversed(engines))
            step = {name: decode(engines[name], batch, SKIP) for name in order}
            dense = decode(engines["none"], batch, [])
            if not round_:  # warms up
                continue
            layer.append((dense - step["none"]) / len(SKIP))
            for name, values in share.items():
                values.append((step[name] - step["none"]) / len(SKIP) / layer[-1])
        microseconds = statistics.median(layer) * 1e6
        cells = [spread(values) for values in share.values()]
        table.add_row(str(batch), f"{microseconds:.0f} us", *cells)
    return table


def decode(llm: Any, batch: int, skip: list[int]) -> float:
    """Give the seconds of one decode step of one batch, everybody under one plan."""
    from vllm import SamplingParams

    def run(tokens: int) -> float:
        params = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False,
            extra_args={"adaskip_skip": skip},
        )  # fmt: skip
        prompts = [{"prompt_token_ids": [7 + one % 5] * 8} for one in range(batch)]
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    return (run(1 + DECODED) - run(1)) / DECODED


def prompt_table(llm: Any, rounds: int) -> Table:
    """Time spent in parts of reading prompts, as shares of the whole prefill."""
    from vllm import SamplingParams

    spent: dict[str, float] = {}

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            start = time.perf_counter()
            result = call(*args)
            spent[part] = spent.get(part, 0.0) + time.perf_counter() - start
            return result

        return wrapper

    def watch(model: Any) -> None:
        observer = model.adaskip.observer
        observer.begin = timed("table", observer.begin)
        observer.finish = timed("table", observer.finish)
        observer.observe = timed("observe", observer.observe)

    llm.apply_model(watch)
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    shares: dict[str, list[float]] = {"table": [], "observe": []}
    for round_ in track(range(rounds + 1), "prefill"):
        # Other prompts each time: a plan that is remembered would not be decided again.
        prompts = [{"prompt_token_ids": [round_ % 400, one, *[9] * 238]} for one in range(16)]
        spent.clear()
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        whole = time.perf_counter() - start
        for part, values in shares.items():
            if round_:
                values.append(spent[part] / whole)
    table = Table(
        "statistics and decisions", "the method's own observing",
        title="share of prefill, 16 prompts of 240 tokens (medians, quartiles)",
    )  # fmt: skip
    table.add_row(*(spread(values) for values in shares.values()))
    return table


def spread(values: list[float]) -> str:
    """Give median and quartiles in per cent."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.1%} ({low:.1%} to {high:.1%})"


if __name__ == "__main__":
    typer.run(main)
