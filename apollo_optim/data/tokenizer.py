"""Tokenizers: a byte-level BPE trained on the corpus, or any other by name or path."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from apollo_optim.core import disk
from apollo_optim.core.errors import InputError
from apollo_optim.core.manifest import NAME as MANIFEST
from apollo_optim.core.manifest import Format, check_files, read_manifest, write_manifest
from apollo_optim.data.foreign import reason, unreachable

END = "<|endoftext|>"
TOKENIZER = Format("apollo-optim tokenizer", 3, "a tokenizer that apollo-optim saved")
TRAINING_BYTES = 32 << 20  # more text than this changes a small vocabulary little and costs time

log = logging.getLogger(__name__)


def trained_bpe(texts: Callable[[], Iterable[str]], vocab_size: int, key: str, cache_dir: Path) -> Any:
    """The byte-level BPE of a corpus (`key` names it): from the cache, or trained and put there."""
    if vocab_size < 257:
        raise InputError(f"data.vocab_size is {vocab_size}; 256 bytes and the end of text need at least 257 entries")
    folder = cache_dir / "tokenizers" / f"bpe-{vocab_size}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if (kept := _kept(folder)) is not None:
        return kept
    log.info("training a tokenizer of %d entries, cached in %s", vocab_size, folder)
    return _cached(_train(texts(), vocab_size), folder)


def _train(texts: Iterable[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_at_most(texts, TRAINING_BYTES), trainer)
    wrap: Any = PreTrainedTokenizerFast  # untyped there
    return wrap(tokenizer_object=bpe, eos_token=END, clean_up_tokenization_spaces=False)


def _at_most(texts: Iterable[str], size: int) -> Iterator[str]:
    for text in texts:
        yield text
        size -= len(text.encode())
        if size <= 0:
            return


def _cached(tokenizer: Any, folder: Path) -> Any:
    """The tokenizer as it is read back. The folder appears whole or not at all; one that another process made stays."""
    read_back = None
    try:
        with disk.new_folder(folder) as temporary:
            tokenizer.save_pretrained(temporary)
            read_back = load_tokenizer(str(temporary))
            write_manifest(temporary, TOKENIZER)
    except OSError as error:
        if read_back is None:
            raise InputError(f"cannot write to {folder.parent} ({error.strerror}); set data.cache_dir") from error
        if not folder.exists():
            log.warning("%s: the tokenizer can't be kept (%s) and is trained each time", folder, error.strerror)
    return read_back


def _kept(folder: Path) -> Any:
    """The tokenizer of the cache, if it is there and as it was written."""
    if not folder.exists():
        return None
    try:
        return own_tokenizer(folder)
    except InputError as error:
        log.warning("%s; it is trained again", error)
    with contextlib.suppress(OSError):
        disk.remove(folder)
    return None


def own_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """A tokenizer that we saved, its files compared with the manifest. (Older ones have none.)"""
    if (folder / MANIFEST).exists():
        check_files(folder, read_manifest(folder, TOKENIZER)["files"])
    return load_tokenizer(str(folder), trust_remote_code=trust_remote_code)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """A tokenizer by name or path, refused if it has no end-of-text token to put between documents."""
    from transformers import AutoTokenizer

    away = not Path(name).is_dir() and unreachable() is not None  # then the cache is asked, and answers at once
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, local_files_only=away)
        encode(tokenizer, ["a"])  # what its files say may be seen only now
    except Exception as error:  # whatever the hub, the file or the parser says, in one line
        here = "" if Path(name).is_dir() else f"; there is no directory {name!r} here"
        raise InputError(f"cannot load the tokenizer {name!r}: {reason(error)}{here}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer {name!r} has no end-of-text token (eos_token), which separates documents")
    return tokenizer


def encode(tokenizer: Any, texts: list[str], *, special: bool = False, split: bool = True) -> list[list[int]]:
    """Token ids of each text. A text's own `<|endoftext|>` stays text: it must not end a document.

    Args:
        special: Add what the tokenizer begins and ends a text with.
        split: False: special tokens that are written out are meant, as in what a chat template has made.
    """
    ids: list[list[int]] = []
    for part in _parts(texts):
        encoded = tokenizer(
            part,
            add_special_tokens=special,
            split_special_tokens=split,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # a document may be longer than the model's context: that is what rows are for
        )
        ids += encoded["input_ids"]
    return ids


def _parts(texts: list[str], characters: int = 1 << 18) -> Iterator[list[str]]:
    """Some texts at a time: a tokenizer keeps a hundred bytes a token until its call is over."""
    part: list[str] = []
    size = 0
    for text in texts:
        part.append(text)
        size += len(text)
        if size >= characters:
            yield part
            part, size = [], 0
    if part:
        yield part


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of everything that decides how text becomes tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def token_bytes(tokenizer: Any) -> list[int]:
    """Bytes of text that each token stands for; special tokens stand for none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    byte_level = backend is not None and "ByteLevel" in str(backend.decoder)
    special = set(tokenizer.all_special_ids)
    sizes = []
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if token is None or index in special:
            sizes.append(0)
        elif byte_level:  # this alphabet writes every byte as one character
            sizes.append(len(token))
        elif len(token) == 6 and token.startswith("<0x"):  # SentencePiece's byte fallback
            sizes.append(1)
        else:
            sizes.append(len(token.replace("\u2581", " ").encode()))
    return sizes
