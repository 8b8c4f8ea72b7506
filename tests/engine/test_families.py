# SPDX-License-Identifier: Apache-2.0
"""The family matrix: each family under every kind of plan, fill and method.

Stock vLLM says what comes out where nothing is skipped, bit for bit; the float32 transformers loop
says all else. Another family is one more entry in `families.CASES`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from helpers.batches import (
    Entries,
    greedy,
    logprobs_of,
    random_plan,
    random_prompts,
    run_with_changes,
    sampling,
)
from helpers.families import CASES, LAYERS, WARM_UP, Matrix
from helpers.reference import Exit, MlpRule

from vllm_adaskip import DecoderShape, SkipPlan, engine_args, request
from vllm_adaskip.config import AdaSkipConfig
from vllm_adaskip.engine.compat.projection import project
from vllm_adaskip.engine.request import Planner
from vllm_adaskip.lab.fitting.sub_layers import decoder_shape
from vllm_adaskip.model_executors.registry import FAMILIES
from vllm_adaskip.support import KV_FILLS, PLAN_KINDS, supported

TOKENS = 14
#: One of everything, ends included, and several together.
SOME: list[list[int]] = [[0], [LAYERS - 1], [2, 3], [1, 2, 4], list(range(1, LAYERS)), []]
#: How a layer is written in each kind of plan.
WRITTEN: dict[str, Callable[[int], int | str]] = {
    "whole layers": int,
    "attention": "attn:{}".format,
    "MLPs": "mlp:{}".format,
}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory, engine: Callable[..., Any]) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("families"), engine)


def test_every_family_has_a_case_and_every_kind_its_plans() -> None:
    """What docs/families.md promises is what is run here."""
    assert {case.architecture for case in CASES.values()} == set(FAMILIES)
    assert set(WRITTEN) == set(PLAN_KINDS)
    run = {(CASES[name].architecture, kind, fill) for name, kind, fill in CELLS}
    assert run == set(supported())


@pytest.mark.parametrize("name", CASES)
def test_the_reference_runs_what_transformers_runs(matrix: Matrix, name: str) -> None:
    """Its loop is written down once more, so where nothing is skipped it is checked itself."""
    reference = matrix.reference(name)
    for prompt in random_prompts(80, 3, longest=30):
        tokens, gap = reference.generate(prompt, [], TOKENS)
        whole = reference.model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        assert whole.argmax(-1).tolist() == tokens and gap > 1e-4


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_keys_and_values_are_projected_without_queries(matrix: Matrix, name: str) -> None:
    executor = matrix.plugin(name, "project").llm_engine.model_executor
    for layer in executor.driver_worker.worker.get_model().stack.layers:
        packed = layer.self_attn.qkv_proj
        hidden = torch.randn(5, packed.input_size)
        want = packed(hidden)[0][:, packed.num_heads * packed.head_size :]
        hook = packed.register_forward_pre_hook(lambda *_: pytest.fail("queries were projected"))
        _, key, value = project(packed, hidden)
        hook.remove()
        torch.testing.assert_close(torch.cat([key, value], dim=-1), want)


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_the_reference_projects_what_transformers_caches(matrix: Matrix, name: str) -> None:
    reference = matrix.reference(name)
    prompt = [5, 300, 17, 42]
    cached = reference.model(torch.tensor([prompt]), use_cache=True).past_key_values.layers[0]
    hidden, where = reference.decoder.embed(prompt, range(len(prompt)))
    key, value = reference.decoder.key_value(0, hidden, where)
    torch.testing.assert_close((key, value), (cached.keys, cached.values))


@pytest.mark.parametrize("name", CASES)
def test_a_plan_s_share_is_counted_by_the_parameters_that_are_there(
    matrix: Matrix, name: str
) -> None:
    assert shape_of(matrix, name) == decoder_shape(matrix.reference(name).model)


@pytest.mark.parametrize("name", CASES)
def test_with_nothing_skipped_logprobs_equal_stock_bit_for_bit(matrix: Matrix, name: str) -> None:
    prompts = random_prompts(81, 8)
    stock, ours = matrix.stock(name), matrix.plugin(name, "none")
    assert ours.apply_model(lambda model: type(model).__name__) == [
        FAMILIES[CASES[name].architecture].architecture
    ]
    want = logprobs(stock, prompts, None)
    assert logprobs(ours, prompts, None) == want
    assert logprobs(ours, prompts, []) == want


CELLS = [
    (name, kind, fill)
    for name, (architecture, kind, fill) in product(CASES, supported())
    if CASES[name].architecture == architecture
]


@pytest.mark.parametrize(("name", "kind", "fill"), CELLS)
def test_plans_of_one_kind(matrix: Matrix, name: str, kind: str, fill: str) -> None:
    """Different plans in one batch; later they change, so that what was filled is read."""
    plans = [[WRITTEN[kind](layer) for layer in layers] for layers in SOME]
    check(matrix, name, fill, plans, seed=82)


@pytest.mark.parametrize(("name", "fill"), product(CASES, KV_FILLS))
def test_plans_of_all_kinds_in_one_batch(matrix: Matrix, name: str, fill: str) -> None:
    rng = random.Random(83)
    check(matrix, name, fill, [random_plan(rng, LAYERS) for _ in range(14)], seed=83)


@pytest.mark.parametrize("name", CASES)
def test_shortened_prompts_beside_whole_ones(matrix: Matrix, name: str) -> None:
    reference, llm = matrix.reference(name), matrix.plugin(name, "none")
    prompts = [prompt * 2 for prompt in random_prompts(86, 6, longest=45)]
    shortened: list[Entries] = [
        [4, 5],
        [],
        ["attn:2", 3],
        ["mlp:0"],
        [0, "attn:5"],
        [1, 2, 3, 4, 5],
    ]
    for tail in (1, 7):
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [
                sampling(None, TOKENS, extra_args=request(prompt_skip=one, prompt_tail=tail))
                for one in shortened
            ],
            use_tqdm=False,
        )
        for prompt, one, output in zip(prompts, shortened, outputs, strict=True):
            want, gap = reference.generate(prompt, [], TOKENS, prompt_plan=(one, tail))
            assert list(output.outputs[0].token_ids) == want, f"{one}, smallest gap {gap:.2g}"


@pytest.mark.parametrize("name", ["gemma3", "opt, post-norm and projections", "qwen3"])
def test_compiled(matrix: Matrix, name: str) -> None:
    """Dense steps run vLLM's compiled model, a known plan's its own body, others the modules.

    Prompts that stop have pieces. With ``project`` a body holds all that a family says.
    """
    known: Entries = [2, "attn:1", "mlp:4"]
    prompt = {"exit": 3, "tail": 2}
    options = engine_args(kv_fill="project", known_plans=[known], prompt=prompt)
    llm = matrix.make(name, enforce_eager=False, **options)
    rng = random.Random(86)
    plans: list[Entries] = [[], *(random_plan(rng, LAYERS) for _ in range(5))]
    prompts, above = random_prompts(86, len(plans)), [*range(3, LAYERS)]
    for together in (plans, [[]] * len(plans), [known] * len(plans)):
        got = greedy(llm, prompts, together, TOKENS)
        for prompt, plan, tokens in zip(prompts, together, got, strict=True):
            reference = matrix.reference(name)
            want, gap = reference.generate(
                prompt, plan, TOKENS, kv_fill="project", prompt_plan=(above, 2)
            )
            assert tokens == want, f"{plan}, smallest gap {gap:.2g}"
    compiled = llm.collective_rpc("adaskip_report")[0]["compiled"]
    assert compiled["plans"] == 2 and compiled["ran"] >= TOKENS - 1 + 3  # with chunks of prompts


@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].forgets])
def test_a_method_that_reads_prompts(matrix: Matrix, name: str) -> None:
    reference, llm = matrix.reference(name), matrix.plugin(name, "copy")
    facts = AdaSkipConfig.parse({"method": "adaskip"}).facts(shape_of(matrix, name))
    classifier = Planner(facts).classifier
    prompts = random_prompts(84, 4) + random_prompts(84, 8, longest=4)  # short ones differ most
    budgets = (0.7, 0.8, 0.9)
    requests = list(product(prompts, budgets))
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in requests],
        [sampling(None, TOKENS, extra_args={"adaskip_max_compute": one}) for _, one in requests],
        use_tqdm=False,
    )
    met = set()
    for (prompt, budget), output in zip(requests, outputs, strict=True):
        plan = classifier.decide(budget, reference.observe(prompt, classifier))
        want, gap = reference.generate(prompt, plan.entries(), TOKENS)
        assert list(output.outputs[0].token_ids) == want, f"{plan}, smallest gap {gap:.2g}"
        met.add((budget, plan))
    assert len(met) > len(budgets)  # the prompt does decide, not the budget alone


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].forgets])
def test_a_method_that_reads_prompts_needs_a_layer_that_keeps_them(
    matrix: Matrix, name: str
) -> None:
    with pytest.raises(ValueError, match=r"'adaskip' reads whole prompts.*disable-sliding"):
        matrix.make(name, **engine_args(method="adaskip"))


@pytest.mark.parametrize("name", CASES)
def test_a_method_that_gates_tokens(matrix: Matrix, name: str) -> None:
    reference, llm = matrix.reference(name), matrix.plugin(name, "project")
    prompts = random_prompts(85, 8)
    left_out = set()
    for prompt, got in zip(prompts, greedy(llm, prompts, [None] * 8, TOKENS), strict=True):
        rule = MlpRule(range(1, LAYERS - 1), CASES[name].threshold, warm_up=WARM_UP)
        want, gap = reference.generate(prompt, [], TOKENS, rule=rule)
        assert got == want, f"smallest gap {gap:.2g}, margin {rule.margin:.2g}"
        left_out |= {tuple(one) for one in rule.left_out}
    assert len(left_out) > 2  # tokens do differ, also after the warm-up


@pytest.mark.parametrize("name", ["opt, post-norm and projections", "qwen3"])
def test_answers_that_stop_early(matrix: Matrix, name: str) -> None:
    """What follows the last layer, norm and projection and head, is looked through below it."""
    reference, checks = matrix.reference(name), [0, 2, 3]
    prompts = random_prompts(87, 24, longest=20)

    def want(top_prob: float) -> tuple[list[list[int]], set[int]]:
        exits = [Exit(checks, top_prob, 0.0) for _ in prompts]
        answers = [reference.answer(*one)[0] for one in zip(prompts, exits, strict=True)]
        return answers, {depth for one in exits for depth in one.depths}

    tried = {one / 100: want(one / 100) for one in (1, 2, 5, 10, 20, 40, 60, 80, 95)}
    top_prob = max(tried, key=lambda one: len(tried[one][1]))
    assert len(tried[top_prob][1]) > 2
    options = engine_args(method="adainfer", check_layers=checks, top_prob=top_prob)
    got = greedy(matrix.make(name, **options), prompts, [None] * len(prompts), 1)
    assert got == tried[top_prob][0]


def check(matrix: Matrix, name: str, fill: str, plans: list[Entries], seed: int) -> None:
    """Run plans in one batch and compare tokens; most change to another plan on the way."""
    reference, llm = matrix.reference(name), matrix.plugin(name, fill)
    rng = random.Random(seed)
    prompts = [[rng.randrange(512) for _ in range(3 + 5 * index)] for index in range(len(plans))]
    # Without a fill nobody may read what a token left out.
    changes = [(rng.randint(2, 8), [] if fill != "none" else plan) for plan in plans]
    outputs = run_with_changes(llm, prompts, plans, changes, TOKENS)
    got = [list(output.token_ids) for output in outputs]
    dense = read = 0
    for prompt, plan, then, tokens in zip(prompts, plans, changes, got, strict=True):
        want, gap = reference.generate(prompt, plan, TOKENS, kv_fill=fill, then=then)
        assert tokens == want, f"{plan} then {then}, smallest gap {gap:.2g}"
        dense += want == reference.generate(prompt, [], TOKENS)[0]
        read += want != reference.generate(prompt, plan, TOKENS, then=then)[0]
    assert dense <= len(plans) // 2, f"{dense} like dense: this case's weights are too small"
    leaves_attention = any(SkipPlan.parse(plan, LAYERS).attention for plan in plans)
    assert bool(read) is (fill != "none" and leaves_attention)  # and so does what is filled


def shape_of(matrix: Matrix, name: str) -> DecoderShape:
    return FAMILIES[CASES[name].architecture].shape(matrix.reference(name).model.config)


def logprobs(llm: Any, prompts: list[list[int]], plan: Entries | None) -> list[Any]:
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [sampling(plan, TOKENS, logprobs=3) for _ in prompts],
        use_tqdm=False,
    )
    return logprobs_of(outputs)
