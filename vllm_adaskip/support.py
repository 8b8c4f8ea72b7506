# SPDX-License-Identifier: Apache-2.0
"""What works with what: families, kinds of plans, KV fills, weights and adapters, as one table.

``python -m vllm_adaskip.support`` prints it as it stands in docs/families.md.
"""

from __future__ import annotations

from itertools import product
from typing import get_args

from vllm_adaskip.config import AdaSkipConfig
from vllm_adaskip.model_executors.registry import FAMILIES

#: What a plan's entries name -> how requests write one.
PLAN_KINDS = {"whole layers": "5", "attention": "attn:5", "MLPs": "mlp:5"}
_INT8, _INT4 = "W8A8 int8", "W4A16 int4"
#: Quantised weights that were run under plans, by family. What else vLLM reads in GPTQ and AWQ is
#: unpacked into the kernels of W4A16; experts have no such kernel on an x86 CPU.
QUANTISED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(FAMILIES, (_INT8, _INT4)),
    "LlamaForCausalLM": (_INT8, _INT4, "GPTQ int4", "AWQ int4"),
    "Qwen3MoeForCausalLM": (_INT8,),
}
#: Families whose requests may bring no LoRA adapter, which is refused at start-up.
UNADAPTED = ("Qwen3MoeForCausalLM",)
KV_FILLS: tuple[str, ...] = get_args(AdaSkipConfig.model_fields["kv_fill"].annotation)


def supported() -> list[tuple[str, str, str]]:
    """Return every ``(architecture, plan kind, kv_fill)`` that is served.

    Plan kinds and fills live in the loop that all families share, and a family has to bring
    what they need: so each family in the registry serves all of them.
    """
    return list(product(FAMILIES, PLAN_KINDS, KV_FILLS))


def markdown() -> str:
    """Write the table: a row per family; a column per plan kind, in it the fills, and three more.

    Whatever a family's weights are, its keys and values may be in fp8.
    """
    cells = supported()
    header = ["architecture", *(f"{kind}, `{entry}`" for kind, entry in PLAN_KINDS.items())]
    header += ["quantised weights", "`--kv-cache-dtype`", "adapters of requests"]
    rows = [header, ["---"] * len(header)]
    for family in FAMILIES:
        fills = [
            [fill for one, kind, fill in cells if (one, kind) == (family, k)] for k in PLAN_KINDS
        ]
        weights = ", ".join(QUANTISED[family])
        kinds = [", ".join(f"`{fill}`" for fill in one) for one in fills]
        adapters = "refused" if family in UNADAPTED else "LoRA"
        rows.append([f"`{family}`", *kinds, weights, "`fp8`", adapters])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    print(markdown(), end="")
