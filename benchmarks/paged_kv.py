# SPDX-License-Identifier: Apache-2.0
"""What `kv_fill` costs against a full layer.

Engines live in one process and take turns, round by round, so that drift of the machine
falls on all. One batch decodes under one plan; what a strategy adds to the step, for each layer
it fills, is set against the time of a layer that runs.

    python benchmarks/paged_kv.py --rounds 15
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_adaskip.lab.bench.engines import alone

alone()  # before torch is loaded, which reads the number of threads then

#: Layers that all sequences leave out, of the bundled model's 12.
SKIP = [3, 4, 5, 6, 7, 8]
BATCHES = (1, 16, 64)
DECODED = 48


def main(rounds: Annotated[int, typer.Option(min=3)] = 15) -> None:
    """Time fills on the bundled model."""
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
    """Return the seconds of one decode step of one batch, all under one plan."""
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


def spread(values: list[float]) -> str:
    """Return median and quartiles in per cent."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.1%} ({low:.1%} to {high:.1%})"


if __name__ == "__main__":
    typer.run(main)
