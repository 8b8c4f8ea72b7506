# SPDX-License-Identifier: Apache-2.0
"""What mkdocs does not know: pages at the top of the repository, and tables made from code."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

sys.path.insert(0, str(Path(__file__).parent))
import options

ROOT = Path(__file__).parents[2]
#: Pages at the top of the repository, and what they are called on the site.
TOP = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> None:
    """Name anchors as GitHub does; stop where the tables of options are not the models'."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    page = options.PAGE.read_text()
    if options.rewritten(page) != page:
        raise PluginError("docs/options.md is out of date; run: python deploy/site/options.py")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages at the top, as if they stood in docs/."""
    for source, name in TOP.items():
        text = LINK.sub(_from_docs, (ROOT / source).read_text())
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn links of pages in docs/ to those at the top into links within the site."""
    return LINK.sub(_to_top, markdown)


def _from_docs(found: re.Match[str]) -> str:
    target, anchor = found[1], found[2] or ""
    return f"]({TOP.get(target, target.removeprefix('docs/'))}{anchor})"


def _to_top(found: re.Match[str]) -> str:
    target, anchor = found[1], found[2] or ""
    name = TOP.get(target.removeprefix("../"))
    return f"]({name}{anchor})" if name and target.startswith("../") else found[0]
