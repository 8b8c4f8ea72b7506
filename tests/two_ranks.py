# SPDX-License-Identifier: Apache-2.0
"""A batch on two tensor-parallel ranks, in a process of its own.

There vLLM's CPU backend binds each rank to a core.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batches import Entries

SCRIPT = """
import json, sys
from batches import sampling
from vllm import LLM
from vllm.lora.request import LoRARequest
from vllm_adaskip import engine_args

if __name__ == "__main__":
    model, prompts, plans, tokens, engine, options, adapters = json.loads(sys.argv[1])
    llm = LLM(model, skip_tokenizer_init=True, enforce_eager=True, max_model_len=256,
              tensor_parallel_size=2, block_size=32, max_num_batched_tokens=64, max_num_seqs=16,
              **engine, **engine_args(**options))
    names = sorted({each for each in adapters if each})
    outputs = llm.generate(
        [{"prompt_token_ids": each} for each in prompts],
        [sampling(plan, tokens) for plan in plans],
        lora_request=[each and LoRARequest(each, names.index(each) + 1, each) for each in adapters]
        if names else None,
    )
    print(json.dumps([list(each.outputs[0].token_ids) for each in outputs]))
"""


def on_two_ranks(
    folder: Path,
    model: str,
    prompts: Sequence[list[int]],
    plans: Sequence[Entries],
    tokens: int,
    *,
    engine: dict[str, Any],
    options: dict[str, Any],
    adapters: Sequence[str | None] = (),
) -> list[list[int]]:
    """Return greedy tokens; each prompt may have an adapter's folder."""
    (folder / "ranks.py").write_text(SCRIPT)
    work = [model, prompts, plans, tokens, engine, options, [*adapters] or [None] * len(prompts)]
    done = subprocess.run(
        [sys.executable, "ranks.py", json.dumps(work)],
        cwd=folder,
        env={
            **{k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"},
            "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
            "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found
