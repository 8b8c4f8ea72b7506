# SPDX-License-Identifier: Apache-2.0
"""AdaInfer's rules, each against what it says written down another way; profiles and options."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.profiles import write_adainfer
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from vllm_adaskip import DecoderShape
from vllm_adaskip.classifiers import PlanError, PromptStatistics
from vllm_adaskip.classifiers.adainfer.gate import LensGate, features
from vllm_adaskip.classifiers.adainfer.method import AdaInfer, AdaInferOptions
from vllm_adaskip.classifiers.adainfer.rule_file import load_rule
from vllm_adaskip.classifiers.adainfer.rules import FILE, Crf, ExitRule, Svm, Threshold
from vllm_adaskip.classifiers.gates import Stream
from vllm_adaskip.classifiers.profile import ProfileError

SHAPE = DecoderShape(6, attention_parameters=1, mlp_parameters=3)
LAYERS = (1, 2, 4)
POINTS = np.random.default_rng(0).random((40, 2))
SEEN = np.random.default_rng(1).random((3, 40, 2))


def chain(rule: ExitRule, seen: np.ndarray) -> list[list[bool]]:
    """What a rule says layer after layer of ``[layers, tokens, 2]`` features."""
    memory = np.zeros((seen.shape[1], 2))
    said = []
    for layer, found in zip(rule.layers, seen, strict=True):
        settled, memory = rule.settled(layer, found, memory)
        said.append(settled.tolist())
    return said


def svm(kernel: str) -> Svm:
    rng = np.random.default_rng(2)
    return Svm(
        LAYERS,
        mean=rng.random((3, 2)),
        scale=rng.random((3, 2)) + 0.1,
        bias=rng.normal(size=3),
        vectors=tuple(rng.normal(size=(count, 2)) for count in (4, 1, 9)),
        dual=tuple(rng.normal(size=count) for count in (4, 1, 9)),
        gamma=np.array([0.3, 1.0, 4.0]) if kernel == "rbf" else None,
    )


def crf(seed: int = 3) -> Crf:
    rng = np.random.default_rng(seed)
    return Crf(LAYERS, rng.normal(size=(3, 2, 3)) * 3, rng.normal(size=(2, 2)) * 2)


def threshold() -> Threshold:
    return Threshold(LAYERS, np.array([0.9, 0.5, 0.2]), np.array([0.1, 0.5, 0.0]))


def test_thresholds_ask_for_both_features() -> None:
    rule, found = threshold(), np.array([[0.5, 0.5], [0.5, 0.4], [0.4, 0.5], [1.0, 1.0]])
    assert chain(rule, np.stack([found] * 3)) == [
        [False, False, False, True],
        [True, False, False, True],
        [True, True, True, True],
    ]


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_svm_is_its_sum_over_support_vectors(kernel: str) -> None:
    rule = svm(kernel)
    for at, layer in enumerate(LAYERS):
        for point, got in zip(POINTS, rule.settled(layer, POINTS, POINTS)[0], strict=True):
            x = [(point[i] - rule.mean[at][i]) / rule.scale[at][i] for i in range(2)]
            total = rule.bias[at]
            for vector, dual in zip(rule.vectors[at], rule.dual[at], strict=True):
                dot = x[0] * vector[0] + x[1] * vector[1]
                if rule.gamma is not None:
                    squared = (x[0] - vector[0]) ** 2 + (x[1] - vector[1]) ** 2
                    dot = math.exp(-rule.gamma[at] * squared)
                total += dual * dot
            assert got == (total >= 0)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_svm_decides_as_scikit_learn_s_from_whose_attributes_it_is_made(kernel: str) -> None:
    from sklearn.svm import SVC

    labels = POINTS.sum(axis=1) + SEEN[0, :, 0] * 0.2 > 1.1
    theirs = SVC(kernel=kernel, gamma=2.0).fit((POINTS - 0.5) / 0.3, labels)
    ours = Svm(
        (3,),
        np.full((1, 2), 0.5),
        np.full((1, 2), 0.3),
        theirs.intercept_,
        (theirs.support_vectors_,),
        (theirs.dual_coef_[0],),
        np.array([2.0]) if kernel == "rbf" else None,
    )
    others = SEEN.reshape(-1, 2)
    want = theirs.decision_function((others - 0.5) / 0.3)
    assert np.allclose(ours.decision(3, others), want) and 0 < (want > 0).sum() < len(others)


@pytest.mark.parametrize("seed", range(6))
def test_crf_is_the_marginal_over_all_labellings_so_far(seed: int) -> None:
    rule, seen = crf(seed), SEEN
    said = chain(rule, seen)
    for token in range(40):
        for length in range(1, 4):
            weight = {0: 0.0, 1: 0.0}
            for labels in itertools.product((0, 1), repeat=length):
                score = sum(
                    rule.unary[at, label] @ [*seen[at, token], 1] for at, label in enumerate(labels)
                )
                score += sum(rule.transition[pair] for pair in itertools.pairwise(labels))
                weight[labels[-1]] += math.exp(score)
            assert said[length - 1][token] == (weight[1] >= weight[0])


@pytest.mark.parametrize("rule", [threshold(), svm("linear"), svm("rbf"), crf()])
def test_a_token_is_decided_by_itself(rule: ExitRule) -> None:
    alone = [chain(rule, SEEN[:, [token]]) for token in range(40)]
    assert chain(rule, SEEN) == [[one[at][0] for one in alone] for at in range(3)]


@pytest.mark.parametrize("rule", [threshold(), svm("linear"), svm("rbf"), crf()])
def test_what_is_saved_is_what_is_read(tmp_path: Path, rule: ExitRule) -> None:
    rule.save(tmp_path)
    kind = type(rule).__name__.lower()
    again = load_rule(kind, tmp_path)
    assert again.layers == LAYERS and chain(again, SEEN) == chain(rule, SEEN)
    assert len({tuple(one) for one in chain(rule, SEEN)}) > 1


def test_nothing_is_settled_by_what_is_no_number() -> None:
    nothing = np.full((3, 1, 2), np.nan)
    for rule in (threshold(), svm("rbf"), crf()):
        assert chain(rule, nothing) == [[False]] * 3


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("threshold", {"gap": None}, "gap is missing"),
        ("threshold", {"layers": None}, "layers is missing"),
        ("threshold", {"more": np.zeros(1)}, "more: unknown with classifier 'threshold'"),
        ("threshold", {"gap": np.zeros(2)}, r"gap is float64 \(2,\)"),
        ("threshold", {"gap": np.array([0, np.nan, 0])}, "gap holds values that are not finite"),
        ("threshold", {"layers": np.array([1, 4, 2])}, "ascending order"),
        ("threshold", {"layers": np.array([-1, 1, 2])}, "ascending order"),
        ("svm", {"scale": np.zeros((3, 2))}, "scale holds values that are not positive"),
        ("svm", {"gamma": -np.ones(3)}, "gamma holds values that are not positive"),
        ("svm", {"dual.2": np.ones(2)}, r"dual\.2 is float64 \(2,\)"),
        ("svm", {"vectors.4": np.ones((0, 2))}, r"vectors\.4 is float64 \(0, 2\)"),
        ("svm", {"vectors.4": np.ones((9, 3))}, r"vectors\.4 is float64 \(9, 3\)"),
        ("svm", {"bias": np.array([True, False, True])}, "bias is bool"),
        ("crf", {"transition": np.zeros((3, 3))}, r"transition is float64 \(3, 3\)"),
        ("crf", {"unary": np.full((3, 2, 3), np.inf)}, "unary holds values that are not finite"),
    ],
)
def test_a_tampered_profile_is_refused(
    tmp_path: Path, kind: str, change: dict[str, Any], message: str
) -> None:
    {"threshold": threshold, "crf": crf, "svm": lambda: svm("rbf")}[kind]().save(tmp_path)
    tensors = {**load_file(tmp_path / FILE), **change}
    save_file({k: v for k, v in tensors.items() if v is not None}, tmp_path / FILE)
    with pytest.raises(ProfileError, match=message) as refused:
        load_rule(kind, tmp_path)
    assert FILE in str(refused.value)


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=FILE):
        load_rule("svm", tmp_path)
    (tmp_path / FILE).write_bytes(b"\x80\x04nonsense")
    with pytest.raises(ProfileError, match=FILE):
        load_rule("svm", tmp_path)


@given(st.integers(1, 6), st.integers(0, 1000))
def test_features_are_the_two_largest_probabilities(vocabulary: int, seed: int) -> None:
    logits = torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(seed)) * 4
    for row, (top_prob, gap) in zip(logits, features(logits), strict=True):
        best = [*row.softmax(0).sort(descending=True).values.tolist(), 0.0]
        assert top_prob.item() == pytest.approx(best[0], abs=1e-6)
        assert gap.item() == pytest.approx(best[0] - best[1], abs=1e-6)


class TwoTokens:
    """A lens through which each stream shows its own two numbers as logits."""

    def check(self, vocabulary: Any) -> None:
        self.checked = vocabulary

    def __call__(self, stream: Stream, vocabulary: Any) -> torch.Tensor:
        assert stream.before is not None
        logits = stream.before + stream.update
        return logits if vocabulary is None else logits[:, list(vocabulary)]


def exits_of(
    gate: LensGate, layer: int, tokens: NDArray[np.int64], logits: torch.Tensor
) -> NDArray[np.bool_]:
    """Whose all above is left out after a layer; nothing else ever is."""
    stream = Stream(torch.zeros_like(logits), logits)
    left_out = gate.after(2 * layer + 1, tokens, lambda chosen: stream)
    if left_out is None:
        return np.zeros(len(tokens), dtype=np.bool_)
    exits = left_out.any(axis=1)
    assert (left_out == exits[:, None] & (np.arange(12) > 2 * layer + 1)).all()
    return exits


def test_the_gate_remembers_each_token_s_own_layers() -> None:
    """Who has left is asked no more; the others' places among those who are asked move."""
    # Nobody is sure at the first layer, and what is seen there counts for more than what comes.
    first, later = [[0, 0, 0], [10, 0, -11]], [[0, 0, 0], [1, 1, 0.5]]
    rule = Crf(LAYERS, np.array([first, later, later]), np.array([[2.0, -2.0], [-2.0, 2.0]]))
    lens = TwoTokens()
    gate = LensGate(rule, lens, check_layers=LAYERS)  # type: ignore[arg-type]
    logits = torch.tensor(np.random.default_rng(4).normal(size=(3, 40, 2)) * 3)
    found = np.stack([features(one).double().numpy() for one in logits])
    want = chain(rule, found)
    assert 5 < sum(want[1]) < 35
    for _ in range(2):  # another step knows nothing of the one before
        gate.begin(np.zeros((40, 12), bool), None)
        left = np.arange(40)
        for at, layer in enumerate(LAYERS):
            exits = exits_of(gate, layer, left, logits[at][left])
            assert exits.tolist() == [want[at][token] for token in left]
            left = left[~exits][::-1].copy()  # in any order
    assert lens.checked is None


def test_each_request_s_own_vocabulary() -> None:
    gate = LensGate(
        Threshold((0,), np.array([0.7]), np.array([0.0])),
        TwoTokens(),  # type: ignore[arg-type]
        check_layers=(0,),
        by_request=True,
    )
    gate.begin(np.zeros((5, 12), bool), [[0], None, [1, 2, 1, 1], [0, 1], [1, 2]])
    logits = torch.tensor([[0.0, 9, 0], [0, 0, 0], [9, 1, 1], [0, 1, 9], [0, 3, 0]])
    exits = exits_of(gate, 0, np.arange(5), logits)
    assert exits.tolist() == [True, False, False, True, True]
    assert exits_of(gate, 0, np.array([0, 1]), logits[:2]).tolist() == [True, False]


def made(profile: Path | None = None, **options: Any) -> AdaInfer:
    return AdaInfer(SHAPE, AdaInferOptions(**options), profile)


OWN: dict[str, Any] = {"check_layers": [1, 3], "top_prob": 0.5}


def test_scopes_say_what_the_engine_must_do() -> None:
    answer, prompt, token = (made(scope=scope, **OWN) for scope in ("answer", "prompt", "token"))
    assert (answer.gate_scope, answer.width) == ("answer", 0)
    assert (token.gate_scope, token.width) == ("token", 0)
    assert (prompt.gate_scope, prompt.width, prompt.last_only) == (None, 4, True)


def test_a_prompt_decides_for_the_first_layer_where_it_is_settled() -> None:
    prompt = made(scope="prompt", gap=0.2, **OWN)

    def depth(*last: float, budget: float = 1.0) -> int:
        own = np.array(last)
        return 6 - prompt.decide(budget, PromptStatistics(3, own, own)).attention.bit_count()

    assert depth(0.4, 0.4, 0.6, 0.1) == 6
    assert depth(0.4, 0.4, 0.6, 0.3) == 4
    assert depth(0.5, 0.2, 0.1, 0.1) == 2
    assert depth(0.4, 0.4, 0.6, 0.1, budget=0.5) == 3
    assert depth(0.5, 0.2, 0.1, 0.1, budget=0.5) == 2


def test_a_budget_is_met_by_leaving_out_the_last_layers() -> None:
    for scope in ("answer", "token"):
        method = made(scope=scope, **OWN)
        assert method.decide(1.0, None).is_dense
        assert method.decide(0.67, None).entries() == [4, 5]
        assert method.decide(0.66, None).entries() == [3, 4, 5]
        with pytest.raises(PlanError, match="runs at least one layer"):
            method.check(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a profile with classifier 'threshold'"),
        ({"classifier": "svm", "check_layers": [1]}, "needs a profile with classifier 'svm'"),
        ({"classifier": "crf", **OWN}, "do not go with classifier 'crf'"),
        (
            {**OWN, "check_layers": [1, 5]},
            r"check_layers \[1, 5\].*allowed with this model: 0 to 4",
        ),
        ({**OWN, "check_layers": [-1]}, "allowed with this model: 0 to 4"),
        ({**OWN, "check_layers": [2, 1]}, "must ascend"),
        ({**OWN, "check_layers": [1, 1]}, "must ascend"),
        ({**OWN, "scope": "token", "vocabulary": "request"}, "does not go with scope 'token'"),
        ({**OWN, "vocabulary": "candidates"}, "needs token ids"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_check_layers_are_among_those_that_were_fitted(tmp_path: Path) -> None:
    svm("rbf").save(tmp_path)
    assert made(tmp_path, classifier="svm", scope="prompt").width == 6
    assert made(tmp_path, classifier="svm", scope="prompt", check_layers=[2]).width == 2
    with pytest.raises(ValueError, match=r"\[0\]; allowed with this profile: some of \[1, 2, 4\]"):
        made(tmp_path, classifier="svm", check_layers=[0])
    crf().save(tmp_path)
    with pytest.raises(ValueError, match=r"\[1, 2\]; allowed with this profile: exactly"):
        made(tmp_path, classifier="crf", check_layers=[1, 2])


def test_thresholds_of_the_options_go_before_those_of_the_profile(tmp_path: Path) -> None:
    threshold().save(tmp_path)
    found = np.array([0.4, 0.4, 0.4, 0.1, 0.3, 0.4])
    statistics = PromptStatistics(3, found, found)

    def depth(**own: Any) -> int:
        plan = made(tmp_path, scope="prompt", **own).decide(1.0, statistics)
        return 6 - plan.attention.bit_count()

    assert depth() == 5 and depth(top_prob=0.4) == 2 and depth(gap=0.5) == 6


def test_a_profile_of_another_model_is_refused_at_start_up(tmp_path: Path, tiny_llama: str) -> None:
    from vllm_adaskip.config import AdaSkipConfig, ConfigError

    folder = write_adainfer(tmp_path / "p", tiny_llama, threshold(), scope="prompt")
    config = AdaSkipConfig.parse({"profile": folder})
    assert config.method == "adainfer"
    with pytest.raises(ConfigError, match="the profile was made for"):
        config.check_model({"hidden_size": 1})
    with pytest.raises(ConfigError, match=r"allowed with this model: 0 to 3"):
        config.facts(DecoderShape(5, 1, 3))
    (tmp_path / "p" / FILE).unlink()
    with pytest.raises(ConfigError, match=FILE):
        config.facts(SHAPE)


def test_scope_token_refuses_to_leave_holes() -> None:
    from vllm_adaskip.config import AdaSkipConfig, ConfigError

    options = {"method": "adainfer", "scope": "token", **OWN}
    with pytest.raises(ConfigError, match=r"kv_fill: 'none'.*allowed: 'copy', 'project'"):
        AdaSkipConfig.parse(options).facts(SHAPE)
    AdaSkipConfig.parse({**options, "kv_fill": "copy"}).facts(SHAPE)
