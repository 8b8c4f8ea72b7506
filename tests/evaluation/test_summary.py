# SPDX-License-Identifier: Apache-2.0
"""Numbers from records, against what can be reckoned by hand; and the runs the tests share."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation.synthetic import LAYERS, PLAIN, SHAPE, answer, summary, timings

from vllm_adaskip import SkipPlan
from vllm_adaskip.lab.evaluation.engine import kept
from vllm_adaskip.lab.evaluation.quality import interval
from vllm_adaskip.lab.evaluation.results import ResultsError, Setting
from vllm_adaskip.lab.evaluation.settings import DENSE


def test_items_are_paired_and_tasks_kept_apart() -> None:
    dense = [answer("dense", f"{task}/{i}", 1.0) for task in ("sum", "key") for i in range(10)]
    lossy = [answer("skip 5", one.item, float(one.task == "key"), [5]) for one in dense]
    found = summary([*reversed(lossy), *dense]).others[0]
    assert found.score and found.score.mean == 0.5
    assert found.score.loss.mean == pytest.approx(0.5)
    assert found.score.loss.low < 0.5 < found.score.loss.high
    assert found.columns["sum", "exact_match"].loss.mean == 1.0
    assert found.columns["sum", "exact_match"].worse
    assert not found.columns["key", "exact_match"].worse
    assert found.kept == pytest.approx(11 / 12)
    assert str(found.plan) == "skip 5"


def test_pairing_narrows_the_interval() -> None:
    """Dense and skipped answers rise and fall together: only their difference is uncertain."""
    drawn = (np.random.default_rng(3).random(300) < 0.5).astype(float)
    dense = [answer("dense", f"sum/{i}", score) for i, score in enumerate(drawn)]
    skipped = [answer("skip 5", f"sum/{i}", score * (i >= 6), [5]) for i, score in enumerate(drawn)]
    score = summary([*dense, *skipped]).others[0].score
    assert score
    error = np.std(drawn - np.array([one.score for one in skipped])) / np.sqrt(300)
    assert score.loss.high - score.loss.low == pytest.approx(2 * 1.96 * error, rel=0.2)
    assert score.loss.high - score.loss.low < 0.2 * 2 * 1.96 * np.std(drawn) * np.sqrt(2 / 300)


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    draws = [interval(rng.choice([0.0, 1.0], 150, p=[0.8, 0.2])) for _ in range(200)]
    assert 0.89 <= np.mean([one.low <= 0.2 <= one.high for one in draws]) <= 0.99


def test_no_difference_on_few_items_is_no_certainty() -> None:
    assert interval(np.zeros(10)).high == pytest.approx(0.26, abs=0.002)  # 0.74 ** 10 is 0.05
    dense = [answer("dense", f"sum/{i}", 1.0) for i in range(10)]
    skipped = [answer("skip 5", f"sum/{i}", 1.0, [5]) for i in range(10)]
    found = summary([*dense, *skipped]).others[0].score
    assert found and found.loss.mean == 0 and found.loss.high > 0.25
    assert found.loss.low == 0  # dense has all right already
    itself = summary([*dense, *skipped]).dense.score
    assert itself and itself.loss.high == 0  # dense against dense is known


def test_an_answer_whose_tokens_left_something_out_is_not_dense_s() -> None:
    """Although it names no plan either; one that left nothing out is."""
    dense = [answer("dense", f"sum/{i}", 1.0) for i in range(10)]
    for share, known in ((0.0, True), (0.1, False)):
        left_out = [0.0] * 23 + [share]
        gated = [answer("skip 5", one.item, 1.0, left_out=left_out) for one in dense]
        score = summary([*dense, *gated]).others[0].score
        assert score and (score.loss.high == 0) == known


def test_shares_of_tokens_are_averaged_over_sequences() -> None:
    dense = [answer("dense", f"sum/{i}", 1.0) for i in range(2)]
    shares = [[0.0] * 22 + [0.5, 1.0], [0.0] * 24]
    gated = [answer("skip 5", f"sum/{i}", 1.0, left_out=shares[i]) for i in range(2)]
    found = summary([*dense, *gated]).others[0]
    assert found.plan is None and found.by_token
    assert found.plans["sum"].tolist() == [0.0] * 22 + [0.25, 0.5]
    with pytest.raises(ResultsError, match="left_out of 3 sub-layers; this model has 24"):
        summary([*dense, answer("skip 5", "sum/0", 1.0, left_out=[0.0] * 3)])


def test_compute_kept_of_tokens_is_a_plan_s_where_they_agree() -> None:
    plan = SkipPlan.parse([5, "attn:3", "mlp:7", "mlp:8"], LAYERS)
    assert kept(plan.mask().tolist(), SHAPE) == pytest.approx(plan.share(SHAPE))
    assert kept([0.0] * 2 * LAYERS, SHAPE) == 1
    assert kept((plan.mask() / 4).tolist(), SHAPE) == pytest.approx(0.75 + plan.share(SHAPE) / 4)


def test_perplexity_is_a_factor_and_never_averaged_with_scores() -> None:
    both = []
    for setting, factor in (("dense", 1.0), ("skip 5", 1.5)):
        for i in range(20):
            both.append(answer(setting, f"sum/{i}", 1.0))
            both.append(answer(setting, f"text/{i}", factor * (3 + i % 4), metric="perplexity"))
    found = summary(both).others[0]
    assert found.perplexity and found.score
    assert found.perplexity.loss.mean == pytest.approx(1.5)
    assert found.perplexity.worse and not found.score.worse
    assert found.score.mean == 1.0


def test_an_infinite_perplexity_is_very_bad_but_a_score_must_be_a_number() -> None:
    dense = [answer("dense", f"text/{i}", 4.0 + i, metric="perplexity") for i in range(8)]
    broken = [
        answer("skip 5", f"text/{i}", float("inf"), metric="perplexity", skip=[5]) for i in range(8)
    ]
    found = summary([*dense, *broken]).others[0].perplexity
    assert found and found.worse
    assert np.isfinite(found.loss.high)
    with pytest.raises(ResultsError, match="sum/0 under 'dense' has a exact_match of nan"):
        summary([answer("dense", "sum/0", float("nan"))])


def test_time_is_the_median_ratio_of_each_batch_size() -> None:
    answers = [answer("dense", "sum/0", 1.0), answer("skip 5", "sum/0", 1.0, [5])]
    times = [*timings("skip 5", [0.8, 0.7, 0.9, 0.75, 0.85]), *timings("skip 5", [1.1], batch=64)]
    found = summary(answers, times)
    speed = found.others[0].speeds[16]
    assert (speed.low, speed.median, speed.high) == pytest.approx((0.75, 0.8, 0.85))
    assert found.batch == 64


def test_plans_that_vary_are_counted_by_task() -> None:
    dense = [answer("dense", f"{task}/{i}", 1.0) for task in ("sum", "key") for i in range(4)]
    vary = [
        answer("skip 5", one.item, 1.0, ["attn:3"] if one.item in ("sum/0", "sum/1") else ["mlp:7"])
        for one in dense
    ]
    found = summary([*dense, *vary]).others[0]
    assert found.plan is None
    assert found.plans["sum"][2 * 3] == 0.5
    assert found.plans["key"][2 * 7 + 1] == 1.0
    assert found.plans["key"].sum() == 1.0


def test_compute_kept_is_weighed_by_tokens() -> None:
    dense = [answer("dense", f"sum/{i}", 1.0) for i in range(2)]
    own = [answer("skip 5", "sum/0", 1.0, kept=0.5, tokens=30)]
    own.append(answer("skip 5", "sum/1", 1.0, kept=0.9, tokens=10))
    assert summary([*dense, *own]).others[0].kept == pytest.approx(0.6)


def test_an_unfinished_setting_is_compared_on_what_it_has() -> None:
    dense = [answer("dense", f"sum/{i}", float(i < 5)) for i in range(10)]
    part = [answer("skip 5", f"sum/{i}", 1.0, [5]) for i in range(5)]
    other = Setting(name="later", family="plan", skip=[6])
    found = summary([*dense, *part], settings=[DENSE, PLAIN, other])
    assert found.others[0].score and found.others[0].score.loss.mean == 0
    assert not found.others[0].complete
    assert found.unanswered == ["later"]
    prose = answer("dense", "text/0", 9.0, metric="perplexity")
    whole = [answer("skip 5", one.item, 1.0, [5]) for one in dense]
    assert summary([*dense, prose, *whole]).others[0].complete  # in all that has a score


def test_what_cannot_be_summed_up_says_why() -> None:
    with pytest.raises(ResultsError, match=r"no answers of a setting of family 'dense'.*'skip 5'"):
        summary([answer("skip 5", "sum/0", 1.0, [5])])
    with pytest.raises(ResultsError, match="names setting 'other'"):
        summary([answer("other", "sum/0", 1.0)])
    with pytest.raises(ResultsError, match="sum/0 under 'dense': 99 names a decoder layer"):
        wrong = answer("dense", "sum/0", 1.0).model_copy(update={"skip": [99]})
        summary([wrong])
