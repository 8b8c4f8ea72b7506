# SPDX-License-Identifier: Apache-2.0
"""What a test file needs besides pytest, read off its imports and those of our own modules.

Of test files and helpers all imports count; of the package those at the top of a module, because
what a function imports is wanted only where it is called. Nothing is imported to find out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent


def needed(file: Path) -> set[str]:
    """Return the top-level packages that a test file imports, itself or through our modules."""
    found: set[str] = set()
    seen, open_files = {file}, [file]
    while open_files:
        for module in imported(open_files.pop()):
            ours = set(files_of(module))
            if not ours:
                found.add(module.partition(".")[0])
            open_files += ours - seen
            seen |= ours
    return found


@cache
def imported(file: Path) -> frozenset[str]:
    """Return the modules that a file imports; ``from a import b`` may mean ``a.b`` too."""
    found: set[str] = set()
    for node in _run(ast.parse(file.read_text()), functions=TESTS in file.parents):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "import_module":
            found.update(
                ast.literal_eval(one) for one in node.args if isinstance(one, ast.Constant)
            )
    return frozenset(found | {"torch"} if "safetensors.torch" in found else found)


def _run(node: ast.AST, functions: bool) -> Iterator[ast.AST]:
    """Walk over what runs: nothing for type checkers, and functions' bodies only if wanted."""
    yield node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not functions:
        return
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from _run(child, functions)


def files_of(module: str) -> Iterator[Path]:
    """Return our files that run when a module is imported: it, and the packages that it is in."""
    names = module.split(".")
    for home in (ROOT, TESTS, ROOT / "benchmarks"):
        for depth in range(1, len(names) + 1):
            place = home.joinpath(*names[:depth])
            for file in (place.with_suffix(".py"), place / "__init__.py"):
                if file.is_file():
                    yield file
