# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at most: bytes and operations per second, measured; its memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

#: Far more than any cache holds.
_BYTES = 1 << 29
#: Of the matrices that are multiplied; the next is tried as long as one takes less than `_LONG`.
_SIZES = (256, 512, 1024, 2048)
#: Seconds. Without AVX-512 PyTorch multiplies bfloat16 a hundred times slower.
_LONG = 0.1


@dataclass(frozen=True)
class Machine:
    """The roof over every step.

    Attributes:
        bandwidth: bytes per second read from memory.
        rate: operations per second of a matrix product in bfloat16, a multiply and an add two.

    """

    bandwidth: float
    rate: float

    @classmethod
    def measure(cls) -> Machine:
        """Measure both, with the threads that PyTorch is set to; the best of a few turns."""
        import torch

        table = torch.ones(_BYTES // 4, dtype=torch.float32)
        bandwidth, rate = _BYTES / _fastest(lambda: table.sum()), 0.0
        for size in _SIZES:
            matrix = torch.randn(size, size, dtype=torch.bfloat16)
            taken = _fastest(lambda own=matrix: own @ own)  # type: ignore[misc]
            rate = max(rate, 2 * size**3 / taken)
            if taken > _LONG:
                break
        return cls(bandwidth, rate)

    def seconds(self, num_bytes: float, operations: float) -> float:
        """Return the least time that so much takes: the slower of both, perfectly overlapped."""
        return max(num_bytes / self.bandwidth, operations / self.rate)


def _fastest(call: Callable[[], object]) -> float:
    taken = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


def memory_available() -> int:
    """Return the bytes that this process may still take: the machine's, or its control group's."""
    import psutil

    machine: int = psutil.virtual_memory().available
    return min([machine, *_control_group()])


def _control_group() -> Iterable[int]:
    folder = Path("/sys/fs/cgroup")
    most, now = (_lines(folder / name) for name in ("memory.max", "memory.current"))
    if most and now and most[0].isdigit():
        # Pages of files go when memory is wanted.
        cache = sum(
            int(line.split()[1])
            for line in _lines(folder / "memory.stat")
            if line.startswith(("inactive_file ", "active_file "))
        )
        yield int(most[0]) - int(now[0]) + cache


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
