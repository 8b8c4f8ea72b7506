# SPDX-License-Identifier: Apache-2.0
"""What method ``ffn-skip`` costs and saves while it decodes, token by token.

First what the gate takes, timed inside the forward: a share of the same step, so a busy machine
hardly matters. With a threshold that nothing reaches every token is measured at every layer of the
middle, the most it can cost; with one that everything reaches, once. Then times of decode steps
against dense ones, round by round. On the bundled model, and at the shape of Llama-3.2-1B with
random weights.

    python benchmarks/ffn_skip.py --rounds 15    # a third of them for the large one
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from reading_prompts import spread
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_adaskip.lab.bench.engines import alone

alone()  # before torch is loaded, which reads the number of threads then

BATCHES = (1, 16, 64)
NEVER, ALWAYS = 2.0, -1.0
#: Of the gate, all that it adds to a step.
PARTS = ("begin", "after", "count")
#: name -> threshold, and the arguments of every second request; the others have none.
VARIANTS: dict[str, tuple[float, dict[str, str] | None]] = {
    "measured, nothing left out": (NEVER, None),
    "all that may be": (ALWAYS, None),
    "so for every second sequence": (ALWAYS, {"adaskip": "off"}),
}


def main(rounds: Annotated[int, typer.Option(min=3)] = 15) -> None:
    """Time the gate on the bundled model and on a larger shape."""
    from vllm_adaskip import bundled_model
    from vllm_adaskip.lab.bench.shapes import Shape

    costs = Table(
        "model", "batch", "a decode step", "measured everywhere", "measured once",
        title="the gate's share of a decode step (medians, quartiles)",
    )  # fmt: skip
    times = Table(
        "model", "batch", *VARIANTS, title="time of a decode step against dense (the same)"
    )
    with TemporaryDirectory() as folder:
        for model, name, tokens, turns in (
            (bundled_model(), "bundled", 48, rounds),
            (
                Shape.of("llama-3.2-1b").write(Path(folder)),
                "Llama-3.2-1B's shape",
                3,
                max(3, rounds // 3),
            ),
        ):
            engines = {threshold: make(model, threshold) for threshold in (NEVER, ALWAYS)}
            for batch in BATCHES:
                taken = [taken_in(engines, batch, tokens) for _ in rounds_of(turns, name, batch)]
                step = statistics.median(one["dense"] for one in taken[1:])
                shares = (
                    [spent_in(engines[threshold], batch, tokens) for _ in range(turns)]
                    for threshold in (NEVER, ALWAYS)
                )
                costs.add_row(name, str(batch), f"{step * 1e3:.2f} ms", *map(spread, shares))
                ratios = ([one[key] / one["dense"] for one in taken[1:]] for key in VARIANTS)
                times.add_row(name, str(batch), *map(spread, ratios))
            for llm in engines.values():
                llm.llm_engine.engine_core.shutdown()
    Console().print(costs, times)


def rounds_of(rounds: int, name: str, batch: int) -> Iterator[int]:
    """Return the rounds; the first warms up."""
    yield from track(range(rounds + 1), f"{name}, batch {batch}")


def make(model: str, threshold: float) -> Any:
    """Start an engine whose tokens are gated from the first one on."""
    from vllm import LLM

    from vllm_adaskip import engine_args

    return LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=64,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        **engine_args(method="ffn-skip", scope="token", threshold=threshold, warm_up=0),
    )


def taken_in(engines: dict[float, Any], batch: int, tokens: int) -> dict[str, float]:
    """Return the seconds of a decode step of dense and of each variant, one after the other."""
    off = {"adaskip": "off"}
    taken = {"dense": decode(engines[NEVER], [off] * batch, tokens)}
    for name, (threshold, other) in VARIANTS.items():
        arguments = [other if one % 2 else None for one in range(batch)]
        taken[name] = decode(engines[threshold], arguments, tokens)
    return taken


def decode(llm: Any, arguments: list[dict[str, str] | None], tokens: int) -> float:
    """Return the seconds of one decode step of one batch."""
    long, short = (generate(llm, arguments, length) for length in (1 + tokens, 1))
    return (long - short) / tokens


def generate(llm: Any, arguments: list[dict[str, str] | None], tokens: int) -> float:
    """Return the seconds of one batch, every sequence giving the same number of tokens."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [7 + one % 5] * 8} for one in range(len(arguments))]
    params = [
        SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=one
        )
        for one in arguments
    ]
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


def spent_in(llm: Any, batch: int, tokens: int) -> float:
    """Return the gate's share of the steps of one batch, of which the first reads the prompts."""
    spent = [0.0]
    llm.apply_model(lambda model: watch(model.adaskip.gate, spent))
    whole = decode(llm, [None] * batch, tokens) * tokens
    llm.apply_model(lambda model: unwatch(model.adaskip.gate))
    return spent[0] / whole


def watch(gate: Any, spent: list[float]) -> None:
    """Have the parts of a gate add up what they take."""

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            start = time.perf_counter()
            result = call(*args)
            spent[0] += time.perf_counter() - start
            return result

        return wrapper

    for part in PARTS:
        setattr(gate, part, timed(getattr(gate, part)))


def unwatch(gate: Any) -> None:
    """Let the parts of a gate be what they were."""
    for part in PARTS:
        delattr(gate, part)


if __name__ == "__main__":
    typer.run(main)
