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
    DecoderShape,
    PlanError,
    PromptStatistics,
    SkipPlan,
)
from vllm_adaskip.classifiers.early_exit import EarlyExit, EarlyExitOptions
from vllm_adaskip.classifiers.ends import EndsOptions
from vllm_adaskip.classifiers.first.routers import Routers
from vllm_adaskip.classifiers.regret import regrets
from vllm_adaskip.classifiers.similarity.method import Similarity
from vllm_adaskip.classifiers.static.method import Static, StaticOptions

SHAPE = DecoderShape(4, attention_parameters=1, mlp_parameters=3)
HIDDEN = 16

#: Options with which every method can be made; a new method must be added here.
EXAMPLES: dict[str, dict[str, object]] = {
    "adainfer": {"check_layers": [0, 2], "top_prob": 0.5},
    "exit": {"layers": 3},
    "ffn-skip": {},
    "first": {"codebook": [[1], [1, 2]]},
    "none": {},
    "similarity": {},
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


def prompt_for(classifier: Classifier, seed: int = 0) -> PromptStatistics | None:
    """Statistics as they might come, for a method that reads prompts."""
    if not classifier.width:
        return None
    mean, last = np.random.default_rng(seed).random((2, classifier.width))
    return PromptStatistics(5, mean, last)


def test_every_method_has_an_example() -> None:
    assert {name.partition(",")[0] for name in EXAMPLES} == set(METHODS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_method_decides_the_same_plan_again_within_its_budget(made: Made, name: str) -> None:
    classifier = made(name)
    prompt = prompt_for(classifier)
    for budget in (1.0, 0.8, 0.7):
        try:
            classifier.check(budget)
        except PlanError:
            continue
        plan = classifier.decide(budget, prompt)
        assert plan == classifier.decide(budget, prompt)
        assert plan.num_layers == SHAPE.num_layers and not plan.skips_everything
        assert plan.share(SHAPE) <= budget
    with pytest.raises(PlanError, match=r"budget of 0\.01 cannot be met"):
        classifier.check(0.01)


def test_every_method_that_reads_prompts_observes_each_token_by_itself(made: Made) -> None:
    """Purity: the batch, or the chunk, that a token came in must not matter."""
    for classifier in map(made, EXAMPLES):
        if not classifier.width:
            continue
        before, update = torch.randn(2, 6, HIDDEN)
        observe = classifier.observer(HIDDEN, before.device)
        whole = torch.zeros(6, classifier.width)
        parts = torch.zeros(6, classifier.width)
        for sub_layer in range(2 * SHAPE.num_layers):
            observe(sub_layer, before, update, whole)
            for chunk in (slice(0, 1), slice(1, 4), slice(4, 6)):
                observe(sub_layer, before[chunk], update[chunk], parts[chunk])
        assert torch.allclose(whole, parts, atol=1e-6) and whole.any()  # but for rounding


def test_every_method_that_compares_plans_regrets_those_that_cost_its_prompt_more(
    made: Made,
) -> None:
    compared = [one for one in map(made, EXAMPLES) if one.coalesces]
    assert len(compared) == 2
    masks = np.array([SkipPlan.parse(one, 4).mask() for one in ([1], [2], [1, 2], [], [0], [3])])
    for classifier in compared:
        for seed in range(5):
            prompt = prompt_for(classifier, seed)
            assert prompt is not None
            own = classifier.decide(0.75, prompt)
            found = classifier.regrets(own, np.array([own.mask(), *masks]), prompt)
            assert found[0] == 0 and ((found >= 0) & (found <= 1) | (found == np.inf)).all()
            assert (found[-2:] == np.inf).all()  # both ends are never left out
            assert found[-3] == 0  # dense costs the prompt nothing
            assert found[3] >= max(found[1], found[2])


def test_regret_goes_from_the_own_plan_to_the_worst_of_its_size(made: Made) -> None:
    mean = np.array([0.99, 0.99, 0.9, 0.8, 0.6, 0.4, 0.99, 0.99])
    plans = [SkipPlan.parse(one, 4) for one in ([1], [2], ["attn:1", "attn:2"], ["mlp:1"])]
    left_out = np.array([plan.mask() for plan in plans])
    found = made("similarity").regrets(plans[0], left_out, PromptStatistics(3, mean, mean))
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
    made("similarity").observer(HIDDEN, before.device)(3, before, update, values)
    want = torch.nn.functional.cosine_similarity(before, before + update, dim=-1)
    assert torch.allclose(values[:, 3], want, atol=1e-6) and not values[:, 2].any()


def test_similarity_leaves_out_what_changed_the_prompt_least(made: Made) -> None:
    similarity = made("similarity")
    mean = np.array([0.99, 0.99, 0.1, 0.9, 0.8, 0.3, 0.99, 0.99])  # ends are always kept
    prompt = PromptStatistics(3, mean, mean)
    assert similarity.decide(1.0, prompt).is_dense
    assert similarity.decide(0.9, prompt).entries() == ["mlp:1"]
    assert similarity.decide(0.75, prompt).entries() == ["attn:2", "mlp:1"]
    assert similarity.decide(0.5, prompt).entries() == [1, 2]


@pytest.mark.parametrize("ends", [{"keep_first": 0, "keep_last": 0}, {"keep_first": 4}])
def test_similarity_refuses_to_keep_nothing_or_all(ends: dict[str, int]) -> None:
    with pytest.raises(PlanError, match="allowed: 1 to 3 in all, of 4"):
        Similarity(SHAPE, EndsOptions(**ends))


def test_static_meets_exactly_the_budget_its_plan_keeps() -> None:
    static = Static(SHAPE, StaticOptions(skip=[1, "attn:2"]))
    kept = 1 - 5 / 16
    static.check(kept)
    assert static.decide(kept, None).share(SHAPE) == kept
    with pytest.raises(PlanError, match=r"keeps 0\.688"):
        static.check(kept - 1e-9)


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
