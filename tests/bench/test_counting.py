# SPDX-License-Identifier: Apache-2.0
"""What a benchmark counts and reckons, against figures worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from math import comb
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from vllm_adaskip.classifiers import SkipPlan
from vllm_adaskip.lab.bench.bound import bound, nearly_dense, rows_to_time
from vllm_adaskip.lab.bench.machine import Machine
from vllm_adaskip.lab.bench.plans import deal, distinct
from vllm_adaskip.lab.bench.results import Results, Target
from vllm_adaskip.lab.bench.rounds import Spread, ratio, take_turns
from vllm_adaskip.lab.bench.shapes import RANK, SHAPES, Shape, adapters_beside
from vllm_adaskip.lab.bench.work import Work, decoder_shape


def test_turns_go_forwards_and_backwards_and_the_first_round_is_not_kept() -> None:
    order: list[str] = []
    ticks = iter(range(1, 100))

    def run(name: str) -> float:
        order.append(name)
        return float(next(ticks))

    done = []
    variants = {name: (lambda name=name: run(name)) for name in "ab"}  # type: ignore[misc]
    taken = take_turns(variants, 2, lambda: done.append(1))
    assert order == [*"baabba"] and len(done) == 6
    assert taken == {"a": [3.0, 6.0], "b": [4.0, 5.0]}
    assert ratio(taken, "b", "a").middle == pytest.approx((4 / 3 + 5 / 6) / 2)


def test_a_spread_is_median_and_quartiles() -> None:
    assert Spread.of([1, 2, 3, 4, 5]) == Spread(2, 3, 4)


@pytest.mark.parametrize(
    ("name", "attention", "mlp"),
    [
        # q and o, k and v; gate, up and down.
        ("llama-3.2-1b", 2 * 2048 * 2048 + 2 * 2048 * 512, 3 * 2048 * 8192),
        ("tinyllama-1.1b", 2 * 2048 * 2048 + 2 * 2048 * 256, 3 * 2048 * 5632),
        ("opt-1.3b", 4 * 2048 * 2048, 2 * 2048 * 8192),
    ],
)
def test_a_steps_work_is_what_its_rows_need(name: str, attention: int, mlp: int) -> None:
    shape = Shape.of(name)
    layers, head = shape.num_layers, shape.config["vocab_size"] * 2048
    decoder = decoder_shape(shape)
    assert (decoder.attention_parameters, decoder.mlp_parameters) == (attention, mlp)
    plans = [SkipPlan(layers, attention=0b11), SkipPlan(layers, attention=0b1, mlp=0b1)]
    work = Work.of(shape, plans, context=100)
    # Attention 0 is needed by none, attention 1 and MLP 0 by one of both.
    assert work.weight_bytes == 2 * ((layers - 1) * attention + layers * mlp + head)
    rows_of_attention = 2 * layers - 3
    kv_heads = shape.config.get("num_key_value_heads", 32)
    assert work.kv_bytes == rows_of_attention * 100 * 2 * kv_heads * 64 * 2
    products = 2 * (rows_of_attention * attention + (2 * layers - 1) * mlp + 2 * head)
    assert work.operations == products + 4 * 2048 * 100 * rows_of_attention


def test_the_roof_is_the_slower_of_reading_and_computing() -> None:
    machine = Machine(bandwidth=10.0, rate=100.0)
    assert machine.seconds(50, 100) == 5
    assert machine.seconds(5, 1000) == 10


def test_a_machine_is_measured() -> None:
    machine = Machine.measure()
    assert 1e8 < machine.bandwidth < 1e13 and 1e8 < machine.rate < 1e16


@given(st.integers(2, 14), st.integers(1, 40))
def test_distinct_plans_are_distinct_and_leave_out_as_much(layers: int, count: int) -> None:
    if count > comb(layers, round(layers / 2)):
        with pytest.raises(ValueError, match=f"no {count} plans .* up to"):
            distinct(layers, count)
        return
    plans = distinct(layers, count)
    assert len({*plans}) == count and plans == distinct(layers, count)
    assert {plan.attention.bit_count() for plan in plans} == {round(layers / 2)}
    assert {plan.share(decoder_shape(Shape.of("opt-1.3b").of_depth(layers))) for plan in plans} == {
        1 - round(layers / 2) / layers
    }
    assert deal(plans, 2 * count + 1)[count::count] == [plans[0], plans[0]]


def test_the_bound_adds_up_what_each_layer_takes_at_its_rows() -> None:
    """Layers of 1 ms a row beside 7 ms of everything else."""
    layers = 12
    plans = distinct(layers, 8)
    running = [sum(not plan.attention >> layer & 1 for plan in plans) for layer in range(layers)]

    layer = {rows: float(rows) for rows in rows_to_time(plans)}
    assert min(layer) <= min(running) and 8 in layer
    assert bound(plans, 7 + 8 * (layers - 1), layer) == pytest.approx(7 + sum(running))
    assert nearly_dense(layers).attention.bit_count() == 1


def test_a_shape_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"'gpt-9' is no model .* bundled, smollm2, smollm2-135m"):
        Shape.of("gpt-9")


@pytest.mark.parametrize("name", ["bundled", *SHAPES])
def test_shapes_are_written_whole_and_shallower(tmp_path: Path, name: str) -> None:
    shape = Shape.of(name)
    shape.of_depth(3).write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 3 and config["architectures"] == [shape.family]
    assert config["hidden_size"] == shape.config["hidden_size"]


def test_a_target_says_whether_it_is_met_and_stands_in_the_json(tmp_path: Path) -> None:
    results = Results(Machine(1, 1))
    low, high = Spread(0.9, 0.95, 1.0), Spread(0.98, 0.99, 1.0)
    results.targets = [
        Target("m", "fast", 0.99, low),
        Target("m", "fast", 0.99, high),
        Target("m", "small", 0.95, low, is_most=True),
        Target("m", "small", 0.96, low, is_most=True),
    ]
    assert [target.is_met for target in results.targets] == [False, True, False, True]
    results.write(tmp_path / "results.json")
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["targets"][0]["found"] == {"low": 0.9, "middle": 0.95, "high": 1.0}
    assert found["versions"]["vllm"] and not (tmp_path / "results.json.part").exists()


def test_adapters_are_written_beside_a_shape_for_all_its_linear_layers(tmp_path: Path) -> None:
    shape = replace(Shape.of("bundled"), adapters=2).of_depth(3)
    folders = adapters_beside(shape.write(tmp_path))
    assert [Path(one).name for one in folders] == ["adapter-0", "adapter-1"]
    first, second = (load_file(Path(one) / "adapter_model.safetensors") for one in folders)
    assert len(first) == 3 * 7 * 2 and first.keys() == second.keys()
    name = "base_model.model.model.layers.2.mlp.down_proj.lora_A.weight"
    assert first[name].shape == (RANK, shape.config["intermediate_size"])
    assert not first[name].equal(second[name])
