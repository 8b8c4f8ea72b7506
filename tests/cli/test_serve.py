# SPDX-License-Identifier: Apache-2.0
"""`adaskip serve` is `vllm serve`: its defaults give way to all that a user wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_adaskip import bundled_model
from vllm_adaskip.cli.main import app
from vllm_adaskip.cli.serve import serve_arguments

LOOPBACK = ["--host", "127.0.0.1"]


@pytest.mark.parametrize(
    ("written", "want"),
    [
        (["m"], ["m", "--plugin", "adaskip", *LOOPBACK]),
        (["m", "--host", "::"], ["m", "--plugin", "adaskip", "--host", "::"]),
        (["m", "--host=::"], ["m", "--plugin", "adaskip", "--host=::"]),
        (["m", "-tp", "2"], ["m", "--plugin", "adaskip", *LOOPBACK, "-tp", "2"]),
        (["--model", "m"], ["--plugin", "adaskip", *LOOPBACK, "--model", "m"]),
        (["--model=m"], ["--plugin", "adaskip", *LOOPBACK, "--model=m"]),
    ],
)
def test_it_is_vllm_serve_with_the_plugin_on_and_on_loopback(
    written: list[str], want: list[str]
) -> None:
    assert serve_arguments(written) == ["serve", *want]


@pytest.mark.parametrize("written", [[], ["--port", "1"], ["--served-model-name", "m"]])
def test_without_a_model_it_serves_the_bundled_one(written: list[str]) -> None:
    want = ["serve", bundled_model(), "--plugin", "adaskip", *LOOPBACK, *written]
    assert serve_arguments(written) == want


def test_short_names_become_paths() -> None:
    plugin = ["--plugin", "adaskip", *LOOPBACK]
    assert serve_arguments(["bundled"]) == ["serve", bundled_model(), *plugin]
    named = ["--model", bundled_model()]
    assert serve_arguments(["--model", "bundled"]) == ["serve", *plugin, *named]


def read_by_vllm(arguments: list[str]) -> Any:
    """What `vllm serve` makes of its arguments, with the model that it would load."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    args = parser.parse_args(arguments)
    args.model = args.model_tag or args.model
    return args


@pytest.mark.parametrize("spelt", [["--config", "FILE"], ["--config=FILE"]])
@pytest.mark.parametrize(
    ("text", "written", "model", "host"),
    [
        ("model: theirs\nhost: '::'", [], "theirs", "::"),
        ("model: theirs", [], "theirs", "127.0.0.1"),
        ("model: theirs\nhost: '::'", ["m", "--host", "0.0.0.0"], "m", "0.0.0.0"),
        ("host: '::'", ["m"], "m", "::"),
        ("host: '::'", ["--model", "m"], "m", "::"),
        ("served-model-name: name", [], bundled_model(), "127.0.0.1"),
    ],
)
def test_vllm_reads_model_and_host_where_the_user_wrote_them(
    tmp_path: Path, spelt: list[str], text: str, written: list[str], model: str, host: str
) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(f"{text}\nmax-model-len: 99\n")
    config = [each.replace("FILE", str(file)) for each in spelt]
    for order in ([*written, *config], [*config, *written]):
        if order[0] == config[0] and written[:1] == ["m"]:
            continue  # for vLLM the model stands first
        args = read_by_vllm(serve_arguments(order))
        assert (args.model, args.host, args.max_model_len) == (model, host, 99)
        assert args.adaskip_plugin == "adaskip"


def test_what_it_starts_answers_for_a_report_and_a_stock_server_is_left_alone() -> None:
    """By an option of that server: the variable of all plugins in a process is not touched."""
    assert read_by_vllm(["serve", "m"]).middleware == []
    before = dict(os.environ)  # after vLLM was imported, which has its own to set
    ours = read_by_vllm(serve_arguments(["m", "--middleware", "their.middleware"]))
    assert [name.rpartition(".")[2] for name in ours.middleware] == [
        "middleware",
        "ReportMiddleware",
    ]
    assert dict(os.environ) == before


@pytest.mark.parametrize("text", [None, "- a list", "a: [", "\xff"])
def test_a_file_that_is_wrong_is_left_to_vllm(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "server.yaml"
    if text is not None:
        file.write_text(text, encoding="latin-1")
    arguments = serve_arguments(["--config", str(file)])
    assert arguments[-2:] == ["--config", str(file)]
    with pytest.raises(Exception):  # noqa: B017
        read_by_vllm(arguments)


def test_an_allow_list_without_the_plugin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setattr("os.execv", lambda *_: pytest.fail("vLLM was started"))
    done = CliRunner().invoke(app, ["serve", "m"])
    assert done.exit_code == 2
    assert "VLLM_PLUGINS is 'other'" in done.output and "add adaskip" in done.output


@pytest.mark.parametrize(
    ("written", "want"),
    [
        (["m", "--port", "1"], ["serve", "m", "--plugin", "adaskip", *LOOPBACK, "--port", "1"]),
        (["--model", "m"], ["serve", "--plugin", "adaskip", *LOOPBACK, "--model", "m"]),
        (["-tp", "2"], ["serve", bundled_model(), "--plugin", "adaskip", *LOOPBACK, "-tp", "2"]),
    ],
)
def test_the_command_hands_on_what_was_typed(
    monkeypatch: pytest.MonkeyPatch, written: list[str], want: list[str]
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda _, command: ran.append(command))
    assert CliRunner().invoke(app, ["serve", *written]).exit_code == 0
    assert ran[0][3:] == want
