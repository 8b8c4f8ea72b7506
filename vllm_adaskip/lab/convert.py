# SPDX-License-Identifier: Apache-2.0
"""``python -m vllm_adaskip.lab.convert FILE.gguf FOLDER``: a checkpoint that vLLM loads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def convert(source: Path, out: Path) -> None:
    """Write the weights of a GGUF file as bfloat16 safetensors, with config and tokenizer.

    transformers widens them when it loads the file, but refuses to save such a model, so they
    move into a fresh one. Where the file keeps a better copy of a tied output matrix, both get it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
    facts = loaded.config.to_dict()
    facts.pop("quantization_config", None)
    weights = loaded.state_dict()
    embedding, head = weights["model.embed_tokens.weight"], weights.get("lm_head.weight")
    if head is not None and (embedding - head).norm() < 0.1 * head.norm():
        weights["model.embed_tokens.weight"] = head
        facts["tie_word_embeddings"] = True
    model = type(loaded)(type(loaded.config)(**facts))
    model.load_state_dict(weights)
    model.tie_weights()
    model = model.to(torch.bfloat16)
    model.config.architectures = [type(loaded).__name__]
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    if isinstance(stop, int):
        model.generation_config.eos_token_id = [stop]
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:
        print(" ".join(str(error).split()) or type(error).__name__)
        sys.exit(1)
