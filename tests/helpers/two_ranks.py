# SPDX-License-Identifier: Apache-2.0
"""Batches on two tensor-parallel ranks, all in one process of its own, as that takes long to start.

There vLLM's CPU backend binds each rank to a core.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCRIPT = """
import json, sys
from helpers.batches import decisions, sampling
from vllm import LLM
from vllm.lora.request import LoRARequest
from vllm_adaskip import engine_args

def run(job):
    llm = LLM(job["model"], skip_tokenizer_init=True, enforce_eager=True, max_model_len=256,
              tensor_parallel_size=2, block_size=32, max_num_batched_tokens=48, max_num_seqs=16,
              kv_cache_memory_bytes=64 << 20, **job["engine"], **engine_args(**job["options"]))
    names = job.get("adapters")
    adapters = names and [name and LoRARequest(name, names.index(name) + 1, name) for name in names]
    for _ in range(2):  # again, now from the prefix cache
        outputs = llm.generate(
            [{"prompt_token_ids": each} for each in job["prompts"]],
            [sampling(plan, job["tokens"]) for plan in job["plans"]],
            lora_request=adapters,
            use_tqdm=False,
        )
    asked = [(None, prompt) for prompt in job["prompts"]]
    found = {
        "tokens": [list(each.outputs[0].token_ids) for each in outputs],
        "reports": llm.collective_rpc("adaskip_report"),
        "ran": llm.collective_rpc("adaskip_ran", args=(asked,)),
        "given": llm.collective_rpc("adaskip_plans", args=(asked,)),
        "decisions": llm.apply_model(decisions),
    }
    llm.llm_engine.engine_core.shutdown()
    return found

if __name__ == "__main__":
    print(json.dumps({name: run(job) for name, job in json.loads(sys.argv[1]).items()}))
"""


def on_two_ranks(folder: Path, jobs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Run jobs one after the other; return what was found of each, of both ranks where it says so.

    A job has ``model``, ``prompts``, ``plans``, ``tokens``, the ``engine``'s options, our
    ``options``, and may have ``adapters``: a folder or None for each prompt.
    """
    (folder / "ranks.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "ranks.py", json.dumps(jobs)],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}",
            "VLLM_CPU_OMP_THREADS_BIND": "0|1",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # of the function that looks at each rank
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
