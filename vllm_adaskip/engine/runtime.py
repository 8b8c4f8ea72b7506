# SPDX-License-Identifier: Apache-2.0
"""What a model asks at every forward: which tokens go through which sub-layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_adaskip.classifiers import Lens
from vllm_adaskip.engine import compat
from vllm_adaskip.engine.compat.kv_cache import KvCache
from vllm_adaskip.engine.crossover import Crossover
from vllm_adaskip.engine.kv_fill import KV_FILLS
from vllm_adaskip.engine.layout import IntArray, Layout
from vllm_adaskip.engine.prompt_observer import PromptObserver
from vllm_adaskip.engine.step_exits import StepExits
from vllm_adaskip.engine.step_plan import StepPlan
from vllm_adaskip.engine.token_gate import StepGate

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention import Attention


class SkipRuntime:
    """One engine's plans, step by step, and the counters of its report.

    Attributes:
        profile: the server's, folder or hub id.

    """

    def __init__(self, vllm_config: VllmConfig, attention: Iterable[Attention], lens: Lens) -> None:
        layers = list(attention)
        self._state = compat.shared_state(vllm_config)
        self._table = self._state.table
        facts = self._state.planner.facts
        self._sub_batches = compat.SubBatches(vllm_config, layers)
        self._cache = KvCache(layers)
        self.kv_fill = KV_FILLS[facts.kv_fill](layers, self._cache)
        hidden_size = vllm_config.model_config.get_hidden_size()
        device = vllm_config.device_config.device
        self.observer = PromptObserver(self._state, self._cache, hidden_size, device, lens)
        classifier = self._state.planner.classifier
        gates = classifier.gates_tokens
        gate = classifier.gate(hidden_size, device) if gates else None
        self.gate = StepGate(gate, self._table)
        exit_gate = classifier.exit_gate(lens) if classifier.exits else None
        self.exits = StepExits(classifier.exits, exit_gate, self._table, self.kv_fill)
        self._crossover = Crossover.model_validate(facts.crossover) if facts.crossover else None
        self._applied = self._crossover
        self._layout: Layout | None = None
        self._starts = b""
        self._only_decodes = False
        self._num_prompt = self._num_generated = 0
        self._version = -1
        self._plan: StepPlan | None = None
        self._is_dense = True
        self._method = facts.method
        self.profile = facts.profile
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._discarded = 0
        self._generated_run = np.zeros(2 * self._table.num_layers, dtype=np.int64)

    def begin_step(self) -> StepPlan | None:
        """Plan the forward that starts now; None when stock vLLM's own may run.

        Costs a few operations on small arrays. A plan is kept as long as rows and phases
        stay, which in steady decoding they do.
        """
        metadata = self._sub_batches.step_metadata()
        if (lengths := self._lengths(metadata)) is None:  # a warm-up: no sequences
            return None
        starts, seq_lens = lengths
        if self._is_stale(starts, seq_lens):
            self._make_plan(starts, seq_lens)
        assert metadata is not None and self._plan is not None and self._layout is not None
        self._count()
        self.observer.begin(self._layout, seq_lens, metadata.block_table)
        self.gate.begin(seq_lens)
        self.exits.begin(seq_lens)
        inside = self.observer.values is not None or self.gate.guarded or self.exits.is_open
        if self._is_dense and not inside:
            return None
        self.kv_fill.begin(self._plan, self._table.skips[: len(seq_lens)], self._layout)
        return self._plan

    def end_step(self) -> None:
        """Finish a forward for which `begin_step` gave a plan; all layers have run."""
        self.kv_fill.finish()
        self.observer.finish()
        self.gate.finish()
        self.exits.finish()

    def running(self, plan: StepPlan) -> AbstractContextManager[Any]:
        """Enter, for this forward, a context in which vLLM's attention sees what is planned."""
        if plan.joined is None and not self.exits.is_open:
            return nullcontext()
        return self._sub_batches.during(plan)

    def go_on(self, rest: StepPlan) -> None:
        """Have what is left of the forward follow another plan."""
        self._sub_batches.arrange(rest)

    def report(self) -> dict[str, Any]:
        """Give cumulative counters, and how many sequences and plans are in the batch now.

        ``*_run[l]`` counts generated tokens that went through sub-layer l; ``discarded`` how often
        a sub-layer was run for a token all the same, because that was cheaper (`Crossover`);
        ``plans`` is `SkipState.plans`; ``coalesced`` counts decisions that others in the batch
        changed. Where a method lets tokens exit, ``exits[l]`` counts those, or with scope
        ``answer`` the requests, that it stopped after layer l.
        """
        run = (self._generated_run - self.gate.left_out - self.exits.left_out).tolist()
        report = {
            "num_layers": self._table.num_layers,
            "prompt_tokens": self._prompt_tokens,
            "decode_tokens": self._generated_tokens,
            "attn_run": run[0::2],
            "mlp_run": run[1::2],
            "discarded": self._discarded,
            "requests": self._table.requests,
            "method": self._method,
            "live_rows": self._table.live_rows,
            "plans": dict(self._state.plans),
            "live_plans": self._table.live_plans,
            "coalesced": self._state.coalesced,
        }
        if self._state.planner.classifier.exits:
            report["exits"] = self.exits.exits.tolist()
        return report

    def plan_of(
        self, extra_args: Mapping[str, Any] | None, prompt: Sequence[int]
    ) -> list[int | str] | None:
        """Give the plan of a request with this prompt, as `SkipPlan.entries`, if it is known."""
        plan = self._state.plan_of(extra_args, prompt)
        return None if plan is None else plan.entries()

    def ran_of(
        self, extra_args: Mapping[str, Any] | None, prompt: Sequence[int]
    ) -> dict[str, Any] | None:
        """Give what ran of gated requests with this prompt, see `adaskip_ran`."""
        if (found := self._state.ran_of(extra_args, prompt)) is None:
            return None
        tokens, left_out = found
        return {"tokens": tokens, "left_out": left_out.tolist()}

    def _lengths(self, metadata: Any | None) -> tuple[IntArray, IntArray] | None:
        """Give ``query_start_loc`` and ``seq_lens`` of the step; None if it has no sequences."""
        if not self._state.is_told_lengths:
            return None if metadata is None else compat.step_lengths(metadata)
        lengths, self._state.lengths = self._state.lengths, None  # a warm-up may come next
        return lengths

    def _is_stale(self, starts: IntArray, seq_lens: IntArray) -> bool:
        if self._layout is None or self._version != self._table.version:
            return True
        if self._applied is not self._applying(seq_lens):
            return True
        if self._only_decodes:  # and goes on so: sequences do not become shorter
            return starts.tobytes() != self._starts
        prompt_lens = self._table.prompt_lens[: len(seq_lens)]
        return not Layout.of(starts, seq_lens, prompt_lens).equals(self._layout)

    def _applying(self, seq_lens: IntArray) -> Crossover | None:
        """Give what of the measured table holds for sequences as long as these."""
        return self._crossover and self._crossover.within(int(seq_lens.sum()) / len(seq_lens))

    def _make_plan(self, starts: IntArray, seq_lens: IntArray) -> None:
        rows = len(seq_lens)
        self._applied = self._applying(seq_lens)
        layout = Layout.of(starts, seq_lens, self._table.prompt_lens[:rows])
        self._version, self._layout, self._starts = self._table.version, layout, starts.tobytes()
        self._plan = StepPlan.build(
            self._table.skips[:rows],
            layout,
            with_passing=self.kv_fill.wants_passing,
            alone=self.gate.arrange(layout),
            factors=None if self._table.factors is None else self._table.factors[:rows],
            checks=self.exits.arrange(layout),
            crossover=self._applied,
        )
        self._is_dense = self._plan.is_dense
        self._num_generated = int(layout.generated.sum())
        self._num_prompt = int(layout.query_lens.sum()) - self._num_generated
        self._only_decodes = self._num_prompt == 0

    def _count(self) -> None:
        self._prompt_tokens += self._num_prompt
        self._generated_tokens += self._num_generated
        assert self._plan is not None
        self._generated_run += self._plan.generated_run
        self._discarded += self._plan.discarded
