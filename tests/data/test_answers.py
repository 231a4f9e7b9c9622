"""Questions and answers: every shape against a hand-worked row, what is refused, and how rows are shared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from apollo_optim.core.errors import InputError
from apollo_optim.data import DataConfig, open_data
from apollo_optim.data.answers import Answers, Sample, packed
from apollo_optim.data.chat import ChatReading
from apollo_optim.data.corpus import Text
from apollo_optim.data.files import local_documents
from apollo_optim.data.readers import Reading

ROLES, PLAIN = ["<system>", "<user>", "<assistant>"], ["be", "kind", "hi", "ho", "how", "are", "you", "fine", "?"]
WORDS = ["</s>", *ROLES, *PLAIN, "<unk>"]
END, SYSTEM, USER, ASSISTANT, BE, KIND, HI, HO, HOW, ARE, YOU, FINE, ASK, UNK = range(len(WORDS))
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<' + m.role + '> ' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + ' </s>' }}{% endgeneration %}{{ ' ' }}{% else %}{{ m.content + ' </s> ' }}{% endif %}{% endfor %}"
)
NO = -100


@pytest.fixture(scope="module")
def words() -> Any:
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def tokenizer(words: Any) -> Any:
    words.chat_template = TEMPLATE
    return words


def data_of(folder: Path, rows: list[Any], tokenizer: Any, **keys: Any) -> Any:
    for name in ("rows.jsonl", "held.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"format": "auto", "seq_len": 16, "on_bad_line": "error", **keys}
    source = {"source": str(folder / "rows.jsonl"), "validation_source": str(folder / "held.jsonl")}
    return open_data(DataConfig(**source, cache_dir=str(folder), **keys), tokenizer)


def only_row(data: Any) -> tuple[list[int], list[int]]:
    batch = data.train.next(1)
    return batch.input_ids[0].tolist(), batch.labels[0].tolist()


HI_HO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
# What stands behind the tokens of a row of 16 is padding: end-of-text, not learnt.
CHAT = ([USER, HI, END, ASSISTANT, HO, END], [NO, NO, NO, NO, HO, END])
TWO = [
    {"role": "system", "content": "be kind"},
    *HI_HO,
    {"role": "user", "content": "how are you ?"},
    {"role": "assistant", "content": "fine"},
]
TWO_ROW = (
    [SYSTEM, BE, KIND, END, USER, HI, END, ASSISTANT, HO, END, USER, HOW, ARE, YOU, ASK, END],
    [NO, NO, NO, NO, NO, NO, NO, NO, HO, END, NO, NO, NO, NO, NO, NO],  # the second answer is cut off
)


def sharegpt(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in messages]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": HI_HO}, CHAT),
        ({"messages": TWO}, TWO_ROW),
        ({"conversations": sharegpt(HI_HO)}, CHAT),
        ({"conversations": sharegpt(TWO[1:]), "system": "be kind"}, TWO_ROW),
        ({"instruction": "hi", "output": "ho"}, CHAT),
        (
            {"instruction": "how are", "input": "you ?", "output": "fine", "system": None},
            ([USER, HOW, ARE, YOU, ASK, END, ASSISTANT, FINE, END], [NO] * 7 + [FINE, END]),
        ),
        ({"prompt": "hi", "completion": "ho ho"}, ([HI, HO, HO, END], [NO, HO, HO, END])),
        # something has to tell the first token of an answer
        ({"prompt": "", "completion": "ho ho"}, ([END, HO, HO, END], [NO, HO, HO, END])),
        ({"prompt": HI_HO[:1], "completion": HI_HO[1:]}, CHAT),
        # of a prompt that holds an answer, only the completion is learnt
        (
            {"prompt": [*HI_HO, *HI_HO[:1]], "completion": HI_HO[1:]},
            (CHAT[0] * 2, [NO] * 6 + CHAT[1]),
        ),
    ],
)
@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
@pytest.mark.parametrize("mode", ["pack", "pad"])
def test_every_shape_by_hand(tmp_path, tokenizer, row, expected, template, mode):
    tokenizer.chat_template = template
    ids, labels = only_row(data_of(tmp_path, [row], tokenizer, mode=mode))
    padding = 16 - len(expected[0])
    assert ids == expected[0] + [END] * padding
    assert labels == expected[1] + [NO] * padding


def test_a_packed_row_by_hand(tmp_path, tokenizer):
    rows = [{"prompt": "hi", "completion": "ho ho"}, {"messages": HI_HO}, {"prompt": "be", "completion": "kind"}]
    batch = data_of(tmp_path, rows, tokenizer).train.next(1)
    # the longest first; what is left over is a text of its own, of which nothing is learnt
    assert batch.input_ids[0].tolist() == [*CHAT[0], HI, HO, HO, END, BE, KIND, END, END, END, END]
    assert batch.labels[0].tolist() == [*CHAT[1], NO, HO, HO, END, NO, KIND, END, NO, NO, NO]
    assert batch.position_ids[0].tolist() == [*range(6), *range(4), *range(3), *range(3)]


def test_columns_have_other_names_and_a_parquet_is_read(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"question": ["hi", "hi"], "answer": ["ho ho", "ho ho"], "id": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    data = DataConfig(
        source=str(tmp_path / "rows.parquet"),
        validation_source=str(tmp_path / "rows.parquet"),
        format="prompt",
        columns={"prompt": "question", "completion": "answer"},
        seq_len=4,
        cache_dir=str(tmp_path),
    )
    assert only_row(open_data(data, tokenizer)) == ([HI, HO, HO, END], [NO, HO, HO, END])
    data.columns = {"prompt": "question", "completoin": "answer"}
    with pytest.raises(InputError, match=r"data\.columns: no shape has a 'completoin' \(did you mean completion\?\)"):
        open_data(data, tokenizer)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "hi"}, r"rows\.jsonl:1: no messages or prompt \+ completion or .*; the keys are question; set"),
        ({"prompt": "hi", "completion": 3}, r"rows\.jsonl:1: 'completion' is int, not a string"),
        ({"prompt": "hi", "completion": " "}, r"rows\.jsonl:1: 'completion' is empty"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": "hi"}, "'messages' is str, not a list"),
        ({"messages": [*HI_HO, HI_HO[1]]}, r"messages\[2\]: roles out of order, 'assistant' after 'assistant'"),
        ({"messages": HI_HO[::-1]}, r"messages\[0\]: roles out of order, 'assistant' at the beginning"),
        ({"messages": [*HI_HO, TWO[0]]}, r"messages\[2\]: roles out of order, 'system' after 'assistant'"),
        ({"messages": HI_HO[:1]}, "'messages' holds no answer"),
        ({"messages": [{"role": "king", "content": "hi"}]}, r"messages\[0\]: the role 'king' is none of system"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: no 'content'"),
        ({"conversations": [{"from": "human", "value": None}]}, r"conversations\[0\]: 'value' is null"),
        ([1], "a JSON object is expected, not list"),
    ],
)
def test_what_is_refused_names_line_and_key(tmp_path, tokenizer, row, said):
    with pytest.raises(InputError, match=said):
        data_of(tmp_path, [row], tokenizer)


def test_what_is_skipped_is_counted(tmp_path, tokenizer, caplog):
    rows = [{"prompt": "hi", "completion": "ho"}, {"messages": HI_HO[:1]}]
    data = data_of(tmp_path, rows, tokenizer, on_bad_line="skip")
    assert data.train.skipped == 2  # of the training and of the validation file
    assert "rows.jsonl:2: 'messages' holds no answer" in caplog.text


def test_a_dataset_has_splits():
    with pytest.raises(InputError, match=r"data\.validation_source: some/set is a dataset; name its split"):
        open_data(DataConfig(source="hf:some/set", validation_source="held.jsonl", format="auto"))


def test_an_empty_file(tmp_path, tokenizer):
    with pytest.raises(InputError, match=r"rows\.jsonl: holds no text"):
        data_of(tmp_path, [], tokenizer)


def test_a_chat_needs_a_template_and_alpaca_can_do_without(tmp_path, tokenizer):
    tokenizer.chat_template = None
    said = r"rows\.jsonl:1: messages need a chat template, and this tokenizer has none: set data\.chat_template"
    with pytest.raises(InputError, match=said):
        only_row(data_of(tmp_path, [{"messages": HI_HO}], tokenizer))
    row = {"instruction": "hi", "input": "", "output": "ho"}
    ids, labels = only_row(data_of(tmp_path, [row], tokenizer, seq_len=64))
    assert labels[ids.index(HO) :][:2] == [HO, END]
    assert [label for label in labels if label != NO] == [HO, END]
    assert HI in ids


def test_prefixes_that_do_not_agree_are_refused(tmp_path, tokenizer):
    tokenizer.chat_template = "{% if messages | length > 3 %}be {% endif %}" + TEMPLATE
    with pytest.raises(InputError, match=r"rows\.jsonl:1: where answer messages\[1\] begins and ends can't be found"):
        only_row(data_of(tmp_path, [{"messages": [*HI_HO, *HI_HO]}], tokenizer))


def test_a_template_that_complains_is_quoted(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system messages here') }}"
    with pytest.raises(InputError, match=r"rows\.jsonl:1: the chat template refuses .*: no system messages here"):
        only_row(data_of(tmp_path, [{"messages": HI_HO}], tokenizer))


def test_what_a_template_writes_before_an_answer_is_said_if_it_is_learnt(tmp_path, tokenizer, caplog):
    header = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    asks = header + "{% if add_generation_prompt %}assistant: {% endif %}"
    for template, warned in ((asks, False), (header, True), (TEMPLATE, False)):
        caplog.clear()
        tokenizer.chat_template = template
        data_of(tmp_path, [{"prompt": "hi", "completion": "ho"}], tokenizer)
        assert ("does not heed add_generation_prompt: 'assistant: '" in caplog.text) == warned


def test_a_template_that_is_none_is_named(tmp_path, tokenizer):
    tokenizer.chat_template = "\n{{ messages"
    with pytest.raises(InputError, match="the tokenizer's chat template, line 2: unexpected end of template"):
        data_of(tmp_path, [{"prompt": "hi", "completion": "ho"}], tokenizer)


def test_cut_and_lost_answers_are_counted(tokenizer):
    layout = Answers(tokenizer, 4, pack=False)
    examples = [("hi", "ho"), ("hi", "ho ho ho"), ("how are you ?", "fine")]
    rows = layout.rows([Text(json.dumps({"at": ":1", "plain": pair})) for pair in examples])
    assert [len(row) for row in rows] == [3, 4]
    assert (layout.samples, layout.cut, layout.unanswered) == (3, 1, 1)


def test_answers_that_teach_no_end_are_counted(tmp_path, tokenizer):
    """A template that ends an answer with nothing, or with another token than the tokenizer's."""
    endings = []
    for ending in ("", " ho", "{{ eos_token }}", "{{ eos_token }}\n"):
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}" + ending + " {% endfor %}"
        layout = Answers(tokenizer, 16, pack=False)
        layout.rows([Text(json.dumps({"at": ":1", "messages": HI_HO}))])
        endings.append(layout.endless)
    assert endings == [1, 1, 0, 0]


@pytest.mark.parametrize("name", ["rows.txt", "rows.md", "rows.py"])
def test_a_text_is_refused(tmp_path, tokenizer, name):
    (tmp_path / name).write_text('{"prompt": "hi", "completion": "ho"}\n')
    for source, said in ((str(tmp_path / name), "a text, and questions"), ("python", "that is text")):
        with pytest.raises(InputError, match=f"{said}.* jsonl"):
            open_data(DataConfig(source=source, format="auto", cache_dir=str(tmp_path)), tokenizer)


def test_one_row_is_too_little_for_two_splits(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "hi", "completion": "ho"}\n')
    with pytest.raises(InputError, match=r"too little for training and validation.*data\.validation_source"):
        open_data(DataConfig(source=str(tmp_path / "rows.jsonl"), format="auto", cache_dir=str(tmp_path)), tokenizer)


def test_packing_wastes_little_and_loses_nothing():
    lengths = [n % 37 + 3 for n in range(0, 5000, 7)]
    samples = [Sample(torch.arange(n).int().numpy().tolist(), bytearray(n)) for n in lengths]  # type: ignore[arg-type]
    rows = packed(samples, 40)
    assert max(map(len, rows)) <= 40
    assert sorted(len(sample.ids) for row in rows for sample in row.samples) == sorted(lengths)
    assert len(rows) <= sum(lengths) / 40 * 1.03


def test_a_position_is_exact_to_the_row_and_belongs_to_a_template(tmp_path, tokenizer):
    rows = [{"prompt": "hi " * (n % 5 + 1), "completion": "ho " * (n % 3 + 1)} for n in range(40)]
    data = data_of(tmp_path, rows, tokenizer)
    data.train.next(5)
    position = json.loads(json.dumps(data.train.state_dict()))
    then = data.train.next(9)
    again = data_of(tmp_path, rows, tokenizer)
    again.train.load_state_dict(position)
    assert all(torch.equal(a, b) for a, b in zip(again.train.next(9), then, strict=True))
    tokenizer.chat_template = MARKED
    with pytest.raises(InputError, match="template was"):
        data_of(tmp_path, rows, tokenizer).train.load_state_dict(position)


ROWS = [{"prompt": "name, please:", "completion": f' "n{n}"'} for n in range(6)]


def as_csv(rows: list[dict[str, str]]) -> str:
    import csv
    import io

    out = io.StringIO()
    writer = csv.DictWriter(out, ["prompt", "completion"])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.json", json.dumps(ROWS, indent=1)),
        ("rows.json", "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("rows.csv", as_csv(ROWS)),
        ("rows.csv", "\ufeff" + as_csv(ROWS)),
    ],
    ids=["array", "lines called json", "csv", "csv of a spreadsheet"],
)
def test_arrays_and_csv_hold_the_rows_of_jsonl(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    mine, same = (
        [json.loads(document.text)["plain"] for document in local_documents(str(tmp_path / file), ChatReading())]
        for file in (name, "same.jsonl")
    )
    assert mine == same == [[row["prompt"], row["completion"]] for row in ROWS]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", "[1, 2]", r"a.json: row 1: a JSON object is expected, not int"),
        ("a.json", "[{]", r"a.json.*not JSON"),
        ("a.json", '[{"x": 1}]', r"a.json: row 1: no messages or prompt.*the keys are x"),
        ("a.csv", "prompt,completion\na,b,c\n", r"a.csv: row 1: 1 fields more than there are names"),
        ("a.csv", "prompt,completion\na\n", r"a.csv: row 1: 'completion' is null"),
        ("a.csv", 'prompt,completion\n"a,b\n', r"a.csv: not a readable csv file"),
    ],
)
def test_what_is_wrong_in_them_names_the_row(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said):
        list(local_documents(str(tmp_path / name), ChatReading(on_bad_line="error")))


def test_among_texts_they_are_something_else(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "package.json").write_text("{}")
    (tmp_path / "b.csv").write_text("1,2")
    reading = Reading()
    assert [document.text for document in local_documents(str(tmp_path), reading)] == [b"text"]
    assert sum(reading.left_out.values()) == 2
