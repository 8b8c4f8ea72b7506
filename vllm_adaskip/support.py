# SPDX-License-Identifier: Apache-2.0
"""What works with what: families, kinds of plans, KV fills, weights and adapters, as one table.

``python -m vllm_adaskip.support`` prints it as it stands in the README.
"""

from __future__ import annotations

from itertools import product
from typing import get_args

from vllm_adaskip.config import AdaSkipConfig
from vllm_adaskip.model_executors.registry import FAMILIES

#: What a plan's entries name -> how requests write one.
PLAN_KINDS = {"whole layers": "5", "attention": "attn:5", "MLPs": "mlp:5"}
#: Quantised weights that were run under plans, by family; others of the list load, untried.
QUANTISED = {"LlamaForCausalLM": ("W8A8 int8", "W4A16 int4", "GPTQ int4", "AWQ int4")}
#: Families whose requests may bring no LoRA adapter, which is refused at start-up.
UNADAPTED = ("Qwen3MoeForCausalLM",)
KV_FILLS: tuple[str, ...] = get_args(AdaSkipConfig.model_fields["kv_fill"].annotation)


def supported() -> list[tuple[str, str, str]]:
    """Give every ``(architecture, plan kind, kv_fill)`` that is served.

    Plan kinds and fills live in the loop that all families share, and a family has to bring
    what they need: so each family in the registry serves all of them.
    """
    return list(product(FAMILIES, PLAN_KINDS, KV_FILLS))


def markdown() -> str:
    """Write the table: a row per family; a column per plan kind, in it the fills, and two more."""
    cells = supported()
    header = ["architecture", *(f"{kind}, `{entry}`" for kind, entry in PLAN_KINDS.items())]
    header += ["quantised weights", "adapters of requests"]
    rows = [header, ["---"] * len(header)]
    for family in FAMILIES:
        fills = [
            [fill for one, kind, fill in cells if (one, kind) == (family, k)] for k in PLAN_KINDS
        ]
        weights = ", ".join(QUANTISED.get(family, ("not tried",)))
        kinds = [", ".join(f"`{fill}`" for fill in one) for one in fills]
        adapters = "refused" if family in UNADAPTED else "LoRA"
        rows.append([f"`{family}`", *kinds, weights, adapters])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    print(markdown(), end="")
