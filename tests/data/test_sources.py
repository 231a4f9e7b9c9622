"""One reader of sources: regular files, each once, and no more of them in memory than a line."""

from __future__ import annotations

import gzip
import json
import os
import socket
import tracemalloc
from pathlib import Path

import pytest

from apollo_optim.core.errors import InputError
from apollo_optim.data import corpus, readers
from apollo_optim.data.corpus import open_corpus
from apollo_optim.data.readers import Reading


@pytest.fixture
def text(tmp_path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.txt").write_text(f"line {i} of some words\n" * 9)
    return folder


def opened(*sources: object, reading: Reading | None = None):
    return open_corpus([str(source) for source in sources], reading or Reading(), 30.0, Path("/tmp"))


@pytest.mark.parametrize("pattern", ["", "*", "*.txt", "**", "**/*.txt", "**/**/*"])
def test_each_file_once_whatever_links_to_it(pattern, text, caplog):
    (text / "again").symlink_to(".")
    (text / "above").symlink_to("..")
    (text / "deep").mkdir()
    (text / "deep" / "loop").symlink_to("../deep")
    (text / "z.txt").symlink_to("0.txt")
    os.link(text / "1.txt", text / "y.txt")
    found = opened(f"{text}/{pattern}" if pattern else text)
    assert found.documents == 9
    assert "other names of a file that is read already: 2" in caplog.text
    if "**" in pattern or not pattern:
        assert "linked folders, which are not followed: 3" in caplog.text


def test_a_list_reads_a_file_under_one_name(text, caplog):
    (text / "sub").mkdir()
    (text / "sub" / "link.txt").symlink_to("../0.txt")
    assert opened(text / "*.txt", text / "sub" / "link.txt").documents == 9
    assert "other names" in caplog.text
    assert opened(text / "*.txt", text / "*.txt").documents == 18  # named twice: every text in the split it was in


def test_a_link_that_was_asked_for_by_name_is_followed(text, tmp_path):
    (tmp_path / "link").symlink_to(text)
    assert opened(tmp_path / "link").documents == 9
    assert opened(tmp_path / "link" / "*.txt").documents == 9


def test_globs(text):
    (text / ".hidden.txt").write_text("not read")
    (text / ".folder").mkdir()
    (text / ".folder" / "a.txt").write_text("not read")
    (text / "a[1].txt").write_text("read")
    for pattern, count in {"[0-3].txt": 4, "?.txt": 9, "[!0]*": 9, "**/[0-4].txt": 5, "*[[]1].txt": 1}.items():
        assert opened(text / pattern).documents == max(count, 2)  # a single one is divided
    with pytest.raises(InputError, match="no file matches"):
        opened(text / "*.jsonl")
    with pytest.raises(InputError, match="no file matches"):
        opened("nowhere/*.txt")


def test_only_regular_files(text, tmp_path, caplog):
    os.mkfifo(text / "pipe.txt")
    (text / "zero.txt").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(text / "s.txt"))
    assert opened(text).documents == opened(text / "*.txt").documents == 9
    assert caplog.text.count("not regular files: 3") == 2
    for name, kind in (("pipe.txt", "a FIFO"), ("zero.txt", "a device"), ("s.txt", "a socket")):
        with pytest.raises(InputError, match=f"{name}: {kind}, not a regular file"):
            opened(text / name)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".py", ".parquet"])
def test_the_longest_line(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST", 1 << 16)
    path = tmp_path / f"long{suffix}"
    rows = [{"text": "short"}, {"text": "x" * (1 << 17)}]
    if suffix == ".parquet":
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".py":
        path.write_text("x" * (1 << 17))
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    with pytest.raises(InputError, match=r"long\S*: .* of more than .* MiB; cut it, or leave it out"):
        opened(path)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet", ".txt"])
def test_a_large_file_takes_little_memory(suffix, tmp_path):
    path, row = tmp_path / f"large{suffix}", {"text": "some words of a text, " * 4000}
    if suffix == ".parquet":
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.table({"text": [f"{i} {row['text']}" for i in range(600)]}), path, compression="zstd")
    elif suffix == ".txt":
        path.write_text((row["text"] + "\n") * 600)
    else:
        with gzip.open(path, "wt") as file:
            for i in range(600):
                file.write(json.dumps({"text": f"{i} {row['text']}"}) + "\n")
    tracemalloc.start()
    found = opened(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.size > 50e6
    assert peak < 30e6


def test_a_large_folder_tells_how_far_it_is(text, monkeypatch, caplog):
    monkeypatch.setattr(corpus, "PROGRESS", -1)
    with caplog.at_level("INFO"):
        opened(text)
    assert "read 9 documents" in caplog.text
