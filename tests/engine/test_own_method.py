# SPDX-License-Identifier: Apache-2.0
"""A method that somebody else wrote: the page's example, from outside the package."""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_SHAPE
from helpers.batches import Entries, greedy, random_prompts
from helpers.reference import Reference

import vllm_adaskip
from vllm_adaskip import DecoderShape, engine_args
from vllm_adaskip.classifiers import Classifier
from vllm_adaskip.config import AdaSkipConfig, ConfigError
from vllm_adaskip.engine.counts import Report
from vllm_adaskip.engine.request import Planner, RequestArgs, RequestError, logger
from vllm_adaskip.testing import a_prompt, check_method

PAGE = Path(__file__).parents[2] / "docs" / "write-a-method.md"
BUDGET = 0.85  # at which these prompts do not all get one plan
#: Fails for prompts of an odd number of tokens; then returns what is no plan.
FAILING = """
from small_updates import SmallUpdates
from vllm_adaskip import Classifier, MethodOptions, SkipPlan

class Failing(SmallUpdates):
    def decide(self, budget, prompt):
        if prompt.tokens % 2:
            raise ZeroDivisionError("odd")
        return super().decide(budget, prompt)

class Nonsense(SmallUpdates):
    width = 0

    def __init__(self, shape, options, profile=None):
        super().__init__(shape, options, profile)
        self.width = 0

    def decide(self, budget, prompt):
        return [3]

class NoMethod: ...

class Abstract(Classifier): ...

class Unfinished(SmallUpdates):
    def __init__(self, shape, options, profile=None):
        raise KeyError("what")

class Everything(SmallUpdates):
    def decide(self, budget, prompt):
        every = (1 << self._shape.num_layers) - 1
        return SkipPlan(self._shape.num_layers, every, every)

class NoOptions(SmallUpdates):
    Options = dict

class Taken(SmallUpdates):
    class Options(MethodOptions):
        max_compute: float = 0.5

class TakenBefore(SmallUpdates):
    class Options(MethodOptions):
        budget: float = 0.5

class Moody(SmallUpdates):
    def check(self, budget):
        if budget < 1:
            raise KeyError("no")
"""


@pytest.fixture(scope="module", autouse=True)
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("outside")
    example = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[0]
    assert example.count("\n") < 60
    (folder / "small_updates.py").write_text(example)
    (folder / "strangers.py").write_text(FAILING)
    (folder / "broken.py").write_text("raise OSError('no such thing')")
    (folder / "leaving.py").write_text("raise SystemExit(3)")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield


def small_updates() -> Classifier:
    own = importlib.import_module("small_updates").SmallUpdates
    return own(DecoderShape(*TINY_SHAPE), own.Options())  # type: ignore[no-any-return]


def test_the_example_keeps_what_an_engine_relies_on() -> None:
    for options in ({}, {"keep_first": 2}):
        check_method(importlib.import_module("small_updates").SmallUpdates, options)


def test_the_page_s_server_takes_its_options() -> None:
    (options,) = re.findall(r"--additional-config.adaskip '(.*)'", PAGE.read_text())
    config = AdaSkipConfig.parse(json.loads(options))
    config.facts(DecoderShape(*TINY_SHAPE))
    assert config.method == "small_updates:SmallUpdates"


def test_the_checks_find_what_is_wrong() -> None:
    own = importlib.import_module("small_updates").SmallUpdates

    class Greedy(own):  # type: ignore[misc]
        def check(self, budget: float) -> None: ...

    class Moody(own):  # type: ignore[misc]
        def decide(self, budget: float, prompt: Any) -> Any:
            self._mood = 1 - getattr(self, "_mood", 0)
            return self._plan([self._mood, 2] if budget < 1 else [])

    class Gossip(own):  # type: ignore[misc]
        def observer(self, *_: Any) -> Any:
            def observe(sub_layer: int, before: Any, update: Any, kept: Any) -> None:
                kept += update.sum()

            return observe

    for wrong, words in ((Greedy, "keeps"), (Moody, "another plan"), (Gossip, "depends on others")):
        with pytest.raises(AssertionError, match=words):
            check_method(wrong)


def test_an_engine_runs_it_and_its_answers_are_the_reference_s(
    engine: Callable[..., Any], tiny_llama: str
) -> None:
    options = {"method": "small_updates:SmallUpdates", "keep_first": 2, "kv_fill": "copy"}
    llm = engine(tiny_llama, **engine_args(max_compute=BUDGET, **options))
    reference, method = Reference(tiny_llama), small_updates()
    method._may_go = range(2, 7)  # type: ignore[attr-defined]
    prompts = random_prompts(61, 8)
    plans = [method.decide(BUDGET, reference.observe(one, method)).entries() for one in prompts]
    assert len({str(plan) for plan in plans}) > 1
    want = [
        reference.generate(prompt, plan, 10, kv_fill="copy")[0]
        for prompt, plan in zip(prompts, plans, strict=True)
    ]
    assert greedy(llm, prompts, [None] * 8, 10) == want
    report = vllm_adaskip.report(llm)
    assert report["failures"] == 0 and report["method"] == "small_updates:SmallUpdates"
    assert set(report) <= set(Report.__annotations__)


def test_where_it_fails_that_sequence_runs_dense_and_its_neighbours_notice_nothing(
    engine: Callable[..., Any], tiny_llama: str
) -> None:
    llm = engine(tiny_llama, **engine_args(method="strangers:Failing", max_compute=BUDGET))
    reference, method = Reference(tiny_llama), small_updates()
    prompts = random_prompts(62, 8)
    plans: list[Entries] = [
        []
        if len(prompt) % 2
        else method.decide(BUDGET, reference.observe(prompt, method)).entries()
        for prompt in prompts
    ]
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        got = greedy(llm, prompts, [None] * 8, 10)
    finally:
        logger.removeHandler(handler)
    assert got == [
        reference.generate(prompt, plan, 10)[0] for prompt, plan in zip(prompts, plans, strict=True)
    ]
    failed = sum(len(prompt) % 2 for prompt in prompts)
    assert vllm_adaskip.report(llm)["failures"] == failed > 1
    (record,) = (one for one in said if "failed to decide" in one.getMessage())  # once
    assert record.exc_info is not None and "strangers:Failing" in record.getMessage()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("nowhere:Method", ["'nowhere:Method'", "No module named", "module:Class"]),
        ("small_updates:Smaller", ["Smaller", "has no attribute"]),
        ("strangers:NoMethod", ["NoMethod", "subclass of vllm_adaskip.Classifier"]),
        ("os:system", ["os:system", "subclass of vllm_adaskip.Classifier"]),
        ("broken:Method", ["broken:Method", "OSError: no such thing"]),
        ("leaving:Method", ["leaving:Method", "SystemExit: 3"]),
        ("small_updates:", ["small_updates:", "subclass of"]),
        (":x", ["':x'"]),
        ("small_updates", ["'small_updates' is no method", "static, or module:Class"]),
        ("strangers:NoOptions", ["Options", "subclass of vllm_adaskip.MethodOptions"]),
        ("strangers:Taken", ["option max_compute has the name of a server's"]),
        ("strangers:TakenBefore", ["option budget has the name of a server's"]),
        ("a" * 10_000 + ":b", ["cannot be imported"]),
    ],
)
def test_what_is_no_method_is_refused_before_a_model_is_loaded(
    method: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        AdaSkipConfig.parse({"method": method})
    for word in words:
        assert word in str(refusal.value)
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Nonsense", "'strangers:Nonsense' decides nothing"),
        ("Abstract", "'strangers:Abstract' cannot be made .TypeError"),
        ("Unfinished", "'strangers:Unfinished' cannot be made .KeyError"),
    ],
)
def test_a_method_that_cannot_be_made_or_fails_without_a_prompt_stops_the_start(
    name: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        AdaSkipConfig.parse({"method": f"strangers:{name}"}).facts(DecoderShape(*TINY_SHAPE))


def test_what_fails_for_one_request_is_that_request_s() -> None:
    facts = AdaSkipConfig.parse({"method": "strangers:Moody"}).facts(DecoderShape(*TINY_SHAPE))
    with pytest.raises(RequestError, match=r"'strangers:Moody' failed .KeyError"):
        Planner(facts).wanted({"adaskip_max_compute": 0.9})
    facts = AdaSkipConfig.parse({"method": "strangers:Everything"}).facts(DecoderShape(*TINY_SHAPE))
    planner = Planner(facts)
    prompt = a_prompt(planner.classifier)
    assert planner.decide(0.9, prompt) is planner.dense


def test_a_profile_names_no_code(tmp_path: Path) -> None:
    """Who may write a profile, on the hub or on a disk, must not choose what a server runs."""
    from vllm_adaskip.classifiers.profile import Profile

    made = Profile(method="small_updates:SmallUpdates", model="m", fingerprint="f")
    made.save(tmp_path)
    profile = {"profile": str(tmp_path)}
    with pytest.raises(ConfigError, match="cannot name code to load"):
        AdaSkipConfig.parse(profile)
    named = {**profile, "method": "small_updates:SmallUpdates", "keep_first": 2}
    assert AdaSkipConfig.parse(named).method_options == {"keep_first": 2}
    with pytest.raises(ConfigError, match="does not go with profile"):
        AdaSkipConfig.parse({**profile, "method": "strangers:Failing"})
    hidden = {**made.model_dump(), "method": "none", "options": {"method": "broken:Method"}}
    (tmp_path / "adaskip.json").write_text(json.dumps(hidden))
    for options in (profile, {**profile, "method": "none"}):
        with pytest.raises(ConfigError, match=r"'method' \('broken:Method'\) is not allowed here"):
            AdaSkipConfig.parse(options)


def test_a_request_names_no_method() -> None:
    for arguments in ({"adaskip_method": "broken:Method"}, {"adaskip": "broken:Method"}):
        with pytest.raises(RequestError, match="allowed: "):
            RequestArgs.parse(arguments)


def test_requests_are_written_by_a_typed_helper() -> None:
    request = vllm_adaskip.request
    assert request(skip=(5, "attn:7"), max_compute=0.9) == {
        "adaskip_skip": [5, "attn:7"],
        "adaskip_max_compute": 0.9,
    }
    assert request(off=True) == {"adaskip": "off"} and request() == {}
    with pytest.raises(ValueError, match=r"adaskip_max_compute: 1\.5 is not allowed"):
        request(max_compute=1.5)
    for skip in ("5-6", ["nope"], [1.5], [True], 5):
        with pytest.raises(ValueError, match="skip plan; allowed: a"):
            request(skip=skip)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'off' means dense and does not go with adaskip_skip"):
        request(skip=[1], off=True)


def test_a_stock_engine_has_no_report(engine: Callable[..., Any], tiny_llama: str) -> None:
    with pytest.raises(ValueError, match="runs without the plugin"):
        vllm_adaskip.report(engine(tiny_llama))
