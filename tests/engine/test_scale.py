# SPDX-License-Identifier: Apache-2.0
"""Method ``similarity`` with ``scale``: the stream is multiplied where sub-layers are left out.

Norms do not notice a factor but by their epsilon, so the checkpoint has a large one: then factors
before K/V that are projected decide tokens as well. (Those before the head cannot, see
`test_step_plan`.)
Fails when factors are not applied, are applied to prompt tokens or to those of another row, stand
behind what they belong before, and when requests that bring a plan are scaled.

Decisions under chunks, prefix hits, parallel samples and preemption: `test_prompt_statistics`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from batches import random_plan, random_prompts, sampling
from conftest import TINY_LAYERS, TINY_SHAPE
from reference import Reference
from tiny import write_llama

from vllm_adaskip import DecoderShape, SkipPlan, engine_args
from vllm_adaskip.classifiers import PromptStatistics
from vllm_adaskip.classifiers.similarity.method import Similarity, SimilarityOptions
from vllm_adaskip.engine.facts import EngineFacts
from vllm_adaskip.engine.planner import Planner
from vllm_adaskip.engine.scaling import Scaling
from vllm_adaskip.engine.state import SkipState
from vllm_adaskip.model_executors.stream import scale

BUDGET = 0.6
KV_FILLS = ["none", "copy", "project"]
Arguments = dict[str, Any] | None


class Scaled:
    """An engine with the method, and what each of its sequences must come to."""

    def __init__(self, llm: Any, reference: Reference, ends: dict[str, int]) -> None:
        self.llm = llm
        self.reference = reference
        self.method = Similarity(DecoderShape(*TINY_SHAPE), SimilarityOptions(scale=True, **ends))

    def decision(self, prompt: list[int], arguments: Arguments) -> tuple[SkipPlan, list[float]]:
        arguments = arguments or {}
        if arguments.get("adaskip") == "off" or "adaskip_skip" in arguments:
            plan = SkipPlan.parse(arguments.get("adaskip_skip", []), TINY_LAYERS)
            return plan, [1.0] * 2 * TINY_LAYERS
        read = self.reference.observe(prompt, self.method)
        plan = self.method.decide(min(BUDGET, arguments.get("adaskip_budget", 1)), read)
        factors = self.method.factors(plan, read)
        assert factors is not None
        return plan, factors.tolist()

    def want(self, prompt: list[int], arguments: Arguments, tokens: int, **more: Any) -> list[int]:
        plan, factors = self.decision(prompt, arguments)
        return self.reference.generate(prompt, plan.entries(), tokens, factors=factors, **more)[0]

    def check(
        self, prompts: list[list[int]], arguments: list[Arguments], tokens: int = 24, **more: Any
    ) -> int:
        """Run a batch; give for how many sequences factors decided the tokens."""
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [sampling(None, tokens, extra_args=one, **more) for one in arguments],
            use_tqdm=False,
        )
        decisive = 0
        for prompt, one, output in zip(prompts, arguments, outputs, strict=True):
            want = self.want(prompt, one, tokens)
            assert [list(sample.token_ids) for sample in output.outputs] == [want] * len(
                output.outputs
            ), one
            plan, _ = self.decision(prompt, one)
            decisive += want != self.reference.generate(prompt, plan.entries(), tokens)[0]
        return decisive


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_llama(
        tmp_path_factory.mktemp("scale") / "llama",
        layers=TINY_LAYERS,
        vocab_size=512,
        max_position_embeddings=512,
        rms_norm_eps=0.5,
    )


@pytest.fixture(scope="module")
def make(engine: Callable[..., Any], checkpoint: str) -> Callable[..., Scaled]:
    """Engines with small blocks, as many as asked for."""
    reference = Reference(checkpoint)
    made: dict[str, Scaled] = {}

    def make(kv_fill: str = "none", ends: dict[str, int] | None = None, **options: Any) -> Scaled:
        ends = {"keep_first": 0, "keep_last": 1} if ends is None else ends
        if (key := repr((kv_fill, ends, options))) not in made:
            plugin = engine_args(
                method="similarity", scale=True, budget=BUDGET, kv_fill=kv_fill, **ends
            )
            options = {"disable_log_stats": False, "block_size": 32, **options}
            made[key] = Scaled(engine(checkpoint, **options, **plugin), reference, ends)
        made[key].llm.reset_prefix_cache()
        return made[key]

    return make


def mixed(rng: random.Random) -> list[Arguments]:
    """Decided plans, dense requests and those that bring a plan, in any order."""
    arguments: list[Arguments] = [None] * 5 + [{"adaskip_budget": share} for share in (0.5, 0.45)]
    arguments += [{"adaskip": "off"}, {"adaskip_skip": []}]
    arguments += [{"adaskip_skip": random_plan(rng, TINY_LAYERS)} for _ in range(5)]
    rng.shuffle(arguments)
    return arguments


@pytest.mark.parametrize("kv_fill", KV_FILLS)
@pytest.mark.parametrize("ends", [{"keep_first": 0}, {"keep_last": 0}], ids=["first", "last"])
def test_scaled_planned_and_dense_requests_in_one_batch(
    make: Callable[..., Scaled], kv_fill: str, ends: dict[str, int]
) -> None:
    """Prompts come in chunks beside tokens that are decoded; either end may be left out."""
    scaled = make(kv_fill, ends, max_num_batched_tokens=48)
    assert scaled.check(random_prompts(80, 14), mixed(random.Random(80))) >= 4


def test_parallel_samples(make: Callable[..., Scaled]) -> None:
    arguments = [None, {"adaskip": "off"}, {"adaskip_skip": [2]}, {"adaskip_budget": 0.5}]
    make().check(random_prompts(81, 4), arguments, 16, n=3, temperature=1.0, top_k=1)


@pytest.mark.parametrize("kv_fill", KV_FILLS)
def test_again_after_preemption(make: Callable[..., Scaled], kv_fill: str) -> None:
    """Answers are replayed beside their prompts, from blocks where these are complete."""
    scaled = make(kv_fill, num_gpu_blocks_override=12, max_num_batched_tokens=40)
    arguments: list[Arguments] = [None] * 6 + [{"adaskip": "off"}, {"adaskip_skip": [2, "mlp:4"]}]
    assert scaled.check(random_prompts(82, 8, longest=40), arguments, 80) >= 4
    counters = {metric.name: getattr(metric, "value", 0) for metric in scaled.llm.get_metrics()}
    assert counters["vllm:num_preemptions"] > 0


@pytest.mark.parametrize("kv_fill", KV_FILLS)
def test_an_answer_that_comes_back_is_not_taken_for_another_s(
    make: Callable[..., Scaled], kv_fill: str
) -> None:
    """Equal tokens at equal places, of which some were generated under other factors."""
    scaled = make(kv_fill)
    prompt = [random.Random(83).randrange(512) for _ in range(40)]
    answer = scaled.want(prompt, None, 70)
    plan = scaled.decision(prompt, None)[0].entries()
    scaled.check([prompt], [None], 70)
    for later in ([*prompt, *answer, 5], [*prompt, *answer[:30]], prompt):
        scaled.check([later], [None], 40)
        scaled.check([later], [{"adaskip_skip": plan}], 40)  # the same plan, not scaled
        scaled.check([later], [{"adaskip": "off"}], 40)


@pytest.mark.parametrize("kv_fill", ["copy", "project"])
def test_who_runs_more_later_finds_what_was_filled(
    make: Callable[..., Scaled], kv_fill: str
) -> None:
    """Projected from the stream before the passed sub-layer's own factor, after earlier ones."""
    scaled = make(kv_fill)
    state = scaled.llm.apply_model(lambda model: model.adaskip._state)[0]
    core = scaled.llm.llm_engine
    prompts = [[random.Random(length).randrange(512)] * length for length in range(3, 43, 4)]
    for index, prompt in enumerate(prompts):
        core.add_request(str(index), {"prompt_token_ids": prompt}, sampling(None, 24))
    got: dict[int, list[int]] = {}
    while core.has_unfinished_requests():
        for output in core.step():
            index, tokens = int(output.request_id), list(output.outputs[0].token_ids)
            if len(tokens) == 8:
                (row,) = np.flatnonzero(state.table.prompt_lens == len(prompts[index]))
                state.table.follow(row, SkipPlan(TINY_LAYERS))
            got[index] = tokens
    for index, prompt in enumerate(prompts):
        then: tuple[int, list[int | str]] = (8, [])
        assert got[index] == scaled.want(prompt, None, 24, kv_fill=kv_fill, then=then)


@pytest.mark.parametrize("tokens", [slice(1, 3), torch.tensor([0, 2])])
def test_a_stream_of_low_precision_is_multiplied_in_float32(tokens: slice | torch.Tensor) -> None:
    """Both halves, and only where it should; before any sub-layer there is but one."""
    factors = torch.tensor([[1.2345], [0.8765]])
    for has_residual in (True, False):
        stream = torch.randn(2, 4, 8).bfloat16().unbind()
        want = [half.clone() for half in stream[: 1 + has_residual]]
        for half in want:
            half[tokens] = (half[tokens].float() * factors).bfloat16()
        scale((stream[0], stream[1] if has_residual else None), Scaling(tokens, factors))
        assert all(torch.equal(*pair) for pair in zip(stream, want, strict=False))


def test_compiled(make: Callable[..., Scaled]) -> None:
    scaled = make("project", enforce_eager=False)
    arguments: list[Arguments] = [None] * 5 + [{"adaskip": "off"}, {"adaskip_skip": ["mlp:2"]}]
    assert scaled.check(random_prompts(85, 7), arguments, 12) > 0


def test_steps_without_factors_are_what_they_were(make: Callable[..., Scaled]) -> None:
    """Of requests that are dense or bring a plan; beside scaled ones too, once these are gone."""
    scaled = make()

    def scalings() -> int:
        plan = scaled.llm.apply_model(lambda model: model.adaskip._plan)[0]
        return sum(isinstance(piece, Scaling) for piece in plan.pieces)

    prompts = random_prompts(86, 2)
    scaled.check(prompts, [None, {"adaskip": "off"}], 4)
    assert scalings() > 0
    scaled.check(prompts, [{"adaskip_skip": [1, "mlp:4"]}, {"adaskip": "off"}], 4)
    assert scalings() == 0


def test_rows_that_wait_with_the_same_prompt_get_one_decision() -> None:
    """Their statistics may differ in the last bits, and they may find each other's blocks."""
    facts = EngineFacts(DecoderShape(3, 1, 3), method="similarity", method_options={"scale": True})
    state = SkipState(Planner(facts), 4)
    for row in (0, 1):
        state.enter(row, {"adaskip_budget": 0.8}, [1, 2, 3], generated=0)
    statistics = [np.linspace(0.1, 1 + row, state.planner.classifier.width) for row in (0, 1)]
    state.decide({row: PromptStatistics(3, read, read) for row, read in enumerate(statistics)})
    assert state.table.skips[0].any()
    assert (state.table.skips[0] == state.table.skips[1]).all()
    assert state.table.factors is not None and (state.table.factors[0] != 1).any()
    assert (state.table.factors[0] == state.table.factors[1]).all()
    state.enter(2, {"adaskip_budget": 0.8}, [1, 2, 3], generated=2)
    assert (state.table.factors[2] == state.table.factors[0]).all()
    state.enter(3, {"adaskip_skip": [1]}, [1, 2, 3], generated=0)
    assert (state.table.factors[3] == 1).all()
