# SPDX-License-Identifier: Apache-2.0
"""Each ready profile of the bundled model is served by the command on its method's page.

And AdaInfer's in its other scopes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_server import URL, serving
from readme import ROOT

from vllm_adaskip.lab import testbed

READY = sorted(
    one.name for one in (Path(testbed.__file__).parent / "profiles").iterdir() if one.is_dir()
)
OTHER_SCOPES = {
    "adainfer, prompt": "scope prompt",
    "adainfer, token": "scope token --additional-config.adaskip.kv_fill copy",
}
TOPIC = "i saw the team and then the stadium . topic ? answer :"
SUM = "sum : 2 6 + 7 1 = ? answer :"


@pytest.fixture(scope="module", params=[*READY, *OTHER_SCOPES])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Start the server; give the method, and its scope if that is not the profile's."""
    method = request.param.partition(",")[0]
    page = (ROOT / "docs" / f"{method}.md").read_text()
    (command,) = [
        one
        for one in page.split("```bash\n")[1:]
        if one.startswith("vllm serve") and f'bundled_profile("{method}")' in one
    ]
    command = command.partition("```")[0].strip()
    if request.param in OTHER_SCOPES:
        command += f" --additional-config.adaskip.{OTHER_SCOPES[request.param]}"
    log = tmp_path_factory.mktemp(method) / "log"
    # Compiling would only take time: `test_server` serves compiled.
    with serving(f"{command} --host 127.0.0.1 --served-model-name bundled --enforce-eager", log):
        yield request.param


def complete(prompt: str, tokens: int, **xargs: Any) -> httpx.Response:
    body = {
        "model": "bundled",
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": tokens,
        "vllm_xargs": xargs or None,
    }
    return httpx.post(f"{URL}/v1/completions", json=body, timeout=60)


def left_out() -> int:
    """Generated tokens kept from sub-layers, and whole prompts that stopped early, so far."""
    (report,) = httpx.get(f"{URL}/adaskip/report").json()
    ran = sum(report["attn_run"]) + sum(report["mlp_run"])
    skipped: int = 2 * report["num_layers"] * report["decode_tokens"] - ran
    return skipped + sum(report.get("exits", ()))


def test_it_skips_by_itself_and_not_where_it_is_off(served: str) -> None:
    tokens = 1 if served == "adainfer" else 12
    before = left_out()
    dense = [complete(one, tokens, adaskip="off").json() for one in (TOPIC, SUM)]
    assert left_out() == before
    own = [complete(one, tokens).json() for one in (TOPIC, SUM)]
    assert left_out() > before
    for one, other in zip(own, dense, strict=True):
        if served in OTHER_SCOPES:
            continue  # the profile was not fitted for texts
        assert one["choices"][0]["text"] == other["choices"][0]["text"]


def test_a_budget_is_kept_or_refused(served: str) -> None:
    assert complete(SUM, 8, adaskip_budget=0.8).status_code == 200
    refused = complete(SUM, 8, adaskip_budget=0.001)
    assert refused.status_code == 400 and "cannot be met" in refused.text
