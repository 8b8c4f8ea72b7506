# SPDX-License-Identifier: Apache-2.0
"""Method ``ffn-skip`` with rules by which the tokens of a step agree.

Against a reference that walks all sequences through the layers together. Fails when the wrong
tokens vote or obey, when a token that was told to leave an MLP out is measured there, and
when plans of others are not counted as leaving out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from batches import random_prompts
from conftest import TINY_LAYERS
from gated import ALWAYS, MIDDLE, Arguments, Gated, maker, mlps
from reference import MlpRule
from transformers import DynamicCache

from vllm_adaskip.config import AdaSkipConfig, ConfigError

RULES = ["majority", "all"]
TOKENS = 20
ONES = [1.0] * (2 * TINY_LAYERS)


@pytest.fixture(scope="module")
def make(engine: Callable[..., Any], tiny_llama: str) -> Callable[..., Gated]:
    return maker(engine, tiny_llama)


class Together:
    """What a batch comes to whose sequences begin together, float32, token by token."""

    def __init__(self, gated: Gated, prompts: list[list[int]], arguments: list[Arguments]) -> None:
        self._reference, self._batch_rule = gated.reference, gated.options.batch_rule
        self._prompts = prompts
        self._own = [gated.followed(one) for one in arguments]
        self._caches = [DynamicCache(config=self._reference.model.config) for _ in prompts]
        self.tokens: list[list[int]] = [[] for _ in prompts]
        #: Of each sequence, how many tokens left out each MLP, and how many of these by itself.
        self.left_out: list[Counter[int]] = [Counter() for _ in prompts]
        self.overruled: Counter[str] = Counter()

    @torch.inference_mode()
    def run(self, tokens: int) -> None:
        for prompt, cache, out in zip(self._prompts, self._caches, self.tokens, strict=True):
            logits = self._reference.model(torch.tensor([prompt]), past_key_values=cache).logits
            out.append(int(logits[0, -1].argmax()))
        for _ in range(tokens - 1):
            self._step()

    def _step(self) -> None:
        parts = zip(self._prompts, self.tokens, self._own, self._caches, strict=True)
        walks = [
            self._reference.walk(
                out[-1], len(prompt) + len(out) - 1, plan, cache, "none", rule, ONES
            )
            for prompt, out, (plan, rule), cache in parts
        ]
        told: list[bool | None] = [None] * len(walks)
        for layer in range(TINY_LAYERS):
            # Who does not come here follows a plan that leaves the MLP out.
            here = [one for one, (plan, _) in enumerate(self._own) if layer not in mlps(plan)]
            for one in here:
                assert self._go_on(one, walks[one], told[one]) == layer
            votes = {one: self._own[one][1].leaves_out(layer) for one in here}
            may = {one: self._decides(self._own[one][1]) for one in here}
            for one in here:
                told[one] = self._told(one, votes, may)
                self.left_out[one][layer] += bool(told[one])
                self.overruled[f"{votes[one]} but {told[one]}"] += votes[one] != told[one]
        for one, walk in enumerate(walks):
            assert self._go_on(one, walk, told[one]) is None

    def _decides(self, rule: MlpRule) -> bool:
        return bool(rule.middle) and len(rule.left_out) > rule.warm_up

    def _told(self, one: int, votes: dict[int, bool], may: dict[int, bool]) -> bool:
        if self._batch_rule == "all":
            return all(votes.values())
        return may[one] and 2 * sum(votes.values()) > sum(may.values())

    def _go_on(
        self, one: int, walk: Generator[int, bool, torch.Tensor], told: bool | None
    ) -> int | None:
        try:
            return next(walk) if told is None else walk.send(told)
        except StopIteration as end:
            self.tokens[one].append(int(end.value.argmax()))
            return None


@pytest.mark.parametrize("batch_rule", RULES)
@pytest.mark.parametrize(("threshold", "max_skip"), [(0.9, None), (0.8, 2), (ALWAYS, None)])
def test_sequences_that_go_together(
    make: Callable[..., Gated], batch_rule: str, threshold: float, max_skip: int | None
) -> None:
    gated = make(threshold, max_skip=max_skip, batch_rule=batch_rule)
    prompts = random_prompts(90, 9, longest=25)[: 9 if batch_rule == "majority" else 3]
    arguments: list[Arguments] = [None] * (len(prompts) - 2) + [{"adaskip_budget": 0.85}] * 2
    if batch_rule == "majority":  # others need not agree, and do not vote
        arguments[3:5] = [{"adaskip": "off"}, {"adaskip_skip": [2, "mlp:4"]}]
    want = Together(gated, prompts, arguments)
    want.run(TOKENS)
    assert gated.run(prompts, arguments, TOKENS) == want.tokens
    for ran, left_out, one in zip(
        gated.ran(prompts, arguments), want.left_out, arguments, strict=True
    ):
        if ran is not None:
            plan, _ = gated.followed(one)
            counts = [(TOKENS - 1) * (layer in mlps(plan)) for layer in range(TINY_LAYERS)]
            assert ran["left_out"][1::2] == [
                count + left_out[layer] for layer, count in enumerate(counts)
            ]
    assert any(map(sum, (each.values() for each in want.left_out)))
    if threshold != ALWAYS:
        assert want.overruled["True but False"]
        assert bool(want.overruled["False but True"]) == (batch_rule == "majority")


def test_by_majority_a_plan_comes_on_top_of_max_skip(make: Callable[..., Gated]) -> None:
    """It bounds what a token would leave out by itself; here the third would stop at MLP 2."""
    gated = make(ALWAYS, warm_up=0, max_skip=2, batch_rule="majority")
    prompts = random_prompts(92, 3, longest=25)
    gated.run(prompts, [None, None, {"adaskip_budget": 0.95}], 9)
    (ran,) = gated.ran(prompts[2:], [{"adaskip_budget": 0.95}])
    assert ran["left_out"][1::2] == [0, 0, 8, 8, 0, 0, 8, 0]


def test_one_dense_neighbour_forbids_what_all_must_agree_to(make: Callable[..., Gated]) -> None:
    gated = make(ALWAYS, warm_up=0, batch_rule="all")
    prompts = random_prompts(91, 5, longest=25)
    dense = gated.run(prompts, [{"adaskip": "off"}] * 5, TOKENS)
    assert gated.run(prompts, [*[None] * 4, {"adaskip": "off"}], TOKENS) == dense
    assert gated.run(prompts, [None] * 5, TOKENS) != dense


def test_a_neighbour_s_plan_agrees_where_it_leaves_the_same_out(
    make: Callable[..., Gated],
) -> None:
    """By what vLLM's own modules are called with: these MLPs are not launched."""
    gated = make(ALWAYS, warm_up=0, batch_rule="all")
    launched: Counter[int] = Counter()

    def watch(model: Any) -> list[Any]:
        def hook(layer: int) -> Callable[..., None]:
            return lambda module, args, output: launched.update([layer])

        layers = enumerate(model.model.layers)
        return [layer.mlp.register_forward_hook(hook(index)) for index, layer in layers]

    handles = gated.llm.apply_model(watch)[0]
    gated.run([[1, 2], [3, 4]], [None, {"adaskip_skip": ["mlp:3", "mlp:5"]}], 6)
    for handle in handles:
        handle.remove()
    runs = [launched[layer] for layer in range(TINY_LAYERS)]
    assert runs == [1 if layer in (3, 5) else 6 for layer in range(TINY_LAYERS)]
    assert {3, 5} < set(MIDDLE)


def test_a_rule_is_refused_where_sequences_decide() -> None:
    with pytest.raises(ConfigError, match=r"adaskip\.batch_rule: 'all' is not allowed: .*'exact'"):
        AdaSkipConfig.parse({"method": "ffn-skip", "batch_rule": "all"})
