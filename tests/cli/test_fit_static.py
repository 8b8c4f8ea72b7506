# SPDX-License-Identifier: Apache-2.0
"""``adaskip fit static`` from outside: profiles that serve, and what is refused before a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vllm_adaskip import SkipPlan
from vllm_adaskip.classifiers import DecoderShape, PlanError
from vllm_adaskip.classifiers.profile import Profile, fingerprint
from vllm_adaskip.classifiers.static.fit import Found
from vllm_adaskip.classifiers.static.method import Static, StaticOptions
from vllm_adaskip.cli.fit_static import table
from vllm_adaskip.cli.main import app
from vllm_adaskip.config import AdaSkipConfig
from vllm_adaskip.lab.fitting.greedy import Step

FEW = ["--data", "bundled:topic,sum", "--limit", "9", "--device", "cpu"]


def fit(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(
        app, ["fit", "static", "--out", str(out), *arguments], env={"COLUMNS": "160"}
    )


def test_greedy_writes_a_profile_that_a_server_takes(tmp_path: Path, model: str) -> None:
    arguments = ["--model", model, "--unit", "sub-layer", *FEW]
    done = fit(out := tmp_path / "profile", *arguments)
    assert done.exit_code == 0, done.output
    names = {path.name for path in out.iterdir()}
    assert names == {"adaskip.json", "fit.json", "search.png"}
    profile = Profile.load(out)
    config = json.loads((Path(model) / "config.json").read_text())
    assert (profile.method, profile.fingerprint) == ("static", fingerprint(config))
    options = StaticOptions.model_validate(profile.options)
    plan = SkipPlan.parse(options.skip, 4)
    assert plan.mask().sum() == 2 and not plan.mask()[[0, 1, 6, 7]].any()
    told = profile.metrics
    assert (told["examples"], told["search"], told["unit"]) == (18, "greedy", "sub-layer")
    assert isinstance(told["loss"], float) and told["loss"] != told["loss_dense"]
    assert 0.4 < float(told["compute_kept"]) < 1
    for words in (str(plan), f"{told['loss']:.4g}", f"{told['loss_dense']:.4g}", "adaskip eval"):
        assert words in done.output
    served = AdaSkipConfig.parse({"profile": str(out)})
    served.check_model(config)
    assert (served.method, served.method_options) == ("static", {"skip": options.skip})
    method = Static(DecoderShape(4, 1, 1), options, out)
    assert method.decide(1.0, None) == plan
    with pytest.raises(PlanError, match=r"a budget of 0.5 cannot be met: .* keeps 0.750"):
        method.check(0.5)
    before = (out / "adaskip.json").stat()
    again = fit(out, *arguments)
    assert again.exit_code == 0 and "vllm serve" in again.output
    assert (out / "adaskip.json").stat() == before  # nothing was searched again
    other = fit(out, *arguments, "--search", "late")
    assert other.exit_code == 2 and "search is 'greedy', not 'late'" in other.output


@pytest.mark.parametrize(
    ("arguments", "skip"),
    [
        (["--search", "late", "--unit", "attention"], ["attn:2"]),
        (["--search", "late", "--unit", "attention", "--keep-last", "0"], ["attn:3"]),
        (["--search", "uniform", "--target-skip", "0.5"], [1, 2]),
        (["--search", "random", "--unit", "mlp", "--seed", "1"], ["mlp:1"]),
    ],
)
def test_searches_that_need_no_losses(
    tmp_path: Path, model: str, arguments: list[str], skip: list[int | str]
) -> None:
    done = fit(tmp_path, "--model", model, *arguments, *FEW)
    assert done.exit_code == 0, done.output
    assert Profile.load(tmp_path).options == {"skip": skip}
    assert not (tmp_path / "search.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--search", "best"], ["--search 'best'", "'greedy', 'late', 'uniform' or 'random'"]),
        (["--unit", "head"], ["--unit 'head'", "'layer', 'attention', 'mlp' or 'sub-layer'"]),
        (["--target-skip", "0"], ["--target-skip 0", "greater than 0"]),
        (["--target-skip", "1"], ["--target-skip 1", "less than 1"]),
        (["--target-skip", "0.03"], ["0.03 is 0 of 12", "the smallest that leaves any out is 0.0"]),
        (["--target-skip", "0.9"], ["0.9 is 11 of 12", "allowed: up to 10", "keep_first"]),
        (["--keep-first", "9"], ["0.25 is 3 of 12", "--unit mlp", "allowed: up to 2"]),
        (["--keep-first", "-1"], ["--keep-first -1", "greater than or equal to 0"]),
        (["--keep-first", "7", "--keep-last", "5"], ["keep 12", "allowed: 1 to 11"]),
        (["--keep-first", "0", "--keep-last", "0"], ["keep 0", "allowed: 1 to 11"]),
        (["--limit", "5", "--data", "bundled:sum"], ["5 examples; allowed: 16"]),
    ],
)
def test_what_cannot_be_searched_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.setattr("vllm_adaskip.cli.fit.loaded", lambda *_: pytest.fail("it was loaded"))
    refused = fit(tmp_path / "out", "--unit", "mlp", *arguments)
    assert refused.exit_code == 2
    for word in words:
        assert word in refused.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("loss", "doubted"), [(5.0, False), (4.9, False), (3.6, True)])
def test_a_plan_that_seems_better_than_the_whole_model_is_doubted(
    loss: float, doubted: bool
) -> None:
    found = Found(SkipPlan.parse([3], 5), [Step((), 5.0), Step((3,), loss)])
    assert bool(table(found, DecoderShape(5, 1, 1)).caption) is doubted
