# SPDX-License-Identifier: Apache-2.0
"""Refuse to build from sources of which something was lost; all else stands in pyproject.toml.

Some copies turn symbolic links into files, or leave folders out. setuptools packs what is there,
so the wheel would have no methods, and nobody would notice before a server starts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
PACKAGE = ROOT / "vllm_adaskip"
#: Folders of the package that a checkout also shows at its top, by links.
LINKED = ("classifiers", "model_executors")


def losses() -> Iterator[str]:
    """Say what was lost, each with how to get it back."""
    again = "get the sources again (git clone, or the sdist)"
    for name in LINKED:
        link = ROOT / name
        if link.exists() and not (link.is_symlink() and link.samefile(PACKAGE / name)):
            yield (
                f"{name} should be a symbolic link to vllm_adaskip/{name} and is none: "
                "git config core.symlinks true; git checkout ."
            )
    for path in sorted(named()):
        if not path.is_file():
            yield f"{path.relative_to(ROOT)} is missing: {again}"


def named() -> Iterator[Path]:
    """Return the modules that hold methods and families, as the tables of these name them."""
    methods, families = PACKAGE / "classifiers/methods.py", PACKAGE / "model_executors/registry.py"
    yield from (methods, families)
    if methods.is_file():
        for module in re.findall(r"(?m)^from ([\w.]+) import", methods.read_text("utf-8")):
            if module.startswith(f"{PACKAGE.name}."):
                yield ROOT / f"{module.replace('.', '/')}.py"
    if families.is_file():
        for module in re.findall(r'_family\("\w+", "(\w+)"', families.read_text("utf-8")):
            yield families.with_name(f"{module}.py")


if lost := list(losses()):
    sys.exit("\n".join(["vllm-adaskip cannot be built from these sources:", *lost]))
setup()
