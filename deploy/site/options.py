# SPDX-License-Identifier: Apache-2.0
"""Write the tables of docs/options.md from the models that check the options.

``python deploy/site/options.py`` writes them; `rewritten` is what tests and the site compare with.
Needs neither torch nor vLLM.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from vllm_adaskip.classifiers import METHODS
from vllm_adaskip.config import AdaSkipConfig
from vllm_adaskip.engine.busy import BusyPlans, Level, Thresholds
from vllm_adaskip.engine.canary import CanaryOptions
from vllm_adaskip.engine.drafts import DraftOptions
from vllm_adaskip.engine.prompt_plan import BusyOptions, PromptOptions

PAGE = Path(__file__).parents[2] / "docs" / "options.md"
#: Tables by the names that the page gives them.
MODELS: dict[str, type[BaseModel]] = {
    "server": AdaSkipConfig,
    "prompt": PromptOptions,
    "prompt.busy": BusyOptions,
    "busy": BusyPlans,
    "busy.levels": Level,
    "busy.levels.enter": Thresholds,
    "canary": CanaryOptions,
    "draft": DraftOptions,
    **{name: method.Options for name, method in METHODS.items() if method.Options.model_fields},
}
BOUNDS = {
    "exclusiveMinimum": "above",
    "minimum": "at least",
    "exclusiveMaximum": "below",
    "maximum": "at most",
}
KINDS = {
    "array": "list",
    "boolean": "`true`, `false`",
    "integer": "integer",
    "number": "number",
    "string": "text",
}
TABLE = re.compile(r"(<!-- options: (\S+) -->\n\n).*?(\n<!-- end -->)", re.DOTALL)


def rewritten(page: str) -> str:
    """Return the page with each table as the models have it now."""
    return TABLE.sub(lambda found: f"{found[1]}{table(MODELS[found[2]])}{found[3]}", page)


def table(model: type[BaseModel]) -> str:
    """Return a row for each option of a model."""
    schema, meanings = model.model_json_schema(), described(model)
    rows = [["option", "value", "default", "meaning"], ["---"] * 4]
    for name, field in model.model_fields.items():
        key = field.alias or name
        facts = schema["properties"][key]
        rows.append([f"`{key}`", values(facts), default(facts), meanings[name]])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def values(facts: dict[str, Any]) -> str:
    """Return what an option's JSON schema allows, in words."""
    (facts,) = [one for one in facts.get("anyOf", [facts]) if one.get("type") != "null"]
    if "enum" in facts:
        return ", ".join(f"`{value}`" for value in facts["enum"])
    bounds = [f"{word} {facts[key]}" for key, word in BOUNDS.items() if key in facts]
    return ", ".join([KINDS.get(facts.get("type", "object"), "object"), *bounds])


def default(facts: dict[str, Any]) -> str:
    """Return an option's default as JSON, or that there is none."""
    if "default" not in facts:
        return "required"
    return "" if facts["default"] is None else f"`{json.dumps(facts['default'])}`"


def described(model: type[BaseModel]) -> dict[str, str]:
    """Return what the docstrings of a model and its bases say of each attribute, as Markdown."""
    found = {}
    for each in reversed(model.__mro__):
        _, _, attributes = inspect.cleandoc(each.__doc__ or "").partition("\nAttributes:\n")
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE):
            found[name] = markdown(" ".join(text.split()))
    return found


def markdown(text: str) -> str:
    """Return a docstring's text as a cell of a table."""
    text = text.replace("``", "`").replace("`METHODS`", ", ".join(f"`{one}`" for one in METHODS))
    text = re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", text).rstrip(".")
    return text[:1].upper() + text[1:]


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
