# SPDX-License-Identifier: Apache-2.0
"""The Prometheus counters ``vllm:adaskip_*_total`` and gauges of one server process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from vllm_adaskip.engine.guard import VERDICTS

#: Of what a worker counts: help text, and the label that tells a counter's parts from each other.
_WORKERS: Final[dict[str, tuple[str, str | None]]] = {
    "prompt_tokens": ("Prompt tokens that ran.", None),
    "shortened_prompt_tokens": ("Prompt tokens that ran under a prompt plan.", None),
    "decode_tokens": ("Generated tokens that ran.", None),
    "rows_run": ("Generated tokens that went through a sub-layer, over all layers.", "kind"),
    "rows_skipped": ("Generated tokens that left a sub-layer out, over all layers.", "kind"),
    "requests": ("Sequences whose plan is known, by plan: dense, skipping, gated.", "plan"),
    "failed_decisions": ("Sequences that run dense as their method failed to decide.", None),
    "guarded": (
        "Sequences whose plan a guard judged: followed, or dense, as slower or within the margin.",
        "verdict",
    ),
    "load_level_requests": ("Sequences that entered at a level of load, 0: dense.", "level"),
    "canary_answers": ("Answers under plans that the canary has read at full depth.", None),
    "exits": ("Tokens, or whole one-token answers, that a method stopped on their way up.", None),
}
#: What the canary says of the last answers it read: help text, and the label of a gauge's parts.
_CANARY: Final[dict[str, tuple[str, str | None]]] = {
    "agreement": ("Share of tokens of read answers that are the whole model's.", "part"),
    "surprise": (
        "Nats a token by which its own first choice is likelier to the whole model.",
        "part",
    ),
    "off": ("1 where the canary has switched plans off.", None),
}
#: Of a mean and its interval.
_PARTS: Final = ("mean", "low", "high")
_REFUSED: Final = "Requests refused for their adaskip arguments, by the argument that was wrong."

Figures = dict[tuple[str, str | None], int]


class ServerCounters:
    """Turns what was counted elsewhere, cumulative, into increments of vLLM's kind of counter.

    Increments, because that is all that counters have in common which several processes write,
    or which hand on to Ray.
    """

    def __init__(
        self, counter: Callable[..., Any], gauge: Callable[..., Any], model_name: str
    ) -> None:
        """Make the counters and gauges.

        Args:
            counter: as ``prometheus_client.Counter``: name, help text, names of labels.
            gauge: as ``prometheus_client.Gauge``.
            model_name: the label that vLLM's own have.

        """
        self._model_name = model_name
        self._counters = {
            name: counter(
                f"vllm:adaskip_{name}", text, ["model_name", "engine", *([label] if label else [])]
            )
            for name, (text, label) in _WORKERS.items()
        }
        self._canary = {
            name: gauge(
                f"vllm:adaskip_canary_{name}",
                text,
                ["model_name", "engine", *([label] if label else [])],
                multiprocess_mode="mostrecent",
            )
            for name, (text, label) in _CANARY.items()
        }
        self._refused = counter("vllm:adaskip_refused_requests", _REFUSED, ["model_name", "reason"])
        self._shown: dict[tuple[str, ...], int] = {}

    def show_report(self, engine: int, report: Mapping[str, Any]) -> None:
        """Show what one worker has counted by now, see `engine.counts.report`.

        Args:
            engine: index of its engine.
            report: of one rank alone, since tensor-parallel ranks count the same rows.

        """
        for (name, value), total in figures(report).items():
            labels = [str(engine), *([value] if value else [])]
            self._raise(self._counters[name], (name, *labels), labels, total)
        self._show_canary(engine, report.get("canary", {"off": False}))

    def _show_canary(self, engine: int, canary: Mapping[str, Any]) -> None:
        """Show `engine.canary.Canary.report`; of nothing read only that plans are on."""
        own = self._model_name, str(engine)
        self._canary["off"].labels(*own).set(int(canary["off"]))
        for name in ("agreement", "surprise"):
            for part, value in zip(_PARTS, canary.get(name, ()), strict=False):
                self._canary[name].labels(*own, part).set(value)

    def show_refused(self, refused: Mapping[str, int]) -> None:
        """Show what this process's front end has refused by now, by `RequestError.reason`."""
        for reason, total in refused.items():
            self._raise(self._refused, ("refused", reason), [reason], total)

    def _raise(self, counter: Any, key: tuple[str, ...], labels: list[str], total: int) -> None:
        """Let a counter grow as its source did; a source that is behind has begun anew."""
        before = self._shown.get(key, 0)
        self._shown[key] = total
        counter.labels(self._model_name, *labels).inc(total - before if total >= before else total)


def figures(report: Mapping[str, Any]) -> Figures:
    """Return what a report comes to, by counter and value of its label."""
    tokens: int = report["decode_tokens"]
    run = {"attention": sum(report["attn_run"]), "mlp": sum(report["mlp_run"])}
    return {
        ("prompt_tokens", None): report["prompt_tokens"],
        ("shortened_prompt_tokens", None): report.get("shortened_tokens", 0),
        ("decode_tokens", None): tokens,
        **{("rows_run", kind): rows for kind, rows in run.items()},
        **{
            ("rows_skipped", kind): tokens * report["num_layers"] - rows
            for kind, rows in run.items()
        },
        **{("requests", plan): entered for plan, entered in report["plans"].items()},
        **{("guarded", verdict): report.get("guard", {}).get(verdict, 0) for verdict in VERDICTS},
        **{
            ("load_level_requests", str(level)): entered
            for level, entered in enumerate(report.get("busy", {}).get("entered", [0]))
        },
        ("canary_answers", None): report.get("canary", {}).get("answers", 0),
        ("failed_decisions", None): report.get("failures", 0),
        ("exits", None): sum(report.get("exits", ())),
    }
