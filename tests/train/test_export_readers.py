"""An exported directory, opened by others: batches, pipelines, transformers 4, tools that read its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from train_tiny import tiny

from apollo_optim.train.pretrain import pretrain


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readers")
    pretrain(tiny(folder, train={"steps": 1}))
    return folder / "run" / "model"


def test_what_its_files_say(model):
    words = json.loads((model / "tokenizer_config.json").read_text())
    config = json.loads((model / "config.json").read_text())
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast", "which transformers 4 knows, and 5 reads"
    assert words["model_input_names"] == ["input_ids", "attention_mask"], "a Llama of transformers 4 takes no other"
    assert words["pad_token"] == words["eos_token"]
    assert words["model_max_length"] == config["max_position_embeddings"]
    assert isinstance(words.get("extra_special_tokens", {}), dict)
    how = json.loads((model / "generation_config.json").read_text())
    assert how["pad_token_id"] == how["eos_token_id"] == config["eos_token_id"]


def test_prompts_of_two_lengths_go_together(model):
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    tokenizer, net = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    net.generation_config.eos_token_id = None  # so that all go on
    both = net.generate(
        **tokenizer(["line 1 of", "a"], padding=True, return_tensors="pt"), max_new_tokens=4, do_sample=False
    )
    alone = net.generate(**tokenizer(["a"], return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert both[1, -4:].tolist() == alone[0, -4:].tolist(), "padded on the left"
    said = pipeline("text-generation", model=net, tokenizer=tokenizer)(["a", "line"], max_new_tokens=2, batch_size=2)
    assert len(said) == 2


def test_a_tokenizer_that_says_these_things_keeps_its_word(tmp_path):
    """A base's own pad token, side, class, length and special tokens."""
    from chat_tiny import make_base
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from apollo_optim.train.checkpoint.export import write_model

    base = make_base(tmp_path / "base")
    tokenizer, net = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<tool>"]})
    tokenizer.model_max_length = 77
    write_model(net, tokenizer, tmp_path / "out")
    words = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (words["pad_token"], words.get("padding_side"), words["model_max_length"]) == ("<pad>", None, 77)
    assert words["additional_special_tokens"] == ["<tool>"]
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert {"<tool>", "<pad>"} <= set(again.all_special_tokens)
    assert again.chat_template == tokenizer.chat_template
    assert (
        json.loads((tmp_path / "out" / "generation_config.json").read_text())["pad_token_id"] == tokenizer.pad_token_id
    )
