# SPDX-License-Identifier: Apache-2.0
"""From a request's arguments to what it wants, the same in every process of an engine.

The arguments of `KEYS` arrive as ``vllm_xargs`` over HTTP and as ``SamplingParams.extra_args``
offline.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from logging import getLogger
from typing import TYPE_CHECKING, Any

from vllm_adaskip import old_names
from vllm_adaskip.classifiers import (
    METHODS,
    Classifier,
    DecoderShape,
    PlanError,
    PromptStatistics,
    Scope,
    SkipPlan,
    method_of,
)
from vllm_adaskip.classifiers.hub import located
from vllm_adaskip.classifiers.plan import reason, shown
from vllm_adaskip.engine.busy import LEVEL, BusyPlans
from vllm_adaskip.engine.canary import CanaryOptions
from vllm_adaskip.engine.drafts import Draft
from vllm_adaskip.engine.prompt_plan import TAIL, PromptPlan, as_tail, named_plan

if TYPE_CHECKING:
    from vllm import SamplingParams

logger = getLogger("vllm.adaskip")

KEYS = (
    "adaskip",
    "adaskip_skip",
    "adaskip_max_compute",
    "adaskip_prompt_exit",
    "adaskip_prompt_skip",
    "adaskip_prompt_tail",
    "adaskip_draft",
    "adaskip_show_plan",
)
#: What goes with ``"adaskip": "off"``.
_WITH_OFF = {"adaskip", "adaskip_draft", "adaskip_show_plan"}
#: By which the scheduler tells workers a request's LoRA adapter, where requests may have any.
ADAPTER = "_adaskip_adapter"
#: How arguments begin that a scheduler alone writes; clients may not.
INTERNAL = "_adaskip"
UNKNOWN = "unknown"
#: That are known, dense among them: each costs some seconds at start-up, on a GPU graphs too.
MOST_PLANS = 8
#: Why requests are refused: the argument that is wrong, or ``unknown``. A closed set, so that
#: clients cannot make up metric labels.
REASONS = (*KEYS, UNKNOWN)


class RequestError(ValueError):
    """A bad per-request argument; the message names the key, the value and what is allowed.

    Attributes:
        reason: one of `REASONS`, for counters.

    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key[:80]}: {problem}")
        self.reason = key if key in KEYS else UNKNOWN


@dataclass(frozen=True, slots=True)
class RequestArgs:
    """What one request asks for; plans are still as they came, `Planner` knows the model."""

    off: bool = False
    skip: object | None = None
    budget: float | None = None
    prompt_exit: object | None = None
    prompt_skip: object | None = None
    prompt_tail: int | None = None
    draft: int | None = None
    shows_plan: bool = False

    @property
    def leaves_plan_open(self) -> bool:
        """Whether the server decides what generated tokens leave out."""
        return not self.off and self.skip is None and self.budget is None

    @classmethod
    def parse(cls, extra_args: Mapping[str, Any] | None) -> RequestArgs:
        """Pick our keys out of a request's extra arguments; those of others are left alone.

        Raises:
            RequestError: a bad value, an unknown key that begins with ``adaskip``, or
                ``"adaskip": "off"`` together with another key of ours.

        """
        ours = {key: value for key, value in (extra_args or {}).items() if _is_ours(key)}
        if not ours:
            return cls()
        try:
            ours = old_names.renamed(ours, old_names.ARGUMENT)
        except ValueError as error:
            raise RequestError("adaskip_max_compute", str(error)) from None
        for key in ours:
            if key not in KEYS:
                raise RequestError(key, f"unknown argument{_nearest(key)}; allowed: {_listed()}")
        is_on = _switch("adaskip", ours.get("adaskip", "on"))
        shows_plan = _switch("adaskip_show_plan", ours.get("adaskip_show_plan", "off"))
        others = " and ".join(sorted(ours.keys() - _WITH_OFF))
        if not is_on and others:
            raise RequestError("adaskip", f"'off' means dense and does not go with {others}")
        exit, skip, tail = (ours.get(f"adaskip_prompt_{name}") for name in ("exit", "skip", "tail"))
        if exit is not None and skip is not None:
            raise RequestError(
                "adaskip_prompt_skip", "does not go with adaskip_prompt_exit; leave one out"
            )
        try:
            own_tail = None if tail is None else as_tail(tail)
        except PlanError as error:
            raise RequestError("adaskip_prompt_tail", str(error)) from None
        budget = _budget(ours.get("adaskip_max_compute"))
        draft = _draft(ours.get("adaskip_draft"))
        return cls(
            not is_on, ours.get("adaskip_skip"), budget, exit, skip, own_tail, draft, shows_plan
        )


def is_one_answer(params: SamplingParams) -> bool:
    """Return whether a request is done with one token, and wants to know no more than that.

    Log-probabilities of the prompt would have to come from layers that an answer may leave out.
    """
    return params.max_tokens == 1 and params.prompt_logprobs is None


@dataclass(frozen=True)
class EngineFacts:
    """The model's depth and the server's options, already checked; they travel as JSON.

    ``profile``, a folder or hub id, is where a method finds its tensors, in every process.
    ``known_plans`` are plans that requests will name, in the form of `SkipPlan.parse`; ``prompt``
    is what `PromptPlan.of_options` reads, ``draft`` what `Draft.of_options` does, ``busy``
    is `BusyPlans`, and ``canary`` `CanaryOptions`.
    """

    shape: DecoderShape
    method: str = "none"
    method_options: Mapping[str, Any] | None = None
    max_compute: float = 1.0
    kv_fill: str = "none"
    profile: str | None = None
    coalesce_regret: float = 0.0
    guard: bool = False
    known_plans: Sequence[Sequence[int | str]] = field(default_factory=list)  # as JSON has it
    prompt: Mapping[str, Any] | None = None
    draft: Mapping[str, Any] | None = None
    busy: Mapping[str, Any] | None = None
    canary: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """Write the facts as JSON text."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> EngineFacts:
        """Read what `to_json` wrote."""
        facts = json.loads(text)
        return cls(**{**facts, "shape": DecoderShape(**facts["shape"])})


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request's arguments come to.

    Attributes:
        plan: its plan; None where the method reads the prompt first.
        budget: largest share of decoder compute that a decided plan may keep.
        gate: scope in which the method's `Gate` may leave out more; None: it may not.
        by_method: whether the server's method decides the plan, and not the request.
        prompt: what the prompt's tokens leave out; None: nothing.
        drafts: tokens that may be drafted at once.

    """

    plan: SkipPlan | None
    budget: float
    gate: Scope | None = None
    by_method: bool = False
    prompt: PromptPlan | None = None
    drafts: int = 0

    @property
    def may_leave_out(self) -> bool:
        """Whether generated tokens may leave something out."""
        return self.plan is None or not self.plan.is_dense or self.gate is not None

    def is_gated(self, one_answer: bool) -> bool:
        """Return whether that holds for a request, which asks for one token or not."""
        return self.gate == "token" or (self.gate == "answer" and one_answer)


class Planner:
    """What each request wants: a plan of its own, or what the server's method decides.

    It is a function of the request's arguments and the server's options alone (purity), so the
    front end can refuse what a worker would refuse.

    Attributes:
        known_plans: that sequences are likely to follow: the method's one plan, those of option
            ``known_plans``, and the method's codebook; without dense, `MOST_PLANS` in all at most.
        prompt: what prompts leave out whose request says nothing; None: nothing.
        draft: how the engine drafts; None: it does not.
        busy: what plans leave out by load; None: always the same.
        canary: which answers are read again at full depth; None: none.
        dense: leaves out nothing. `decide` returns just this one where the method fails.
        refused: requests that `admit` has refused in this process, by `RequestError.reason`.

    """

    def __init__(self, facts: EngineFacts) -> None:
        method = method_of(facts.method)
        options = method.Options.model_validate(dict(facts.method_options or {}))
        self.facts = facts
        self.dense = SkipPlan(facts.shape.num_layers)
        profile = located(facts.profile) if facts.profile else None
        try:
            self.classifier: Classifier = method(facts.shape, options, profile)
        except ValueError:
            raise
        except Exception as error:  # somebody else's class
            raise ValueError(f"method {facts.method!r} cannot be made ({reason(error)})") from error
        gate = self.classifier.gate_scope
        if gate == "token" and self.classifier.gates_attention and facts.kv_fill == "none":
            raise ValueError(
                "kv_fill: 'none' is not allowed where each token stops by itself, because deeper "
                "tokens would read holes; allowed: 'copy', 'project'"
            )
        if facts.coalesce_regret and not self.classifier.coalesces:
            able = ", ".join(repr(name) for name, each in METHODS.items() if each.coalesces)
            raise ValueError(
                f"coalesce_regret: {facts.coalesce_regret:g} is not allowed with method "
                f"{facts.method!r}, which cannot say how much worse another plan is; allowed: 0, "
                f"or method {able}"
            )
        if facts.guard and gate:
            raise ValueError(
                f"guard: True is not allowed with method {facts.method!r} and scope {gate!r}, as "
                "nobody knows before a step what it will leave out; allowed: False, or a method "
                "that decides once a sequence"
            )
        layers = facts.shape.num_layers
        self.prompt = None if facts.prompt is None else PromptPlan.of_options(facts.prompt, layers)
        if self.prompt is not None and self.classifier.reads_whole_prompts:
            raise ValueError(f"prompt: '{self.prompt.plan}' {self._not_with_the_method}")
        self.draft = None if facts.draft is None else Draft.of_options(facts.draft, layers)
        if self.draft is not None and gate:
            raise ValueError(
                f"draft: not allowed with method {facts.method!r} and scope {gate!r}, whose "
                "gate would remember drafts that are not accepted; allowed: a method that decides "
                "once a sequence"
            )
        if self.draft is not None and facts.coalesce_regret:
            raise ValueError(
                f"draft: not allowed with coalesce_regret {facts.coalesce_regret:g}, under which a "
                "plan depends on the sequences in the batch, and so on how fast others draft; "
                "allowed: coalesce_regret 0"
            )
        self._has_failed = False
        self._default = self._decided(facts.max_compute)
        self.busy = None if facts.busy is None else BusyPlans.model_validate(dict(facts.busy))
        self._levels = [Wanted(self.dense, 1.0), *(self._at_levels() if self.busy else ())]
        if facts.canary is None:
            self.canary = None
        else:
            self.canary = CanaryOptions.model_validate(dict(facts.canary))
            self._check_canary()
        if self._has_failed:
            raise ValueError(f"method: {facts.method!r} decides nothing, as the log says above")
        self.known_plans = self._known_plans()
        self.refused = dict.fromkeys(REASONS, 0)

    def admit(
        self, extra_args: Mapping[str, Any] | None, *, asks_for_prompt_logprobs: bool = False
    ) -> None:
        """Refuse, in the front end, a request whose arguments are not allowed, and count it.

        Raises:
            RequestError: see `wanted`; or it asks for what a shortened prompt has not.

        """
        try:
            for key in extra_args or ():
                if isinstance(key, str) and key.startswith(INTERNAL):
                    raise RequestError(key, f"unknown argument; allowed: {_listed()}")
            wanted = self.wanted(extra_args)
            if asks_for_prompt_logprobs and wanted.prompt is not None:
                raise RequestError(
                    "adaskip_prompt_exit",
                    "the tokens of this prompt leave out layers, so they have no "
                    "log-probabilities; ask for no prompt_logprobs, or for the whole model by "
                    f"adaskip_prompt_exit {self.facts.shape.num_layers}",
                )
        except RequestError as error:
            self.refused[error.reason] += 1
            raise

    def wanted(self, extra_args: Mapping[str, Any] | None) -> Wanted:
        """Read a request's arguments.

        Raises:
            RequestError: an argument that is not allowed, or a plan that keeps more
                compute than the request's budget.

        """
        args = RequestArgs.parse(extra_args)
        level = (extra_args or {}).get(LEVEL)
        wanted: Wanted
        if level is not None and args.leaves_plan_open:
            wanted = self._levels[level]
        else:
            wanted = Wanted(self.dense, 1.0) if args.off else self._wanted(args)
        prompt, drafts = None if args.off else self._prompt(args), self._drafts(args.draft)
        if prompt is None and not drafts:
            return wanted
        return replace(wanted, prompt=prompt, drafts=drafts)

    def shown(self, extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what a request gets, for its client, as far as is known before its prompt is read.

        Returns:
            ``skip``, the plan, in the form of `SkipPlan.entries`; None where the method decides
            it with the prompt before it, or the guard or a gate has a say. Beside it ``compute``,
            the share of decoder compute that it keeps; ``level``, of load, with option ``busy``;
            ``prompt_skip`` and ``prompt_tail`` where the prompt leaves something out.

        """
        wanted, level = self.wanted(extra_args), (extra_args or {}).get(LEVEL)
        is_settled = wanted.gate is None and not (wanted.by_method and self.facts.guard)
        plan = wanted.plan if is_settled else None
        found: dict[str, Any] = {"skip": None if plan is None else plan.entries()}
        if plan is not None:
            found["compute"] = round(plan.share(self.facts.shape), 4)
        if self.busy is not None and level is not None:
            found["level"] = level
        if wanted.prompt is not None:
            found["prompt_skip"] = wanted.prompt.plan.entries()
            found["prompt_tail"] = wanted.prompt.tail
        return found

    def at_level(self, extra_args: Mapping[str, Any] | None, level: int) -> Mapping[str, Any]:
        """Return a request's arguments with the level of load that holds for it."""
        return {**(extra_args or {}), LEVEL: level}

    def _at_levels(self) -> list[Wanted]:
        """Return what requests get that leave it open, by level."""
        assert self.busy is not None
        if self.classifier.gate_scope:
            raise ValueError(
                f"busy: not allowed with method {self.facts.method!r} and scope "
                f"{self.classifier.gate_scope!r}, as a budget does not bind what each token leaves "
                "out; allowed: a method that decides once a sequence"
            )
        found = []
        for level in self.busy.levels:
            try:
                found.append(self._decided(level.max_compute))
            except PlanError as error:
                raise ValueError(f"busy: {error}") from None
        if all(each.plan == self.dense for each in found):
            raise ValueError(
                f"busy: method {self.facts.method!r} leaves nothing out at any level; allowed: a "
                "method, or a profile, that does"
            )
        return found

    def _check_canary(self) -> None:
        """Refuse a canary that would never have anything to read."""
        open_to = [self._default, *self._levels]
        if self.prompt is None and not any(each.may_leave_out for each in open_to):
            raise ValueError(
                f"canary: method {self.facts.method!r} leaves nothing out and prompts run "
                "everything, so there is nothing to read; allowed: a method, a profile or prompt "
                "that leaves something out, or no canary"
            )

    def _drafts(self, asked: int | None) -> int:
        """Return how many tokens may be drafted: what a request says, or the server's."""
        most = 0 if self.draft is None else self.draft.tokens
        if asked is None:
            return most
        if asked > most:
            allowed = f"0 to {most}" if most else "0, as this server drafts nothing (option draft)"
            raise RequestError("adaskip_draft", f"{asked} is not allowed; allowed: {allowed}")
        return asked

    def _wanted(self, args: RequestArgs) -> Wanted:
        if args.skip is not None:
            return Wanted(self._explicit(args.skip, args.budget), 1.0)
        if args.budget is None:
            return self._default
        try:
            return self._decided(min(args.budget, self.facts.max_compute))
        except PlanError as error:
            raise RequestError("adaskip_max_compute", str(error)) from None

    def _prompt(self, args: RequestArgs) -> PromptPlan | None:
        """Return what a request's prompt leaves out: what it names, or what the server says."""
        own, tail = self.prompt, args.prompt_tail
        if args.prompt_exit is None and args.prompt_skip is None:
            if tail is not None and own is None:
                raise RequestError(
                    "adaskip_prompt_tail",
                    "needs adaskip_prompt_exit or adaskip_prompt_skip beside it, as prompts of "
                    "this server run everything",
                )
            return own if own is None or tail is None else replace(own, tail=tail)
        key = "adaskip_prompt_exit" if args.prompt_skip is None else "adaskip_prompt_skip"
        try:
            plan = named_plan(args.prompt_exit, args.prompt_skip, self.facts.shape.num_layers)
        except PlanError as error:
            raise RequestError(key, str(error)) from None
        if plan.is_dense:
            return None
        if self.classifier.reads_whole_prompts:
            raise RequestError(key, f"'{plan}' {self._not_with_the_method}")
        return PromptPlan(plan, tail or (own.tail if own else TAIL))

    def with_whole_prompt(self, extra_args: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Return a request's arguments, by which its prompt runs everything if it leaves that open.

        Raises:
            RequestError: see `wanted`.

        """
        args = RequestArgs.parse(extra_args)
        is_open = args.prompt_exit is None and args.prompt_skip is None
        if self.prompt is None or args.off or not is_open:
            return extra_args
        return {**(extra_args or {}), "adaskip_prompt_exit": self.facts.shape.num_layers}

    @property
    def _not_with_the_method(self) -> str:
        return (
            f"is not allowed with method {self.facts.method!r}, whose figures are of prompts that "
            "run everything; allowed: no prompt plan, or another method"
        )

    def decide(self, budget: float, prompt: PromptStatistics | None) -> SkipPlan:
        """Return the plan that the method decides, or `dense` where it fails, which is logged once.

        See `Classifier.decide`. A method may be anybody's, and the others in the batch go on.
        """
        try:
            plan = self.classifier.decide(budget, prompt)
            layers = self.facts.shape.num_layers
            if not isinstance(plan, SkipPlan) or plan.num_layers != layers or plan.skips_everything:
                raise TypeError(f"{shown(plan)} is no SkipPlan for {layers} layers that can run")
        except Exception:
            if not self._has_failed:
                logger.exception(
                    "vllm-adaskip: method '%s' failed to decide a plan; its sequence runs dense, "
                    "and adaskip_report counts it with all others (failures)",
                    self.facts.method,
                )
            self._has_failed = True
            return self.dense
        return plan

    def _known_plans(self) -> list[SkipPlan]:
        num_layers = self.facts.shape.num_layers
        named = [SkipPlan.parse(one, num_layers) for one in self.facts.known_plans]
        own = (self._default.plan, *(each.plan for each in self._levels), *named)
        first = dict.fromkeys(plan for plan in own if plan and not plan.is_dense)
        if len(first) >= MOST_PLANS:
            raise ValueError(
                f"known_plans: {len(named)} plans; allowed: {MOST_PLANS} with dense and the "
                "method's own, as each is compiled, or gets CUDA graphs"
            )
        more = (plan for plan in self.classifier.codebook if not plan.is_dense)
        return [*dict.fromkeys([*first, *more])][: MOST_PLANS - 1]

    def _decided(self, budget: float) -> Wanted:
        """Let the method decide at once, unless it reads the prompt."""
        try:
            self.classifier.check(budget)
        except PlanError:
            raise
        except Exception as error:  # somebody else's method
            raise PlanError(
                f"{budget:g}: method {self.facts.method!r} failed ({reason(error)})"
            ) from error
        reads = self.classifier.width > 0
        plan = None if reads else self.decide(budget, None)
        return Wanted(plan, budget, self.classifier.gate_scope, by_method=True)

    def _explicit(self, skip: object, budget: float | None) -> SkipPlan:
        """Return the plan a request names itself; the server's budget does not bind it."""
        try:
            plan = SkipPlan.parse(skip, self.facts.shape.num_layers)
        except PlanError as error:
            raise RequestError("adaskip_skip", str(error)) from None
        kept = plan.share(self.facts.shape)
        if budget is not None and kept > budget:
            raise RequestError(
                "adaskip_max_compute",
                f"{budget:g} is below what adaskip_skip keeps: '{plan}' keeps "
                f"{kept:.3f} of the decoder's compute; name more to skip, or a larger budget",
            )
        return plan


def _is_ours(key: object) -> bool:
    return isinstance(key, str) and key.lower().startswith("adaskip")


def _nearest(key: str) -> str:
    near = difflib.get_close_matches(key[:80].lower(), KEYS, n=1, cutoff=0.0)
    return f" (did you mean {near[0]}?)"


def _listed() -> str:
    return ", ".join(KEYS)


def _switch(key: str, value: object) -> bool:
    if value not in ("on", "off"):
        raise RequestError(key, f"{shown(value)} is not allowed; allowed: 'on', 'off'")
    return value == "on"


def _draft(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RequestError(
            "adaskip_draft",
            f"{shown(value)} is not allowed; allowed: an integer from 0 (no drafts) to the "
            "server's draft.tokens",
        )
    return value


def _budget(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise RequestError(
            "adaskip_max_compute",
            f"{shown(value)} is not allowed; allowed: a number in (0, 1], the "
            "largest share of decoder compute the plan may keep",
        )
    return float(value)
