# SPDX-License-Identifier: Apache-2.0
"""What an ablation compares, and how it is averaged over seeds."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluation.synthetic import answer, manifest

from vllm_adaskip.classifiers.first.ablate import BEST, TUNED, Fits, best_fixed, settings
from vllm_adaskip.lab.evaluation.ablation_plot import draw, groups
from vllm_adaskip.lab.evaluation.results import Setting
from vllm_adaskip.lab.evaluation.settings import DENSE
from vllm_adaskip.lab.evaluation.summary import summarise

FITS = Fits([Path("a"), Path("b")], Path("c"), Path("d"), {"reduce last": Path("e")})


def test_every_kind_is_compared_at_every_share() -> None:
    found = settings(FITS, {3: [5, 6, 7], 6: [1, 2, 3, 4, 5, 6]}, [0.25, 0.5], 12)
    assert found[0] == DENSE and len({one.name for one in found}) == len(found)
    count = {one.family: 0 for one in found}
    for one in found:
        count[one.family] += 1
    assert count == {
        "dense": 1, "routers": 4, "routers + LoRA": 2, "reduce last": 1,
        "uniform": 2, "random": 6, BEST: 2, TUNED: 1,
    }  # fmt: skip
    (tuned,) = [one for one in found if one.family == TUNED]
    assert tuned.skip == [] and tuned.options == {"profile": "d"}
    assert all(
        one.options["target_skip"] in (0.25, 0.5) for one in found if one.family == "routers"
    )


def test_the_best_fixed_plan_is_searched_greedily() -> None:
    price = {layer: float(abs(layer - 4)) for layer in range(8)}
    found = best_fixed(lambda left_out: sum(price[one] for one in left_out), [1, 3], 8)
    assert found == {1: [4], 3: [3, 4, 5]}


def test_items_are_averaged_over_seeds_before_they_are_compared(tmp_path: Path) -> None:
    names = ["routers #0 -25%", "routers #1 -25%"]
    made = [Setting(name=name, family="routers", method="first") for name in names]
    answers = [answer("dense", f"sum/{one}", 1.0) for one in range(20)]
    answers += [answer(names[0], f"sum/{one}", float(one > 3), skip=[5]) for one in range(20)]
    answers += [answer(names[1], f"sum/{one}", 1.0, skip=[5, 6, 7]) for one in range(20)]
    (found,) = groups(summarise(manifest([DENSE, *made]), answers, []), answers)
    assert (found.family, found.asked, found.members) == ("routers", "-25%", 2)
    assert found.score == pytest.approx(0.9) and found.loss.mean == pytest.approx(0.1)
    assert found.kept == pytest.approx(1 - 2 / 12, abs=1e-3)
    assert found.worst == ("sum", pytest.approx(0.1))
    draw([found], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
