# SPDX-License-Identifier: Apache-2.0
"""Ranks agree: with two tensor-parallel ranks, the same tokens and the same plans on both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from batches import Entries, random_prompts
from conftest import TINY_SHAPE
from reference import Exit, MlpRule, Reference

from vllm_adaskip import DecoderShape
from vllm_adaskip.classifiers.ends import EndsOptions
from vllm_adaskip.classifiers.similarity.method import Similarity

#: None: decided by the method, from the prompt or token by token.
PLANS: list[Entries | None] = [[], [2, 3], ["attn:4", "mlp:5"], [0], None, ["mlp:0"], None, None]
TOKENS = 10
BUDGET = 0.6
METHOD = Similarity(DecoderShape(*TINY_SHAPE), EndsOptions())
#: Somebody else's, which every rank imports.
READING = {"method": "strangers:Theirs", "budget": BUDGET, "kv_fill": "project"}
GUARDED = {**READING, "method": "similarity", "guard": True}
GATING = {"method": "ffn-skip", "scope": "token", "threshold": 0.9, "warm_up": 2}
EXITING = {
    "method": "adainfer",
    "scope": "token",
    "check_layers": [1, 2, 4, 6],
    "top_prob": 0.04,
    "gap": 0.01,
    "kv_fill": "copy",
}

#: A process of its own, because vLLM's CPU backend then binds each rank to a core.
SCRIPT = """
import json, sys
from batches import decisions, greedy
from vllm import LLM
from vllm_adaskip import engine_args

if __name__ == "__main__":
    model, prompts, plans, tokens, options = json.loads(sys.argv[1])
    llm = LLM(model, dtype="float32", skip_tokenizer_init=True, enforce_eager=True,
              max_model_len=256, tensor_parallel_size=2, block_size=32,
              max_num_batched_tokens=48, max_num_seqs=16,
              **engine_args(**options))
    greedy(llm, prompts, plans, tokens)  # again, now from the prefix cache
    got = greedy(llm, prompts, plans, tokens)
    asked = [(None, prompt) for prompt in prompts]
    ran = llm.collective_rpc("adaskip_ran", args=(asked,))
    given = llm.collective_rpc("adaskip_plans", args=(asked,))
    report = llm.collective_rpc("adaskip_report")
    print(json.dumps([got, report, ran, given, llm.apply_model(decisions)]))
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
@pytest.mark.parametrize(
    "options",
    [READING, GUARDED, GATING, EXITING],
    ids=["reading", "guarded", "gating", "exiting"],
)
def test_two_ranks_give_the_reference_s_tokens_and_equal_reports(
    tiny_llama: str, tmp_path: Path, options: dict[str, object]
) -> None:
    """Ranks that gated differently would wait for each other for ever, in an MLP's all-reduce."""
    prompts = random_prompts(12, len(PLANS))
    (tmp_path / "ranks.py").write_text(SCRIPT)
    theirs = "from vllm_adaskip.classifiers.similarity.method import Similarity as Theirs"
    (tmp_path / "strangers.py").write_text(theirs)
    done = subprocess.run(
        [sys.executable, "ranks.py", json.dumps([tiny_llama, prompts, PLANS, TOKENS, options])],
        cwd=tmp_path,
        env={
            **{k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"},
            "PYTHONPATH": f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}",
            "VLLM_CPU_OMP_THREADS_BIND": "0|1",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # of the function that looks at each rank
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    got, reports, ran, given, decisions = json.loads(done.stdout.splitlines()[-1])
    reference = Reference(tiny_llama)
    assert given[0] == given[1]
    for number, (prompt, plan, tokens) in enumerate(zip(prompts, PLANS, got, strict=True)):
        here, there = (each[number] for each in ran)
        rule = exit = None
        gates = options in (GATING, EXITING)
        assert here == there and (here is None) == (plan is not None or not gates)
        if plan is None and options is GATING:
            plan, rule = [], MlpRule(range(1, TINY_SHAPE[0] - 1), 0.9, warm_up=2)
        if plan is None and options is EXITING:
            plan, exit = [], Exit([1, 2, 4, 6], 0.04, 0.01)
        if plan is None and options is GUARDED:  # each judges by its own clock, and asks the first
            plan = given[0][number]
        if plan is None:
            plan = METHOD.decide(BUDGET, reference.observe(prompt, METHOD)).entries()
        fill = str(options.get("kv_fill", "none"))
        want, _ = reference.generate(prompt, plan, TOKENS, kv_fill=fill, rule=rule, exit=exit)
        assert tokens == want
        if rule is not None:
            assert here["tokens"] == 2 * (TOKENS - 1)
            assert sum(here["left_out"]) == 2 * sum(map(len, rule.left_out))
    guards = [one.pop("guard", None) for one in reports]
    assert len(reports) == 2 and reports[0] == reports[1]
    if options is GUARDED:
        counted = [[one[key] for key in ("followed", "slower", "margin")] for one in guards]
        assert counted[0] == counted[1] and sum(counted[0]) == 2 * PLANS.count(None)
    assert decisions[0] == decisions[1]
    assert options is not READING or decisions[0]
