# SPDX-License-Identifier: Apache-2.0
"""Invariant 6: with two tensor-parallel ranks, the same tokens and the same plans on both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from batches import random_prompts
from reference import Reference

PLANS: list[list[int | str]] = [[], [2, 3], ["attn:4", "mlp:5"], [0], [7], ["mlp:0"]]
TOKENS = 10

#: A process of its own, because vLLM's CPU backend then binds each rank to a core.
SCRIPT = """
import json, sys
from batches import greedy
from vllm import LLM
from vllm_adaskip import engine_args

if __name__ == "__main__":
    model, prompts, plans, tokens = json.loads(sys.argv[1])
    llm = LLM(model, dtype="float32", skip_tokenizer_init=True, enforce_eager=True,
              max_model_len=256, tensor_parallel_size=2, **engine_args())
    print(json.dumps([greedy(llm, prompts, plans, tokens), llm.collective_rpc("adaskip_report")]))
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
def test_two_ranks_give_the_reference_s_tokens_and_equal_reports(
    tiny_llama: str, tmp_path: Path
) -> None:
    prompts = random_prompts(12, len(PLANS))
    (tmp_path / "ranks.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "ranks.py", json.dumps([tiny_llama, prompts, PLANS, TOKENS])],
        cwd=tmp_path,
        env={
            **{k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"},
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    got, reports = json.loads(done.stdout.splitlines()[-1])
    reference = Reference(tiny_llama)
    for prompt, plan, tokens in zip(prompts, PLANS, got, strict=True):
        assert tokens == reference.generate(prompt, plan, TOKENS)[0]
    assert len(reports) == 2 and reports[0] == reports[1]
