# SPDX-License-Identifier: Apache-2.0
"""Every mode the same: under vLLM's default compilation plans mean what they mean eagerly.

Guards against a step's plan that is looked at inside what `torch.compile` traces: the
first plan seen would then hold for ever.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TINY_LAYERS, TINY_SHAPE
from helpers.batches import Entries, greedy, random_plan, random_prompts
from helpers.reference import Reference
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_adaskip import DecoderShape, engine_args
from vllm_adaskip.classifiers.adaskip.method import AdaSkip
from vllm_adaskip.classifiers.ends import EndsOptions

BUDGET = 0.6
METHOD = AdaSkip(DecoderShape(*TINY_SHAPE), EndsOptions())


@pytest.mark.parametrize(
    "options",
    [{"kv_fill": "copy"}, {"method": "adaskip", "max_compute": BUDGET, "kv_fill": "project"}],
    ids=["copy", "adaskip"],
)
def test_compiled_gives_the_tokens_of_the_reference(
    engine: Callable[..., Any], tiny_llama: str, options: dict[str, Any]
) -> None:
    llm = engine(tiny_llama, enforce_eager=False, **engine_args(**options))
    reference = Reference(tiny_llama)
    rng = random.Random(11)
    for seed in range(2):  # dense, plans, decided plans if there is a method, dense again
        prompts = random_prompts(seed, 8)
        decided: list[Entries] = [[]] * 8
        if "method" in options:
            statistics = [reference.observe(prompt, METHOD) for prompt in prompts]
            decided = [METHOD.decide(BUDGET, one).entries() for one in statistics]
        own: list[Entries] = [random_plan(rng, TINY_LAYERS) for _ in prompts]
        rounds: list[tuple[list[Entries | None], list[Entries]]] = [
            ([[]] * 8, [[]] * 8),
            ([*own], own),
            ([None] * 8, decided),
            ([[]] * 8, [[]] * 8),
        ]
        for plans, followed in rounds:
            got = greedy(llm, prompts, plans, max_tokens=12)
            want = [
                reference.generate(prompt, plan, 12)[0]
                for prompt, plan in zip(prompts, followed, strict=True)
            ]
            assert got == want


def test_planned_steps_run_kernels_and_the_layers_stay_stock_vllm_s(
    engine: Callable[..., Any], tiny_llama: str
) -> None:
    llm = engine(tiny_llama, enforce_eager=False, **engine_args())
    stock, planned = llm.apply_model(
        lambda model: [operators(one) for one in (model.model.layers[0], model.stack.layers[0])]
    )[0]
    assert "_C::fused_add_rms_norm" in planned and "_C::fused_add_rms_norm" not in stock
    parameters = llm.apply_model(
        lambda model: [
            [each.data_ptr() for each in layer.parameters()]
            for layer in (model.model.layers[0], model.stack.layers[0])
        ]
    )[0]
    assert parameters[0] == parameters[1]  # shared, not copied


def operators(layer: Any) -> list[str]:
    """Name the operators that a layer's second norm runs."""
    names: list[str] = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            names.append(op.name())
            return op(*args, **(kwargs or {}))

    with Log():
        layer.post_attention_layernorm(torch.ones(2, 128), torch.ones(2, 128))
    return names
