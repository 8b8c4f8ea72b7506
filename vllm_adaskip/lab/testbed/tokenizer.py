# SPDX-License-Identifier: Apache-2.0
"""One token per word, digit and punctuation mark."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vllm_adaskip.lab.testbed import words

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"

# The user's words are the prompt; the closing "answer :" is added where it is missing.
CHAT_TEMPLATE = (
    "{%- set text = messages[-1]['content'] | trim -%}"
    "{{- text -}}"
    "{%- if add_generation_prompt and not text.endswith('answer :') %} answer :{% endif -%}"
)


def build() -> PreTrainedTokenizerFast:
    """Make the tokenizer from the word lists alone."""
    vocabulary = [PAD, EOS, UNK, *words.vocabulary()]
    ids = {word: index for index, word in enumerate(vocabulary)}
    core = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    core.normalizer = normalizers.Lowercase()
    # No start token is added, so chat and plain completions see the same tokens.
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
