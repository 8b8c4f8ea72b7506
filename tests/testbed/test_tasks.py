# SPDX-License-Identifier: Apache-2.0
"""The generators: deterministic, disjoint splits, answers that can be worked out again."""

import subprocess
import sys

import pytest

from vllm_adaskip.lab.testbed import knowledge, tasks, words

ALL = [*tasks.TASKS, *tasks.EXERCISES]


def text_of(sample: tasks.Sample) -> str:
    return sample.prompt.removeprefix(f"{sample.task} : ").removesuffix(" answer :")


def work_out(sample: tasks.Sample) -> str:
    """The right answer, found without the generator's help."""
    text = text_of(sample)
    parts = text.split()
    match sample.task:
        case "sentiment":
            signs = {w: 1 for w in words.GOOD} | {w: -1 for w in words.BAD}
            votes = [
                -signs[w] if before == "not" else signs[w]
                for before, w in zip(["", *parts], parts, strict=False)
                if w in signs
            ]
            assert len(set(votes)) == 1
            return "positive" if votes[0] > 0 else "negative"
        case "topic":
            counts = {t: sum(p in about for p in parts) for t, about in words.TOPICS.items()}
            most = max(counts, key=lambda t: counts[t])
            assert sorted(counts.values())[-2] < counts[most]
            return most
        case "fact" | "hop":
            (person,) = (p for name, p in knowledge.people().items() if name in text)
            if sample.task == "hop":
                assert "the friend of " + person.name in text
                person = knowledge.people()[person.friend]
            (attribute,) = (
                attribute
                for attribute, wordings in knowledge.WORDINGS.items()
                for wording in wordings
                if set(wording.split()) - {"{who}"} <= set(parts)
                and text.startswith(wording.split(" {who}")[0])
                and text.endswith(wording.split("{who} ")[1])
            )
            return str(getattr(person, attribute))
        case "translate":
            verb = next(p for p in parts if p in words.SOURCE_VERBS)
            at = parts.index(verb)
            groups = parts[:at], parts[at + 1 : -1]
            order = [w for group in groups for w in (group[-1], *group[:-1])]
            return " ".join(words.DICTIONARY[w] for w in [*order, verb])
        case "key":
            return text.split("* ")[1].split(" .")[0]
        case "sum" | "column":
            a, b = text.removesuffix(" = ?").replace(" ", "").split("+")
            total = str(int(a) + int(b))
            return " ".join(total if sample.task == "sum" else reversed(total))
        case "steps":
            value, values = 0, []
            for step in text.split(" ."):
                match step.split():
                    case ["start", "at", number]:
                        value = int(number)
                        continue
                    case ["add", number]:
                        value += int(number)
                    case ["take", number]:
                        value -= int(number)
                    case ["double"]:
                        value *= 2
                    case _:
                        continue
                values.append(str(value % 10))
            return " ".join(values)
        case "copy":
            return text.removesuffix(" .")
        case "gloss":
            return " ".join(words.DICTIONARY[w] for w in parts[:-1])
    raise AssertionError(sample.task)


@pytest.mark.parametrize("task", ALL)
def test_the_same_seed_gives_the_same_questions(task: str) -> None:
    first = tasks.samples(task, "train", 3, 50)
    assert first == tasks.samples(task, "train", 3, 50)
    assert first != tasks.samples(task, "train", 4, 50)


@pytest.mark.parametrize("task", ALL)
def test_answers_are_right(task: str) -> None:
    for sample in tasks.samples(task, "train", 0, 300) + tasks.samples(task, "test", 0, 100):
        assert work_out(sample) == sample.answer


@pytest.mark.parametrize("task", ALL)
def test_splits_are_disjoint(task: str) -> None:
    splits = {
        split: {sample.prompt for sample in tasks.samples(task, split, 0, n)}
        for split, n in (("train", 3000), ("tune", 300), ("test", 300))
    }
    assert not splits["train"] & splits["test"]
    assert not splits["train"] & splits["tune"]
    assert not splits["tune"] & splits["test"]


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split"):
        tasks.samples("sum", "all", 0, 1)


def test_lengths_vary() -> None:
    lengths = [len(s.prompt.split()) for t in tasks.TASKS for s in tasks.samples(t, "test", 0, 100)]
    assert min(lengths) <= 12
    assert 75 <= max(lengths) <= 95


def test_people_have_all_attributes_and_another_friend() -> None:
    known = knowledge.people()
    assert len(known) == 300
    assert all(person.friend in known and person.friend != name for name, person in known.items())
    assert knowledge.people(1) != known


def test_tasks_need_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from vllm_adaskip.lab.testbed import tasks;"
        "tasks.samples('sum', 'test', 0, 1);"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
