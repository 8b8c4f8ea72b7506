# SPDX-License-Identifier: Apache-2.0
"""The sweep against models whose weights were moved by hand, and the greedy order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from vllm_adaskip import bundled_model
from vllm_adaskip.cli.sweep import sweep as command
from vllm_adaskip.lab.data.sources import load_items
from vllm_adaskip.lab.data.tokens import end_tokens
from vllm_adaskip.lab.evaluation import sleb
from vllm_adaskip.lab.evaluation.results import Results, SweepCell
from vllm_adaskip.lab.evaluation.sweep import (
    WHOLE,
    Damage,
    Judge,
    Sweep,
    SweepError,
    damaged,
    damages,
    overall,
)
from vllm_adaskip.lab.fitting.samples import Sample, sample

ROUNDING = 1e-4


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    items = load_items("bundled:hop,sum,translate", limit=5, seed=3)
    return [sample(item, tokenizer, end_tokens(bundled_model(), tokenizer)) for item in items]


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def mixed() -> Any:
    """A random model whose layers see all tokens or only the last three, by turns."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        use_sliding_window=True,
        sliding_window=3,
        layer_types=["full_attention", "sliding_attention"] * 2 + ["full_attention"],
    )
    return Qwen2ForCausalLM(config).eval()


def rebuilt(model: Any, order: list[int]) -> Any:
    """A new model with this model's layers in another order, weight by weight."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.num_hidden_layers = len(order)
    if types := getattr(model.config, "layer_types", None):
        config.layer_types = [types[layer] for layer in order]
    weights: Mapping[str, torch.Tensor] = model.state_dict()
    moved = {key: value for key, value in weights.items() if ".layers." not in key}
    for place, layer in enumerate(order):
        old, new = f"model.layers.{layer}.", f"model.layers.{place}."
        moved |= {key.replace(old, new): weights[key] for key in weights if key.startswith(old)}
    fresh = type(model)(config).eval()
    fresh.load_state_dict(moved)
    return fresh


def expected(whole: Any, other: Any, samples: list[Sample], damage: Damage) -> dict[str, SweepCell]:
    """The cells, one sample at a time and without padding."""
    cells = {}
    for task in {each.task for each in samples}:
        same, losses = [], []
        for each in (each for each in samples if each.task == task):
            ids = torch.tensor([each.ids])
            with torch.inference_mode():
                first, second = (
                    one(ids).logits[0, -each.answer - 1 : -1] for one in (whole, other)
                )
            same += (first.argmax(-1) == second.argmax(-1)).tolist()
            logs = second.log_softmax(-1)
            losses += [
                -logs[row, token].item() for row, token in enumerate(each.ids[-each.answer :])
            ]
        agreement, loss = sum(same) / len(same), sum(losses) / len(losses)
        cells[task] = SweepCell(
            kind=damage.kind,
            layers=list(damage.layers),
            task=task,
            tokens=len(same),
            agreement=agreement,
            loss=loss,
        )
    return cells


def check(model: Any, samples: list[Sample], damage: Damage, order: list[int]) -> None:
    judge = Judge(model, samples, batch=4)
    for task, want in expected(model, rebuilt(model, order), samples, damage).items():
        got = judge.cell(damage, task)
        assert got.model_copy(update={"loss": 0.0}) == want.model_copy(update={"loss": 0.0})
        assert got.loss == pytest.approx(want.loss, abs=ROUNDING, rel=ROUNDING)


@pytest.mark.parametrize(
    ("damage", "order"),
    [
        (Damage("delete", (0,)), [*range(1, 12)]),
        (Damage("delete", (5, 6, 7, 8, 9)), [0, 1, 2, 3, 4, 10, 11]),
        (Damage("swap", (0, 1)), [1, 0, *range(2, 12)]),
    ],
)
def test_damage_is_what_moving_the_weights_gives(
    model: Any, samples: list[Sample], damage: Damage, order: list[int]
) -> None:
    check(model, samples, damage, order)


@pytest.mark.parametrize(
    ("damage", "order"),
    [(Damage("delete", (1,)), [0, 2, 3, 4]), (Damage("swap", (2, 3)), [0, 1, 3, 2, 4])],
)
def test_layers_keep_their_kind_of_attention(mixed: Any, damage: Damage, order: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(97, (size,), generator=generator).tolist() for size in (9, 20, 31)]
    check(mixed, [Sample("random", ids, 5) for ids in drawn], damage, order)


@pytest.mark.parametrize("most", [0, 1 << 30])
def test_damages_one_after_the_other_are_each_what_they_are_alone(
    model: Any, samples: list[Sample], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upwards, twice the same layer, down again, and the last layers; with or without memory."""
    monkeypatch.setattr("vllm_adaskip.lab.evaluation.sweep.MOST_KEPT", most)
    judge, layers = Judge(model, samples, batch=4), list(model.model.layers)
    order = [(2,), (2, 3), (7,), (11,), (10, 11), (3,), (0,), ()]
    for deleted in order:
        for task in judge.samples:
            alone = Judge(model, samples, batch=4).cell(Damage("delete", deleted), task)
            assert judge.cell(Damage("delete", deleted), task) == alone
    assert list(model.model.layers) == layers
    assert not any(layer._forward_hooks for layer in layers)


def test_layers_below_a_damage_run_once_for_all_damages_above_them(
    model: Any, samples: list[Sample]
) -> None:
    judge, ran = Judge(model, samples), [0] * 12
    hooks = [
        layer.register_forward_hook(lambda *_, at=at: ran.__setitem__(at, ran[at] + 1))
        for at, layer in enumerate(model.model.layers)
    ]
    for damage in damages(12, 1)[1:]:
        for task in judge.samples:
            judge.cell(damage, task)
    for hook in hooks:
        hook.remove()
    reads = len(judge.samples)  # a batch each
    # Layer 0 runs in its swap, and once more below all others.
    assert ran[0] == 2 * reads
    assert ran[11] == 22 * reads  # in all damages but its own deletion


def test_the_whole_model_agrees_with_itself(model: Any, samples: list[Sample]) -> None:
    judge = Judge(model, samples)
    for task in judge.samples:
        cell = judge.cell(WHOLE, task)
        assert cell.agreement == 1.0
        assert cell.tokens == sum(each.answer for each in samples if each.task == task)
        assert cell.loss < 0.01  # it was trained on these tasks, the end token included


def test_the_model_is_whole_again_after_an_error(model: Any) -> None:
    layers = list(model.model.layers)
    with pytest.raises(RuntimeError), damaged(model, Damage("delete", (2, 3))):
        assert len(model.model.layers) == model.config.num_hidden_layers == 10
        raise RuntimeError
    assert list(model.model.layers) == layers
    assert model.config.num_hidden_layers == 12


def test_every_block_and_every_swap() -> None:
    plan = damages(6, 3)
    assert len(set(plan)) == len(plan) == 1 + (6 + 5 + 4) + 5
    assert Damage("swap", (4, 5)).order(6) == [0, 1, 2, 3, 5, 4]
    assert Damage("delete", (3, 4, 5)) in plan
    for size in (0, 6):
        with pytest.raises(SweepError, match=f"blocks of {size} layers; allowed: 1 to 5"):
            damages(6, size)


def test_what_cannot_be_swept_is_refused(model: Any) -> None:
    long = Sample("a", [3] * 513, 2)
    with pytest.raises(SweepError, match="513 tokens; allowed: 1 to 512"):
        Judge(model, [long])
    with pytest.raises(SweepError, match=r"Linear: allowed: a model with model\.model\.layers"):
        Judge(torch.nn.Linear(1, 1), [long])


def test_measured_cells_are_not_measured_again(
    model: Any, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = damages(12, 1)[:3]
    first = Sweep(Results(tmp_path), Judge(model, samples))
    cells = [first.cells(damage) for damage in plan]
    file = tmp_path / "sweep.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + lines[-1][:20])  # killed while writing the last one
    second = Sweep(Results(tmp_path), judge := Judge(model, samples))
    assert [second.measured(damage) for damage in plan] == [True, True, False]
    asked = []
    real = judge.cell
    monkeypatch.setattr(judge, "cell", lambda *args: asked.append(args) or real(*args))
    assert [second.cells(damage) for damage in plan] == cells
    assert asked == [(plan[2], cells[2][-1].task)]
    assert file.read_text().splitlines(keepends=True) == lines


def test_cells_of_other_items_are_refused(
    model: Any, samples: list[Sample], tmp_path: Path
) -> None:
    Sweep(Results(tmp_path), Judge(model, samples)).cells(WHOLE)
    with pytest.raises(SweepError, match="use the same data, limit and seed"):
        Sweep(Results(tmp_path), Judge(model, samples[:-1]))


def loss_of(damage: Damage) -> float:
    """Layers 2 and 4 are cheap alone and dear together."""
    single = [9.0, 0.3, 0.1, 0.4, 0.2, 9.0]
    return sum(single[layer] for layer in damage.layers) + 5.0 * ({2, 4} <= set(damage.layers))


def test_each_step_deletes_the_layer_that_is_missed_least() -> None:
    asked: list[Damage] = []
    steps = sleb.sleb_order(lambda damage: asked.append(damage) or loss_of(damage), 6, 3)
    assert [step.deleted for step in steps] == [(2,), (2, 1), (2, 1, 3)]
    assert len(asked) == len(set(asked)) == sleb.trials(6, 3) == 4 + 3 + 2
    everything = list(sleb.sleb_order(loss_of, 6, 99, protected=0))
    assert len(everything) == 5  # one layer must stay
    assert {everything[-1].deleted[-1], *everything[-2].deleted} == set(everything[-1].deleted)


def test_a_folder_gives_the_order_as_far_as_it_goes() -> None:
    cells = [
        SweepCell(
            kind="delete",
            layers=list(layers),
            task=task,
            tokens=tokens,
            agreement=1.0,
            loss=loss_of(Damage("delete", layers)) * scale,
        )
        for size in (1, 2)
        for layers in combinations(range(6), size)
        for task, tokens, scale in (("a", 3, 2.0), ("b", 1, -2.0))  # together: the loss itself
    ]
    assert overall(cells[:2])[1] == pytest.approx(loss_of(Damage("delete", (0,))))
    assert [step.deleted for step in sleb.stored_order(cells, 6)] == [(2,), (2, 1)]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    app = typer.Typer()
    app.command()(command)
    arguments = ["--out", str(tmp_path / "run"), "--data", "bundled:topic,sum", "--limit", "2"]
    arguments += ["--max-block", "1", "--sleb-steps", "1"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    stored = (tmp_path / "run" / "sweep.jsonl").read_text()
    cells = [json.loads(line) for line in stored.splitlines()]
    assert len(cells) == 2 * (1 + 12 + 11)
    assert all(cell["agreement"] == 1.0 for cell in cells if not cell["layers"])
    assert "SLEB" in done.output
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "run" / "sweep.jsonl").read_text() == stored
    other = CliRunner().invoke(app, [*arguments, "--seed", "1"])
    assert other.exit_code != 0
    assert "holds another run" in other.output
