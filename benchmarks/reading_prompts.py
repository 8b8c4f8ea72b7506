# SPDX-License-Identifier: Apache-2.0
"""What methods that read prompts cost at prefill, timed inside the forward.

Shares of the same prefill, so a busy machine hardly matters. The bundled model is so narrow
that a pass over its residual stream weighs much; so also at the shape of Llama-3.2-1B, with
random weights.

    python benchmarks/reading_prompts.py --rounds 15
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_adaskip.lab.bench.engines import alone

alone()  # before torch is loaded, which reads the number of threads then

TOKENS = 240


def main(
    rounds: Annotated[int, typer.Option(min=3)] = 15,
    large: Annotated[bool, typer.Option(help="Also time Llama-3.2-1B's shape.")] = True,
) -> None:
    """Time methods that read prompts on the bundled model and on a larger shape."""
    from vllm_adaskip import bundled_model
    from vllm_adaskip.lab.bench.engines import untrained_first
    from vllm_adaskip.lab.bench.shapes import Shape

    table = Table(
        "model", "prompts", "method", "statistics and decisions", "the method's own observing",
        title=f"share of prefill, prompts of {TOKENS} tokens (medians, quartiles)",
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        models = [(bundled_model(), "bundled, hidden size 192", 16)]
        if large:
            shape = Shape.of("llama-3.2-1b").write(Path(folder) / "model")
            models.append((shape, "Llama-3.2-1B's shape, 2048", 1))
        for model, name, prompts in models:
            for method, options in (
                ("adaskip", {"method": "adaskip"}),
                ("ffn-skip", {"method": "ffn-skip"}),
                ("first, linear", {"profile": untrained_first(Path(folder) / "linear", model)}),
                (
                    "first, 16 units",
                    {"profile": untrained_first(Path(folder) / "units", model, 16)},
                ),
            ):
                spent = shares(model, options, prompts, rounds)
                table.add_row(name, str(prompts), method, *map(spread, spent.values()))
    Console().print(table)


def shares(
    model: str, options: dict[str, Any], prompts: int, rounds: int
) -> dict[str, list[float]]:
    """Return, for each part of reading prompts, its share of the prefill in each round."""
    from vllm import LLM, SamplingParams

    from vllm_adaskip import engine_args

    llm = LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=512,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        **engine_args(max_compute=0.75, **options),
    )
    spent: dict[str, float] = {}
    llm.apply_model(lambda model: watch(model.adaskip.reader, spent))
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    found: dict[str, list[float]] = {"table": [], "observe": []}
    for round_ in track(range(rounds + 1), "prefill"):
        # Other prompts each time: a plan that is remembered would not be decided again.
        asked = [
            {"prompt_token_ids": [round_ % 400, one, *[9] * (TOKENS - 2)]} for one in range(prompts)
        ]
        spent.clear()
        start = time.perf_counter()
        llm.generate(asked, params, use_tqdm=False)
        whole = time.perf_counter() - start
        for part, values in found.items():
            if round_:  # the first warms up
                values.append(spent[part] / whole)
    llm.llm_engine.engine_core.shutdown()
    return found


def watch(reader: Any, spent: dict[str, float]) -> None:
    """Have the parts of reading add up what they take."""

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            start = time.perf_counter()
            result = call(*args)
            spent[part] = spent.get(part, 0.0) + time.perf_counter() - start
            return result

        return wrapper

    reader.begin = timed("table", reader.begin)
    reader.finish = timed("table", reader.finish)
    reader.observe = timed("observe", reader.observe)


def spread(values: list[float]) -> str:
    """Return median and quartiles in per cent."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.1%} ({low:.1%} to {high:.1%})"


if __name__ == "__main__":
    typer.run(main)
