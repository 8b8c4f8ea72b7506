# SPDX-License-Identifier: Apache-2.0
"""The state machine: what hypothesis may do to an engine, and in which shapes."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from helpers.batches import Entries, PromptPlan, random_plan
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from torture.engines import LAYERS, LONGEST_PROMPT, VOCABULARY
from torture.traffic import MOST_STEPS, Request, Traffic

#: Plans that many requests share, so that cached blocks meet requests with an equal plan.
COMMON_PLANS: list[Entries] = [[2, "attn:4", "mlp:5"], [0, 7], ["attn:1", "attn:6"], [3, 4, 5]]
MALFORMED: list[dict[str, Any]] = [
    {"adaskip_skip": [LAYERS]},
    {"adaskip_skip": [-1]},
    {"adaskip_skip": ["attn:x"]},
    {"adaskip_skip": "2"},
    {"adaskip_skip": [True, 1.5]},
    {"adaskip_skip": list(range(LAYERS))},
    {"adaskip_skips": [2]},
    {"adaskip": "off", "adaskip_skip": [2]},
    {"adaskip_prompt_exit": 0},
    {"adaskip_prompt_exit": 4, "adaskip_prompt_skip": [5]},
    {"adaskip_prompt_exit": 4, "adaskip_prompt_tail": 0},
]
SEEDS = st.integers(0, 2**16 - 1)
PLANS = st.one_of(
    st.just([]),
    st.sampled_from(COMMON_PLANS),
    SEEDS.map(lambda seed: random_plan(random.Random(seed), LAYERS)),
)
#: Few, so that cached blocks of prompts meet prompts under an equal plan; tails of several lengths.
PROMPT_PLANS: st.SearchStrategy[PromptPlan | None] = st.one_of(
    st.none(),
    st.tuples(
        st.sampled_from([[4, 5, 6, 7], [2, "attn:4", "mlp:5"], ["attn:0", 7]]),
        st.sampled_from([1, 16, 40]),
    ),
)
#: Two letters of one word, or the end of one and the start of the next; they do occur.
STOPS = st.sampled_from([[], [], [], ["in"], ["er", "s t"], ["e b", "qu"], [" b"]])


def words(seed: int, count: int) -> list[int]:
    """The first ``count`` of a seed's random tokens: equal seeds give common prefixes."""
    rng = random.Random(seed)
    return [rng.randrange(VOCABULARY) for _ in range(count)]


#: A shared beginning that ends at, just before or just after a block, then a tail of its own.
PROMPTS = st.builds(
    lambda start, shared, seed, own: words(start, shared) + words(100 + seed, own),
    st.integers(0, 2),
    st.sampled_from([0, 0, 31, 32, 33, 64, 70, 96]),
    st.integers(0, 9),
    st.integers(1, 30),
)
MAX_TOKENS = st.one_of(st.integers(1, 40), st.integers(30, 40))


@st.composite
def requests(draw: st.DrawFn, prompts: st.SearchStrategy[list[int]] = PROMPTS) -> Request:
    sampled = draw(st.integers(0, 3)) == 0
    stop_seed = draw(st.one_of(st.none(), st.none(), SEEDS))
    return Request(
        draw(prompts)[:LONGEST_PROMPT],
        draw(PLANS),
        draw(MAX_TOKENS),
        stop=draw(STOPS),
        stop_token_ids=[] if stop_seed is None else words(stop_seed, 8),
        logprobs=draw(st.booleans()),
        samples=draw(st.integers(1, 3)) if sampled else 1,
        sampled=sampled,
        prompt_plan=draw(PROMPT_PLANS),
    )


class Torture(RuleBasedStateMachine):
    """One example: an empty engine, traffic, all of it finished and judged, empty again."""

    traffic: Traffic

    @initialize(batch=st.lists(requests(), min_size=4, max_size=12))
    def start(self, batch: list[Request]) -> None:
        for request in batch:
            self.traffic.send(request)

    @rule(batch=st.lists(requests(), min_size=1, max_size=4), steps=st.integers(0, 3))
    def arrive(self, batch: list[Request], steps: int) -> None:
        for request in batch:
            self.traffic.send(request)
        self.run(steps)

    @rule(
        replies=st.lists(st.tuples(requests(), st.integers(1, 40)), min_size=1, max_size=3),
        same_plan=st.booleans(),
        idle=st.booleans(),
    )
    def converse(self, replies: list[tuple[Request, int]], same_plan: bool, idle: bool) -> None:
        """The latest prompts with their answers, and more: generated tokens come as prompt.

        When the engine is idle the blocks of these answers are still in its cache.
        """
        self.run(MOST_STEPS if idle else 0)
        latest = self.traffic.history[: -1 - len(replies) : -1]
        for (shape, new), (earlier, samples) in zip(replies, latest, strict=False):
            prompt = earlier.prompt + samples[0][0] + words(new, new)
            plan = earlier.plan if same_plan else shape.plan
            self.traffic.send(replace(shape, prompt=prompt[:LONGEST_PROMPT], plan=plan))

    @rule(pick=st.integers(0, 999), shape=requests(), start=SEEDS, length=st.integers(1, 12))
    def again(self, pick: int, shape: Request, start: int, length: int) -> None:
        """An earlier request again, to stop at a piece of its own text, or under another plan."""
        if history := self.traffic.history[-8:]:
            earlier, samples = history[pick % len(history)]
            text = samples[0][1]
            at = start % max(1, len(text))
            stop = [piece] if (piece := text[at : at + length]) else []
            plan = shape.plan if pick % 3 == 0 else earlier.plan
            read = shape.prompt_plan if pick % 4 == 0 else earlier.prompt_plan
            shape = Request(
                earlier.prompt, plan, 40, stop=stop, logprobs=shape.logprobs, prompt_plan=read
            )
        self.traffic.send(shape)

    @rule(
        prompt=PROMPTS,
        plans=st.lists(PLANS, min_size=2, max_size=4),
        same_plan=st.booleans(),
        token=st.integers(100, 101),
        read=PROMPT_PLANS,
    )
    def twins(
        self,
        prompt: list[int],
        plans: list[Entries],
        same_plan: bool,
        token: int,
        read: PromptPlan | None,
    ) -> None:
        """Equal tokens at equal places, but under several plans, or after longer prompts.

        Only one token may be drawn, so their blocks differ in nothing but what must keep them
        apart when one of them is preempted and looks for blocks that others have cached.
        """
        for index, plan in enumerate(plans):
            own = prompt + [token] * index if same_plan else prompt
            plan = plans[0] if same_plan else plan
            self.traffic.send(Request(own, plan, 40, only=[token], prompt_plan=read))

    @rule(steps=st.integers(1, 12))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            if not self.traffic.running:
                break
            self.traffic.step()

    @rule(pick=st.integers(0, 999))
    def abort(self, pick: int) -> None:
        self.traffic.abort(pick)

    @rule(extra_args=st.sampled_from(MALFORMED))
    def refuse(self, extra_args: dict[str, Any]) -> None:
        self.traffic.refuse(extra_args)

    def teardown(self) -> None:
        self.traffic.settle()


def machine(traffic: Traffic) -> type[Torture]:
    """Return the state machine of one engine."""
    return type("Torture", (Torture,), {"traffic": traffic})


def examples(count: int, steps: int) -> settings:
    """Hypothesis's settings for ``count`` examples of up to ``steps`` rules."""
    return settings(
        max_examples=count,
        stateful_step_count=steps,
        deadline=None,  # `soak.py` runs outside of pytest, whose profile says so too
        phases=[Phase.generate],  # a fault names its request in full; shrinking takes minutes
        report_multiple_bugs=False,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
