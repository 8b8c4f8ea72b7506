# SPDX-License-Identifier: Apache-2.0
"""Engines in this process that take turns, and one batch in one of them."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from vllm_adaskip.classifiers import SkipPlan
from vllm_adaskip.lab.bench.shapes import RANK, adapters_beside

#: Of each request, its ``extra_args``.
Arguments = Sequence[Mapping[str, Any] | None]

_numbers = count()


def alone(kv_space: int = 1) -> None:
    """Set the environment of such engines: this process, one thread, so that steps repeat.

    Args:
        kv_space: GiB of KV cache for each of them.

    """
    if "torch" in sys.modules:
        raise RuntimeError("torch is loaded already, with as many threads as it found then")
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE=str(kv_space),
        VLLM_LOGGING_LEVEL="ERROR",
        OMP_NUM_THREADS="1",
    )


@contextmanager
def engine(model: str, *, plugin: Mapping[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """Start an engine with made-up weights, compiled as vLLM is by default.

    Args:
        model: folder of its config; with adapters beside it they are enabled.
        plugin: with ours and these options of it; None: stock vLLM.
        options: vLLM's, which go before what all these engines have.

    """
    from vllm import LLM

    from vllm_adaskip import engine_args
    from vllm_adaskip.engine.compat import enable_amx

    enable_amx()
    common: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "max_num_seqs": 128,
        "max_num_batched_tokens": 8192,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "uni",
    }
    if count := len(adapters_beside(model)):
        common |= {"enable_lora": True, "max_loras": count + 1, "max_lora_rank": RANK}
    llm = LLM(model, **{**common, **options}, **({} if plugin is None else engine_args(**plugin)))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


class Batch:
    """Requests that one engine works on; every step of it is timed by itself.

    Prompts are `prompt` tokens long, all different, and never come again, so that no plan is
    remembered from an earlier batch; with ``again`` they are the same in every batch, so that
    the prefix cache has them. Each of the adapters beside the model, of which there are ``n``,
    is taken by ``n`` requests one after the other, so that it meets plans that are dealt in turn.
    """

    def __init__(
        self,
        llm: Any,
        arguments: Arguments,
        *,
        prompt: int = 8,
        tokens: int = 64,
        again: bool = False,
    ) -> None:
        from vllm import SamplingParams

        self._engine = llm.llm_engine
        vocabulary = self._engine.model_config.get_vocab_size()
        adapters = _adapters(self._engine.model_config.model)
        self._ids = [f"bench-{next(_numbers)}" for _ in arguments]
        for place, (one, extra_args) in enumerate(zip(self._ids, arguments, strict=True)):
            number = place if again else int(one.removeprefix("bench-"))
            params = SamplingParams(
                temperature=0,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args=None if extra_args is None else dict(extra_args),
            )
            ids = random.Random(number).choices(range(vocabulary - 8), k=prompt)
            adapter = adapters[place // len(adapters) % len(adapters)] if adapters else None
            self._engine.add_request(one, {"prompt_token_ids": ids}, params, lora_request=adapter)

    def prefill(self) -> float:
        """Run steps until every request has its first token; give their seconds."""
        waiting, taken = set(self._ids), 0.0
        while waiting:
            start = time.perf_counter()
            outputs = self._engine.step()
            taken += time.perf_counter() - start
            waiting -= {output.request_id for output in outputs}
        return taken

    def step(self) -> float:
        """Run one step; give its seconds."""
        start = time.perf_counter()
        self._engine.step()
        return time.perf_counter() - start

    def end(self) -> None:
        """Drop the requests, so that the next batch has the engine to itself."""
        self._engine.abort_request(self._ids, internal=True)
        while self._engine.has_unfinished_requests():
            self._engine.step()


def _adapters(model: str) -> list[Any]:
    """Return the adapters beside a model as requests name them."""
    from vllm.lora.request import LoRARequest

    folders = adapters_beside(model)
    return [LoRARequest(str(at), at, folder) for at, folder in enumerate(folders, start=1)]


def following(plans: Sequence[SkipPlan]) -> Arguments:
    """Return arguments that name the plans."""
    return [{"adaskip_skip": plan.entries()} for plan in plans]


def decode(
    llm: Any, arguments: Arguments, steps: int, *, prompt: int = 8, again: bool = False
) -> list[float]:
    """Return the seconds of so many decode steps of a batch, after one that warms up."""
    batch = Batch(llm, arguments, prompt=prompt, tokens=steps + 3, again=again)
    batch.prefill()
    batch.step()
    taken = [batch.step() for _ in range(steps)]
    batch.end()
    return taken


def first_tokens(llm: Any, arguments: Arguments, tokens: int) -> float:
    """Return the seconds until all requests of a batch, prompts so long, have their first token."""
    batch = Batch(llm, arguments, prompt=tokens, tokens=1)
    seconds = batch.prefill()
    batch.end()
    return seconds


def whole_answers(llm: Any, arguments: Arguments, prompt: int, tokens: int) -> float:
    """Return the seconds until all requests of a batch, prompts so long, have all their tokens."""
    batch, taken = Batch(llm, arguments, prompt=prompt, tokens=tokens), 0.0
    while llm.llm_engine.has_unfinished_requests():
        taken += batch.step()
    return taken


def untrained_first(folder: Path, model: str, width: int = 0) -> str:
    """Write a profile for the model in a folder, with routers of so many hidden units."""
    from transformers import AutoConfig

    from vllm_adaskip.classifiers.first.routers import Routers
    from vllm_adaskip.classifiers.profile import Profile, fingerprint

    config = AutoConfig.from_pretrained(model).to_dict()
    profile = Profile(method="first", model=model, fingerprint=fingerprint(config))
    profile.save(folder)
    Routers(config["num_hidden_layers"], config["hidden_size"], width).save(folder)
    return str(folder)
