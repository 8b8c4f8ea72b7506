# SPDX-License-Identifier: Apache-2.0
"""A stand-in for CUDA graphs on the CPU: what was launched is written down, and run again.

As a graph does, a tape takes no decision of the host again and reads and writes the tensors
that it was recorded with. Unlike one it lets attention look its metadata up anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape:
    """Takes the place of `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []

    def replay(self) -> None:
        """Run every call again, and write what it returns where the first one's result lies."""
        for function, args, kwargs, results in self.calls:
            again = tree_leaves(function(*args, **kwargs))
            for old, new in zip(results, again, strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recording(TorchDispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._tape.calls.append((func, args, kwargs or {}, tree_leaves(result)))
        return result


@contextmanager
def record(tape: Tape, *_: Any, **__: Any) -> Iterator[None]:
    """Take the place of `torch.cuda.graph`."""
    with _Recording(tape):
        yield


def capture_on_tapes(worker: Any) -> None:
    """Have a worker's model state capture its graphs, on tapes."""
    from vllm.v1.worker.gpu import cudagraph_utils as utils

    utils.graph_capture = lambda device: nullcontext()
    utils.capture_pool = lambda pool, config: nullcontext(pool)
    utils.CudaGraphManager._capture_stream = lambda self, desc: None
    utils.current_platform.__class__.get_global_graph_pool = lambda self: None
    torch.cuda.CUDAGraph, torch.cuda.graph = Tape, record
    runner = worker.model_runner
    runner.model_state.capture_inner_cudagraphs(
        runner.input_buffers, runner.block_tables, runner.attn_groups, runner.kv_cache_config
    )
