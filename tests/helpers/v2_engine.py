# SPDX-License-Identifier: Apache-2.0
"""Runs vLLM's own Model Runner V2 on the CPU: its Triton kernels in Triton's interpreter.

vLLM takes V2 for usable on a CPU where Triton has a backend named ``cpu``; the interpreter asks
nothing of it. Both must be so before vLLM is imported, hence a process of its own:
``python -m helpers.v2_engine < jobs.json``, a list of `run_job`'s keyword arguments; the last line
printed is the list of what it gave.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def run_job(
    model: str,
    engine: dict[str, Any],
    options: dict[str, Any],
    prompts: list[list[int]],
    extra_args: list[dict[str, Any] | None],
    max_tokens: int,
    graphs: bool = False,
) -> dict[str, Any]:
    """Run one batch, greedy, on an engine of its own with our ``options``.

    With ``graphs``, a tape takes the place of each CUDA graph.
    """
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError

    from helpers.tape import capture_on_tapes
    from vllm_adaskip import engine_args

    llm = LLM(
        model,
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        distributed_executor_backend="uni",
        disable_log_stats=False,
        **{"kv_cache_memory_bytes": 64 << 20, "max_model_len": 256, **engine},
        **engine_args(**options),
    )
    if graphs:
        llm.collective_rpc(capture_on_tapes)
    config = llm.llm_engine.vllm_config
    given: dict[str, Any] = {
        "is_v2": config.use_v2_model_runner,
        "refused": [],
        "tokens": {},
    }
    core = llm.llm_engine
    for index, (prompt, args) in enumerate(zip(prompts, extra_args, strict=True)):
        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            detokenize=False,
            ignore_eos=True,
            extra_args=args,
        )
        try:
            core.add_request(str(index), {"prompt_token_ids": prompt}, params)
        except VLLMValidationError as error:
            given["refused"].append([index, str(error)])
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                given["tokens"][output.request_id] = list(output.outputs[0].token_ids)
    metrics = {one.name: one.value for one in llm.get_metrics() if hasattr(one, "value")}
    given["preemptions"] = metrics["vllm:num_preemptions"]
    given["report"] = llm.collective_rpc("adaskip_report")[0]
    requests = [
        (extra_args[int(index)], prompts[int(index)]) for index in sorted(given["tokens"], key=int)
    ]
    given["plans"] = llm.collective_rpc("adaskip_plans", args=(requests,))[0]
    core.engine_core.shutdown()
    return given


def main() -> None:
    """Pretend that Triton has a CPU backend, then run the jobs."""
    import triton.backends

    class Driver:
        is_active = staticmethod(lambda: True)

    triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=Driver)
    print("\n" + json.dumps([run_job(**job) for job in json.load(sys.stdin)]))


if __name__ == "__main__":
    os.environ.update(
        TRITON_INTERPRET="1",
        VLLM_USE_V2_MODEL_RUNNER="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
    )
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    main()
