# SPDX-License-Identifier: Apache-2.0
"""Methods ``adainfer`` and ``exit``: who stops early, after which layer, and what the others read.

The rule is written down once more, plainly, in `reference.Exit`. Fails when tokens are looked at or
leave at another's place, when what left is not filled before deeper tokens read it (preemption),
when a row that stays sees fewer or other tokens because a neighbour left, and when blocks that
lack K/V in deep layers are found by anybody.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY_LAYERS, TINY_SHAPE
from helpers.batches import random_plan, random_prompts, sampling
from helpers.profiles import write_adainfer
from helpers.reference import Exit, Reference

from vllm_adaskip import DecoderShape, SkipPlan, engine_args
from vllm_adaskip.classifiers import METHODS
from vllm_adaskip.classifiers.adainfer.rule_file import load_rule
from vllm_adaskip.classifiers.adainfer.rules import Crf, ExitRule, Svm
from vllm_adaskip.classifiers.profile import Profile

BLOCK = 32
SHAPE = DecoderShape(*TINY_SHAPE)
CHECKS = [1, 2, 4, 6]
#: ``(top_prob, gap)``, from never to always; at those between tokens differ, see `varied`.
NEVER, ALWAYS = (2.0, 0.0), (0.0, 0.0)
SOMETIMES = (0.04, 0.01)
#: The same where the features are over a few tokens.
FEW = (0.7, 0.5)
DENSE: dict[str, Any] = {"adaskip": "off"}

Arguments = dict[str, Any] | None


class Early:
    """An engine with a method that exits, and what each of its requests must come to."""

    def __init__(self, llm: Any, reference: Reference, server: dict[str, Any]) -> None:
        self.llm = llm
        self.reference = reference
        self.server = server
        self.kv_fill = server.get("kv_fill", "none")
        own = {k: v for k, v in server.items() if k not in ("kv_fill", "method", "profile")}
        method, profile = METHODS[server["method"]], server.get("profile")
        if profile:
            own = {**Profile.load(Path(profile)).options, **own}
            self._rule = load_rule(own["classifier"], Path(profile))
        options = method.Options.model_validate(own)
        self.method = method(SHAPE, options, Path(profile) if profile else None)

    def exit(self) -> Exit:
        own = self.server
        if own["method"] == "exit":
            return Exit([])
        if "profile" in own:
            return Exit(self._rule.layers, rule=self._settled)
        candidates = own.get("candidates") if own.get("vocabulary") == "candidates" else None
        warm_up = own.get("warm_up", 0)
        return Exit(own["check_layers"], own["top_prob"], own["gap"], warm_up, candidates)

    def _settled(self, seen: list[tuple[float, float]]) -> bool:
        memory = np.zeros((1, 2))
        for layer, found in zip(self._rule.layers, seen, strict=False):
            settled, memory = self._rule.settled(layer, np.array([found]), memory)
        return bool(settled[0])

    def want(
        self, prompt: list[int], arguments: Arguments, tokens: int
    ) -> tuple[list[int], SkipPlan, Exit | None]:
        """Return tokens, the plan of the generated ones, and who stopped where, if asked."""
        arguments = arguments or {}
        if arguments.get("adaskip") == "off" or "adaskip_skip" in arguments:
            plan = SkipPlan.parse(arguments.get("adaskip_skip", []), TINY_LAYERS)
            return self._generated(prompt, plan, tokens, None), plan, None
        statistics = None
        if self.method.width:
            statistics = self.reference.observe(prompt, self.method)
        plan = self.method.decide(arguments.get("adaskip_max_compute", 1.0), statistics)
        exit = self.exit()
        if self.method.gate_scope == "answer" and tokens == 1:
            depth = TINY_LAYERS - plan.attention.bit_count()
            return self.reference.answer(prompt, exit, depth)[0], plan, exit
        watched = exit if self.method.gate_scope == "token" else None
        return self._generated(prompt, plan, tokens, watched), plan, watched

    def _generated(
        self, prompt: list[int], plan: SkipPlan, tokens: int, exit: Exit | None
    ) -> list[int]:
        return self.reference.generate(
            prompt, plan.entries(), tokens, kv_fill=self.kv_fill, exit=exit
        )[0]

    def run(
        self,
        prompts: list[list[int]],
        arguments: list[Arguments],
        tokens: int | list[int],
        **more: Any,
    ) -> list[list[int]]:
        counts = [tokens] * len(prompts) if isinstance(tokens, int) else tokens
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [
                sampling(None, count, extra_args=one, **more)
                for one, count in zip(arguments, counts, strict=True)
            ],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def check(
        self,
        prompts: list[list[int]],
        arguments: list[Arguments],
        tokens: int | list[int] = 20,
        *,
        replayed: bool = False,
    ) -> list[Exit]:
        """Run a batch and compare tokens and, unless some are replayed, what was counted."""
        before = self.report()
        got = self.run(prompts, arguments, tokens)
        after = self.report()
        counts = [tokens] * len(prompts) if isinstance(tokens, int) else tokens
        ran, exits, watched = Counter[int](), Counter[int](), []
        for prompt, one, output, count in zip(prompts, arguments, got, counts, strict=True):
            want, plan, exit = self.want(prompt, one, count)
            assert output == want, f"{one}, margin {exit and exit.margin:.2g}"
            ends = TINY_LAYERS - (plan.attention & plan.mlp).bit_count()
            depths = exit.depths if exit else []
            if exit and count > 1:  # warm-up tokens are not watched
                depths = [ends] * (count - 1 - len(depths)) + depths
            answers = self.method.gate_scope == "answer" and exit is not None
            for depth in depths if exit else [TINY_LAYERS] * (count - 1):
                stops = depth < (TINY_LAYERS if answers else ends)
                exits.update([depth - 1] * (exit is not None and stops))
                kept = () if answers else range(min(depth, TINY_LAYERS))
                ran.update(layer for layer in kept if not plan.attention >> layer & 1)
            watched += [exit] if exit else []
        if not replayed:
            for name, counted in (("attn_run", ran), ("exits", exits)):
                assert (name in after) or self.method.gate_scope is None
                if name not in after:
                    continue
                difference = [a - b for a, b in zip(after[name], before[name], strict=True)]
                assert difference == [counted[layer] for layer in range(TINY_LAYERS)], name
        return watched

    def report(self) -> dict[str, Any]:
        (report,) = self.llm.collective_rpc("adaskip_report")
        return dict(report)

    def cached(self, prompt: list[int], arguments: Arguments, tokens: int = 1) -> int:
        """How many prompt tokens of a request the prefix cache had; its tokens are checked."""
        (output,) = self.llm.generate(
            {"prompt_token_ids": prompt},
            sampling(None, tokens, extra_args=arguments),
            use_tqdm=False,
        )
        assert list(output.outputs[0].token_ids) == self.want(prompt, arguments, tokens)[0]
        found: int = output.num_cached_tokens
        return found


def varied(exits: list[Exit]) -> int:
    """After how many different layers tokens stopped."""
    return len({depth for one in exits for depth in one.depths})


@pytest.fixture(scope="module")
def make(engine: Callable[..., Any], tiny_llama: str) -> Callable[..., Early]:
    """Engines with small blocks, as many as asked for."""
    reference = Reference(tiny_llama)
    made: dict[str, Early] = {}

    def make(
        scope: str,
        features: tuple[float, float] = SOMETIMES,
        engine_options: dict[str, Any] | None = None,
        **server: Any,
    ) -> Early:
        defaults: dict[str, Any] = {"method": "adainfer"}
        if server.get("method", "adainfer") == "adainfer" and "profile" not in server:
            defaults |= {"check_layers": CHECKS, "top_prob": features[0], "gap": features[1]}
        if scope == "token":
            defaults["kv_fill"] = "copy"
        server = {"scope": scope, **defaults, **server}
        if (key := repr((engine_options, sorted(server.items())))) not in made:
            options = {"disable_log_stats": False, "block_size": BLOCK, **(engine_options or {})}
            llm = engine(tiny_llama, **options, **engine_args(**server))
            made[key] = Early(llm, reference, server)
        made[key].llm.reset_prefix_cache()
        return made[key]

    return make


CHUNKED = {"max_num_batched_tokens": 48}
Make = Callable[..., Early]


def mixed(seed: int, own: list[Arguments]) -> list[Arguments]:
    """The given arguments among dense requests and such that bring a plan."""
    rng = random.Random(seed)
    plans: list[Arguments] = [{"adaskip_skip": random_plan(rng, TINY_LAYERS)} for _ in range(4)]
    arguments = [*own, DENSE, {"adaskip_skip": []}, *plans]
    rng.shuffle(arguments)
    return arguments


@pytest.mark.parametrize("features", [NEVER, SOMETIMES, ALWAYS])
@pytest.mark.parametrize("kv_fill", ["none", "copy", "project"])
def test_answers_in_one_batch_with_others(
    make: Make, kv_fill: str, features: tuple[float, float]
) -> None:
    """Prompts come in chunks beside tokens that are decoded; half the others ask for one token."""
    early = make("answer", features, CHUNKED, kv_fill=kv_fill)
    arguments = mixed(80, [None] * 8)
    tokens = [1 if one is None or index % 2 else 12 for index, one in enumerate(arguments)]
    prompts = random_prompts(80, 14)
    exits = early.check([*prompts, *prompts[:2]], [*arguments, None, None], [*tokens, 12, 12])
    want = {NEVER: 1, SOMETIMES: 2, ALWAYS: 1}[features]
    assert varied(exits) >= want and len(exits) >= 8


@pytest.mark.parametrize("features", [NEVER, SOMETIMES, ALWAYS])
@pytest.mark.parametrize("kv_fill", ["copy", "project"])
def test_tokens_in_one_batch_with_others(
    make: Make, kv_fill: str, features: tuple[float, float]
) -> None:
    early = make("token", features, CHUNKED, kv_fill=kv_fill)
    exits = early.check(random_prompts(81, 14), mixed(81, [None] * 8))
    assert varied(exits) == {NEVER: 1, SOMETIMES: len(CHECKS) + 1, ALWAYS: 1}[features]


@pytest.mark.parametrize("kv_fill", ["none", "copy", "project"])
def test_prompts_decide_in_one_batch_with_others(make: Make, kv_fill: str) -> None:
    early = make("prompt", SOMETIMES, CHUNKED, kv_fill=kv_fill)
    prompts = random_prompts(82, 14)
    arguments = mixed(82, [None] * 8)
    early.check(prompts, arguments)
    requests = list(zip(arguments, prompts, strict=True))
    (plans,) = early.llm.collective_rpc("adaskip_plans", args=(requests,))
    decided = [
        plan for plan, one in zip(plans, arguments, strict=True) if one is None and plan is not None
    ]
    assert len(decided) == 8 and len({str(plan) for plan in decided}) >= 3


@pytest.mark.parametrize("scope", ["answer", "prompt", "token"])
def test_greedy_answers_of_who_never_exits_are_the_dense_ones(make: Make, scope: str) -> None:
    """To the last token; log-probabilities but for the rounding of other kernels."""
    early = make(scope, NEVER)
    prompts = random_prompts(83, 6)
    tokens = 1 if scope == "answer" else 16
    drawn, likely = [], []
    for arguments in (None, DENSE):
        early.llm.reset_prefix_cache()
        outputs = early.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            sampling(None, tokens, extra_args=arguments, logprobs=1),
            use_tqdm=False,
        )
        drawn.append([output.outputs[0].token_ids for output in outputs])
        likely.append([output.outputs[0].cumulative_logprob for output in outputs])
    assert drawn[0] == drawn[1] and likely[0] == pytest.approx(likely[1], abs=1e-3)


@pytest.mark.parametrize("scope", ["answer", "prompt", "token"])
def test_a_sequence_does_not_notice_its_neighbours(make: Make, scope: str) -> None:
    early = make(scope)
    prompts = random_prompts(84, 12)
    tokens = 1 if scope == "answer" else 16
    together = early.run(prompts, [None] * 12, tokens)
    early.llm.reset_prefix_cache()
    assert together == [early.run([prompt], [None], tokens)[0] for prompt in prompts]


def test_an_exited_prompt_is_found_by_nobody(make: Make) -> None:
    """Nor is it in a later step of its own, and the blocks it finds itself stay everybody's."""
    early = make("answer", ALWAYS)
    prompt = [random.Random(85).randrange(512) for _ in range(100)]
    for one in (None, None, DENSE):
        assert early.cached(prompt, one) == 0
    for one in (None, DENSE):  # the dense one's
        assert early.cached(prompt, one) == 96
    longer = [*prompt, *prompt]
    assert early.cached(longer, None) == 96
    assert early.cached(longer, None) == 96
    assert early.cached(longer, None, tokens=4) == 96
    assert early.cached(longer, None) == 192


def test_chunks_before_the_last_are_found_by_all(make: Make) -> None:
    """They ran at full depth; also the block that the last chunk goes on with is not shared."""
    early = make("answer", ALWAYS, CHUNKED)
    prompt = [random.Random(86).randrange(512) for _ in range(100)]  # 48, 48, 4
    assert early.cached(prompt, None) == 0
    assert early.cached(prompt, DENSE, tokens=8) == 96
    short = prompt[:80]  # 48, 32: the second block begins in the first chunk, ends in the second
    early.llm.reset_prefix_cache()
    assert early.cached(short, None) == 0
    assert early.cached(short, DENSE, tokens=8) == 32


def test_a_dense_request_beside_an_exited_one_with_its_prompt(make: Make) -> None:
    """vLLM lets requests of one step share blocks that are still to be computed."""
    early = make("answer", ALWAYS)
    prompt = [random.Random(87).randrange(512) for _ in range(70)]
    own: list[Arguments] = [None, DENSE, None, {"adaskip_skip": [3]}, None]
    early.check([prompt] * 5, own, [1, 12, 1, 12, 12])


def test_log_probabilities_of_a_prompt_are_those_of_the_whole_model(make: Make) -> None:
    early = make("answer", ALWAYS)
    prompt = random_prompts(88, 1, longest=60)[0]
    found = [
        early.llm.generate(
            {"prompt_token_ids": prompt},
            sampling(None, 1, extra_args=one, prompt_logprobs=1),
            use_tqdm=False,
        )[0].prompt_logprobs
        for one in (None, DENSE)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("chunk", [256, 24])
@pytest.mark.parametrize(
    ("scope", "kv_fill"), [("token", "copy"), ("token", "project"), ("prompt", "none")]
)
def test_again_after_preemption(
    make: Make, scope: str, kv_fill: str, chunk: int, prefix_caching: bool
) -> None:
    """Tokens that exited are replayed in one query with such that went deeper."""
    early = make(
        scope,
        engine_options={
            "num_gpu_blocks_override": 12,
            "max_num_batched_tokens": chunk,
            "enable_prefix_caching": prefix_caching,
        },
        kv_fill=kv_fill,
    )
    arguments: list[Arguments] = [None] * 6 + [DENSE, {"adaskip_skip": [2, "mlp:4"]}]
    early.check(random_prompts(89, 8, longest=40), arguments, 80, replayed=True)
    counters = {metric.name: getattr(metric, "value", 0) for metric in early.llm.get_metrics()}
    assert counters["vllm:num_preemptions"] > 0


def test_answers_after_preemption(make: Make) -> None:
    early = make("answer", engine_options={"num_gpu_blocks_override": 12, **CHUNKED})
    prompts = random_prompts(90, 16, longest=100)
    arguments: list[Arguments] = [None, DENSE] * 8
    early.check(prompts, arguments, [1, 60] * 8, replayed=True)


@pytest.mark.parametrize("warm_up", [1, 7])
def test_warm_up_counts_the_generated_tokens_of_each_sequence(make: Make, warm_up: int) -> None:
    early = make("token", ALWAYS, warm_up=warm_up)
    early.check(random_prompts(91, 4), [None] * 4, 16)


@pytest.mark.parametrize("scope", ["prompt", "token"])
def test_parallel_samples_exit_each_by_itself(make: Make, scope: str) -> None:
    early = make(scope)
    prompts = random_prompts(92, 3)
    params = sampling(None, 16, n=3, temperature=1.0, top_k=1)
    outputs = early.llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        want = early.want(prompt, None, 16)[0]
        assert [list(one.token_ids) for one in output.outputs] == [want] * 3


@pytest.mark.parametrize("features", [NEVER, SOMETIMES])
@pytest.mark.parametrize("scope", ["answer", "prompt", "token"])
def test_a_budget_is_a_depth_that_nobody_goes_beyond(
    make: Make, scope: str, features: tuple[float, float]
) -> None:
    early = make(scope, features)
    shares = [0.9, 0.6, 0.2] * 3
    arguments: list[Arguments] = [*({"adaskip_max_compute": one} for one in shares), None, DENSE]
    tokens = 1 if scope == "answer" else 12
    exits = early.check(random_prompts(93, 11), arguments, tokens)
    for share, exit in zip(shares, exits, strict=False):
        assert max(exit.depths) <= share * TINY_LAYERS


@pytest.mark.parametrize(("vocabulary", "allowed"), [("candidates", None), ("request", [3, 99])])
def test_features_over_a_few_tokens(make: Make, vocabulary: str, allowed: list[int] | None) -> None:
    """The prediction itself is over all that the request allows."""
    few = [5, 17, 200, 511]
    own = {"candidates": few} if vocabulary == "candidates" else {}
    early = make("answer", FEW, vocabulary=vocabulary, **own)
    prompts = random_prompts(94, 12)
    before = early.report()["exits"]
    early.run(prompts, [None] * 12, 1, allowed_token_ids=allowed)
    exits = [a - b for a, b in zip(early.report()["exits"], before, strict=True)]
    rules = [Exit(CHECKS, *FEW, 0, allowed or few) for _ in prompts]
    for prompt, rule in zip(prompts, rules, strict=True):
        early.reference.answer(prompt, rule)
    depths = Counter(depth for rule in rules for depth in rule.depths)
    assert exits == [depths[layer + 1] for layer in range(TINY_LAYERS - 1)] + [0]
    assert varied(rules) >= 3


def test_requests_with_different_allowed_tokens_in_one_batch(make: Make) -> None:
    early = make("answer", FEW, vocabulary="request")
    prompts = random_prompts(95, 9)
    sets: list[list[int] | None] = [[7], [3, 99], [1, 2, 3, 4], None, [3, 99]] * 2
    before = early.report()["exits"]
    early.llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [sampling(None, 1, allowed_token_ids=one) for one in sets[:9]],
        use_tqdm=False,
    )
    exits = [a - b for a, b in zip(early.report()["exits"], before, strict=True)]
    depths: Counter[int] = Counter()
    for prompt, allowed in zip(prompts, sets, strict=False):
        rule = Exit(CHECKS, *FEW, 0, allowed)
        early.reference.answer(prompt, rule)
        depths.update(rule.depths)
    assert exits == [depths[layer + 1] for layer in range(TINY_LAYERS - 1)] + [0]


@pytest.mark.parametrize("scope", ["answer", "prompt", "token"])
@pytest.mark.parametrize("kind", ["svm", "crf"])
def test_rules_of_a_profile(
    make: Make, tiny_llama: str, tmp_path_factory: pytest.TempPathFactory, kind: str, scope: str
) -> None:
    """Written by hand for what this model's predictions look like."""
    mean, scale = np.array([0.04, 0.012]), np.array([0.015, 0.01])
    rules: dict[str, ExitRule] = {
        "svm": Svm(
            (1, 3, 5),
            np.stack([mean] * 3),
            np.stack([scale] * 3),
            np.array([-0.1, 0.0, -0.2]),
            tuple(np.array([[1.0, 1.0], [-1.0, -0.5], [0.0, 2.0]]) for _ in range(3)),
            tuple(np.array([1.0, -1.0, 0.4]) for _ in range(3)),
            np.array([0.5, 0.7, 0.9]),
        ),
        "crf": Crf(
            (1, 3, 5),
            np.stack([[[0, 0, 0], [*(2 / scale), -3.0 - (2 * mean / scale).sum()]]] * 3),
            np.array([[0.5, -0.5], [-1.0, 1.0]]),
        ),
    }
    folder = write_adainfer(tmp_path_factory.mktemp("rules") / kind, tiny_llama, rules[kind])
    early = make(scope, profile=folder)
    prompts = random_prompts(101, 10)
    exits = early.check(prompts, [None] * 9 + [DENSE], 1 if scope == "answer" else 12)
    depths = {early.want(prompt, None, 1)[1].attention for prompt in prompts}
    assert (len(depths) if scope == "prompt" else varied(exits)) >= 2


def rows_of(early: Early) -> tuple[Counter[tuple[int, int]], list[Any]]:
    """Count calls of each layer's MLP by the tokens it is given."""
    rows: Counter[tuple[int, int]] = Counter()

    def watch(model: Any) -> list[Any]:
        def hook(layer: int) -> Callable[..., None]:
            return lambda module, args, output: rows.update([(layer, len(output))])

        return [
            layer.mlp.register_forward_hook(hook(index))
            for index, layer in enumerate(model.model.layers)
        ]

    return rows, early.llm.apply_model(watch)[0]


def test_deeper_layers_are_not_launched(make: Make) -> None:
    """By what vLLM's own modules are called with: whole prompts, and tokens."""
    early = make("answer", ALWAYS)
    rows, handles = rows_of(early)
    early.run([[1] * 30, [2] * 20, [3] * 10], [None, DENSE, None], 1)
    assert dict(rows) == {(0, 60): 1, (1, 60): 1, **{(layer, 20): 1 for layer in range(2, 8)}}
    rows.clear()
    early.run([[4] * 30, [5] * 20], [None, None], 1)
    assert dict(rows) == {(0, 50): 1, (1, 50): 1}
    early = make("token", ALWAYS)
    again, more = rows_of(early)
    early.run([[1, 2], [3, 4], [5, 6]], [None, DENSE, None], 6)
    assert [again[layer, 3] for layer in range(TINY_LAYERS)] == [5, 5, 0, 0, 0, 0, 0, 0]
    assert [again[layer, 1] for layer in range(TINY_LAYERS)] == [0, 0, 5, 5, 5, 5, 5, 5]
    for handle in [*handles, *more]:
        handle.remove()


@pytest.mark.parametrize("scope", ["sequence", "answer"])
def test_static_early_exit(make: Make, scope: str) -> None:
    early = make(scope, method="exit", layers=5)
    prompts = random_prompts(96, 8)
    early.check(prompts, [None] * 6 + [DENSE, {"adaskip_skip": [1]}], [1] * 4 + [12] * 4)


@pytest.mark.parametrize("scope", ["answer", "prompt", "token"])
def test_compiled(make: Make, scope: str) -> None:
    early = make(scope, engine_options={"enforce_eager": False})
    arguments: list[Arguments] = [None] * 5 + [DENSE, {"adaskip_skip": ["mlp:2"]}]
    early.check(random_prompts(97, 7), arguments, 1 if scope == "answer" else 12)


def test_in_bfloat16(make: Make) -> None:
    early = make("token", ALWAYS, {"dtype": "bfloat16"})
    prompts = random_prompts(98, 6)
    plan = list(range(CHECKS[0] + 1, TINY_LAYERS))
    got = early.run(prompts, [None] * 6, 12)
    assert got == early.run(prompts, [{"adaskip_skip": plan}] * 6, 12)


def test_gated_answers_are_found_by_their_own_sequence_alone(make: Make) -> None:
    early = make("token")
    prompt = [random.Random(99).randrange(512) for _ in range(40)]
    (answer,) = early.run([prompt], [None], 70)
    for one in (None, DENSE):
        early.llm.reset_prefix_cache()
        early.run([prompt], [None], 70)
        assert early.cached([*prompt, *answer, 5, 6], one, 4) == BLOCK


def test_dense_answers_stay_shared_where_a_prompt_s_last_token_decides(make: Make) -> None:
    early = make("prompt")
    prompt = [random.Random(100).randrange(512) for _ in range(40)]
    (answer,) = early.run([prompt], [DENSE], 70)
    assert early.cached([*prompt, *answer, 5], None, 4) == 96


@pytest.mark.parametrize("scope", ["answer", "token"])
def test_what_ran_of_each_request_is_known(make: Make, scope: str) -> None:
    """Of a whole answer its last prompt token counts, which is the one that gives the answer."""
    early = make(scope)
    prompts = random_prompts(991, 12)
    tokens = 1 if scope == "answer" else 15
    watched = early.check(prompts, [None] * len(prompts), tokens)
    asked = [(None, prompt) for prompt in prompts]
    (found,) = early.llm.collective_rpc("adaskip_ran", args=(asked,))
    for exit, ran in zip(watched, found, strict=True):
        assert ran["tokens"] == len(exit.depths) == max(tokens - 1, 1)
        stopped = [sum(depth <= layer for depth in exit.depths) for layer in range(TINY_LAYERS)]
        assert ran["left_out"][0::2] == ran["left_out"][1::2] == stopped
    assert varied(watched) > 2
    (plans,) = early.llm.collective_rpc("adaskip_plans", args=(asked,))
    assert plans == [None] * len(prompts)


def test_requests_for_more_tokens_under_scope_answer_have_a_plan(make: Make) -> None:
    early = make("answer")
    prompts = random_prompts(992, 3)
    early.check(prompts, [None] * 3, 4)
    for name, want in (("adaskip_ran", None), ("adaskip_plans", [])):
        (found,) = early.llm.collective_rpc(name, args=([(None, one) for one in prompts],))
        assert found == [want] * 3
