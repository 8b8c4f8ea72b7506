# SPDX-License-Identifier: Apache-2.0
"""Open-loop load on a server that runs already: Poisson arrivals at several rates, by variant.

Requests are sent and timed by ``vllm bench serve``. How many layers ran stands in the server's
own report.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

#: Of the server's report.
_COUNTED = ("decode_tokens", "prompt_tokens", "shortened_tokens")
#: Requests that are sent before the first rate, and not counted.
WARM_UP = 8


@dataclass(frozen=True)
class Objective:
    """What a request must keep to count as good: milliseconds to its first token, and a token."""

    first_token: float
    per_token: float


@dataclass(frozen=True)
class Asked:
    """What is sent.

    Attributes:
        url: of the server.
        model: by its name there.
        tokenizer: folder or hub id.
        prompts: file of JSON lines, each with a ``prompt``.
        tokens: of each answer.
        seconds: for which requests arrive, at each rate.
        objective: see there.

    """

    url: str
    model: str
    tokenizer: str
    prompts: Path
    tokens: int
    seconds: float
    objective: Objective


@dataclass(frozen=True)
class Point:
    """What a variant gave at a rate.

    Attributes:
        rate: requests a second that arrived, in the mean.
        good: requests a second that kept the objective.
        served: requests a second that were answered.
        failed: requests that were not.
        first_token: milliseconds, 50th, 95th and 99th percentile.
        per_token: the same of the time a token after the first.
        ran: share of the sub-layers that generated tokens ran.
        shortened: share of the prompts' tokens that ran under a prompt plan.
        levels: sequences that entered at each level of load.

    """

    variant: str
    rate: float
    good: float
    served: float
    failed: int
    first_token: tuple[float, float, float]
    per_token: tuple[float, float, float]
    ran: float
    shortened: float
    levels: list[int]


def measure(
    asked: Asked,
    variants: Mapping[str, Mapping[str, Any] | None],
    rates: Sequence[float],
    folder: Path,
    done: Callable[[], None],
) -> list[Point]:
    """Send every variant at each rate, in turn; what ``vllm bench serve`` said is kept.

    Args:
        asked: what is sent.
        variants: of each, the requests' ``vllm_xargs``.
        rates: requests a second.
        folder: for its files, one a variant and rate.
        done: is called after each.

    Raises:
        ValueError: it fails, or the server has no report.

    """
    _send(asked, next(iter(variants.values())), WARM_UP / asked.seconds, folder / "warm-up.json")
    found = []
    for turn, rate in enumerate(rates):
        order = [*variants.items()]
        for name, arguments in order if turn % 2 else reversed(order):
            before = _report(asked.url)
            file = folder / f"{name}-{rate:g}.json"
            said = _send(asked, arguments, rate, file)
            found.append(_point(name, rate, said, before, _report(asked.url)))
            done()
    return found


def _send(
    asked: Asked, arguments: Mapping[str, Any] | None, rate: float, file: Path
) -> dict[str, Any]:
    """Send requests at a rate; return what ``vllm bench serve`` measured."""
    objective = asked.objective
    command: list[str] = [
        str(Path(sys.executable).with_name("vllm")), "bench", "serve",
        "--backend", "openai", "--base-url", asked.url, "--endpoint", "/v1/completions",
        "--model", asked.model, "--tokenizer", asked.tokenizer,
        "--dataset-name", "custom", "--dataset-path", str(asked.prompts), "--skip-chat-template",
        "--custom-output-len", str(asked.tokens), "--ignore-eos", "--temperature", "0",
        "--num-prompts", str(max(1, round(rate * asked.seconds))),
        "--request-rate", f"{rate:g}", "--seed", "0", "--disable-tqdm",
        "--goodput", f"ttft:{objective.first_token:g}", f"tpot:{objective.per_token:g}",
        "--save-result", "--save-detailed", "--result-filename", str(file),
    ]  # fmt: skip
    if arguments is not None:
        command += ["--extra-body", json.dumps({"vllm_xargs": arguments})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not file.exists():
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"vllm bench serve failed: {last:.500}")
    said: dict[str, Any] = json.loads(file.read_text())
    return said


def _report(url: str) -> dict[str, Any]:
    try:
        answer = httpx.get(f"{url}/adaskip/report", timeout=30)
        answer.raise_for_status()
        report: dict[str, Any] = answer.json()[0]
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise ValueError(f"{url!r} has no report of this plugin: {error}") from None
    return report


def _point(
    variant: str,
    rate: float,
    said: Mapping[str, Any],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> Point:
    grown = {key: after[key] - before[key] for key in _COUNTED}
    tokens = grown["decode_tokens"]
    ran = sum(sum(after[key]) - sum(before[key]) for key in ("attn_run", "mlp_run"))
    entered = (each.get("busy", {}).get("entered", []) for each in (after, before))
    times = [
        (first, sum(gaps) / len(gaps))
        for first, gaps in zip(said["ttfts"], said["itls"], strict=True)
        if gaps
    ]
    first_token, per_token = (
        tuple(float(1e3 * at) for at in np.percentile(values, [50, 95, 99]))
        for values in zip(*times, strict=True)
    )
    return Point(
        variant,
        rate,
        float(said["request_goodput"]),
        float(said["request_throughput"]),
        int(said["failed"]),
        first_token,  # type: ignore[arg-type]
        per_token,  # type: ignore[arg-type]
        ran / (2 * after["num_layers"] * tokens) if tokens else 1.0,
        grown["shortened_tokens"] / max(1, grown["prompt_tokens"]),
        [late - early for late, early in zip(*entered, strict=True)],
    )


def draw(found: Sequence[Point], objective: Objective, path: Path) -> None:
    """Draw, by the rate that was offered, what was answered in time, how late, and what ran."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    parts: list[tuple[str, Callable[[Point], float]]] = [
        ("answered within the objective, requests/s", lambda one: one.good),
        ("first token, 95th percentile, ms", lambda one: one.first_token[1]),
        ("sub-layers that generated tokens ran", lambda one: one.ran)
        if all(one.shortened == 0 for one in found)
        else ("prompt tokens that ran under a plan", lambda one: one.shortened),
    ]
    for axes, (what, value) in zip(panels, parts, strict=True):
        for variant in dict.fromkeys(one.variant for one in found):
            own = [one for one in found if one.variant == variant]
            axes.plot([one.rate for one in own], [value(one) for one in own], "o-", label=variant)
        axes.set(xlabel="offered, requests/s", title=what)
        axes.spines[["top", "right"]].set_visible(False)
    rates = [one.rate for one in found]
    panels[0].plot([0, max(rates)], [0, max(rates)], ":", color="0.6", label="all of them")
    panels[0].legend(frameon=False)
    panels[1].set_yscale("log")
    panels[1].axhline(objective.first_token, color="0.4", linestyle="--", linewidth=1)
    panels[2].set_ylim(0, 1.05)
    figure.savefig(path, dpi=130)
