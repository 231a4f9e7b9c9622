"""What to train on: the `data` section of a run file."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class DataConfig:
    """The text, the tokenizer, and how documents become rows."""

    source: str | list[str] = "python"
    """Where the text comes from: `python` (the source of the standard library; always there), `packages` (the Python
    source of the installed torch and transformers, about 100 MB), a local file, directory or glob (txt, md, py, jsonl,
    jsonl.gz, parquet; of questions and answers json and csv, too), a list of these, or the name of a Hugging Face
    dataset, which is streamed (`allenai/c4`).
    A prefix settles a doubt: `./python` is a path, `hf:name` is a dataset."""

    subset: str | None = None
    """Configuration of a Hugging Face dataset, such as `en` for `allenai/c4`."""

    split: str = "train"
    """Split of a Hugging Face dataset to train on."""

    validation_split: str | None = "validation"
    """Split of a Hugging Face dataset to evaluate on; null if there is none. Local text: see `validation_percent`."""

    validation_source: str | list[str] | None = None
    """Local text to evaluate on, if it lies in files of its own; null: a share of `source` (`validation_percent`)."""

    format: Literal["text", "auto", "messages", "prompt", "alpaca", "sharegpt"] = "text"
    """`text`: documents, as pre-training reads them. The others are questions and answers (`apollo-optim finetune`), of
    which only the answers are learnt: `messages` (a list of role and content), `prompt` (and `completion`), `alpaca`
    (`instruction`, `input`, `output`), `sharegpt` (`conversations`, a list of from and value); `auto`: whichever of
    these a row is."""

    columns: dict[str, str] = field(default_factory=dict)
    """Where the columns of a `format` have other names in the file: {prompt: question, completion: answer}."""

    chat_template: str | None = None
    """A file with the chat template (jinja) to use, and to export, in place of the tokenizer's own."""

    text_key: str = "text"
    """Key or column that holds the text in jsonl, parquet and Hugging Face datasets."""

    mode: Literal["pack", "pad"] = "pack"
    """`pack` joins documents, with an end-of-text token between them, and cuts the result into rows: no position is
    wasted. `pad` puts one document into one row, cut or padded, as in the papers. Questions and answers are packed
    whole, and do not see each other."""

    seq_len: int = 256
    """Tokens in a row. The model shifts by itself, so a row teaches seq_len - 1 predictions."""

    tokenizer: str = "bpe"
    """`bpe` trains a byte-level BPE on the training text and caches it; anything else is the name or path of a
    tokenizer (`google-t5/t5-base` for the papers' protocol)."""

    vocab_size: int = 4096
    """Entries of the tokenizer that `bpe` trains."""

    seed: int = 0
    """Decides the order of the documents, a new one in every epoch. Streams keep the order they come in."""

    on_bad_line: Literal["skip", "error"] = "skip"
    """A broken jsonl line or a row without text: `skip` counts and reports it, `error` stops."""

    validation_percent: float = 2.0
    """Share of the documents of local text kept for evaluation, chosen by a hash of each document's path. A txt or md
    file above 64 KiB counts as several documents."""

    cache_dir: str | None = None
    """Trained tokenizers live here. null is $XDG_CACHE_HOME/apollo-optim, or ~/.cache/apollo-optim."""
