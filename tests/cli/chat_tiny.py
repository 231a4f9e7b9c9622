"""A tiny model whose tokenizer has a chat template."""

from pathlib import Path

import torch

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content + '</' + m.role[0] + '>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)
SYSTEM_REFUSED = "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"


def make_base(folder: Path, template: str | None = TEMPLATE) -> Path:
    """A Llama of one layer and a tokenizer of bytes, saved."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<|end|>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=257, bos_token_id=None, eos_token_id=0, max_position_embeddings=256, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
