# SPDX-License-Identifier: Apache-2.0
"""The training: packing, layer dropout, the forward pass, and a run that stops and resumes."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from vllm_adaskip import bundled_model
from vllm_adaskip.lab.testbed import batches, course, network, tasks, tokenizer, train

TOKENIZER = tokenizer.build()


def a_batch(rows: int = 4) -> batches.Batch:
    stream = iter([s for task in tasks.TASKS for s in tasks.samples(task, "train", 0, 3)])
    return batches.Packer(TOKENIZER, 96).batch(stream, rows)


def test_packed_samples_are_whole() -> None:
    batch = a_batch()
    for row in range(2):
        for segment in range(int(batch.segments[row].max()) + 1):
            inside = batch.segments[row] == segment
            ids, labels = batch.ids[row][inside].tolist(), batch.labels[row][inside].tolist()
            assert batch.positions[row][inside].tolist() == list(range(len(ids)))
            prompt, answer = TOKENIZER.decode(ids).split("answer :")
            assert prompt.split()[0] in tasks.TASKS
            given = [label for label in labels if label != batches.IGNORED]
            assert given[-1] == ids[-1] == TOKENIZER.eos_token_id
            assert TOKENIZER.decode(given).split() == answer.split()
            # Each label is the token that comes next.
            wanted = zip(labels[:-1], ids[1:], strict=True)
            assert all(label in (batches.IGNORED, following) for label, following in wanted)


def test_logits_equal_those_of_transformers() -> None:
    torch.manual_seed(0)
    model = network.create(TOKENIZER, layers=3)
    batch = a_batch()
    gates = torch.ones(3, *batch.ids.shape)
    ours = network.forward(model, batch.ids, batch.positions, batch.segments, gates)
    for row, segment in ((0, 0), (0, 1), (1, 0)):
        inside = batch.segments[row] == segment
        theirs = model(input_ids=batch.ids[row][inside][None]).logits[0]
        torch.testing.assert_close(ours[row][inside], theirs, atol=1e-4, rtol=1e-4)


def test_a_closed_gate_is_a_deleted_layer() -> None:
    torch.manual_seed(0)
    model = network.create(TOKENIZER, layers=3)
    batch = a_batch()
    gates = torch.ones(3, *batch.ids.shape)
    gates[1] = 0
    gated = network.forward(model, batch.ids, batch.positions, batch.segments, gates)
    del model.model.layers[1]
    deleted = network.forward(model, batch.ids, batch.positions, batch.segments, gates[:2] * 0 + 1)
    torch.testing.assert_close(gated, deleted)


def test_layer_dropout_grows_with_depth_and_time() -> None:
    assert network.drop_probabilities(12, 0.2, 0.0).max() == 0
    end = network.drop_probabilities(12, 0.2, 1.0)
    assert end[0] == 0
    assert end[-1].item() == pytest.approx(0.2)
    assert (end[1:] > end[:-1]).all()
    half = network.drop_probabilities(12, 0.2, 0.5)
    torch.testing.assert_close(half, end * (math.sqrt(2) - 1))


def test_early_exits_weigh_more_the_deeper_they_are_and_take_turns() -> None:
    steps = torch.stack([network.exit_weights(12, 1.0, 3, step) for step in range(3)])
    torch.testing.assert_close(steps.sum(1), torch.ones(3))
    assert ((steps[:, :-1] > 0).sum(0) == torch.tensor([0, *[1] * 10])).all()  # layer 0 has none
    assert (steps[:, -1] == steps.max(1).values).all()
    # LayerSkip's e_l: 0 + ... + l, and L - 1 + 0 + ... + (L - 2) of the last.
    torch.testing.assert_close(steps[0, 9] / steps[0, -1], torch.tensor(45 / 66))
    torch.testing.assert_close(steps[1, 4] / steps[1, 10], torch.tensor(10 / 55))
    assert network.exit_weights(12, 0.0, 3, 0).tolist() == [0.0] * 11 + [1.0]


def test_an_exit_says_what_the_layers_up_to_it_say() -> None:
    torch.manual_seed(0)
    model = network.create(TOKENIZER, layers=3)
    batch = a_batch()
    gates = torch.ones(3, *batch.ids.shape)
    streams = network.streams(model, batch.ids, batch.positions, batch.segments, gates)
    gates[2] = 0
    stopped = network.forward(model, batch.ids, batch.positions, batch.segments, gates)
    torch.testing.assert_close(network.head(model, streams[1]), stopped)


def test_gates_are_drawn_per_sample_and_layer() -> None:
    segments = torch.arange(8).repeat_interleave(12).expand(500, -1)
    probabilities = torch.tensor([0.0, 0.1, 0.3])
    gates = network.sample_gates(probabilities, segments, torch.Generator().manual_seed(0))
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    per_sample = gates.view(3, 500, 8, 12)
    assert (per_sample == per_sample[..., :1]).all()
    torch.testing.assert_close(1 - gates.mean((1, 2)), probabilities, atol=0.02, rtol=0)


def test_learned_tasks_are_drawn_less_and_exercises_fade() -> None:
    fresh, later = course.shares(0.0, {}), course.shares(0.5, {"sum": 1.0})
    assert later["sum"] < 0.2 * fresh["sum"]
    assert later["gloss"] == 0
    assert course.rate(0.3) == 1
    assert course.rate(1.0) == 0


def test_a_trained_model_learns_to_leave_early(tmp_path: Path) -> None:
    options = train.Options(
        out=tmp_path, start=Path(bundled_model()), exits=1.0, steps=12, rows=4, rate=1e-3,
        questions=1, compiled=False,
    )  # fmt: skip
    trainer, batch = train.Trainer(options), a_batch()
    gates = torch.ones(12, *batch.ids.shape)
    given = trainer.model, batch.ids, batch.positions, batch.segments, gates

    def loss_of_exits() -> float:
        with torch.no_grad():
            logits = [network.head(trainer.model, each) for each in network.streams(*given)]
        losses = [network.answer_loss(each, batch.labels).item() for each in logits]
        return sum(losses[3:9])

    before = loss_of_exits()
    trainer.run()
    assert loss_of_exits() < 0.9 * before
    trainer.write_record()
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["early_exit_scale"] == 1.0


def test_a_tiny_run_learns_and_resumes(tmp_path: Path) -> None:
    def options(steps: int, resume: bool = False) -> train.Options:
        return train.Options(
            out=tmp_path, steps=steps, rows=4, layers=2, hidden=64,
            questions=4, compiled=False, resume=resume,
        )  # fmt: skip

    first = train.Trainer(options(20)).run()
    losses = [loss for *_, loss in first.loss]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])

    again = train.Trainer(options(30, resume=True))
    assert again.record.steps == 20
    assert again.record.tokens == first.tokens
    again.run()
    again.write_record()
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["steps"] == 30
    assert len(record["tune_exact_match"]) == 2
    assert (tmp_path / "loss.png").stat().st_size > 0
    stored = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert stored.dtype == torch.bfloat16
