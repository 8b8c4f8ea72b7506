# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from vllm_adaskip.classifiers import (
    METHODS,
    Classifier,
    PlanError,
    PromptStatistics,
    SkipPlan,
)
from vllm_adaskip.classifiers.adaskip.method import AdaSkip
from vllm_adaskip.classifiers.early_exit import EarlyExit, EarlyExitOptions
from vllm_adaskip.classifiers.ends import EndsOptions
from vllm_adaskip.classifiers.first.routers import Routers
from vllm_adaskip.classifiers.regret import regrets
from vllm_adaskip.classifiers.static.method import Static, StaticOptions
from vllm_adaskip.testing import HIDDEN, SHAPE, a_prompt, check_observer, check_plans, check_regrets

#: Options with which every method can be made; a new method must be added here.
EXAMPLES: dict[str, dict[str, object]] = {
    "adainfer": {"check_layers": [0, 2], "top_prob": 0.5},
    "exit": {"layers": 3},
    "ffn-skip": {},
    "first": {"codebook": [[1], [1, 2]]},
    "none": {},
    "adaskip": {},
    "static": {"skip": [1, "attn:2"]},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Classifier]:
    """Make a method by its name, with a profile of random tensors for whoever wants one."""
    folder = tmp_path_factory.mktemp("profile")
    routers = Routers(SHAPE.num_layers, HIDDEN)
    torch.nn.init.normal_(routers.weight)
    routers.save(folder)

    def made(name: str) -> Classifier:
        method = METHODS[name.partition(",")[0]]
        profile = folder if name == "first" else None
        return method(SHAPE, method.Options.model_validate(EXAMPLES[name]), profile)

    return made


Made = Callable[[str], Classifier]


def test_every_method_has_an_example() -> None:
    assert {name.partition(",")[0] for name in EXAMPLES} == set(METHODS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_method_keeps_what_an_engine_relies_on(made: Made, name: str) -> None:
    classifier = made(name)
    check_plans(classifier, SHAPE)
    check_observer(classifier, SHAPE, HIDDEN)
    check_regrets(classifier, SHAPE)
    with pytest.raises(PlanError, match=r"budget of 0\.01 cannot be met"):
        classifier.check(0.01)


def test_every_method_that_compares_plans_regrets_those_that_cost_its_prompt_more(
    made: Made,
) -> None:
    compared = [one for one in map(made, EXAMPLES) if one.coalesces]
    assert len(compared) == 2
    masks = np.array([SkipPlan.parse(one, 4).mask() for one in ([1], [2], [1, 2], [], [0], [3])])
    for classifier in compared:
        for seed in range(5):
            prompt = a_prompt(classifier, seed)
            assert prompt is not None
            own = classifier.decide(0.75, prompt)
            found = classifier.regrets(own, np.array([own.mask(), *masks]), prompt)
            assert (found[-2:] == np.inf).all()  # both ends are never left out
            assert found[-3] == 0  # dense costs the prompt nothing
            assert found[3] >= max(found[1], found[2])


def test_regret_goes_from_the_own_plan_to_the_worst_of_its_size(made: Made) -> None:
    mean = np.array([0.99, 0.99, 0.9, 0.8, 0.6, 0.4, 0.99, 0.99])
    plans = [SkipPlan.parse(one, 4) for one in ([1], [2], ["attn:1", "attn:2"], ["mlp:1"])]
    left_out = np.array([plan.mask() for plan in plans])
    found = made("adaskip").regrets(plans[0], left_out, PromptStatistics(3, mean, mean))
    # Missing to 1: 0.1 + 0.2 at layer 1, 0.4 + 0.6 at layer 2.
    np.testing.assert_allclose(found, [0, 1, 0.2 / 0.7, 0])
    scores = np.array([0.5, 0.2, 0.8, 0.5])
    for reduced in (PromptStatistics(3, scores, mean[:4]), PromptStatistics(3, scores, scores)):
        found = made("first").regrets(plans[0], left_out, reduced)
        np.testing.assert_allclose(found, [0, 1, 0.5, 0])


def test_where_every_plan_of_a_size_is_the_worst_more_harm_is_regretted_wholly() -> None:
    harms = np.array([np.inf, 0.2, 0.3, np.inf])
    dense, both = np.zeros(4, dtype=np.bool_), np.array([False, True, True, False])
    one = np.array([False, True, False, False])
    assert regrets(harms, dense, np.array([dense, one])).tolist() == [0, 1]
    assert regrets(harms, both, np.array([both, one, ~both])).tolist() == [0, 0, np.inf]


def test_similarity_is_the_cosine_of_the_stream_before_and_after(made: Made) -> None:
    before, update = torch.randn(2, 6, HIDDEN)
    values = torch.zeros(6, 8)
    made("adaskip").observer(HIDDEN, before.device)(3, before, update, values)
    want = torch.nn.functional.cosine_similarity(before, before + update, dim=-1)
    assert torch.allclose(values[:, 3], want, atol=1e-6) and not values[:, 2].any()


def test_similarity_leaves_out_what_changed_the_prompt_least(made: Made) -> None:
    similarity = made("adaskip")
    mean = np.array([0.99, 0.99, 0.1, 0.9, 0.8, 0.3, 0.99, 0.99])  # ends are always kept
    prompt = PromptStatistics(3, mean, mean)
    assert similarity.decide(1.0, prompt).is_dense
    assert similarity.decide(0.9, prompt).entries() == ["mlp:1"]
    assert similarity.decide(0.75, prompt).entries() == ["attn:2", "mlp:1"]
    assert similarity.decide(0.5, prompt).entries() == [1, 2]


@pytest.mark.parametrize("ends", [{"keep_first": 0, "keep_last": 0}, {"keep_first": 4}])
def test_similarity_refuses_to_keep_nothing_or_all(ends: dict[str, int]) -> None:
    with pytest.raises(PlanError, match="allowed: 1 to 3 in all, of 4"):
        AdaSkip(SHAPE, EndsOptions(**ends))


def test_static_meets_exactly_the_budget_its_plan_keeps() -> None:
    static = Static(SHAPE, StaticOptions(skip=[1, "attn:2"]))
    kept = 1 - 5 / 16
    static.check(kept)
    assert static.decide(kept, None).share(SHAPE) == kept
    with pytest.raises(PlanError, match=r"keeps 0\.688"):
        static.check(kept - 1e-9)


def test_of_a_ladder_a_budget_takes_the_plan_that_keeps_most() -> None:
    static = Static(SHAPE, StaticOptions(skip=[1, 2], ladder=[[1], [1, 2, "mlp:3"]]))
    assert [plan.entries() for plan in static.codebook] == [[1], [1, 2], [1, 2, "mlp:3"]]
    taken = {budget: static.decide(budget, None).entries() for budget in (1.0, 0.75, 0.6, 0.5)}
    assert taken == {1.0: [1], 0.75: [1], 0.6: [1, 2], 0.5: [1, 2]}
    least = static.codebook[-1].share(SHAPE)
    static.check(least)
    with pytest.raises(PlanError, match="as its smallest plan"):
        static.check(least - 1e-9)


def test_early_exit_runs_the_first_layers() -> None:
    exit = EarlyExit(SHAPE, EarlyExitOptions(layers=3))
    assert exit.decide(1.0, None).entries() == [3] and exit.gate_scope is None
    exit.check(0.75)
    with pytest.raises(PlanError, match=r"keeps 0\.750"):
        exit.check(0.74)
    with pytest.raises(PlanError, match="layers 5; allowed: 1 to 4"):
        EarlyExit(SHAPE, EarlyExitOptions(layers=5))
    assert EarlyExit(SHAPE, EarlyExitOptions(layers=4, scope="answer")).gate_scope == "answer"


def test_classifiers_never_import_vllm() -> None:
    code = "import sys, vllm_adaskip.classifiers; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
