# SPDX-License-Identifier: Apache-2.0
"""What speaks against a run's numbers, and that nothing is recommended in spite of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evaluation.synthetic import DENSE, LAYERS, answer, manifest, timings, write

from vllm_adaskip.lab.data.items import Item
from vllm_adaskip.lab.evaluation.doubt import doubts
from vllm_adaskip.lab.evaluation.manifest import chance
from vllm_adaskip.lab.evaluation.quality import is_narrow
from vllm_adaskip.lab.evaluation.recommend import recommend
from vllm_adaskip.lab.evaluation.report import make_report
from vllm_adaskip.lab.evaluation.results import Answer, Question, Record, Setting, Timing
from vllm_adaskip.lab.evaluation.runner import Timed, Work
from vllm_adaskip.lab.evaluation.summary import Summary, summarise

MILD = Setting(name="mild", family="plan", skip=[5])
STEADY = [0.95, 0.94, 0.95, 0.96, 0.95]


def scored(setting: Setting, right: int, items: int = 400, task: str = "sum") -> list[Answer]:
    return [
        answer(setting.name, f"{task}/{i}", float(i < right), setting.skip or [])
        for i in range(items)
    ]


def run(
    answers: list[Answer],
    times: list[Timing] | None = None,
    settings: list[Setting] | None = None,
    **facts: object,
) -> Summary:
    times = timings("mild", STEADY) if times is None else times
    return summarise(manifest(settings or [DENSE, MILD], **facts), answers, times)


def kinds(summary: Summary, max_loss: float = 0.02) -> list[str]:
    """Return what speaks against switching on, which must then not be recommended."""
    found = recommend(summary, max_loss)
    assert (found.verdict == "on") == (not found.why), found
    return [one.kind for one in found.why]


def test_nothing_speaks_against_a_sound_run() -> None:
    assert kinds(run([*scored(DENSE, 390), *scored(MILD, 390)])) == []


def test_dense_next_to_nothing() -> None:
    assert kinds(run([*scored(DENSE, 20), *scored(MILD, 20)])) == ["nothing"]
    assert kinds(run([*scored(DENSE, 21), *scored(MILD, 21)])) == []


def test_one_task_next_to_nothing_is_named() -> None:
    made = [
        *scored(DENSE, 390), *scored(MILD, 390),
        *scored(DENSE, 1, 100, "capital"), *scored(MILD, 1, 100, "capital"),
    ]  # fmt: skip
    [found] = doubts(run(made)).run
    assert "1.0 of 100 on capital (exact_match)" in found.text


def test_a_loss_as_large_as_all_that_there_is_to_lose() -> None:
    assert kinds(run([*scored(DENSE, 120), *scored(MILD, 120)]), 0.3) == ["nothing"]
    assert kinds(run([*scored(DENSE, 120), *scored(MILD, 120)]), 0.29) == []


def test_dense_at_chance() -> None:
    made = [*scored(DENSE, 216), *scored(MILD, 216)]  # 54 %
    assert kinds(run(made, chance={"sum": 0.5})) == ["chance"]
    assert kinds(run(made, chance={"sum": 0.45})) == []
    assert kinds(run(made, chance={"other": 0.5})) == []


def item(task: str, number: int, reference: str) -> Item:
    return Item(f"{task}/{number}", task, "?", (reference,), "accuracy")


def test_chance_is_the_most_frequent_label() -> None:
    labels = ["positive"] * 12 + ["Positive "] * 3 + ["negative"] * 5
    items = [item("sentiment", i, label) for i, label in enumerate(labels)]
    items += [item("capital", i, f"city {i}") for i in range(20)]
    items += [item("few", i, "yes") for i in range(3)]
    assert chance(items) == {"sentiment": 0.75}


@pytest.mark.parametrize("prompt", [{"exit": 9}, {"skip": [3, 4, 5]}, {"skip": [3, 4, "mlp:5"]}])
def test_time_is_bounded_by_what_prompts_or_answers_keep(prompt: dict[str, Any]) -> None:
    short = Setting(name="short", family="prompts", skip=[], prompt=prompt)
    made = [*scored(DENSE, 300), *scored(short, 300)]
    for ratio, found in ((0.76, []), (0.6, ["faster"])):
        times = timings("short", [ratio] * 5)
        assert kinds(run(made, times, [DENSE, short])) == found


def test_better_than_dense_beyond_luck() -> None:
    assert kinds(run([*scored(DENSE, 300), *scored(MILD, 340)])) == ["better"]
    assert kinds(run([*scored(DENSE, 300), *scored(MILD, 303)])) == []


def test_better_than_dense_on_one_task_of_two() -> None:
    made = [
        *scored(DENSE, 390), *scored(MILD, 350),
        *scored(DENSE, 100, 200, "date"), *scored(MILD, 140, 200, "date"),
    ]  # fmt: skip
    found = doubts(run(made)).run
    assert [one.kind for one in found] == ["better"] and "20.0 above dense on date" in found[0].text


def test_a_metric_that_one_setting_shows_to_be_wrong_speaks_against_all() -> None:
    odd = Setting(name="odd", family="plan", skip=[4, 5, 6])
    made = [*scored(DENSE, 300), *scored(MILD, 300), *scored(odd, 380)]
    times = [*timings("mild", STEADY), *timings("odd", STEADY)]
    assert "better" in kinds(run(made, times, [DENSE, MILD, odd]), 0.05)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([], ["rounds"]),
        ([0.95], ["rounds"]),
        ([0.95, 0.95], ["rounds"]),
        ([0.95, 0.95, 0.95], []),
        ([0.9, 0.95, 1.02], ["spread"]),
        ([0.99, 0.98, 0.97, 0.985, 1.0], ["spread"]),
        ([0.6, 0.62, 0.61], ["faster"]),
        ([0.6, 0.62, 0.95], []),  # one round that is possible
    ],
)
def test_times(ratios: list[float], expected: list[str]) -> None:
    assert pytest.approx(0.917, abs=1e-3) == 1 - 1 / LAYERS  # what mild keeps
    made = [*scored(DENSE, 390), *scored(MILD, 390)]
    assert kinds(run(made, timings("mild", ratios))) == expected


def test_unfinished() -> None:
    made = [*scored(DENSE, 390), *scored(MILD, 390)]
    assert kinds(run(made, rounds=6)) == ["unfinished"]
    assert kinds(run(made, asked=900)) == ["unfinished"]
    assert kinds(run(made, rounds=5, asked=400)) == []
    part = run([*scored(DENSE, 390), *scored(MILD, 200, 200)])
    assert [one.kind for one in doubts(part).of("mild")] == ["unfinished"]
    assert recommend(part, 0.02).verdict == "nothing"


def test_the_luckiest_of_many() -> None:
    """Three lost of 400: within 2 points alone, and not as the best of thirty."""
    many = [Setting(name=f"plan {i}", family="plan", skip=[i % 10 + 1]) for i in range(30)]
    made = [*scored(DENSE, 400), *scored(MILD, 397)]
    assert kinds(run(made), 0.018) == []
    more = [one for setting in many for one in scored(setting, 300)]
    assert kinds(run([*made, *more], settings=[DENSE, MILD, *many]), 0.018) == ["many"]


def test_a_sound_setting_is_taken_before_a_faster_one_in_doubt() -> None:
    hasty = Setting(name="hasty", family="plan", skip=[4, 5])
    made = [*scored(DENSE, 390), *scored(MILD, 390), *scored(hasty, 390)]
    times = [*timings("mild", STEADY), *timings("hasty", [0.3, 0.3, 0.3])]
    found = recommend(run(made, times, [DENSE, MILD, hasty]), 0.02)
    assert found.verdict == "on" and found.setting and found.setting.name == "mild"
    assert [one.kind for one in found.doubts.of("hasty")] == ["faster"]


# --- first contact: what a stranger's file made of the tools ---

CUT = Setting(name="uniform 27/30", family="uniform", skip=[5])


def first_contact() -> list[Record]:
    """Dense writes "Paris." and the metric wants "Paris"; a damaged model forgets the full stop."""
    made: list[Record] = []
    for i in range(140):
        task, right = (
            ("capital", f"City {i}") if i < 90 else ("sentiment", ("positive", "negative")[i % 2])
        )
        name = f"{task}/{i}"
        made.append(Question(item=name, prompt=f"Question {i}?", references=[right]))
        whole, damaged = f"{right}.", right if i % 2 else f"{right}!"
        facts = {"metric": "accuracy", "task": task}
        made.append(answer("dense", name, float(i == 0), [], text=whole, **facts))
        made.append(answer(CUT.name, name, float(i % 2), [5], text=damaged, **facts))
    return [*made, *timings(CUT.name, [0.21, 0.25])]


def test_first_contact_is_not_recommended_and_every_doubt_is_said(tmp_path: Path) -> None:
    results = write(tmp_path, first_contact(), [DENSE, CUT])
    results.write_manifest(
        results.manifest().model_copy(
            update={"rounds": 2, "asked": 140, "chance": {"sentiment": 0.5}}
        )
    )
    made = make_report(results, 0.01)
    assert made.recommendation.verdict == "doubt"
    assert made.headline == "Leave it off for now: the numbers of uniform 27/30 are in doubt"
    kinds = {one.kind for one in made.recommendation.why}
    assert kinds == {"nothing", "better", "rounds", "faster"}
    page = made.html
    for words in (
        "Dense scores 1.1 of 100 on capital (accuracy), next to nothing",
        "uniform 27/30 scores 49.3 above dense",
        "was timed in 2 rounds; at least 3 are needed",
        "takes 0.23 of dense&#39;s time and keeps 0.92 of the compute",
        "Answers, side by side",
    ):
        assert words in page, words
    top = page[page.index('id="headline"') : page.index("<h2>Every setting")]
    assert 'class="card off"' in page and "Switch on" not in page
    assert 'class="good"' not in top and "You win" not in top and "✓ yes" not in page


def test_six_answers_worst_first(tmp_path: Path) -> None:
    made: list[Record] = []
    for i in range(20):
        name, lost = f"sum/{i}", i in (3, 7)
        made.append(Question(item=name, prompt=f"<b>{i}</b>", references=["<i>right</i>"]))
        made.append(answer("dense", name, 1.0, [], text=f"dense {i} <script>"))
        made.append(answer("mild", name, float(not lost), [5], text=f"planned {i} <script>"))
    page = make_report(write(tmp_path, made, [DENSE, MILD]), 0.01).html
    part = page[page.index("Answers, side by side") : page.index("What it costs")]
    assert part.count('<th scope="row">') == 6
    assert part.index("planned 3 ") < part.index("planned 7 ") < part.index("planned 0 ")
    assert "&lt;b&gt;3&lt;/b&gt;" in part and "&lt;i&gt;right" in part
    assert "<script" not in page and "<b>3" not in page and "<i>" not in page


# --- timing goes on until it says enough ---


@pytest.mark.parametrize(
    ("ratios", "narrow"),
    [
        ([0.9, 0.9], False),
        ([0.9, 0.9, 0.9], True),
        ([0.5, 0.7, 0.9], False),
        ([0.5, 0.55, 0.6], True),  # wide, and below the gain
        ([1.2, 1.3, 1.35], True),  # surely slower
        ([0.98, 1.0, 1.02], True),  # no gain, and known to be none
        ([0.9, 1.0, 1.1], False),
    ],
)
def test_when_times_say_enough(ratios: list[float], narrow: bool) -> None:
    assert is_narrow(ratios) is narrow
    assert Timed(4, 8, most=9).wants_more(ratios) is not narrow
    assert not Timed(4, 8, most=len(ratios)).wants_more(ratios)


def test_what_is_left_to_time(tmp_path: Path) -> None:
    def left(ratios: list[float], rounds: int = 3) -> list[int]:
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        results = write(folder, [*timings("mild", ratios, batch=4)], [DENSE, MILD])
        timed = Timed(batch=4, tokens=8, most=3 * rounds)
        return Work.left(results, [DENSE, MILD], [], rounds, timed).rounds["mild"]

    assert left([]) == [0, 1, 2]
    assert left([0.9]) == [1, 2]
    assert left([0.9, 0.9, 0.9]) == []
    assert left([0.9, 1.0, 1.1]) == [3]  # a killed run goes on with what it had begun
    assert left([0.9, 1.0, 1.1] * 3) == []
    assert left([0.9, 1.0, 1.1], rounds=0) == []


def test_chance_of_choices_is_a_draw() -> None:
    items = [
        Item(f"q/{i}", "q", "?", (f"{i}",), "choice", choices=("a", "b", "c", "d"))
        for i in range(20)
    ]
    assert chance(items) == {"q": 0.25}
