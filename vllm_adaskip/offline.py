# SPDX-License-Identifier: Apache-2.0
"""What a Python program says in a request, and asks of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_adaskip.classifiers.plan import as_entries, parse_entry
from vllm_adaskip.engine.request import RequestArgs
from vllm_adaskip.old_names import REQUEST, renamed

if TYPE_CHECKING:
    from vllm import LLM

    from vllm_adaskip.engine.counts import Report


def request(
    *,
    skip: Sequence[int | str] | None = None,
    max_compute: float | None = None,
    off: bool = False,
    prompt_exit: int | None = None,
    prompt_skip: Sequence[int | str] | None = None,
    prompt_tail: int | None = None,
    draft: int | None = None,
    show_plan: bool = False,
    budget: float | None = None,
) -> dict[str, Any]:
    """Return a request's arguments: for ``SamplingParams.extra_args``, or ``vllm_xargs`` over HTTP.

    Args:
        skip: the plan, ``[5, 6, "attn:7", "mlp:8"]``: whole decoder layers, and sub-layers. Whether
            the model has them is known to the engine alone, which refuses what it has not.
        max_compute: largest share of decoder compute that a decided plan may keep, in (0, 1].
        off: run everything, whatever the server's method.
        prompt_exit: layers that the prompt's tokens run, but for its last ones.
        prompt_skip: what they leave out, in the form of ``skip``; one of the two at most.
        prompt_tail: last tokens of the prompt that run everything, 16 by default.
        draft: tokens that may be drafted at once, 0 for none; the server's number by default.
        show_plan: say in the output's ``kv_transfer_params`` what the request got.
        budget: the old name of ``max_compute``, until 0.3.

    Raises:
        ValueError: a share, a tail or an entry that is not allowed, ``prompt_exit`` together with
            ``prompt_skip``, ``max_compute`` with ``budget``, or ``off`` with another argument.

    """
    for entries in (skip, prompt_skip):
        for entry in () if entries is None else as_entries(entries):
            parse_entry(entry)
    shares = {"max_compute": max_compute, "budget": budget}
    named = {name: share for name, share in shares.items() if share is not None}
    given = {
        "adaskip": "off" if off else None,
        "adaskip_skip": None if skip is None else [*skip],
        "adaskip_max_compute": renamed(named, REQUEST).get("max_compute"),
        "adaskip_prompt_exit": prompt_exit,
        "adaskip_prompt_skip": None if prompt_skip is None else [*prompt_skip],
        "adaskip_prompt_tail": prompt_tail,
        "adaskip_draft": draft,
        "adaskip_show_plan": "on" if show_plan else None,
    }
    arguments = {key: value for key, value in given.items() if value is not None}
    RequestArgs.parse(arguments)
    return arguments


def report(llm: LLM) -> Report:
    """Return what an engine has counted so far, of its first worker: all ranks count the same.

    Raises:
        ValueError: the engine runs without the plugin.

    """
    if "adaskip" not in (llm.llm_engine.vllm_config.additional_config or {}):
        raise ValueError(
            "this engine runs without the plugin; make it with "
            "LLM(model, **vllm_adaskip.engine_args(...))"
        )
    first: Report = llm.collective_rpc("adaskip_report")[0]
    return first
