# SPDX-License-Identifier: Apache-2.0
"""vLLM's own Model Runner V2, on the CPU (see `v2_engine`), against the float32 reference.

Fails when rows are not put into the batch's order, when a resumed request's generated tokens
count as its prompt, when a step's lengths are an earlier step's, and when the front end does
not check requests.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
from conftest import TINY_LAYERS, TINY_SHAPE
from helpers.batches import random_plan, random_prompts
from helpers.gated import Gated
from helpers.reference import Exit, Reference

from vllm_adaskip import DecoderShape
from vllm_adaskip.config import AdaSkipConfig
from vllm_adaskip.engine.request import Planner

CHUNKED = {"max_num_seqs": 6, "max_num_batched_tokens": 48}
#: Hardly more blocks than two sequences need.
TIGHT = {"max_num_seqs": 6, "block_size": 32, "num_gpu_blocks_override": 9}
BAD = {"adaskip_skip": [TINY_LAYERS]}
SIMILARITY = {"method": "adaskip", "max_compute": 0.6}
GATED = {"threshold": 0.9, "warm_up": 2}
CHECKS, TOP_PROB, GAP = [1, 2, 4, 6], 0.04, 0.01
SHARED = [2, "attn:4", "mlp:5"]
EXITS = {"method": "adainfer", "check_layers": CHECKS, "top_prob": TOP_PROB, "gap": GAP}


PROMPTS = [
    {"adaskip_prompt_exit": 3, "adaskip_prompt_tail": 5},
    {"adaskip_prompt_skip": [2, "attn:5"]},
    {"adaskip_prompt_exit": 5, "adaskip_skip": [1, "mlp:6"]},
    {"adaskip_skip": [3]},
]


def planned(seed: int, count: int) -> list[Any]:
    rng = random.Random(seed)
    return [{"adaskip_skip": random_plan(rng, TINY_LAYERS)} for _ in range(count)]


def job(options: dict[str, Any], extra_args: list[Any], **more: Any) -> dict[str, Any]:
    """One batch; the last of the prompts comes twice."""
    prompts = random_prompts(70, len(extra_args) - 1, longest=70)
    given = {"options": options, "extra_args": extra_args, "prompts": [*prompts, prompts[-1]]}
    return {"engine": CHUNKED, "max_tokens": 12, **given, **more}


HAS_GRAPHS = find_spec("vllm.v1.worker.gpu.sample.logits_processor")  # as 0.32 has both
FILLS = ["none", "copy", "project"] if HAS_GRAPHS else []
JOBS: dict[str, dict[str, Any]] = {
    "mixed": job({"kv_fill": "project"}, [*planned(1, 5), BAD, *planned(2, 5), None]),
    "preempted": job({"kv_fill": "copy"}, planned(3, 8), engine=TIGHT, max_tokens=50),
    "read": job(SIMILARITY, [None] * 7),
    "gated": job({"method": "ffn-skip", "scope": "token", **GATED}, [None] * 7),
    "exits": job({**EXITS, "scope": "token", "kv_fill": "copy"}, [None] * 7),
    "answers": job(EXITS, [None] * 7, max_tokens=1),
    "prompts": job({"kv_fill": "copy"}, [*map(dict, PROMPTS), None, None], engine=TIGHT),
    **{
        f"graphs, {fill}": job(
            {"kv_fill": fill, "known_plans": [SHARED]},
            [*planned(4, 3), *[{"adaskip_skip": SHARED}] * 7, *[None] * 7],
            graphs=True,
        )
        for fill in FILLS
    },
}


@pytest.fixture(scope="module")
def ran(tiny_llama: str) -> dict[str, dict[str, Any]]:
    """What each job gave, all from one process."""
    jobs = json.dumps([{"model": tiny_llama, **one} for one in JOBS.values()])
    done = subprocess.run(
        [sys.executable, "-m", "helpers.v2_engine"],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        input=jobs,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr[-4000:]
    return dict(zip(JOBS, json.loads(done.stdout.splitlines()[-1]), strict=True))


def check(job: dict[str, Any], got: dict[str, Any], want: Callable[..., list[int]]) -> None:
    """Compare tokens; ``want`` gives them from prompt, arguments and their number."""
    assert got["is_v2"] and got["tokens"]
    for index, tokens in got["tokens"].items():
        args = job["extra_args"][int(index)]
        prompt = job["prompts"][int(index)]
        assert tokens == want(prompt, args, job["max_tokens"]), (index, len(prompt), args)


def by_plan(reference: Reference, kv_fill: str) -> Callable[..., list[int]]:
    def want(prompt: list[int], args: Any, tokens: int) -> list[int]:
        skip = (args or {}).get("adaskip_skip", [])
        return reference.generate(prompt, skip, tokens, kv_fill=kv_fill)[0]

    return want


def test_mixed_plans_and_prompts_in_chunks(ran: dict[str, Any], reference: Reference) -> None:
    assert len(ran["mixed"]["tokens"]) == 11
    check(JOBS["mixed"], ran["mixed"], by_plan(reference, "project"))


@pytest.mark.parametrize("fill", FILLS)
def test_steps_under_one_plan_replay_its_graph_and_dense_ones_theirs(
    ran: dict[str, Any], reference: Reference, fill: str
) -> None:
    """On a tape in a graph's stead, padded; other steps of the same engine run the loop."""
    job, got = JOBS[f"graphs, {fill}"], ran[f"graphs, {fill}"]
    check(job, got, by_plan(reference, fill))
    assert got["report"]["graphs"]["plans"] == 2
    # Seventeen requests in rows of six: of some 34 decode steps a few see plans that differ.
    assert 8 < got["report"]["graphs"]["replayed"] < got["report"]["decode_tokens"] / 4
    assert got["report"]["decode_tokens"] == len(got["tokens"]) * (job["max_tokens"] - 1)


def test_a_bad_request_is_refused_in_the_front_end_and_nobody_notices(ran: dict[str, Any]) -> None:
    ((index, message),) = ran["mixed"]["refused"]
    assert JOBS["mixed"]["extra_args"][index] == BAD
    assert "adaskip_skip" in message and f"layers 0 to {TINY_LAYERS - 1}" in message


def test_the_report_counts_what_ran(ran: dict[str, Any]) -> None:
    report, job = ran["mixed"]["report"], JOBS["mixed"]
    chosen = [index for index, args in enumerate(job["extra_args"]) if args != BAD]
    assert report["requests"] == len(chosen)
    assert report["prompt_tokens"] == sum(len(job["prompts"][index]) for index in chosen)
    assert report["decode_tokens"] == len(chosen) * (job["max_tokens"] - 1)
    skips = [job["extra_args"][index]["adaskip_skip"] for index in chosen[:-1]] + [[]]
    dense = [sum({layer, f"mlp:{layer}"}.isdisjoint(skip) for skip in skips) for layer in range(8)]
    assert report["mlp_run"] == [count * (job["max_tokens"] - 1) for count in dense]


def test_preempted_requests_resume_under_their_plans(
    ran: dict[str, Any], reference: Reference
) -> None:
    assert ran["preempted"]["preemptions"] > 0
    check(JOBS["preempted"], ran["preempted"], by_plan(reference, "copy"))


def test_a_method_that_reads_prompts_decides_as_from_the_reference(
    ran: dict[str, Any], reference: Reference
) -> None:
    facts = AdaSkipConfig.parse(SIMILARITY).facts(DecoderShape(*TINY_SHAPE))
    classifier = Planner(facts).classifier
    plans = [
        classifier.decide(facts.max_compute, reference.observe(prompt, classifier)).entries()
        for prompt in JOBS["read"]["prompts"]
    ]
    assert ran["read"]["plans"] == plans and len({str(plan) for plan in plans}) > 1
    known = dict(zip(map(tuple, JOBS["read"]["prompts"]), plans, strict=True))
    check(
        JOBS["read"],
        ran["read"],
        lambda prompt, _, tokens: reference.generate(prompt, known[tuple(prompt)], tokens)[0],
    )


def test_shortened_prompts_beside_whole_ones(ran: dict[str, Any], reference: Reference) -> None:
    def want(prompt: list[int], args: Any, tokens: int) -> list[int]:
        args = args or {}
        exit = args.get("adaskip_prompt_exit")
        left_out = [*range(exit, TINY_LAYERS)] if exit else args.get("adaskip_prompt_skip", [])
        short = left_out, args.get("adaskip_prompt_tail", 16)
        skip = args.get("adaskip_skip", [])
        return reference.generate(prompt, skip, tokens, kv_fill="copy", prompt_plan=short)[0]

    check(JOBS["prompts"], ran["prompts"], want)


def test_a_token_gate_leaves_out_what_its_rule_says(
    ran: dict[str, Any], reference: Reference
) -> None:
    gated = Gated(None, reference, **GATED)
    check(JOBS["gated"], ran["gated"], lambda *request: gated.want(*request)[0])
    assert len(set(ran["gated"]["report"]["mlp_run"])) > 1


def test_tokens_and_whole_answers_stop_early(ran: dict[str, Any], reference: Reference) -> None:
    depths = set()

    def by_token(prompt: list[int], _: Any, tokens: int) -> list[int]:
        exit = Exit(CHECKS, TOP_PROB, GAP)
        found = reference.generate(prompt, [], tokens, kv_fill="copy", exit=exit)[0]
        depths.update(exit.depths)
        return found

    check(JOBS["exits"], ran["exits"], by_token)
    check(
        JOBS["answers"],
        ran["answers"],
        lambda prompt, *_: reference.answer(prompt, Exit(CHECKS, TOP_PROB, GAP))[0],
    )
    assert len(depths) > 2 and sum(ran["exits"]["report"]["exits"]) > 0
    assert sum(ran["answers"]["report"]["exits"]) > 0
