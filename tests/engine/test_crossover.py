# SPDX-License-Identifier: Apache-2.0
"""When a sub-layer is run for all, and that nobody can tell."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import greedy, random_plan, random_prompts
from hypothesis import given
from hypothesis import strategies as st
from reference import Reference
from tiny import write_llama

from vllm_adaskip import engine_args
from vllm_adaskip.config import ConfigError
from vllm_adaskip.engine.crossover import Crossover
from vllm_adaskip.engine.joined_subsets import JoinedSubsets
from vllm_adaskip.engine.layout import Layout
from vllm_adaskip.engine.step_plan import Segment, StepPlan

LAYERS = 4
ALWAYS = {"context": 1000, "attention": [[1000, 1]], "mlp": [[1000, 1]], "layer": [[1000, 1]]}
#: Attention from half of the rows on, MLPs never, as measured tables may have it.
SOME = {"context": 20, "attention": [[4, 2], [64, 32]], "mlp": [[64, 64]], "layer": [[64, 20]]}


def test_a_table_is_read_by_the_size_of_the_step() -> None:
    table = Crossover(attention=((4, 1), (8, 6)), mlp=((8, 8),))
    assert [table.runs_all("attention", running, 4) for running in range(1, 4)] == [
        True,
        True,
        True,
    ]
    assert [running for running in range(1, 6) if table.runs_all("attention", running, 6)] == [
        5
    ]  # 6 of 8
    assert [running for running in range(1, 16) if table.runs_all("attention", running, 16)] == [
        *range(12, 16)
    ]
    assert not any(table.runs_all("mlp", running, 8) for running in range(1, 8))


def test_attentions_part_holds_up_to_a_context() -> None:
    table = Crossover.model_validate(SOME)
    assert table.within(20) is table
    assert not any(table.within(20.5).runs_all(kind, 3, 4) for kind in ("attention", "layer"))
    assert table.within(21) is table.within(22)  # so that a step plan is not made anew


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no crossover table"),
        ("[1]", "no crossover table"),
        ("[" * 9000, "no crossover table"),
        ('{"format": 2}', "format"),
        ('{"mlp": [[0, 1]]}', "mlp.0.0"),
        ('{"mlp": [[2, 1], [2, 1]]}', "rise"),
        ('{"mlp": [[1e99, 1]]}', "mlp.0.0"),
        ('{"attn": []}', "attn"),
        (json.dumps({"mlp": [[n, n] for n in range(1, 99)]}), "mlp"),
        (" " * 70_000, "longer than"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        Crossover.load(str(path))
    assert "table.json" in str(error.value)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"nowhere\.json"):
        Crossover.load("nowhere.json")
    from vllm_adaskip.classifiers import DecoderShape
    from vllm_adaskip.config import AdaSkipConfig

    with pytest.raises(ConfigError, match=r"adaskip\.crossover: .*nowhere"):
        AdaSkipConfig.parse({"crossover": "nowhere.json"}).facts(DecoderShape(4, 1, 3))


masks = st.lists(st.booleans(), min_size=2 * LAYERS, max_size=2 * LAYERS)
batches = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), masks), min_size=1, max_size=8)


def layout_of(batch: list[tuple[int, int, list[bool]]]) -> tuple[Any, Layout]:
    prompt, generated = (np.array([row[i] for row in batch]) for i in (0, 1))
    generated = np.where(prompt + generated == 0, 1, generated)
    return np.array([row[2] for row in batch]), Layout(prompt + generated, generated)


@given(batches, st.sampled_from([ALWAYS, SOME]))
def test_a_table_changes_how_sub_layers_run_and_not_for_whom(
    batch: list[tuple[int, int, list[bool]]], table: dict[str, Any]
) -> None:
    skips, layout = layout_of(batch)
    usual = StepPlan.build(skips, layout)
    plan = StepPlan.build(skips, layout, crossover=Crossover.model_validate(table))
    assert np.array_equal(plan.generated_run, usual.generated_run)
    total = int(layout.query_lens.sum())
    ran: list[dict[int, list[int]]] = [{}, {}]
    discarded = 0
    for one, found in ((usual, ran[0]), (plan, ran[1])):
        for segment in one.pieces:
            assert isinstance(segment, Segment)
            whole = torch.arange(total)
            through = whole if segment.subset is None else whole[segment.subset.tokens]
            if segment.others is not None:
                beside = whole[segment.others.tokens]
                assert sorted([*through.tolist(), *beside.tolist()]) == whole.tolist()
                discarded += len(beside) * len(segment.sub_layers)
            found |= dict.fromkeys(segment.sub_layers, through.tolist())
    assert ran[0] == ran[1]
    assert (usual.discarded, plan.discarded) == (0, discarded)
    if table is ALWAYS:
        assert all(piece.subset is None or piece.others for piece in plan.pieces)
        assert plan.attention_subsets == ()


@given(batches)
def test_joined_subsets_hold_each_ones_indices(batch: list[tuple[int, int, list[bool]]]) -> None:
    skips, layout = layout_of(batch)
    subsets = StepPlan.build(skips, layout).attention_subsets
    if not subsets:
        return
    joined = JoinedSubsets(subsets)
    all_rows, all_tokens, all_dropped = joined.on(torch.device("cpu"))
    everything = torch.arange(int(layout.query_lens.sum()))
    dropped = torch.cat([subset.dropped for subset in subsets])
    for subset, rows, tokens in zip(
        subsets,
        all_rows.split(joined.num_rows),
        all_tokens.split(joined.num_tokens),
        strict=True,
    ):
        assert torch.equal(rows, subset.rows)
        assert torch.equal(tokens, everything[subset.tokens])
    assert (all_dropped is None) == (not dropped.any())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_llama(tmp_path_factory.mktemp("model"), layers=LAYERS, vocab_size=512)


@pytest.mark.parametrize("kv_fill", ["none", "copy", "project"])
@pytest.mark.parametrize("table", [ALWAYS, SOME], ids=["always", "some"])
def test_mixed_plans_give_the_tokens_of_the_reference(
    engine: Callable[..., Any], model: str, tmp_path: Path, kv_fill: str, table: dict[str, Any]
) -> None:
    """Prompts come in chunks beside decoding rows, and one plan leaves out the first layer."""
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    options = engine_args(kv_fill=kv_fill, crossover=str(path))
    llm = engine(model, max_num_batched_tokens=48, **options)
    rng = random.Random(6)
    prompts = random_prompts(7, 12, longest=40)
    plans = [[0], [], *(random_plan(rng, LAYERS) for _ in range(10))]
    reference = Reference(model)
    for prompt, plan, tokens in zip(prompts, plans, greedy(llm, prompts, plans, 20), strict=True):
        want, gap = reference.generate(prompt, plan, 20, kv_fill=kv_fill)
        assert tokens == want, f"plan {plan}, smallest gap {gap:.2g}"
    (report,) = llm.collective_rpc("adaskip_report")
    assert report["discarded"] > 0
    kept = [
        sum(f"attn:{one}" not in plan and one not in plan for plan in plans)
        for one in range(LAYERS)
    ]
    assert report["attn_run"] == [19 * rows for rows in kept]


def test_preempted_sequences_keep_their_tokens(
    engine: Callable[..., Any], model: str, tmp_path: Path
) -> None:
    """What comes back replays planned tokens inside a prompt's chunk, some of them put back."""
    path = tmp_path / "table.json"
    path.write_text(json.dumps(ALWAYS))
    llm = engine(
        model,
        num_gpu_blocks_override=14,
        enable_prefix_caching=False,
        **engine_args(kv_fill="copy", crossover=str(path)),
    )
    rng = random.Random(9)
    prompts = random_prompts(10, 8, longest=40)
    plans = [random_plan(rng, LAYERS) for _ in prompts]
    reference = Reference(model)
    got = greedy(llm, prompts, plans, 100)
    for prompt, plan, tokens in zip(prompts, plans, got, strict=True):
        want, gap = reference.generate(prompt, plan, 100, kv_fill="copy")
        assert tokens == want, f"plan {plan}, smallest gap {gap:.2g}"
