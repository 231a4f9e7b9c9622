"""The data room: every token once, in a position that can be saved; and one clear line for everything that is wrong."""

import gzip
import json
import logging
import math
import os
import random
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apollo_optim.core.errors import InputError
from apollo_optim.data import IGNORED, Batch, Batches, Data, DataConfig, check_vocabulary, open_data
from apollo_optim.data.corpus import CorpusDocuments, open_corpus, pieces
from apollo_optim.data.files import local_documents
from apollo_optim.data.layout import Pack
from apollo_optim.data.readers import SECTION, Reading
from apollo_optim.data.stream import open_builder
from apollo_optim.data.tokenizer import END, encode, load_tokenizer, token_bytes, trained_bpe

WORDS = ["def", "return", "self", "if", "else", "for", "in", "None", "True", "print", "class", "import", "the", "of"]


def story(seed: int, words: int = 60) -> str:
    pick = random.Random(seed)
    return f"# story {seed}\n" + " ".join(pick.choice(WORDS) for _ in range(pick.randrange(2, words))) + "\n"


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stories")
    for number in range(60):
        (folder / f"{number:02}.txt").write_text(story(number))
    return folder


@pytest.fixture
def small(cache: str) -> Callable[..., DataConfig]:
    def config(source: object, **changes: Any) -> DataConfig:
        texts = {"source": str(source), "cache_dir": cache, "vocab_size": 300, "seq_len": 16, "validation_percent": 20}
        return DataConfig(**{**texts, **changes})

    return config


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset as on the hub, with two files a split, in a local directory."""
    folder = tmp_path_factory.mktemp("dataset")
    for split, first in (("train", 0), ("validation", 500)):
        for shard in range(2):
            lines = [json.dumps({"text": story(first + 100 * shard + n), "id": n}) for n in range(40)]
            (folder / f"{split}-{shard}.jsonl").write_text("\n".join(lines) + "\n")
    return "hf:" + str(folder)


def ids(batches: Batches, *counts: int) -> list[list[int]]:
    return [row for count in counts for row in batches.next(count).input_ids.tolist()]


def encoded(data: Data, texts: list[str]) -> list[list[int]]:
    return [[*row, data.tokenizer.eos_token_id] for row in encode(data.tokenizer, texts)]


# ---- the built-in corpora


@pytest.fixture(scope="session")
def python(cache: str) -> Data:
    return open_data(DataConfig(cache_dir=cache))


def test_python_corpus(python: Data, cache: str) -> None:
    identity = python.identity
    assert identity["name"] == "python"
    assert identity["python"] == ".".join(map(str, sys.version_info[:3]))
    assert identity["bytes"] > 5e6
    assert identity["documents"] > 300
    assert len(identity["sha256"]) == len(identity["tokenizer"]["sha256"]) == 64
    assert json.loads(json.dumps(identity)) == identity
    assert len(python.tokenizer) == identity["tokenizer"]["entries"] == 4096
    batch = python.train.next(2)
    assert batch.input_ids.shape == batch.labels.shape == (2, 256)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    again = open_data(DataConfig(cache_dir=cache))
    assert again.identity == identity
    assert torch.equal(again.train.next(2).input_ids, batch.input_ids)
    assert 2 < python.bytes_per_token(python.validation(10_000)) < 6


def test_python_corpus_holds_no_tests_and_no_copies() -> None:
    documents = list(local_documents("python", Reading()))
    parts = {part for key, _ in documents for part in key.split("/")}
    assert not parts & {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "__pycache__"}
    assert [key for key, _ in documents] == sorted(key for key, _ in documents)
    assert "os.py" in parts


def test_packages_are_found_without_importing_them() -> None:
    code = """
import sys
from apollo_optim.data.files import local_documents, versions
from apollo_optim.data.readers import Reading
keys = [key for key, _ in local_documents("packages", Reading())]
assert "torch/nn/functional.py" in keys and "transformers/trainer.py" in keys and "torch/version.py" not in keys
assert sorted(versions("packages")) == ["torch", "transformers"] and "+" not in str(versions("packages"))
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="torch is not installed"):
        list(local_documents("packages", Reading()))


def test_copies_in_a_library_count_once_and_hashes_name_the_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "lib"
    (library / "tests").mkdir(parents=True)
    for number in range(30):
        (library / f"m{number}.py").write_text(f"x = {number % 15}\n")
    (library / "tests" / "t.py").write_text("no")
    (library / "latin.py").write_bytes(b"# caf\xe9\n")
    (library / "__init__.py").write_text("")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    first = open_corpus(["python"], Reading(), 20, tmp_path)
    assert (first.documents, first.identity["skipped_lines"]) == (15, 1)
    (library / "m0.py").write_text("x = 99\n")
    second = open_corpus(["python"], Reading(), 20, tmp_path)
    assert first.identity["sha256"] != second.identity["sha256"]
    # What was read at the start is what is served, whatever happens to the files.
    assert "x = 0\n" in set(first.whole(range(len(first.ends)), ""))
    assert sorted(os.listdir(tmp_path)) == ["lib"]


def test_the_split_follows_the_path_alone(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / f"{number}.txt").write_text(story(number))
    corpus = open_corpus([str(tmp_path)], Reading(), 20, tmp_path)
    held = set(corpus.whole(corpus.validation, ""))
    assert 20 < len(held) < 60
    for number in range(100):
        (tmp_path / f"{number}.txt").unlink()
    rest = open_corpus([str(tmp_path)], Reading(), 20, tmp_path)
    assert set(rest.whole(rest.validation, "")) <= held
    assert not set(rest.whole(rest.train, "")) & held


# ---- rows


def test_packing_uses_every_row_once_and_shuffles_every_epoch(stories: Path, small: Callable[..., DataConfig]) -> None:
    data = open_data(small(stories))
    orders = []
    for epoch in range(2):
        documents = CorpusDocuments(*_corpus(data), seed="0")
        documents.load_state_dict({"epoch": epoch, "position": 0})
        texts = documents.read()
        tokens = zip(encode(data.tokenizer, [text.text for text in texts]), texts, strict=True)
        end = [data.tokenizer.eos_token_id]
        flat = [token for row, text in tokens for token in (row + end if text.ends else row)]
        rows = [flat[i : i + 16] for i in range(0, len(flat) - 15, 16)]
        got = ids(data.train, *[1] * len(rows))
        assert Counter(map(tuple, got)) == Counter(map(tuple, rows))
        assert got != rows, "neighbours in a document are not neighbours in a batch"
        orders.append(got)
    assert orders[0] != orders[1]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "é", "€", "\n", "line\n"]), min_size=1), st.integers(4, 12))
def test_pieces_are_documents_cut_at_line_ends(parts: list[str], longest: int) -> None:
    text = "".join(parts).encode()
    start = 0
    for size in pieces(text, longest):
        piece = text[start : start + size]
        assert 0 < size <= longest
        piece.decode()  # never cut in a character
        assert piece.endswith(b"\n") or start + size == len(text) or b"\n" not in text[start : start + longest]
        start += size
    assert start == len(text)


def test_a_long_document_is_spread_over_the_epoch(small: Callable[..., DataConfig], tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.py").write_text("".join(f"a = {number}\n" for _ in range(20)))
    (tmp_path / "book.py").write_text("".join(f"line = {number}\n" for number in range(2000)))
    data = open_data(small(tmp_path, validation_percent=20))
    corpus, indices = _corpus(data)
    assert corpus.documents == 31
    whole = set(corpus.whole(indices, ""))
    assert any(len(text) > 10_000 for text in whole), "the long one is in training text, and in one piece again"
    texts = data.train.documents.read()
    assert sum(text.ends for text in texts) == len(whole)
    long = [number for number, text in enumerate(texts) if "line" in text.text]
    assert long[-1] - long[0] > len(long), "other documents stand between its pieces"


def _corpus(data: Data) -> tuple[Any, Any]:
    documents = data.train.documents
    assert isinstance(documents, CorpusDocuments)
    return documents.corpus, documents.indices


def _documents(data: Data) -> list[torch.Tensor]:
    documents = data.train.documents
    assert isinstance(documents, CorpusDocuments)
    return [torch.tensor(row) for row in encoded(data, list(documents.corpus.whole(documents.indices, "")))]


def test_packed_labels_are_the_tokens(stories: Path, small: Callable[..., DataConfig]) -> None:
    batch = open_data(small(stories)).train.next(5)
    assert torch.equal(batch.input_ids, batch.labels)
    assert batch.input_ids.data_ptr() != batch.labels.data_ptr()


def test_pad_mode_is_one_document_a_row(stories: Path, small: Callable[..., DataConfig]) -> None:
    data = open_data(small(stories, mode="pad", seq_len=40))
    end = data.tokenizer.eos_token_id
    documents = [row.tolist() for row in _documents(data)]
    expected = Counter(tuple(row if len(row) <= 40 else [*row[:39], end]) for row in documents)
    assert {len(row) < 40 for row in expected} == {True, False}
    batch = data.train.next(len(documents))
    seen = Counter(tuple(token for token in row if token != IGNORED) for row in batch.labels.tolist())
    assert seen == expected
    padded = batch.labels == IGNORED
    assert bool((batch.input_ids[padded] == end).all())
    assert torch.equal(batch.input_ids[~padded], batch.labels[~padded])
    assert data.train.tokens == int((~padded).sum())


def test_the_seed_decides_the_order_and_validation_ignores_it(stories: Path, small: Callable[..., DataConfig]) -> None:
    one, same, other = (open_data(small(stories, seed=seed)) for seed in (1, 1, 2))
    rows = [ids(data.train, 8) for data in (one, same, other)]
    assert rows[0] == rows[1] != rows[2]
    held = [[row.input_ids.tolist() for row in data.validation(64)] for data in (one, other)]
    assert held[0] == held[1]
    assert len(held[0]) == 4


def test_validation_repeats(stories: Path, small: Callable[..., DataConfig]) -> None:
    data = open_data(small(stories))
    rows = data.validation()
    assert [row.input_ids.shape for row in rows] == [(16,)] * len(rows)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(rows, data.validation(), strict=True))
    assert [row.input_ids.tolist() for row in data.validation(32)] == [row.input_ids.tolist() for row in rows[:2]]
    assert len(data.validation(1)) == 1


def test_the_global_random_state_is_left_alone(stories: Path, small: Callable[..., DataConfig]) -> None:
    random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), torch.get_rng_state()
    data = open_data(small(stories))
    data.train.next(200)
    data.validation(64)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


# ---- resuming


@pytest.fixture(scope="session")
def places(stories: Path, dataset: str, cache: str) -> dict[tuple[str, str], Data]:
    common: dict[str, Any] = {"cache_dir": cache, "vocab_size": 300, "seq_len": 16, "validation_percent": 20}
    sources = {"files": str(stories), "stream": dataset}
    return {
        (kind, mode): open_data(DataConfig(source=source, mode=mode, **common))
        for kind, source in sources.items()
        for mode in ("pack", "pad")
    }


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few documents, so that cuts fall on every kind of edge."""
    monkeypatch.setattr("apollo_optim.data.corpus.BLOCK", 500)
    monkeypatch.setattr("apollo_optim.data.stream.BLOCK", 500)


@pytest.mark.parametrize("mode", ["pack", "pad"])
@pytest.mark.parametrize("kind", ["files", "stream"])
def test_text_made_ahead_is_the_same_text_at_the_same_positions(
    places: dict[tuple[str, str], Data], tiny_blocks: None, kind: str, mode: str
) -> None:
    batches = places[kind, mode].train
    batches.load_state_dict(start := _fresh(places[kind, mode]).state_dict())

    def told() -> list[tuple[Any, ...]]:
        return [(ids(batches, 3), batches.state_dict(), batches.skipped) for _ in range(12)]

    expected = told()
    after = ids(batches, 3)
    batches.load_state_dict(start)
    with batches.ahead(99):
        assert told() == expected
        assert batches._ahead is not None, "nothing was made ahead"
    assert _making() == []
    assert ids(batches, 3) == after  # what was made ahead is used, too
    batches.load_state_dict(start)
    with batches.ahead(99):
        batches.next(3)
        batches.load_state_dict(expected[2][1])  # while a thread reads the same documents
    assert ids(batches, 3) == expected[3][0]


def test_no_thread_where_the_block_suffices(places: dict[tuple[str, str], Data], tiny_blocks: None) -> None:
    batches = places["files", "pack"].train
    batches.load_state_dict(_fresh(places["files", "pack"]).state_dict())
    batches.next(1)
    with batches.ahead(len(batches._block.rows) - 1):
        assert batches._ahead is None
    with batches.ahead(len(batches._block.rows)):
        assert batches._ahead is not None


def test_an_error_of_the_thread_is_raised_by_the_batch_that_needs_the_text(
    places: dict[tuple[str, str], Data], tiny_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = places["stream", "pack"].train
    batches.load_state_dict(_fresh(places["stream", "pack"]).state_dict())
    batches.next(1)

    def breaks() -> None:
        raise InputError("the stream broke")

    monkeypatch.setattr(batches.documents, "read", breaks)
    left = len(batches._block.rows) - 1
    with batches.ahead(99):
        batches.next(left)
        position = batches.state_dict()
        with pytest.raises(InputError, match=r"^the stream broke$"):
            batches.next(1)
    assert batches.state_dict() == position
    assert _making() == []


def _making() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "text ahead"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["files", "stream"]),
    mode=st.sampled_from(["pack", "pad"]),
    before=st.lists(st.integers(1, 9), max_size=6),
    after=st.lists(st.integers(1, 7), min_size=1, max_size=4),
)
def test_a_resumed_position_continues_exactly(
    places: dict[tuple[str, str], Data], tiny_blocks: None, kind: str, mode: str, before: list[int], after: list[int]
) -> None:
    data = places[kind, mode]
    start = _fresh(data).state_dict()
    data.train.load_state_dict(start)
    uninterrupted = ids(data.train, sum(before) + sum(after)) if before or after else []
    data.train.load_state_dict(start)
    ids(data.train, *before)
    state = json.loads(json.dumps(data.train.state_dict()))
    tokens, skipped = data.train.tokens, data.train.skipped
    ids(data.train, 3)  # the position was taken before these
    data.train.load_state_dict(state)
    assert data.train.state_dict() == state
    assert (data.train.tokens, data.train.skipped) == (tokens, skipped)
    assert ids(data.train, *after) == uninterrupted[sum(before) :]


def _fresh(data: Data) -> Batches:
    documents: Any = data.train.documents
    beginning = {"epoch": 0, "position": 0}
    if not isinstance(documents, CorpusDocuments):
        beginning = {"dataset": None, "rows": 0, "skipped": 0}  # type: ignore[dict-item]
    documents.load_state_dict(beginning)
    return Batches(documents, data.train.layout, data.train.about, data.train.seed)


@pytest.mark.parametrize("kind", ["files", "stream"])
def test_a_new_process_resumes_at_every_row(
    kind: str, stories: Path, dataset: str, small: Callable[..., DataConfig], tiny_blocks: None
) -> None:
    cfg = small(stories if kind == "files" else dataset, seed=3)
    data = open_data(cfg)
    rows, states = [], [json.dumps(data.train.state_dict())]
    for _ in range(90):
        rows += ids(data.train, 1)
        states.append(json.dumps(data.train.state_dict()))
    for cut in range(0, 90, 7):
        again = open_data(cfg)
        again.train.load_state_dict(json.loads(states[cut]))
        assert ids(again.train, 5) == rows[cut : cut + 5]
        assert len(states[cut]) < 2000


def test_a_failure_in_the_middle_of_a_batch_leaves_the_position_before_it(
    dataset: str, small: Callable[..., DataConfig]
) -> None:
    data = open_data(small(dataset))
    data.train.next(3)
    state, tokens = data.train.state_dict(), data.train.tokens
    with pytest.raises(InputError, match=r"the text ended after \d+ tokens"):
        data.train.next(100_000)
    assert data.train.state_dict() == state
    assert state["tokens"] == tokens


@pytest.mark.parametrize(
    "change", [{"seq_len": 32}, {"seed": 9}, {"mode": "pad"}, {"validation_percent": 40}, {"vocab_size": 310}]
)
def test_a_position_on_other_data_is_refused(
    change: dict[str, Any], stories: Path, small: Callable[..., DataConfig]
) -> None:
    state = open_data(small(stories)).train.state_dict()
    name = "tokenizer" if "vocab_size" in change else next(iter(change))
    with pytest.raises(InputError, match=f"other data: .*{name} was"):
        open_data(small(stories, **change)).train.load_state_dict(state)
    with pytest.raises(InputError, match="other data"):
        open_data(small(stories)).train.load_state_dict({})


def test_text_that_moved_is_the_same_text(stories: Path, small: Callable[..., DataConfig], tmp_path: Path) -> None:
    data = open_data(small(stories))
    data.train.next(9)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in stories.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    again = open_data(small(moved))
    again.train.load_state_dict(data.train.state_dict())
    assert ids(again.train, 9) == ids(data.train, 9)


# ---- tokenizers


def test_bpe_is_deterministic_cached_and_opens_with_from_pretrained(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    texts = [story(number) for number in range(50)]
    made = [trained_bpe(lambda: texts, 320, "key", tmp_path / name) for name in ("a", "b")]
    folders = [next((tmp_path / name / "tokenizers").iterdir()) for name in ("a", "b")]
    assert [path.name for path in (tmp_path / "a" / "tokenizers").iterdir()] == [folders[1].name]
    for name in os.listdir(folders[0]):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    never: Callable[[], list[str]] = lambda: pytest.fail("trained although cached")  # noqa: E731
    cached = trained_bpe(never, 320, "key", tmp_path / "a")
    assert len(made[0]) == len(cached) == 320
    assert isinstance(cached, PreTrainedTokenizerFast)
    opened: Any = AutoTokenizer.from_pretrained(folders[0])
    assert opened.eos_token == END


@pytest.mark.parametrize(
    "text", ["caf\u00e9 \U0001f680\n\n\n\tx", f"a {END} b", "  leading", "\x00\r\n", "a  .  b ' s"]
)
def test_bpe_gives_back_every_text(text: str, python: Data) -> None:
    row = encode(python.tokenizer, [text])[0]
    assert python.tokenizer.eos_token_id not in row  # the text's own end of text ends nothing
    assert python.tokenizer.decode(row) == text
    sizes = token_bytes(python.tokenizer)
    assert sum(sizes[token] for token in row) == len(text.encode())


def test_bytes_per_token_counts_targets_only(python: Data) -> None:
    end = python.tokenizer.eos_token_id
    row = [*encode(python.tokenizer, ["x = 1\n"])[0], end]
    size = len(b"x = 1\n") - token_bytes(python.tokenizer)[row[0]]
    labels = torch.tensor([*row, IGNORED, IGNORED])
    assert math.isclose(python.bytes_per_token([Batch(labels.clamp(min=0), labels)]), size / (len(row) - 1))


def test_bytes_of_other_kinds_of_tokens() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("\u2581caf\u00e9", -1.0), ("<0x0A>", -2.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.decoder = decoders.Metaspace()
    wrap: Any = PreTrainedTokenizerFast
    assert token_bytes(wrap(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")) == [0, 0, 6, 1]


def test_a_tokenizer_by_path(stories: Path, small: Callable[..., DataConfig], tmp_path: Path) -> None:
    trained = open_data(small(stories))
    trained.tokenizer.save_pretrained(tmp_path)
    named = open_data(small(stories, tokenizer=str(tmp_path)))
    assert ids(named.train, 5) == ids(trained.train, 5)
    assert named.identity["tokenizer"]["sha256"] == trained.identity["tokenizer"]["sha256"]
    trained.tokenizer.eos_token = None
    trained.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no end-of-text token"):
        open_data(small(stories, tokenizer=str(tmp_path)))
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|endoftext|>", "model_max_length": "x"}))
    with pytest.raises(InputError, match="cannot load the tokenizer"):  # it loads, and the first text is a TypeError
        open_data(small(stories, tokenizer=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot load the tokenizer"):
        open_data(small(stories, tokenizer=str(tmp_path)))


def test_only_ids_that_occur_must_fit_the_model(python: Data) -> None:
    batch = Batch(torch.tensor([[1, 5, 3]]), torch.tensor([[1, 5, 3]]))
    check_vocabulary(batch, 6)  # the tokenizer has 4096 entries; they do not occur
    word = python.tokenizer.convert_ids_to_tokens(5)
    with pytest.raises(InputError, match=r"token 5 .*occurs .* has 5 entries") as failure:
        check_vocabulary(batch, 5, python.tokenizer)
    assert repr(word) in str(failure.value)


# ---- files


def test_every_file_type_gives_the_same_text(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = [story(number) for number in range(20)]
    lines = "".join(json.dumps({"id": 1, "body": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c4.json.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"id": [1] * 20, "body": texts}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "c4.json.gz", "a.parquet"):
        documents = list(local_documents(str(tmp_path / name), Reading("body")))
        assert [text.decode() for _, text in documents] == texts
        assert documents[3].key == f"{name}:4"


def test_directories_globs_and_lists(tmp_path: Path) -> None:
    for name in ("a.txt", "deep/b.md", "deep/c.py", "deep/picture.png", ".hidden/d.txt", "__pycache__/e.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text of {name}")

    def keys(source: str) -> list[str]:
        return [key for key, _ in local_documents(str(tmp_path / source), Reading())]

    assert keys("") == ["a.txt", "deep/b.md", "deep/c.py"]
    assert keys("deep/*.[mp][dy]") == ["b.md", "c.py"]
    assert keys("**/*.txt") == ["a.txt"]
    corpus = open_corpus([str(tmp_path / "a.txt"), str(tmp_path / "deep")], Reading(), 20, tmp_path)
    assert corpus.documents == 3


def test_what_is_left_out_is_counted_and_named(
    tmp_path: Path, small: Callable[..., DataConfig], caplog: pytest.LogCaptureFixture
) -> None:
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    lines = [json.dumps({"text": f"a line of text, number {i * i}"}) for i in range(40)]
    (folder / "part.jsonl").write_text("\n".join([*lines, '{"text": "  "}']))
    for name in ("one.json", "two.csv", "three.zst", "four.zst", ".hidden.txt"):
        (folder / name).write_text("something")
    (folder / "README.md").write_text("# A data card")
    (elsewhere / "more.jsonl").write_text("\n".join(lines))
    (folder / "more").symlink_to(elsewhere)
    os.mkfifo(folder / "pipe.txt")
    with caplog.at_level(logging.WARNING, "apollo_optim"):
        data = open_data(small(source=str(folder), seq_len=16))
    assert data.identity["documents"] == 40
    assert sorted(data.left_out.values()) == [1, 1, 1, 1, 1, 4]
    for words in ("(four.zst, one.json, three.zst, ...)", "(more)", "(README.md)", "(pipe.txt)", "part.jsonl:41"):
        assert words in caplog.text
    caplog.clear()
    open_data(small(source=str(folder / "*.jsonl"), seq_len=16))
    assert "README" not in caplog.text
    with pytest.raises(InputError, match="not a regular file"):
        open_data(small(source=str(folder / "pipe.txt")))


def test_a_long_text_is_cut_at_line_ends_and_loses_nothing(tmp_path: Path) -> None:
    text = "".join(story(number) for number in range(2000)) + "\u20ac" * SECTION  # the end is one line without a break
    path = tmp_path / "long.txt"
    path.write_text(text)
    documents = list(local_documents(str(path), Reading()))
    assert b"".join(part for _, part in documents).decode() == text
    assert len(documents) > 5
    assert all(0 < len(part) <= SECTION for _, part in documents)
    assert documents[0].text.endswith(b"\n")
    assert [key for key, _ in documents[:2]] == ["long.txt#0", "long.txt#1"]


BROKEN = ["{", "[1]", '{"other": "x"}', '{"text": 5}', '{"text": null}', '{"text": "\\ud800"}', '{"text": "caf\xe9"}']


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_line_is_counted_or_fatal(line: str, tmp_path: Path, small: Callable[..., DataConfig]) -> None:
    path = tmp_path / "some.jsonl"
    good = [json.dumps({"text": story(number)}) for number in range(30)]
    lines = [*good[:3], "", line, *good[3:]]
    path.write_bytes("\n".join(lines).encode("latin-1"))
    data = open_data(small(path))
    assert (data.identity["documents"], data.identity["skipped_lines"], data.train.skipped) == (30, 1, 1)
    with pytest.raises(InputError, match=r"some\.jsonl:5: .*data\.on_bad_line"):
        open_data(small(path, on_bad_line="error"))


# ---- bad input: one clear line each


def _write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


ROWS = "".join(json.dumps({"title": "t", "body": story(n)}) + "\n" for n in range(5))
BAD: dict[str, tuple[str, bytes | str, str]] = {
    "empty": ("a.txt", "", r"a\.txt: holds no text"),
    "blank": ("a.txt", " \n\n", r"a\.txt: holds no text"),
    "empty jsonl": ("a.jsonl", "", r"a\.jsonl: holds no text"),
    "all lines broken": ("a.jsonl", "{\n{\n", r"no text; skipped 2 broken lines, the first: .*a\.jsonl:1: not JSON"),
    "undecodable": ("a.txt", b"abc\xff", r"a\.txt: byte 3 \(0xff\) is not valid UTF-8"),
    "undecodable late": ("a.md", b"abc d\n" * 30_000 + b"\xe9t\xe9", r"a\.md: byte 180000 \(0xe9\)"),
    "undecodable code": ("a.py", b"\xc3", r"a\.py: byte 0 "),
    "missing key": ("a.jsonl", ROWS, r"a\.jsonl: no key 'text'; the keys are body, title; set data\.text_key"),
    "unknown type": ("a.csv", "x,y", r"a\.csv: unknown file type; txt, md, py, jsonl"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(ROWS.replace("body", "text").encode())[:-20], r"gz: a damaged gzip file"),
    "no gzip": ("a.jsonl.gz", ROWS, r"gz: a damaged gzip file"),
    "no parquet": ("a.parquet", "PAR1", r"a\.parquet: not a readable parquet file"),
    "one short document": ("a.txt", "a", r"a\.txt: this document is too short for training and val"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case: str, tmp_path: Path, small: Callable[..., DataConfig]) -> None:
    name, content, message = BAD[case]
    path = _write(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as failure:
        open_data(small(path))
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("mode", ["pack", "pad"])
def test_the_end_of_a_single_document_is_its_validation_text(
    mode: str, tmp_path: Path, small: Callable[..., DataConfig]
) -> None:
    text = "".join(f"{n} " + story(n).replace("\n", " ") + "\n" for n in range(200))
    data = open_data(small(_write(tmp_path / "a.txt", text), validation_percent=10, mode=mode))
    corpus = open_corpus([str(tmp_path / "a.txt")], Reading(), 10, tmp_path, longest=None if mode == "pad" else 500)
    parts = ["".join(corpus[i].text for i in indices) for indices in (corpus.train, corpus.validation)]
    assert "".join(parts) == text
    assert parts[0].endswith("\n")  # cut at a line's end
    assert len(parts[1]) / len(text) == pytest.approx(0.1, abs=0.01)
    assert data.train.next(1).input_ids.numel()
    assert data.validation(None)


def test_a_parquet_file_without_the_column(tmp_path: Path, small: Callable[..., DataConfig]) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x", None, "y"], "n": [1, 2, 3]}), path)
    with pytest.raises(InputError, match=r"a\.parquet: no key 'text'; the keys are body, n"):
        open_data(small(path))
    reading = Reading("body")
    assert [text for _, text in local_documents(str(path), reading)] == [b"x", b"y"]
    assert (reading.skipped, reading.first_skipped) == (1, f"{path}: row 2: 'body' is null, not a string")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/file.txt", "no such file or directory"),
        ("no/such/folder/x", "no such file or directory"),
        ("nothing-*.txt", "no file matches"),
        ("", "data.source is empty"),
        ([], "data.source is empty"),
        (["python", "allenai/c4"], "allenai/c4.*only be used alone"),
    ],
)
def test_bad_sources(source: Any, message: str, cache: str) -> None:
    with pytest.raises(InputError, match=message):
        open_data(DataConfig(source=source, cache_dir=cache))


def test_a_directory_without_text(tmp_path: Path, small: Callable[..., DataConfig]) -> None:
    _write(tmp_path / "a.png", "x")
    with pytest.raises(InputError, match="no text in this directory; files of type txt, md"):
        open_data(small(tmp_path))


def test_a_file_that_cannot_be_read(tmp_path: Path, small: Callable[..., DataConfig]) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"cannot read .*a\.txt: No such file"):
        open_data(small(tmp_path))


def test_empty_splits_say_which_percentage_would_do(tmp_path: Path, small: Callable[..., DataConfig]) -> None:
    for number in range(4):
        _write(tmp_path / f"{number}.txt", story(number))
    for percent, part in ((0.001, "validation"), (99.999, "training")):
        with pytest.raises(InputError, match=f"the {part} split is empty, with 4 documents") as failure:
            open_data(small(tmp_path, validation_percent=percent))
        advised = float(str(failure.value).split(" to at ")[1].split()[1].strip(","))
        open_corpus([str(tmp_path)], Reading(), advised, tmp_path)  # the advice is good


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 1}, "seq_len is 1"),
        ({"vocab_size": 256}, "vocab_size is 256"),
        ({"validation_percent": 0}, "validation_percent is 0"),
        ({"validation_percent": 100}, "validation_percent is 100"),
        ({"tokenizer": "./no-such-tokenizer"}, "cannot load the tokenizer './no-such-tokenizer'"),
        ({"cache_dir": "/dev/null/x"}, r"cannot make the cache directory .* set data\.cache_dir"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str, stories: Path, small: Callable[..., DataConfig]) -> None:
    with pytest.raises(InputError, match=message) as failure:
        open_data(small(stories, **change))
    assert "\n" not in str(failure.value)


def test_a_full_disk_is_one_line(stories: Path, small: Callable[..., DataConfig], monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(InputError, match=r"cannot copy the text to .*No space left.*data\.cache_dir"):
        open_data(small(stories))


def test_validation_shorter_than_a_row(stories: Path, small: Callable[..., DataConfig]) -> None:
    with pytest.raises(InputError, match="shorter than one row of 100000 tokens"):
        open_data(small(stories, seq_len=100_000)).validation()


# ---- streams


def test_a_stream_is_read_once_and_named(dataset: str, small: Callable[..., DataConfig]) -> None:
    data = open_data(small(dataset, mode="pad", seq_len=200))
    rows = encoded(data, [story(number) for number in (*range(40), *range(100, 140))])
    batch = data.train.next(len(rows))
    assert sorted([token for token in row if token != IGNORED] for row in batch.labels.tolist()) == sorted(rows)
    held = encoded(data, [story(number) for number in (*range(500, 540), *range(600, 640))])
    seen = [[token for token in row.labels.tolist() if token != IGNORED] for row in data.validation()]
    assert sorted(seen) == sorted(held)
    assert data.identity["name"] == dataset.removeprefix("hf:")
    assert data.identity["revision"]


def test_streams_from_every_kind_of_dataset_resume(stories: Path, cache: str, tmp_path: Path) -> None:
    """The position is the dataset's own: Arrow in memory, parquet and jsonl come through different code there."""
    from datasets import Dataset

    from apollo_optim.data.stream import StreamDocuments

    texts = [story(number) for number in range(60)]
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "train.parquet", batch_size=7)
    tokenizer = open_data(DataConfig(str(stories), cache_dir=cache, vocab_size=300, validation_percent=20)).tokenizer

    class Memory:
        def as_streaming_dataset(self, split: str) -> Any:
            return Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=3)

    def open_stream(builder: Any) -> Batches:
        return Batches(StreamDocuments(builder, "name", "train", Reading()), Pack(tokenizer, 16), {})

    from datasets import load_dataset_builder

    for builder in (Memory(), load_dataset_builder(str(tmp_path))):
        whole = open_stream(builder)
        rows, states = [], []
        for _ in range(40):
            states.append(json.dumps(whole.state_dict()))
            rows += ids(whole, 1)
        for cut in range(0, 40, 3):
            again = open_stream(builder)
            again.load_state_dict(json.loads(states[cut]))
            assert ids(again, 2) == rows[cut : cut + 2] if cut < 39 else True


def test_rows_without_text_in_a_stream(tmp_path: Path, small: Callable[..., DataConfig]) -> None:
    lines = [{"text": None if number % 10 == 4 else story(number)} for number in range(60)]
    _write(tmp_path / "train.jsonl", "\n".join(map(json.dumps, lines)))
    data = open_data(small(f"hf:{tmp_path}", validation_split="train"))
    data.train.next(4)
    assert data.train.skipped == 6
    state = data.train.state_dict()
    again = open_data(small(f"hf:{tmp_path}", validation_split="train"))
    again.train.load_state_dict(state)
    assert again.train.skipped == 6
    with pytest.raises(InputError, match=r"\(train\): row 5: 'text' is null"):
        open_data(small(f"hf:{tmp_path}", on_bad_line="error")).train.next(1)


def test_a_hub_that_is_not_there_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client would wait 1, 2, 4, 8 and 8 seconds, and that for every file that it asks for."""

    def nobody(host: str, *_: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    asked: list[Any] = []
    monkeypatch.setattr("socket.getaddrinfo", nobody)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("apollo_optim.data.foreign.getproxies", dict)
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *words: asked.append(words))
    with pytest.raises(
        InputError, match=r"cannot open the dataset 'pythn': huggingface.co cannot be reached .*`python`"
    ):
        open_builder("pythn", None)
    assert not asked
    monkeypatch.setattr("apollo_optim.data.foreign.getproxies", lambda: {"https": "proxy"})
    open_builder("pythn", None)
    assert asked, "a proxy finds names by itself"
    monkeypatch.setattr("apollo_optim.data.foreign.getproxies", dict)
    with pytest.raises(InputError, match="cannot load the tokenizer 'no/where'"):
        load_tokenizer("no/where")


def test_bad_streams(dataset: str, small: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no key 'body'; the keys are id, text; set data\.text_key"):
        open_data(
            small(dataset, text_key="body")
        )  # its tokenizer is not in the cache: a key is part of what text it is
    with pytest.raises(InputError, match=r"cannot open the split 'nosplit'.*train"):
        open_data(small(dataset, split="nosplit"))
    with pytest.raises(InputError, match=r"cannot open the split 'test'.*validation"):
        open_data(small(dataset, validation_split="test")).validation()
    with pytest.raises(InputError, match="validation_split is null"):
        open_data(small(dataset, validation_split=None)).validation()

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'allenai/c4' on the Hub\nand more")

    monkeypatch.setattr("apollo_optim.data.stream.unreachable", lambda: None)
    monkeypatch.setattr("datasets.load_dataset_builder", offline)
    with pytest.raises(
        InputError, match=r"^cannot open the dataset 'allenai/c4': Couldn't reach 'allenai/c4' on the Hub$"
    ):
        open_data(small("allenai/c4", subset="en"))
    with pytest.raises(InputError, match=r"'stdlib'.*`python` and `packages` need no download$"):
        open_data(small("stdlib"))


def test_a_stream_that_breaks_says_where(small: Callable[..., DataConfig], tmp_path: Path) -> None:
    good = "".join(json.dumps({"text": story(number)}) + "\n" for number in range(30))
    _write(tmp_path / "train-0.jsonl", good)
    _write(tmp_path / "train-1.jsonl", "{ broken\n")
    with pytest.raises(InputError, match=r"the stream broke after 30 rows: ") as failure:
        open_data(small(f"hf:{tmp_path}"))
    assert "\n" not in str(failure.value)
