"""`apollo-optim chat`, and `sample` with a question: the words, and what the model sees."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from chat_tiny import SYSTEM_REFUSED, TEMPLATE, make_base

from apollo_optim.cli import chat, sample
from apollo_optim.cli.main import main


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def seen(monkeypatch) -> list[str]:
    """The prompts that the model is given; it answers each with its number."""
    prompts: list[str] = []

    def generate(model, tokenizer, prompt, **how):
        prompts.append(prompt)
        yield f" answer {len(prompts)}"

    monkeypatch.setattr(chat, "generate", generate)
    return prompts


def talk(monkeypatch, lines: str, *words: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return main(["chat", *words])


def test_a_question_is_put_by_the_template(base, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = [
        "sample",
        str(base),
        "--question",
        "say 5",
        "--system",
        "Be short.",
        "--temperature",
        "0",
        "--max-tokens",
        "6",
    ]
    assert main(words) == 0
    ours = capsys.readouterr().out.removesuffix("\n")
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "say 5"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    said = model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(said[0, ids.shape[1] :]).startswith(ours.rstrip("�"))
    assert "say 5" not in ours


def test_a_text_ends_with_any_of_the_models_end_tokens(base):
    """Llama 3 ends a turn with another token than a document."""
    model, tokenizer = sample.load(base)
    how = {"max_tokens": 8, "temperature": 0, "seed": 0}
    whole = "".join(sample.generate(model, tokenizer, "say", **how))
    ids = torch.tensor([tokenizer("say")["input_ids"]])
    third = int(model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=3, do_sample=False)[0, -1])
    model.generation_config.eos_token_id = [250, third]
    short = "".join(sample.generate(model, tokenizer, "say", **how))
    assert whole.startswith(short)
    assert len(short) < len(whole)


def test_a_conversation_sees_what_was_said(base, seen, monkeypatch, capsys):
    assert talk(monkeypatch, "one\n\n two \n/new\nthree\n", str(base), "--system", "Be short.") == 0
    first = "<s>Be short.</s><u>one</u><a>"
    assert seen == [first, f"{first}answer 1</a><u>two</u><a>", "<s>Be short.</s><u>three</u><a>"]
    assert capsys.readouterr().out.count("answer") == 3


def test_the_oldest_turns_leave_a_full_context(base, seen, monkeypatch, capsys):
    monkeypatch.setattr(chat, "opened", with_context(40))
    assert talk(monkeypatch, "a b c\nd e f\n", str(base), "--system", "S") == 0
    assert seen == ["<s>S</s><u>a b c</u><a>", "<s>S</s><u>d e f</u><a>"]
    assert "no longer sees the oldest question" in capsys.readouterr().err
    assert talk(monkeypatch, "a " * 40, str(base)) == 2
    assert "the model's context only 40: ask a shorter one" in capsys.readouterr().err


def with_context(size: int):
    import contextlib

    real = sample.opened

    @contextlib.contextmanager
    def opened(args):
        with real(args) as (directory, model, tokenizer):
            model.config.max_position_embeddings = size
            yield directory, model, tokenizer

    return opened


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("chat nowhere", "nowhere: there is no such directory"),
        ("chat DIR --max-tokens 0", "--max-tokens 0: at least 1"),
        ("chat DIR --prompt x", "unknown argument --prompt"),
        ("chat BARE", "its tokenizer has no chat template"),
        ("sample BARE --question x", "its tokenizer has no chat template"),
        ("sample BASE --question x --prompt y", "--question and --prompt"),
        ("sample BASE --system y", "--system: it goes with a --question"),
        ("chat STRICT --system y", "the chat template refuses this conversation: no system, please"),
    ],
)
def test_wrong_words_are_one_line(base, tmp_path, capsys, words, said):
    names = {"BASE": base}
    if "BARE" in words:
        names["BARE"] = make_base(tmp_path / "bare", template=None)
    if "STRICT" in words:
        names["STRICT"] = make_base(tmp_path / "strict", template=SYSTEM_REFUSED + TEMPLATE)
    assert main([str(names.get(word, word)) for word in words.split()]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_directory_that_lacks_weights_is_refused(base, tmp_path, capsys):
    """Else they would be drawn anew, and what the model says means nothing: low-bit codes, another library's."""
    from safetensors.torch import load_file, save_file

    folder = make_base(tmp_path / "lacks")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(["sample", str(folder), "--max-tokens", "2"]) == 2
    assert "it lacks model.layers.0.mlp.up_proj.weight" in capsys.readouterr().err
