# SPDX-License-Identifier: Apache-2.0
"""The rule of the recommendation, its command lines, and the list of losses."""

from __future__ import annotations

import json
import shlex

import pytest
from evaluation.synthetic import DENSE, PLAIN, answer, manifest, summary, timings

from vllm_adaskip.config import AdaSkipConfig
from vllm_adaskip.lab.evaluation.recommend import (
    MaxLossError,
    losses,
    options,
    parse_max_loss,
    recommend,
    request_arguments,
    switch_on_command,
)
from vllm_adaskip.lab.evaluation.results import Answer, Setting, Timing

ITEMS = 400
MILD = Setting(name="mild", family="plan", skip=[5])
HARD = Setting(name="hard", family="plan", skip=[3, 4, 5, 6])
BROKEN = Setting(name="broken", family="exit", skip=[6, 7, 8, 9, 10, 11])
ALL = [DENSE, MILD, HARD, BROKEN]


def answers(setting: Setting, wrong: int, items: int = ITEMS) -> list[Answer]:
    skip = setting.skip or []
    return [answer(setting.name, f"sum/{i}", float(i >= wrong), skip) for i in range(items)]


def run(*times: Timing) -> tuple[list[Answer], list[Timing]]:
    """Mild loses nothing to speak of (1 in 400), hard 3 points, broken 50."""
    made = [*answers(DENSE, 0), *answers(MILD, 1), *answers(HARD, 12), *answers(BROKEN, 200)]
    return made, list(times)


@pytest.mark.parametrize(
    ("text", "share"),
    [("1%", 0.01), ("0.01", 0.01), ("1 point", 0.01), ("2.5 points", 0.025), (" .5 % ", 0.005),
     ("0", 0.0), ("0%", 0.0)],
)  # fmt: skip
def test_losses_are_read(text: str, share: float) -> None:
    assert parse_max_loss(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["1", "-1%", "100%", "nan", "", "%", "one", "1e-2", "1 percent"])
def test_other_losses_are_refused_by_name(text: str) -> None:
    with pytest.raises(MaxLossError, match="allowed: a percentage such as 1%") as raised:
        parse_max_loss(text)
    assert repr(text) in str(raised.value)


def test_the_fastest_within_the_limit() -> None:
    made, times = run(
        *timings("mild", [0.9] * 5), *timings("hard", [0.7] * 5), *timings("broken", [0.55] * 5)
    )
    for limit, name in ((0.012, "mild"), (0.06, "hard"), (0.6, "broken")):
        found = recommend(summary(made, times, ALL), limit)
        assert (found.verdict, found.setting and found.setting.name) == ("on", name)
        assert found.batch == 16


def test_the_bound_counts_and_not_the_mean() -> None:
    """Three points are lost on average; at 95% it may be more than four."""
    found = recommend(summary(*run(), ALL), 0.031)
    assert found.setting and found.setting.name == "mild"


def test_measured_time_goes_before_compute() -> None:
    made, times = run(*timings("mild", [0.9] * 5), *timings("hard", [0.95] * 5))
    found = recommend(summary(made, times, ALL), 0.06)
    assert found.setting and found.setting.name == "mild"
    without = recommend(summary(made, [], ALL), 0.06)
    assert without.batch is None
    assert without.setting and without.setting.name == "hard"


def test_the_largest_batch_is_what_counts() -> None:
    made, times = run(
        *timings("mild", [0.5] * 3, batch=1), *timings("mild", [0.95] * 3, batch=64),
        *timings("hard", [0.9] * 3, batch=1), *timings("hard", [0.8] * 3, batch=64),
    )  # fmt: skip
    found = recommend(summary(made, times, ALL), 0.06)
    assert (found.setting and found.setting.name, found.batch) == ("hard", 64)


def test_slower_than_dense_is_not_recommended() -> None:
    made, times = run(*timings("mild", [1.1] * 5), *timings("hard", [1.05] * 5))
    found = recommend(summary(made, times, ALL), 0.01)
    assert (found.verdict, found.setting and found.setting.name) == ("slow", "mild")


def test_the_nearest_miss_and_the_items_it_would_take() -> None:
    made = [*answers(DENSE, 0, 50), *answers(MILD, 1, 50), *answers(HARD, 20, 50)]
    found = recommend(summary(made, [], [DENSE, MILD, HARD]), 0.03)
    assert (found.verdict, found.setting and found.setting.name) == ("lossy", "mild")
    assert found.items_needed is not None and 50 < found.items_needed < 1000
    same = [*answers(DENSE, 0, 50), *answers(MILD, 0, 50)]
    needed = recommend(summary(same, [], [DENSE, MILD]), 0.01).items_needed
    assert needed is not None and 290 < needed < 300  # the rule of three
    hopeless = recommend(summary(made, [], [DENSE, MILD, HARD]), 0.0)
    assert hopeless.items_needed is None


def test_the_nearest_miss_is_one_that_saves_time() -> None:
    made, times = run(*timings("mild", [1.1] * 5), *timings("hard", [0.8] * 5))
    found = recommend(summary(made, times, ALL), 0.0)
    assert (found.verdict, found.setting and found.setting.name) == ("lossy", "hard")


def test_nothing_to_choose_from() -> None:
    alone = summary(answers(DENSE, 0), settings=[DENSE])
    assert recommend(alone, 0.01).verdict == "nothing"
    part = summary([*answers(DENSE, 0), *answers(MILD, 0, 10)], settings=[DENSE, MILD])
    assert recommend(part, 0.9).verdict == "nothing"  # unfinished
    drawn = Setting(name="drawn", family="random")
    own = [one.model_copy(update={"setting": "drawn"}) for one in answers(MILD, 0)]
    assert recommend(summary([*answers(DENSE, 0), *own], settings=[DENSE, drawn]), 0.9).verdict == (
        "nothing"
    )


@pytest.mark.parametrize(
    "setting",
    [
        HARD,
        Setting(name="s", family="adaskip", method="adaskip", budget=0.75,
                options={"keep_first": 2}),
        Setting(name="t", family="static", method="static", options={"skip": [5, "attn:7"]}),
    ],
)  # fmt: skip
def test_the_command_is_one_that_the_server_takes(setting: Setting) -> None:
    run = manifest([setting], model="my models/it's", engine={"enforce_eager": True})
    command = switch_on_command(setting, run)
    assert command is not None
    words = shlex.split(command.replace("\\\n", ""))
    assert words[:5] == ["vllm", "serve", "--model", "my models/it's", "--plugin"]
    assert "--enforce-eager" in words
    config = AdaSkipConfig.parse(json.loads(words[-1])["adaskip"])
    assert config.max_compute == setting.budget
    assert setting.skip is None or config.method_options["skip"] == setting.skip


def test_what_a_request_adds() -> None:
    assert request_arguments(HARD) == '{"vllm_xargs": {"adaskip_skip": [3, 4, 5, 6]}}'
    decided = Setting(name="s", family="adaskip", method="adaskip", budget=0.75)
    assert request_arguments(decided) == '{"vllm_xargs": {"adaskip_max_compute": 0.75}}'
    short = Setting(name="short", family="prompts", skip=[], prompt={"exit": 9, "tail": 5})
    assert request_arguments(short) == json.dumps(
        {"vllm_xargs": {"adaskip_prompt_exit": 9, "adaskip_prompt_tail": 5}}
    )
    assert options(short) == {"prompt": short.prompt}
    assert options(DENSE) is None and switch_on_command(DENSE, manifest([])) is None


def test_the_list_of_losses() -> None:
    made, times = run(*timings("mild", [1.2] * 3), *timings("hard", [0.8] * 3))
    draws = [Setting(name=f"random {i}", family="random", skip=[i, *range(7, 12)]) for i in (2, 3)]
    for draw, wrong in zip(draws, (90, 110), strict=True):
        made += answers(draw, wrong)
    found = losses(summary(made, times, [*ALL, *draws]), made)
    assert [(one.name, batches) for one, batches in found.slower] == [("mild", [16])]
    assert "broken" in [one.name for one, _ in found.tasks]
    assert "mild" not in [one.name for one, _ in found.tasks]
    [(worse, peers, quality)] = found.random
    assert (worse.name, peers) == ("broken", ["random 2", "random 3"])
    assert quality.loss.mean == pytest.approx(0.25)


def test_one_setting_beside_dense_without_anything_else() -> None:
    made = [*answers(DENSE, 0), *answers(PLAIN, 0)]
    assert recommend(summary(made, timings(PLAIN.name, [0.95] * 3)), 0.02).verdict == "on"
