# SPDX-License-Identifier: Apache-2.0
"""The side table against sums over whole prompts, whatever chunks and blocks they came in."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_adaskip.engine.prompts import PagedStatistics

SLOTS, BLOCKS, WIDTH = 4, 24, 3


@given(
    prompts=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    chunk=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_chunks_and_reused_blocks_do_not_matter(prompts: list[int], chunk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = PagedStatistics(BLOCKS, SLOTS, WIDTH, torch.device("cpu"))
    for length in prompts:  # each takes any blocks, which others have used before
        blocks = torch.randperm(BLOCKS, generator=generator)[: -(-length // SLOTS)]
        positions = torch.arange(length)
        slots = blocks[positions // SLOTS] * SLOTS + positions % SLOTS
        values = torch.randn(length, WIDTH, generator=generator)
        for start in range(0, length, chunk):
            part = table.new_values(len(values[start : start + chunk]))
            part[:, :-1] = values[start : start + chunk]
            table.add(slots[start : start + chunk], part)
        got = table.read(blocks, length, part[-1])
        assert got.tokens == length
        assert torch.allclose(torch.from_numpy(got.mean), values.double().mean(dim=0), atol=1e-6)
        assert torch.equal(torch.from_numpy(got.last), values[-1].double())
        whole = PagedStatistics(BLOCKS, SLOTS, WIDTH, torch.device("cpu"))
        part = whole.new_values(length)
        part[:, :-1] = values
        whole.add(slots, part)
        assert (whole.read(blocks, length, part[-1]).mean == got.mean).all()  # bit for bit


def test_a_prompt_that_was_not_wholly_observed_is_an_error() -> None:
    table = PagedStatistics(BLOCKS, SLOTS, WIDTH, torch.device("cpu"))
    table.add(torch.arange(3), table.new_values(3))
    with pytest.raises(RuntimeError, match="3 of a prompt's 4 tokens"):
        table.read(torch.tensor([0]), 4, table.new_values(1)[0])


def test_it_takes_less_than_a_hundredth_of_the_kv_cache() -> None:
    """Llama-3.2-1B's shape: 16 layers, 8 K/V heads of 64, bf16, blocks of 16 tokens."""
    layers, slots, blocks = 16, 16, 10
    table = PagedStatistics(blocks, slots, 2 * layers, torch.device("cpu"))
    kv_cache = blocks * slots * layers * 2 * 8 * 64 * 2
    assert table.sums.nbytes < 0.01 * kv_cache
