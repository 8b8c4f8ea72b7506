# SPDX-License-Identifier: Apache-2.0
"""The ``adaskip`` command: its subcommands are in the files beside this."""

from __future__ import annotations

import sys
from functools import partial

import typer

from vllm_adaskip import old_names
from vllm_adaskip.cli import ablate_adainfer, ablate_ffn_skip, ablate_first
from vllm_adaskip.cli.ablate import ablate
from vllm_adaskip.cli.bench import bench, curves, guard, server
from vllm_adaskip.cli.bench_drafts import drafts
from vllm_adaskip.cli.bench_load import load
from vllm_adaskip.cli.bench_regimes import regimes
from vllm_adaskip.cli.demo import demo
from vllm_adaskip.cli.doctor import doctor
from vllm_adaskip.cli.eval import evaluate
from vllm_adaskip.cli.fit import fit
from vllm_adaskip.cli.fit_adainfer import adainfer
from vllm_adaskip.cli.fit_adaskip import adaskip
from vllm_adaskip.cli.fit_draft import draft
from vllm_adaskip.cli.fit_ffn_skip import ffn_skip
from vllm_adaskip.cli.fit_first import first
from vllm_adaskip.cli.fit_heal import heal
from vllm_adaskip.cli.fit_static import static
from vllm_adaskip.cli.get import get
from vllm_adaskip.cli.report import oracle, report
from vllm_adaskip.cli.scan import scan
from vllm_adaskip.cli.serve import publish, serve
from vllm_adaskip.cli.sweep import sweep
from vllm_adaskip.cli.tune import tune

app = typer.Typer(
    help="Layer skipping per sequence, inside vLLM's continuous batch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(doctor)
app.command()(demo)
app.command()(get)
app.command("eval")(evaluate)
app.command()(report)
fit.command()(adainfer)
fit.command()(draft)
fit.command()(ffn_skip)
fit.command()(first)
fit.command()(heal)
fit.command()(adaskip)
fit.command()(static)
app.add_typer(fit, name="fit")
ablate.command("adainfer")(ablate_adainfer.adainfer)
ablate.command("ffn-skip")(ablate_ffn_skip.ffn_skip)
ablate.command("first")(ablate_first.first)
app.add_typer(ablate, name="ablate")
bench.command()(curves)
bench.command()(drafts)
bench.command()(guard)
bench.command()(load)
bench.command()(regimes)
bench.command()(server)
app.add_typer(bench, name="bench")
app.command()(scan)
app.command()(publish)
app.command()(tune)
app.command()(sweep)
app.command()(oracle)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(serve)


def main() -> None:
    """Run the command line; old names are read as new ones, and stderr says so."""
    try:
        arguments = old_names.arguments(sys.argv[1:], partial(typer.echo, err=True))
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    app(arguments)
