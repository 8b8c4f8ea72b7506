# SPDX-License-Identifier: Apache-2.0
"""Where plans are applied: the loop that all families share, and what it asks at every forward.

When nothing is skipped the family's own forward runs, compiled or not, exactly as in stock vLLM.
When something is, the loop runs the same modules, sub-layer by sub-layer, each for the tokens that
need it. It carries the residual stream as a pair, see `Stream`; leaving a sub-layer out means
passing on both halves. Most of vLLM's layers carry it so, with the sum fused into the next norm.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import partial
from logging import getLogger
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vllm_adaskip.classifiers import Lens, Stream
from vllm_adaskip.classifiers.hub import located
from vllm_adaskip.classifiers.lora import Lora
from vllm_adaskip.classifiers.profile import Profile
from vllm_adaskip.engine import compat
from vllm_adaskip.engine.compat.adapters import Adapters
from vllm_adaskip.engine.compat.head import Head
from vllm_adaskip.engine.compat.kernels import with_kernels
from vllm_adaskip.engine.compat.kv_cache import KvCache
from vllm_adaskip.engine.compat.modules import copied
from vllm_adaskip.engine.compat.projection import keep_apart
from vllm_adaskip.engine.compiled import Body, CompiledPlans, Headed, Inputs, Made, Pieces
from vllm_adaskip.engine.decide import shared_state
from vllm_adaskip.engine.drafter import Drafter
from vllm_adaskip.engine.fill import KV_FILLS, ProjectFill
from vllm_adaskip.engine.gate import StepGate
from vllm_adaskip.engine.guard import PARTS, SIZES, Costs, Guard, measured
from vllm_adaskip.engine.probes import Probes, runs
from vllm_adaskip.engine.prompts import PromptReader
from vllm_adaskip.engine.step import NOBODY, Bools, Ints, Step
from vllm_adaskip.engine.taught import Layers, Taught
from vllm_adaskip.engine.window import Window, gather, rows

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention import Attention

    from vllm_adaskip.engine.window import Shown

logger = getLogger("vllm.adaskip")


class SkipRuntime:
    """One engine's steps: planned when a forward begins, counted when it ends.

    Attributes:
        state: its plans.
        cache: the paged K/V.
        batches: what attention is told.
        fill: what is written where a generated token leaves attention out.
        prompt_fill: the same of prompt tokens under a prompt plan.
        reader: shows prompts to the method.
        gate: asks the method in the middle of a forward.
        step: the step that runs now, or ran last.
        body: compiled for the step that runs now, or its pieces; None: there is none.
        starts: ``[rows + 1]``, where each row's tokens start in that step.

    """

    def __init__(self, vllm_config: VllmConfig, attention: Iterable[Attention], lens: Lens) -> None:
        layers = list(attention)
        self.state = shared_state(vllm_config)
        self._table = self.state.table
        classifier, facts = self.state.planner.classifier, self.state.planner.facts
        self.cache = KvCache(layers)
        self.batches = compat.SubBatches(vllm_config, layers)
        self.fill = KV_FILLS[facts.kv_fill](layers, self.cache)
        self.prompt_fill = ProjectFill(layers, self.cache)
        hidden_size = vllm_config.model_config.get_hidden_size()
        device = vllm_config.device_config.device
        self.reader = PromptReader(self.state, self.cache, hidden_size, device, lens)
        scope = classifier.gate_scope
        gate = classifier.gate(hidden_size, device, lens) if scope else None
        self.gate = StepGate(gate, classifier, self._table)
        self.step: Step | None = None
        self.body: Body | Pieces | None = None
        self.starts: Ints = np.zeros(1, dtype=np.int64)
        self._planned: Step | None = None
        self._starts = b""
        self._only_decodes = False
        self._version = -1

    def begin(self) -> Step | None:
        """Plan the forward that starts now; None when stock vLLM's own may run, or a graph.

        Costs a few operations on small arrays. A step is kept as long as all rows decode and
        none changes, which in steady decoding is so.
        """
        metadata = self.batches.step_metadata()
        if (lengths := self._lengths(metadata)) is None:  # a warm-up: no sequences
            self.step = None
            return None
        if self.state.pulled is not None:
            self.state.pulled.update()
        self.starts, seq_lens = lengths
        starts = self.starts
        step = self._planned
        if step is None or self._is_stale(starts):
            step = self._planned = self._plan(starts, seq_lens)
        assert metadata is not None
        self.reader.begin(step, seq_lens, metadata.block_table)
        self.gate.begin(step, seq_lens)
        self.step = step.fork() if self.gate.is_open else step
        is_observed = self.reader.is_open or self.gate.is_open
        if self.state.replay is not None or (self._is_dense and not is_observed):
            self._count()
            return None
        self.body = None if is_observed else self._compiled
        self.fill.begin(self.step, may_change=self.gate.is_open)
        return self.step

    def end(self) -> None:
        """Finish a forward for which `begin` returned a step; all layers have run."""
        self.fill.finish()
        self.reader.finish()
        self._count()

    def running(self, step: Step) -> AbstractContextManager[Any]:
        """Enter, for this forward, a context in which vLLM's attention sees the step's parts."""
        parts = step.attention_parts
        if all(part in (None, NOBODY) for part in parts) and not self.gate.may_leave_attention:
            return nullcontext()
        return self.batches.during(parts)

    def ask(self, sub_layer: int, window: Window) -> None:
        """Ask the gate behind a sub-layer, and tell attention and cache which tokens left."""
        assert self.step is not None
        leaving = self.gate.after(sub_layer, self.step, window.of)
        if leaving is None or not (attention := leaving.left_out[:, 0::2]).any():
            return
        layer = sub_layer // 2
        if self.gate.scope == "token":  # no token reads a prompt that asks for one token
            self.fill.leave(layer, leaving.tokens, attention)
        self.batches.arrange(self.step.attention_parts[layer + 1 :], layer + 1)

    def _count(self) -> None:
        assert self.step is not None
        self._table.counts.add(self.step)
        self.gate.count(self.step)

    def _lengths(self, metadata: Any | None) -> tuple[Ints, Ints] | None:
        """Return ``query_start_loc`` and ``seq_lens`` of the step; None if it has no sequences."""
        if not self.state.is_told_lengths:
            return None if metadata is None else compat.step_lengths(metadata)
        lengths, self.state.lengths = self.state.lengths, None  # a warm-up may come next
        return lengths

    def _is_stale(self, starts: Ints) -> bool:
        # Where all rows decoded they go on so: sequences do not become shorter.
        is_kept = self._only_decodes and self._version == self._table.version
        return not (is_kept and starts.tobytes() == self._starts)

    def _plan(self, starts: Ints, seq_lens: Ints) -> Step:
        rows = len(seq_lens)
        prompt_lens, skips = self._table.prompt_lens[:rows], self._table.skips[:rows]
        shortened = None
        if (full_from := self._table.full_from[:rows]).any():
            shortened = full_from, self._table.prompt_skips[:rows]
        prompt_skips = self.gate.prompt_skips(seq_lens)
        step = Step.of(starts, seq_lens, prompt_lens, skips, prompt_skips, shortened)
        self._version, self._starts = self._table.version, starts.tobytes()
        self._only_decodes = step.num_generated == step.num_tokens
        self._is_dense = step.is_dense
        plans = self.state.compiled
        self._compiled = None if plans is None else plans.of(step) or plans.pieces_of(step)
        return step


class SkippingDecoder(nn.Module):
    """Mixin before a vLLM ``...ForCausalLM`` class; a family adds the methods marked abstract.

    A layer that they are given, and `stack`, come with kernels (`compat.kernels`).
    """

    model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        compat.enable_amx()
        stack = self.stack_of(self.model)
        attention = [self.attention_of(layer) for layer in stack.layers]
        #: Requests may bring LoRA adapters, for which vLLM wraps the layers after this.
        self._is_adapted = vllm_config.lora_config is not None
        head = Head(self, self.finish, is_adapted=self._is_adapted)
        self.adaskip = SkipRuntime(vllm_config, attention, head)
        shortens = self.adaskip.state.planner.facts.prompt is not None
        if (shortens or self.adaskip.fill.projects) and not self._is_adapted:
            keep_apart(stack)
        self.use(stack if self._is_adapted else with_kernels(stack))
        #: For tokens under plans, where the profile has such layers.
        self.taught: Taught | None = None
        compilation, state = vllm_config.compilation_config, self.adaskip.state
        #: Inductor's, where a CPU compiles.
        self._options: Mapping[str, Any] | None = None
        if compilation.mode and vllm_config.device_config.device_type == "cpu":
            self._options = compilation.inductor_compile_config
            planner = state.planner
            state.compiled = CompiledPlans(
                planner.known_plans, self.body_of, planner.prompt, self._pieces_of
            )
        is_guarded = state.planner.facts.guard and not self._is_adapted
        if is_guarded and vllm_config.device_config.device_type == "cpu":
            state.guard = Guard(partial(self._costs, vllm_config), compat.of_rank_0)
        self.drafter: Drafter | None = None
        if state.planner.draft is not None:
            self.drafter = state.drafter = Drafter(self, vllm_config, attention, head)

    @staticmethod
    def get_model_state_cls() -> type[Any]:
        """Return, for Model Runner V2, the feeder of our table."""
        from vllm_adaskip.engine.v2 import AdaSkipModelState

        return AdaSkipModelState

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """Load a checkpoint, and what the profile adds to it: an adapter, a draft's layers."""
        profile = self.adaskip.state.planner.facts.profile
        lora = Lora.of(located(profile)) if profile else None
        taught: dict[str, Tensor] = {}
        if profile and lora is not None:
            is_merged = Profile.load(located(profile)).adapter == "merged"
            weights = lora.merged(weights) if is_merged else lora.beside(weights, taught)
        loaded = self.load_plain(weights)
        if taught:
            self.taught = Taught(self, taught)
            self.taught_linears = self.taught.linears  # so that vLLM packs their weights too
            logger.info(
                "vllm-adaskip: tokens under plans have layers of their own, which take %.0f MiB",
                self.taught.mebibytes,
            )
        if self.drafter is not None:
            self.drafter.load()
        ours = ("taught_linears.", "draft_layers.")
        own = {name for name, _ in self.named_parameters() if name.startswith(ours)}
        return loaded and {*loaded, *own}  # vLLM checks that nothing was left out

    def load_plain(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """Load weights as stock vLLM does."""
        return super().load_weights(weights)  # type: ignore[misc]

    def use(self, stack: Any) -> None:
        """Run a stack's layers in steps in which something is skipped or observed."""
        self._stack = (stack,)  # not registered once more
        self.layers = [*stack.layers]  # whose lookup takes longer than this list's

    def with_own_layers(self, first: int, weights: Mapping[str, Tensor]) -> SkippingDecoder:
        """Return this model with its first layers and final norm copied, and weights in them.

        The copies attend by the model's own attention modules, to its own cache. Call it when
        weights are loaded, and not yet packed for kernels.

        Args:
            first: layers that are copied.
            weights: by the names of the model's checkpoint.

        Raises:
            ValueError: the model's layers are laid out otherwise.

        """
        stack = self.stack_of(self.model)
        if stack is not self.model or not hasattr(stack, "norm"):
            raise ValueError("draft: a profile's layers are for models laid out as Llama")
        layers = [copied(layer, self.attention_of(layer)) for layer in stack.layers[:first]]
        model = copy(stack)
        model._modules = {
            **stack._modules,
            "layers": nn.ModuleList([*layers, *stack.layers[first:]]),
            "norm": copied(stack.norm),
        }
        own, _ = self.with_model(model, weights)
        #: So that vLLM packs their weights too.
        self.draft_layers = nn.ModuleList([*layers, model.norm])
        return own

    def with_model(
        self, model: Any, weights: Mapping[str, Tensor]
    ) -> tuple[SkippingDecoder, set[str]]:
        """Return this decoder around a twin of its model, and the parameters that were loaded.

        Args:
            model: vLLM's, with some parts of its own.
            weights: of these, by the names of the model's checkpoint.

        """
        own = copy(self)
        own._modules, own.taught = {**self._modules, "model": model}, None
        own.use(with_kernels(own.stack_of(model)))
        return own, {*own.load_plain(weights.items())}

    @property
    def stack(self) -> Any:
        """The module with the list ``layers``, and what comes before and after them."""
        return self._stack[0]

    def stack_of(self, model: Any) -> Any:
        """Find that module in vLLM's ``model``, which most often is it."""
        return model

    def attention_of(self, layer: Any) -> Any:
        """Return the layer's vLLM `Attention` module."""
        return layer.self_attn.attn

    def embed(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
    ) -> Tensor:
        """Return the stream ``[tokens, hidden]`` before the first layer; one input is not None."""
        if inputs_embeds is not None:
            return inputs_embeds
        embedded: Tensor = self.model.embed_input_ids(input_ids)
        return embedded

    @abstractmethod
    def run_attention(self, layer: Any, positions: Tensor, stream: Stream) -> Stream:
        """Run a layer's attention and the norm that is its own; ``[tokens]`` positions."""

    @abstractmethod
    def run_mlp(self, layer: Any, stream: Stream) -> Stream:
        """Run a layer's MLP and the norm that is its own."""

    @abstractmethod
    def project_kv(self, layer: Any, positions: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        """Return a layer's K and V ``[tokens, kv_heads * head_size]``, as its attention would."""

    @abstractmethod
    def finish(self, stream: Stream) -> Tensor:
        """Return what the LM head takes, ``[tokens, width]``, of the stream after any layer."""

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """Return what the LM head takes, ``[tokens, width]``."""
        inputs = input_ids, positions, intermediate_tensors, inputs_embeds
        guard, drafter = self.adaskip.state.guard, self.drafter
        if guard is None and drafter is None:
            return self._forward(*inputs)
        start = perf_counter()
        output = self._forward(*inputs)
        seconds, step = perf_counter() - start, self.adaskip.step
        if step is None:
            self._measure(input_ids, positions, inputs_embeds)
            return output
        if drafter is not None:
            drafter.ran(self.adaskip.starts, seconds, output)
        rows = len(self.adaskip.starts) - 1
        if guard is not None and step.num_generated == step.num_tokens == rows:  # no drafts
            guard.saw(step.runs, seconds)
        return output

    def _measure(self, *inputs: *Inputs) -> None:
        """Time, in a warm-up, what guard and drafter want to know."""
        if (guard := self.adaskip.state.guard) is not None:
            guard.measure(*inputs[:2])
        if self.drafter is not None:
            self.drafter.warm_up(self._options, *inputs)

    def dense(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Run stock vLLM's own forward of ``[tokens]`` ids and positions."""
        output: Tensor = super().forward(input_ids, positions)
        return output

    def _forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any,
        inputs_embeds: Tensor | None,
    ) -> Any:
        adaskip = self.adaskip
        step = adaskip.begin()
        if adaskip.step is None and self._options is not None:
            plans = adaskip.state.compiled
            assert plans is not None
            plans.compile(adaskip.fill, self._options, input_ids, positions, inputs_embeds)
        if (replay := adaskip.state.replay) is not None:
            adaskip.state.replay = None
            return replay()
        if step is None:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        # What vLLM adds for its graphs lies behind the step's own tokens; it is no sequence's.
        real = slice(step.num_tokens)
        input_ids = None if input_ids is None else input_ids[real]
        inputs_embeds = None if inputs_embeds is None else inputs_embeds[real]
        inputs = input_ids, positions[real], inputs_embeds
        if isinstance(adaskip.body, Pieces):
            output = self._run_pieces(step, adaskip.body, *inputs)
        elif adaskip.body is not None:
            output = self._run_compiled(step, adaskip.body, *inputs)
        else:
            if (plans := adaskip.state.compiled) is not None:
                plans.miss(step)
            output = self.run(step, *inputs)
        adaskip.end()
        return output

    def _costs(
        self, vllm_config: VllmConfig, ids: Tensor | None = None, positions: Tensor | None = None
    ) -> Costs:
        """Time what steps take here, by what their rows leave out; on all ranks together."""
        most = vllm_config.scheduler_config.max_num_seqs
        if ids is None or positions is None:  # no warm-up: vLLM compiles nothing
            ids, positions = torch.zeros(2, most, dtype=torch.int64).unbind()
        sizes = [size for size in SIZES if size <= min(most, len(positions))]
        compiled = self.adaskip.state.compiled
        bodies = [] if compiled is None else compiled.bodies

        def timed(size: int) -> list[Callable[[], Any]]:
            inputs = ids[:size], positions[:size]
            return [partial(self.dense, *inputs), *runs(Probes(self, *inputs), bodies)]

        with compat.warm_up(vllm_config):
            table = measured(timed, sizes)
        table[PARTS.index("attention") : len(PARTS)] /= len(self.layers)
        return Costs(sizes, compat.of_rank_0(table), [mask for mask, _ in bodies])

    def body_of(self, left_out: Bools, *, fills: bool = True) -> Body:
        """Return what a step runs in which all rows leave out ``[2 * num_layers]``.

        It runs the modules as stock vLLM made them, whose small operations the compiler fuses.
        ``fills``: whether K/V are made where the engine's fill wants them.
        """
        bare = self._bare(self if self.taught is None else self.taught.model)
        layers, projects = bare.layers, fills and self.adaskip.fill.projects
        sub_layers = list(enumerate(left_out.tolist()))

        def body(input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None) -> Made:
            stream = Stream(bare.embed(input_ids, positions, inputs_embeds), None)
            passed = []
            for sub_layer, is_left_out in sub_layers:
                layer, is_mlp = layers[sub_layer // 2], sub_layer % 2
                if is_left_out:
                    if projects and not is_mlp:
                        passed.append(bare.project_kv(layer, positions, stream))
                elif is_mlp:
                    stream = bare.run_mlp(layer, stream)
                else:
                    stream = bare.run_attention(layer, positions, stream)
            return Made(bare.finish(stream), passed)

        return body

    @staticmethod
    def _bare(decoder: SkippingDecoder) -> SkippingDecoder:
        """Return a decoder over the modules as stock vLLM made them, for the compiler."""
        bare = copy(decoder)
        bare.use(bare.stack_of(bare.model))
        return bare

    def _pieces_of(self, exit: int) -> Pieces | None:
        """Return what a step runs in which some tokens of prompts stop after so many layers.

        As `body_of`, in two pieces, between which the K/V of those tokens are written. None where
        these tokens have layers of their own, which the others do not run, and with adapters.
        """
        if self.taught is not None or self._is_adapted:
            return None
        bare = self._bare(self)
        layers = bare.layers

        def run(stream: Stream, positions: Tensor, some: list[Any]) -> Stream:
            for layer in some:
                stream = bare.run_mlp(layer, bare.run_attention(layer, positions, stream))
            return stream

        def first(
            input_ids: Tensor | None,
            positions: Tensor,
            inputs_embeds: Tensor | None,
            going: Tensor,
            stopping: Tensor,
        ) -> Headed:
            embedded = Stream(bare.embed(input_ids, positions, inputs_embeds), None)
            stream = run(embedded, positions, layers[:exit])
            theirs = gather(stream, stopping)
            where = rows(positions, stopping)
            passed = [bare.project_kv(layer, where, theirs) for layer in layers[exit:]]
            update, before = gather(stream, going)
            assert before is not None  # a layer has run
            return Headed(update, before, rows(positions, going), passed)

        def rest(update: Tensor, before: Tensor, positions: Tensor) -> Tensor:
            return bare.finish(run(Stream(update, before), positions, layers[exit:]))

        return Pieces(exit, len(layers), first, rest)

    def _run_pieces(self, step: Step, pieces: Pieces, *inputs: *Inputs) -> Tensor:
        """Run the pieces that are compiled for the prompts' exit; return as `run`."""
        adaskip = self.adaskip
        plans, going = adaskip.state.compiled, step.part(2 * pieces.exit)
        assert plans is not None and going is not None
        stopping = step.passing(2 * pieces.exit, generated=False)
        tokens, others = (torch.from_numpy(each.positions) for each in (going, stopping))
        with adaskip.running(step):
            made = pieces.first(*inputs, tokens, others)
            for layer, (key, value) in enumerate(made.passed, pieces.exit):
                adaskip.prompt_fill.pass_by(layer, stopping, key, value)
            found = pieces.rest(made.update, made.before, made.positions)
        plans.ran += 1
        output = found.new_zeros(step.num_tokens, found.shape[1])
        return output.index_copy_(0, tokens, found)

    def _run_compiled(self, step: Step, body: Body, *inputs: *Inputs) -> Tensor:
        """Run the body that is compiled for the step's plan, and fill what it passed by."""
        adaskip = self.adaskip
        plans = adaskip.state.compiled
        assert plans is not None
        made = body(*inputs)
        plans.ran += 1
        left_out = (layer for layer, part in enumerate(step.attention_parts) if part is NOBODY)
        for layer, (key, value) in zip(left_out, made.passed, strict=False):
            adaskip.fill.pass_by(layer, step.passing(2 * layer), key, value)
        return made.hidden

    def body(self, step: Step) -> Callable[[Tensor, Tensor], Tensor]:
        """Return what a graph of a step holds, in which all tokens follow one plan.

        It takes ``[tokens]`` input ids and positions and returns what `forward` does. What it
        makes on its first call and needs again stays as long as the step.
        """

        def run(input_ids: Tensor, positions: Tensor) -> Tensor:
            if step.is_dense:
                return self.dense(input_ids, positions)
            adaskip = self.adaskip
            adaskip.fill.begin(step, may_change=False)
            output = self.run(step, input_ids, positions, None)
            adaskip.fill.finish()
            return output

        return run

    def run(
        self,
        step: Step,
        input_ids: Tensor | None,
        positions: Tensor,
        inputs_embeds: Tensor | None,
        *,
        fills: bool = True,
    ) -> Tensor:
        """Run a step's tokens through what they do not leave out; return as `forward`.

        ``fills``: whether K/V are projected where they leave attention out.
        """
        embedded = self.embed(input_ids, positions, inputs_embeds)
        if self.taught is None:
            layers, rows = Layers(self.layers, self.layers, None), self._adapters()
        else:
            layers = self.taught.of(step, positions.device)
            rows = nullcontext(layers.rows)
        with self.adaskip.running(step), rows as told:
            window = Window(Stream(embedded, None), positions, told)
            self._run_sub_layers(step, window, layers, fills)
        return self.finish(window.stream)

    def _adapters(self) -> AbstractContextManager[Shown | None]:
        """Enter what tells vLLM's LoRA layers whose rows are shown; None: there are none."""
        return Adapters(self).during_step() if self._is_adapted else nullcontext()

    def _run_sub_layers(self, step: Step, window: Window, layers: Layers, fills: bool) -> None:
        """Run each sub-layer for its tokens; where there are none it is not launched."""
        adaskip = self.adaskip
        reads, asks = adaskip.reader.is_open, adaskip.gate.is_open
        projects = fills and (adaskip.fill.projects or step.is_shortened)
        for sub_layer in range(step.runs.shape[1]):
            part, is_mlp = step.part(sub_layer), sub_layer % 2
            layer = layers.running[sub_layer // 2]
            if part is not NOBODY:
                window.show(part)
            if projects and not is_mlp and part is not None:
                self._pass_by(step, sub_layer, window, layers)
            if part is NOBODY:
                continue
            if is_mlp:
                window.stream = self.run_mlp(layer, window.stream)
            else:
                window.stream = self.run_attention(layer, window.positions, window.stream)
            if reads:
                adaskip.reader.observe(sub_layer, window.stream, part)
            if asks:
                adaskip.ask(sub_layer, window)
        window.show(None)

    def _pass_by(self, step: Step, sub_layer: int, window: Window, layers: Layers) -> None:
        """Project K/V of the tokens that leave an attention sub-layer out."""
        tokens = step.passing(sub_layer, generated=self.adaskip.fill.projects)
        if not tokens.count:
            return
        if step.part(sub_layer) is NOBODY:  # what ran last may be of these tokens
            window.show(None)
        layer = sub_layer // 2
        window.adapt(tokens)
        key, value = self.project_kv(layers.passing[layer], *window.passing(tokens))
        window.adapt(window.part)
        self.adaskip.prompt_fill.pass_by(layer, tokens, key, value)
