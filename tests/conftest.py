# SPDX-License-Identifier: Apache-2.0
"""What several test files share: a tiny random checkpoint, and engines in this process."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from helpers.reference import Reference

# Before vLLM is imported: engines run in this process, side by side, one thread each.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
)
sys.path.insert(0, str(Path(__file__).parent))

from helpers.needs import needed

# A busy machine is slow, and no test depends on when it looks.
settings.register_profile("adaskip", deadline=None)
settings.load_profile("adaskip")

#: Files that take longest, so that two processes which share the tests end together.
LONGEST = (
    "test_families",
    "test_server",
    "test_evaluation",
    "test_adainfer",
    "test_torture",
    "test_model_runner_v2",
    "test_readme",
    "test_fit_adainfer",
    "test_ffn_skip",
    "test_compiled",
    "test_compiled_plans",
)


#: Files whose tests take minutes: many processes each, which want all cores.
SLOW = ("test_tensor_parallel", "test_many_engines")
#: What an environment for `make test-pure` may lack; the files that need it are left out there.
HEAVY = ("torch", "transformers", "vllm")
ABSENT = {name for name in HEAVY if find_spec(name) is None}


@cache
def kind(path: Path) -> str:
    """Return the mark of a test file: pure if it can do without vLLM."""
    if path.parent.name == "ray":
        return "ray"
    # The commands import what they need when they run.
    needs_vllm = path.parent.name == "cli" or "vllm" in needed(path)
    return "engine" if needs_vllm else "pure"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out what cannot be imported here, which `pytest_report_header` says."""
    if ABSENT and collection_path.name.startswith("test_"):
        lacks_vllm = kind(collection_path) != "pure" and "vllm" in ABSENT
        return lacks_vllm or bool(ABSENT & needed(collection_path)) or None
    return None


def pytest_report_header() -> str:
    """Say what is missing, so that nobody takes a part of the tests for all."""
    return f"left out: files that need {', '.join(sorted(ABSENT))}" if ABSENT else ""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark each test by what its file needs, and how long it takes.

    A test that has vLLM in a process of its own, which no import shows, is marked where it stands.
    """
    if not item.get_closest_marker("engine"):
        item.add_marker(kind(item.path))
    if item.path.stem in SLOW:
        item.add_marker("slow")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files that take longest first; the others stay as they are."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


TINY_LAYERS = 8
#: Each layer is compiled once more for each plan, so there are few.
FEW_LAYERS = 4
#: Parameters of the tiny Llama's sub-layers, as `llama_shape` counts them.
TINY_SHAPE = (TINY_LAYERS, 2 * 128 * 32 * (4 + 2), 3 * 128 * 256)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama of 8 layers, no tokenizer."""
    from helpers.tiny import write_llama

    path = tmp_path_factory.mktemp("tiny") / "llama"
    return write_llama(path, layers=TINY_LAYERS, vocab_size=512, max_position_embeddings=512)


@pytest.fixture(scope="session")
def few_layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama of `FEW_LAYERS`, for engines that compile each layer."""
    from helpers.tiny import write_llama

    path = tmp_path_factory.mktemp("few") / "llama"
    return write_llama(path, layers=FEW_LAYERS, vocab_size=512, max_position_embeddings=512)


@pytest.fixture(scope="module")
def reference(tiny_llama: str) -> Reference:
    """What plans of `tiny_llama` mean."""
    from helpers.reference import Reference

    return Reference(tiny_llama)


@pytest.fixture(scope="module")
def engine() -> Iterator[Callable[..., Any]]:
    """Make engines that the module shares; all are shut down after it.

    Keyword arguments are those of `vllm.LLM`. Prompts are token ids.
    """
    from vllm import LLM
    from vllm.model_executor.models import registry

    from vllm_adaskip.engine.compat import enable_amx

    enable_amx()  # for stock engines; ours do it themselves
    engines: list[Any] = []

    def make(model: str, **kwargs: Any) -> Any:
        defaults: dict[str, Any] = {
            "dtype": "float32",
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "max_model_len": 256,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 256,
            "distributed_executor_backend": "uni",
            "kv_cache_memory_bytes": 64 << 20,  # many live side by side
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("VLLM_CPU_KVCACHE_SPACE")  # it would go before
            # vLLM looks at each new model class in a process of its own, which takes 20 s to start.
            patch.setattr(registry, "_run_in_subprocess", lambda look: look())
            engines.append(LLM(model, **{**defaults, **kwargs}))
        return engines[-1]

    yield make
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda *_: 0)  # each would twice, a second in all
        for one in engines:
            one.llm_engine.engine_core.shutdown()
    engines.clear()
    gc.collect()
