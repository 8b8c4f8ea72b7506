# SPDX-License-Identifier: Apache-2.0
"""Times a server that runs already, over HTTP, variant by variant in turn."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

#: Of each request of a batch, its ``vllm_xargs``.
Arguments = Sequence[dict[str, Any] | None]


@dataclass(frozen=True)
class Load:
    """What each request asks: tokens of prompt, and of its answer."""

    prompt: int
    tokens: int


@dataclass(frozen=True)
class Served:
    """One batch of requests, sent together.

    Attributes:
        throughput: generated tokens per second, all together.
        first_token: median seconds to a request's first token.
        per_token: median seconds from token to token after that.

    """

    throughput: float
    first_token: float
    per_token: float


class Server:
    """A server's completions; words of its prompts are numbers, which every vocabulary has."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.model = self._model()
        self._turn = 0

    def _model(self) -> str:
        try:
            answer = httpx.get(f"{self.url}/v1/models", timeout=10)
            answer.raise_for_status()
            name: str = answer.json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise ValueError(f"{self.url!r} does not answer as a vLLM server: {error}") from None
        return name

    def serve(self, load: Load, arguments: Arguments) -> Served:
        """Send a batch, prompts that were never sent before, and wait for all."""
        self._turn += 1
        return asyncio.run(self._all(load, arguments))

    async def _all(self, load: Load, arguments: Arguments) -> Served:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=600, limits=limits) as client:
            start = time.perf_counter()
            sent = [self._one(client, load, n, one) for n, one in enumerate(arguments)]
            times = await asyncio.gather(*sent)
            whole = time.perf_counter() - start
        return Served(
            load.tokens * len(times) / whole,
            statistics.median(first - start for first, _ in times),
            statistics.median((last - first) / (load.tokens - 1) for first, last in times),
        )

    async def _one(
        self, client: httpx.AsyncClient, load: Load, number: int, xargs: dict[str, Any] | None
    ) -> tuple[float, float]:
        """Return the moments at which a request's first and last token arrived."""
        seed = 1000 * self._turn + number
        body = {
            "model": self.model,
            "prompt": [7 + (seed * 31 + place * 17) % 400 for place in range(load.prompt)],
            "max_tokens": load.tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "vllm_xargs": xargs,
        }
        moments, received = [], 0
        async with client.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                said = (await answer.aread()).decode(errors="replace")
                raise ValueError(f"the server refused {json.dumps(xargs)}: {said:.500}")
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                if "error" in (piece := json.loads(line.removeprefix("data: "))):
                    said = piece["error"]["message"]
                    raise ValueError(f"the server refused {json.dumps(xargs)}: {said:.500}")
                if piece["choices"]:
                    moments.append(time.perf_counter())
                elif usage := piece.get("usage"):  # the last piece
                    received = usage["completion_tokens"]
        if received != load.tokens:  # several may come in one piece, so pieces are not counted
            raise ValueError(f"the server sent {received} tokens where {load.tokens} were asked")
        return moments[0], moments[-1]


def compare(
    server: Server,
    load: Load,
    variants: dict[str, Arguments],
    rounds: int,
    done: Callable[[], None],
) -> dict[str, list[Served]]:
    """Send every variant once a round, forwards and backwards in turn; the first warms up."""
    found: dict[str, list[Served]] = {name: [] for name in variants}
    order = list(variants)
    for round_ in range(rounds + 1):
        order.reverse()
        for name in order:
            served = server.serve(load, variants[name])
            if round_:
                found[name].append(served)
            done()
    return found
