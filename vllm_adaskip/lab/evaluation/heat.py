# SPDX-License-Identifier: Apache-2.0
"""Heat maps of a run: plans by task and layer, and what damage to the decoder does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_adaskip.lab.evaluation.results import SweepCell
from vllm_adaskip.lab.evaluation.summary import SettingSummary

#: Share, text and explanation.
Cell = tuple[float, str, str]


@dataclass(frozen=True)
class Heat:
    """A table of shares in [0, 1]; cells are None where nothing was measured.

    Attributes:
        groups: what stands above the columns, and over how many.
        rows: name and cells of each.

    """

    title: str
    groups: list[tuple[str, int]]
    columns: list[str]
    rows: list[tuple[str, list[Cell | None]]]


def _sub_layers(num_layers: int) -> tuple[list[tuple[str, int]], list[str]]:
    layers = [str(layer) for layer in range(num_layers)]
    return [("attention", num_layers), ("MLP", num_layers)], layers * 2


def fixed_plans(settings: Sequence[SettingSummary], num_layers: int) -> Heat:
    """Show, a row each, what settings with one plan for all leave out."""
    rows: list[tuple[str, list[Cell | None]]] = []
    for one in settings:
        assert one.plan is not None
        mask = one.plan.mask()
        flags = [*mask[0::2], *mask[1::2]]
        cells = [(float(flag), "", "left out" if flag else "runs") for flag in flags]
        rows.append((one.name, [*cells]))
    return Heat("One plan for all sequences", *_sub_layers(num_layers), rows)


def varying_plans(one: SettingSummary, num_layers: int) -> Heat:
    """Show how many of each task's sequences, or of their tokens, leave out each sub-layer."""
    rows: list[tuple[str, list[Cell | None]]] = []
    whose = "of tokens" if one.by_token else "of sequences"
    for task, shares in one.plans.items():
        ordered = [*shares[0::2].tolist(), *shares[1::2].tolist()]
        cells = [
            (share, f"{100 * share:.0f}" if share else "", f"{share:.1%} {whose} leave it out")
            for share in ordered
        ]
        rows.append((task, [*cells]))
    return Heat(one.name, *_sub_layers(num_layers), rows)


def sweeps(cells: Iterable[SweepCell]) -> list[Heat]:
    """Return a heat map for each kind of damage: hot where answers change."""
    kinds: dict[tuple[str, int], dict[tuple[tuple[int, ...], str], SweepCell]] = {}
    for cell in cells:
        # The whole model and sets of layers that a greedy search tried are not blocks.
        if not cell.layers or cell.layers[-1] - cell.layers[0] != len(cell.layers) - 1:
            continue
        key = (cell.kind, len(cell.layers))
        kinds.setdefault(key, {})[tuple(cell.layers), cell.task] = cell
    return [_sweep(kind, size, found) for (kind, size), found in sorted(kinds.items())]


def _sweep(kind: str, size: int, found: dict[tuple[tuple[int, ...], str], SweepCell]) -> Heat:
    layers = sorted({key[0] for key in found})
    tasks = dict.fromkeys(key[1] for key in found)
    if kind == "swap":
        title, sign = "Two neighbours swapped", "↔"
    else:
        title, sign = (f"{size} layers deleted", "-") if size > 1 else ("One layer deleted", "")
    columns = [f"{each[0]}{sign}{each[-1]}" if sign else str(each[0]) for each in layers]
    rows = [(task, [_swept(found.get((each, task))) for each in layers]) for task in tasks]
    return Heat(title, [], columns, rows)


def _swept(cell: SweepCell | None) -> Cell | None:
    if cell is None:
        return None
    text = f"{100 * cell.agreement:.0f}"
    return 1 - cell.agreement, text, f"loss {cell.loss:.2f} nats, {cell.tokens} tokens"
