# SPDX-License-Identifier: Apache-2.0
"""Drives one live engine: sends, steps, aborts, and has every finished output judged."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from helpers.batches import Entries, PromptPlan

from vllm_adaskip import request

if TYPE_CHECKING:
    from torture.judge import Judge
    from vllm import SamplingParams

#: More than any example takes, even if one request after another is run alone.
MOST_STEPS = 20_000


@dataclass(frozen=True)
class Request:
    """All that decides what a request must give."""

    prompt: list[int]
    plan: Entries
    max_tokens: int
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    only: list[int] = field(default_factory=list)  # tokens that may be drawn; empty: all
    logprobs: bool = False
    samples: int = 1
    sampled: bool = False  # with no seed: vLLM's CPU runner fails on seeds in chunked prompts
    prompt_plan: PromptPlan | None = None

    @property
    def wants_logprobs(self) -> bool:
        """True also where tokens alone do not tell whether the right layers ran."""
        return self.logprobs or self.sampled or bool(self.only)

    def params(self) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        left_out, tail = self.prompt_plan or (None, None)
        return SamplingParams(
            n=self.samples,
            temperature=1 if self.sampled else 0,
            max_tokens=self.max_tokens,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            allowed_token_ids=self.only or None,
            logprobs=0 if self.wants_logprobs else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=request(skip=self.plan or None, prompt_skip=left_out, prompt_tail=tail),
        )


@dataclass
class Tally:
    """What an engine has been through; every field is a sum."""

    finished: int = 0
    aborted: int = 0
    refused: int = 0
    planned: int = 0
    dense: int = 0
    shortened: int = 0
    stopped: int = 0
    tokens_judged: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    mismatches: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*map(sum, zip(asdict(self).values(), asdict(other).values(), strict=True)))


class Traffic:
    """One engine, what it works on, and what it has finished since the last `settle`."""

    def __init__(self, llm: Any, judge: Judge) -> None:
        self.llm, self.judge, self.tally = llm, judge, Tally()
        self.running: dict[str, Request] = {}
        #: Finished requests, each with its samples' tokens and texts.
        self.history: list[tuple[Request, list[tuple[list[int], str]]]] = []
        #: Everything that went wrong, in full. Hypothesis may show something else: when it
        #: runs a failing example again, an engine in another process may do other steps.
        self.faults: list[str] = []
        self.broken = False
        self._engine = llm.llm_engine
        self._sent = self._raised = 0

    def send(self, request: Request) -> None:
        self._sent += 1
        self._engine.add_request(
            str(self._sent), {"prompt_token_ids": request.prompt}, request.params()
        )
        self.running[str(self._sent)] = request

    def refuse(self, extra_args: dict[str, Any]) -> None:
        """Send a malformed plan, which must be refused at once."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        try:
            self._engine.add_request(
                "malformed", {"prompt_token_ids": [3]}, SamplingParams(extra_args=extra_args)
            )
        except VLLMValidationError:
            self.tally.refused += 1
        else:
            self._fail(f"{extra_args} was not refused")

    def abort(self, pick: int) -> None:
        """Abort one of the requests that have not finished, if there is any."""
        if self.running:
            name = sorted(self.running, key=int)[pick % len(self.running)]
            self._engine.abort_request([name])
            del self.running[name]
            self.tally.aborted += 1

    def step(self) -> None:
        """One step of an engine that has something to do; what it finishes is judged."""
        try:
            outputs = self._engine.step()
        except Exception as error:
            self.broken = True
            self.faults.append(f"the engine broke: {error!r}")
            raise
        for output in outputs:
            self._judge(self.running.pop(output.request_id), output.outputs)

    def settle(self) -> None:
        """Run until all is finished, then see that nothing is left behind.

        Raises:
            AssertionError: a wrong output since the last time, or something left behind.

        """
        if self.broken:  # what broke it has been raised
            return
        for _ in range(MOST_STEPS):
            if not self.running:
                break
            self.step()
        else:
            self._fail(f"no end of {list(self.running.values())}")
        self._wait_until_empty()
        self.tally.preemptions, self.tally.prefix_hit_tokens = self._counters()
        self.history = []
        new, self._raised = self.faults[self._raised :], len(self.faults)
        assert not new, "\n\n".join(new)

    def report(self) -> dict[str, Any]:
        """Return the worker's `adaskip_report`."""
        report: dict[str, Any] = self.llm.collective_rpc("adaskip_report")[0]
        return report

    def _wait_until_empty(self) -> None:
        """The runner hears of finished and aborted requests one step later."""
        from vllm.v1.engine.core_client import InprocClient

        in_process = isinstance(self._engine.engine_core, InprocClient)
        for _ in range(100):
            if self.report()["live_rows"] == 0 and self.llm.reset_prefix_cache():
                break
            self._engine.step() if in_process else time.sleep(0.02)
        else:
            rows = self.report()["live_rows"]
            self._fail(f"{rows} rows, or blocks of finished requests, are left")
        if self._engine.has_unfinished_requests():
            self._fail("the engine has requests that nobody sent")

    def _counters(self) -> tuple[int, int]:
        """Preemptions and prefix-hit tokens so far.

        vLLM keeps these per process and for the newest engine: run one engine after another.
        """
        values = {one.name: getattr(one, "value", 0) for one in self.llm.get_metrics()}
        return int(values["vllm:num_preemptions"]), int(values["vllm:prefix_cache_hits"])

    def _fail(self, fault: str) -> NoReturn:
        self.faults.append(fault)
        raise AssertionError(fault)

    def _judge(self, request: Request, outputs: list[Any]) -> None:
        tally = self.tally
        tally.finished += 1
        tally.planned += bool(request.plan)
        tally.dense += not request.plan
        tally.shortened += request.prompt_plan is not None
        wrong = [] if len(outputs) == request.samples else [f"{len(outputs)} samples"]
        for one in outputs:
            tally.tokens_judged += len(one.token_ids)
            tally.stopped += one.finish_reason == "stop"
            wrong += [f"{fault}; output: {one}" for fault in self.judge.faults(request, one)]
        tally.mismatches += bool(wrong)
        if wrong:
            self.faults.append("\n".join([repr(request), *wrong]))
        self.history.append((request, [(list(one.token_ids), one.text) for one in outputs]))
