# SPDX-License-Identifier: Apache-2.0
"""What the tests of commands share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model with the bundled one's tokenizer."""
    import torch

    from vllm_adaskip.lab.testbed import network, tokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    network.save(network.create(words := tokenizer.build(), 4, 32), words, folder)
    return str(folder)
