# SPDX-License-Identifier: Apache-2.0
"""Each ready profile of the bundled model works in the engine of the command on its method's page.

And AdaInfer's in its other scopes. The command is read by vLLM's own parser; `test_server` says
what a server adds.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.readme import ENVIRONMENT, ROOT
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_adaskip.lab import testbed

READY = sorted(
    one.name for one in (Path(testbed.__file__).parent / "profiles").iterdir() if one.is_dir()
)
OTHER_SCOPES = {
    "adainfer, prompt": ["scope", "prompt"],
    "adainfer, token": ["scope", "token", "kv_fill", "copy"],
}
TOPIC = "i saw the team and then the stadium . topic ? answer :"
SUM = "sum : 2 6 + 7 1 = ? answer :"


class Ready:
    """An engine with a profile, and its method's name, with the scope if that is not its own."""

    def __init__(self, name: str, llm: Any) -> None:
        self.name, self.llm = name, llm

    def complete(self, prompt: str, tokens: int, **extra_args: Any) -> str:
        params = SamplingParams(temperature=0, max_tokens=tokens, extra_args=extra_args or None)
        (done,) = self.llm.generate([prompt], params, use_tqdm=False)
        return str(done.outputs[0].text)

    def left_out(self) -> int:
        """Return tokens kept from sub-layers, and whole prompts that stopped early, so far."""
        (report,) = self.llm.collective_rpc("adaskip_report")
        ran = sum(report["attn_run"]) + sum(report["mlp_run"])
        skipped: int = 2 * report["num_layers"] * report["decode_tokens"] - ran
        return skipped + sum(report.get("exits", ()))


def command_of(method: str) -> list[str]:
    """Return the words of the page's ``vllm serve``, as the shell makes them."""
    page = (ROOT / "docs" / f"{method}.md").read_text()
    (command,) = [
        one.partition("```")[0].strip()
        for one in page.split("```bash\n")[1:]
        if one.startswith("vllm serve") and f'bundled_profile("{method}")' in one
    ]
    words = command.removeprefix("vllm serve")
    shell = ["bash", "-c", f"printf '%s\\n' {words}"]
    return subprocess.check_output(shell, env=ENVIRONMENT, cwd=ROOT, text=True).splitlines()


@pytest.fixture(scope="module", params=[*READY, *OTHER_SCOPES])
def ready(request: pytest.FixtureRequest, engine: Callable[..., Any]) -> Ready:
    method = request.param.partition(",")[0]
    words, more = command_of(method), OTHER_SCOPES.get(request.param, [])
    for key, value in zip(more[::2], more[1::2], strict=True):
        words += [f"--additional-config.adaskip.{key}", value]
    with pytest.MonkeyPatch.context() as patch:  # `--plugin` names the plugins that vLLM loads
        patch.setenv("VLLM_PLUGINS", "adaskip")
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
        args.model = args.model_tag or args.model
        options = vars(EngineArgs.from_cli_args(args))
        changed = {
            key: value
            for key, value in options.items()
            if value != getattr(EngineArgs(args.model), key) and key != "model"
        }
        return Ready(request.param, engine(args.model, **changed, skip_tokenizer_init=False))


def test_it_skips_by_itself_and_not_where_it_is_off(ready: Ready) -> None:
    tokens = 1 if ready.name == "adainfer" else 12
    before = ready.left_out()
    dense = [ready.complete(one, tokens, adaskip="off") for one in (TOPIC, SUM)]
    assert ready.left_out() == before
    own = [ready.complete(one, tokens) for one in (TOPIC, SUM)]
    assert ready.left_out() > before
    if ready.name not in OTHER_SCOPES:  # for which the profile was not fitted
        assert own == dense


def test_a_budget_is_kept_or_refused(ready: Ready) -> None:
    assert ready.complete(SUM, 8, adaskip_max_compute=0.8)
    with pytest.raises(VLLMValidationError, match="cannot be met"):
        ready.complete(SUM, 8, adaskip_max_compute=0.001)
