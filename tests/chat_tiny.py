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


def make_tuned(folder: Path, pairs: list[tuple[str, str]]) -> Path:
    """The same, after it has learnt these questions and answers by heart."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_base(folder)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    texts = [[*tokenizer(asked + answer)["input_ids"], tokenizer.eos_token_id] for asked, answer in pairs]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    labels = torch.tensor([text + [-100] * (longest - len(text)) for text in texts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(150):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    return folder
