# SPDX-License-Identifier: Apache-2.0
"""``adaskip fit adainfer`` from outside: a profile that loads, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import vllm_adaskip
from vllm_adaskip.classifiers.adainfer.rule_file import load_rule
from vllm_adaskip.classifiers.profile import Profile
from vllm_adaskip.cli.main import app
from vllm_adaskip.config import AdaSkipConfig

ONE_TOKEN = ["--data", "bundled:sentiment,topic", "--limit", "60", "--device", "cpu"]
ALWAYS = {"adaskip.json", "fit.json", "features.png", "coverage.png", "adainfer.safetensors"}


def fit(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["fit", "adainfer", "--out", str(out), *arguments])


@pytest.mark.parametrize(
    ("classifier", "others", "written"),
    [
        ("svm", ["--kernel", "linear", "--checks", "3"], {"training.skops"}),
        ("crf", ["--candidates"], {"training.crfsuite"}),
        ("threshold", ["--check-layers", "6,8"], set()),
    ],
)
def test_it_writes_a_profile_that_a_server_takes(
    tmp_path: Path, classifier: str, others: list[str], written: set[str]
) -> None:
    arguments = [*ONE_TOKEN, "--classifier", classifier, "--agreement", "0.97", *others]
    done = fit(out := tmp_path / "profile", *arguments)
    assert done.exit_code == 0, done.output
    assert {path.name for path in out.iterdir()} == ALWAYS | written
    profile = Profile.load(out)
    assert profile.method == "adainfer" and float(profile.metrics["pruned"]) > 0.2
    rule = load_rule(classifier, out)
    assert len(rule.layers) <= 3 or classifier != "svm"
    assert rule.layers == (6, 8) or classifier != "threshold"
    served = AdaSkipConfig.parse({"profile": str(out)})
    served.check_model(json.loads((Path(vllm_adaskip.bundled_model()) / "config.json").read_text()))
    assert served.method_options.get("classifier", "threshold") == classifier
    answers = served.method_options.get("candidates", [])
    assert len(answers) == (8 if classifier == "crf" else 0)  # 2 sentiments, 6 topics
    cost = float(profile.metrics["check_cost_in_layers"])
    assert cost == pytest.approx(192 * (len(answers) or 473) / 442_368)
    for words in (
        "asked for",
        "97.00%",
        "looked after",
        "as dense",
        "sentiment",
        "vllm serve",
        "adaskip eval",
    ):
        assert words in done.output
    before = (out / "adaskip.json").stat()
    assert fit(out, *arguments).exit_code == 0
    assert (out / "adaskip.json").stat() == before  # nothing was fitted again
    refused = fit(out, *arguments[:-1], "--agreement", "0.9", *arguments[-1:])
    assert refused.exit_code == 2


@pytest.mark.parametrize("scope", ["prompt", "token"])
def test_scopes_that_generate_have_cases_of_their_own(tmp_path: Path, scope: str) -> None:
    few = ["--data", "bundled:key,sum", "--limit", "60", "--device", "cpu", "--agreement", "0.95"]
    done = fit(out := tmp_path / "profile", *few, "--scope", scope, "--classifier", "threshold")
    assert done.exit_code == 0, done.output
    assert AdaSkipConfig.parse({"profile": str(out)}).method_options["scope"] == scope
    assert float(Profile.load(out).metrics["agreement_of_stopped"]) > 0.85


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--classifier", "tree"], ["--classifier 'tree'", "svm", "crf", "threshold"]),
        (["--scope", "layer"], ["--scope 'layer'", "answer"]),
        (["--agreement", "0"], ["--agreement 0", "greater than 0"]),
        (["--agreement", "1.01"], ["--agreement 1.01", "less than or equal to 1"]),
        (["--agreement", "nan"], ["--agreement nan"]),
        (["--checks", "-1"], ["--checks -1"]),
        (["--check-layers", "three"], ["--check-layers 'three'"]),
        (["--check-layers", "5,11"], ["--check-layers 5,11", "0 to 10", "last layer"]),
        (["--check-layers", "12"], ["--check-layers 12", "0 to 10"]),
        (["--kernel", "poly"], ["--kernel 'poly'", "linear"]),
        (["--kernel", "linear", "--classifier", "crf"], ["--classifier svm"]),
        (["--limit", "11"], ["99 examples", "100 or more"]),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.setattr("vllm_adaskip.cli.fit.loaded", lambda *_: pytest.fail("it was loaded"))
    refused = fit(tmp_path / "out", *arguments)
    assert refused.exit_code == 2
    for word in words:
        assert word in refused.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_layer_where_nothing_is_settled_is_refused(tmp_path: Path) -> None:
    arguments = ["--data", "bundled:fact", "--limit", "120", "--check-layers", "0"]
    refused = fit(tmp_path / "out", *arguments, "--device", "cpu")
    assert refused.exit_code == 2 and "check layer 0" in refused.output
    assert not (tmp_path / "out" / "adaskip.json").exists()
