# SPDX-License-Identifier: Apache-2.0
"""Engines with method ``ffn-skip`` token by token, and what their sequences must come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from conftest import TINY_LAYERS, TINY_SHAPE

from helpers.batches import sampling
from helpers.reference import MlpRule, Reference
from vllm_adaskip import DecoderShape, SkipPlan, engine_args
from vllm_adaskip.classifiers.ffn_skip.method import FfnSkip, FfnSkipOptions

BLOCK = 32
MIDDLE = range(1, TINY_LAYERS - 1)
#: From never to always; at those between tokens differ, see `varied`.
NEVER, ALWAYS = 1.01, -1.0
THRESHOLDS = [NEVER, 0.95, 0.9, 0.8, ALWAYS]

Arguments = dict[str, Any] | None


class Gated:
    """An engine with the method, and what each of its sequences must come to."""

    def __init__(self, llm: Any, reference: Reference, **options: Any) -> None:
        self.llm = llm
        self.reference = reference
        self.options = FfnSkipOptions(scope="token", **options)
        self._method = FfnSkip(DecoderShape(*TINY_SHAPE), self.options)

    def rule(self) -> MlpRule:
        own = self.options
        return MlpRule(MIDDLE, own.threshold, own.warm_up, own.max_skip or TINY_LAYERS)

    def want(
        self, prompt: list[int], arguments: Arguments, tokens: int
    ) -> tuple[list[int], SkipPlan, MlpRule]:
        """Return tokens, the plan that holds for all of them, and what was left out beyond it."""
        plan, rule = self.followed(arguments)
        got, _ = self.reference.generate(prompt, plan.entries(), tokens, rule=rule)
        return got, plan, rule

    def followed(self, arguments: Arguments) -> tuple[SkipPlan, MlpRule]:
        """Return a request's plan, and the rule beyond it."""
        arguments = arguments or {}
        rule = self.rule()
        if arguments.get("adaskip") == "off" or "adaskip_skip" in arguments:
            rule = MlpRule(range(0), 0)
            plan = SkipPlan.parse(arguments.get("adaskip_skip", []), TINY_LAYERS)
        else:
            plan = self._method.decide(arguments.get("adaskip_max_compute", 1.0), None)
        return plan, rule

    def run(
        self, prompts: list[list[int]], arguments: list[Arguments], tokens: int
    ) -> list[list[int]]:
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [sampling(None, tokens, extra_args=one) for one in arguments],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def check(
        self,
        prompts: list[list[int]],
        arguments: list[Arguments],
        tokens: int = 24,
        *,
        replayed: bool = False,
    ) -> list[MlpRule]:
        """Run a batch and compare tokens and, unless some are replayed, what was counted."""
        before = self.mlp_run()
        got = self.run(prompts, arguments, tokens)
        counted = self.mlp_run()
        counted.subtract(before)
        ran: Counter[int] = Counter()
        rules = []
        for prompt, one, output in zip(prompts, arguments, got, strict=True):
            want, plan, rule = self.want(prompt, one, tokens)
            assert output == want, f"{one}, margin {rule.margin:.2g}"
            for left_out in rule.left_out:
                ran.update(set(range(TINY_LAYERS)) - set(left_out) - mlps(plan))
            rules.append(rule)
        assert replayed or counted == ran
        return rules

    def ran(self, prompts: list[list[int]], arguments: list[Arguments]) -> list[Any]:
        requests = list(zip(arguments, prompts, strict=True))
        found: list[Any] = self.llm.collective_rpc("adaskip_ran", args=(requests,))[0]
        return found

    def must_have_run(self, prompt: list[int], arguments: Arguments, tokens: int) -> Any:
        """Return what `ran` says of a gated request, by the reference."""
        _, plan, rule = self.want(prompt, arguments, tokens)
        left_out = [0] * (2 * TINY_LAYERS)
        for each in rule.left_out:
            for layer in mlps(plan) | set(each):
                left_out[2 * layer + 1] += 1
        return {"tokens": tokens - 1, "left_out": left_out}

    def mlp_run(self) -> Counter[int]:
        (report,) = self.llm.collective_rpc("adaskip_report")
        return Counter(dict(enumerate(report["mlp_run"])))


def mlps(plan: SkipPlan) -> set[int]:
    return {layer for layer in range(TINY_LAYERS) if plan.mlp >> layer & 1}


def varied(rules: list[MlpRule]) -> int:
    """How many different sets of MLPs single tokens left out."""
    return len({tuple(one) for rule in rules for one in rule.left_out})


def maker(engine: Callable[..., Any], model: str) -> Callable[..., Gated]:
    """Engines with small blocks, as many as asked for."""
    reference = Reference(model)
    made: dict[str, Gated] = {}

    def make(
        threshold: float = 0.9,
        warm_up: int = 3,
        max_skip: int | None = None,
        engine_options: dict[str, Any] | None = None,
        **server: Any,
    ) -> Gated:
        own: dict[str, Any] = {"threshold": threshold, "warm_up": warm_up, "max_skip": max_skip}
        if (key := repr((own, engine_options, server))) not in made:
            plugin = engine_args(method="ffn-skip", scope="token", **own, **server)
            options = {"disable_log_stats": False, "block_size": BLOCK, **(engine_options or {})}
            made[key] = Gated(engine(model, **options, **plugin), reference, **own)
        made[key].llm.reset_prefix_cache()
        return made[key]

    return make
