# SPDX-License-Identifier: Apache-2.0
"""What a plan means, as a plain float32 transformers loop at batch size one.

The prompt runs at full depth. Each generated token then runs exactly the sub-layers that
its plan keeps; a skipped attention sub-layer writes no key and no value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from vllm_adaskip import SkipPlan


class Reference:
    """A float32 transformers model and its plan-following greedy loop."""

    def __init__(self, path: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.num_layers: int = self.model.config.num_hidden_layers

    @torch.inference_mode()
    def generate(
        self, prompt: Sequence[int], skip: Sequence[int | str], max_tokens: int
    ) -> tuple[list[int], float]:
        """Give greedy tokens, and the smallest gap between the two best logits on the way.

        A gap near float32 rounding means that another order of summation may rightly
        choose another token; callers check it.
        """
        plan = SkipPlan.parse(skip, self.num_layers)
        cache = DynamicCache(config=self.model.config)
        logits = self.model(torch.tensor([prompt]), past_key_values=cache).logits[0, -1]
        tokens, gap = [], float("inf")
        while True:
            best = logits.topk(2).values
            gap = min(gap, (best[0] - best[1]).item())
            tokens.append(int(logits.argmax()))
            if len(tokens) == max_tokens:
                return tokens, gap
            logits = self._step(tokens[-1], len(prompt) + len(tokens) - 1, plan, cache)

    def _step(self, token: int, position: int, plan: SkipPlan, cache: DynamicCache) -> torch.Tensor:
        decoder = self.model.model
        hidden = decoder.embed_tokens(torch.tensor([[token]]))
        rotary = decoder.rotary_emb(hidden, torch.tensor([[position]]))
        for index, layer in enumerate(decoder.layers):
            if not plan.attention >> index & 1:
                update, _ = layer.self_attn(
                    layer.input_layernorm(hidden),
                    position_embeddings=rotary,
                    attention_mask=None,  # one query token sees all that its layer has cached
                    past_key_values=cache,
                )
                hidden = hidden + update
            if not plan.mlp >> index & 1:
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(decoder.norm(hidden))[0, -1]
