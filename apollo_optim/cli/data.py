"""`apollo-optim data`: what rows of a run file look like, and what is learnt of them."""

import itertools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..core.errors import InputError
from ..core.printing import lines
from .words import CONSENT, CONSENT_HELP, Parser, console, show

if TYPE_CHECKING:
    from ..data import Batch

PROG = "apollo-optim data"
LEARNT, TEXT_BREAK = "bold green", "dim"


def run(argv: Sequence[str]) -> int:
    parser = Parser(
        PROG,
        "Show rows as a run lays them out: decoded, what is learnt in colour (without colours: between >> and <<),\n"
        "a line between texts that do not see each other; then what is in one pass over the training text.\n"
        "RUN.yaml is a run file of pretrain or (it says data.format) of finetune; its keys can be changed:\n"
        "--data.seq_len 1024.",
        "examples:\n  apollo-optim data runs/demo.yaml\n"
        "  apollo-optim data RUN.yaml --rows 3 --data.source pairs.jsonl | less -R",
    )
    parser.add_argument("config", metavar="RUN.yaml", help="a run file, or the directory of a run")
    parser.add_argument("--rows", type=int, default=10, help="show so many rows (10)")
    parser.add_argument(CONSENT, action="store_true", help=CONSENT_HELP)
    args, keys = parser.parse_beside_keys(argv)
    if args.rows < 0:
        raise InputError(f"--rows {args.rows}: 0 or more")
    from ..data import open_data
    from ..train.config import read_run_file
    from ..train.finetune import resolved, survey
    from . import finetune, pretrain

    if os.path.isdir(args.config):  # a run
        args.config = os.path.join(args.config, "config.yaml")
    text = (read_run_file(args.config).get("data") or {}).get("format", "text") == "text"
    text = text and not any(word.startswith("--data.format") for word in keys)
    cfg = pretrain.parse(["--config", args.config, *keys], pretrain.PRETRAIN if text else finetune.story()).cfg
    cfg = cfg if cfg.data.format == "text" else resolved(cfg)
    data = open_data(cfg.data, trust_remote_code=args.trust_remote_code)
    found = survey(data) if data.open_epoch is not None else None
    rows = itertools.chain.from_iterable(data.train.blocks())
    for number, row in enumerate(itertools.islice(rows, args.rows), 1):
        show_row(data.tokenizer, data.train.layout.batch([row]).row(0), len(row), f"row {number}")
    show(f"corpus: {data.identity['name']}; tokenizer: {cfg.data.tokenizer}, {len(data.tokenizer):,} entries")
    for line in found.lines() if found is not None else ["a stream: nothing is counted"]:
        show(line)
    return 0


def show_row(tokenizer: Any, row: "Batch", end: int, title: str) -> None:
    """One row, its tokens decoded in stretches of one kind; `end`: where its padding begins."""
    import torch
    from rich.text import Text

    from ..data import IGNORED

    coloured = not os.environ.get("NO_COLOR") and console().is_terminal
    size = len(row.labels)
    positions = torch.arange(size) if row.position_ids is None else row.position_ids
    learnt = (row.labels != IGNORED).tolist()
    learnt[0] = False  # nothing tells a row's first token
    told = Text()
    start = 0
    for at in range(1, end + 1):
        begins = at < end and int(positions[at]) == 0
        if at < end and learnt[at] == learnt[start] and not begins:
            continue
        piece = lines(tokenizer.decode(row.input_ids[start:at].tolist()))
        told.append(
            f">>{piece}<<" if learnt[start] and not coloured else piece, style=LEARNT if learnt[start] else None
        )
        if begins:
            told.append("\n" + "-" * 20 + "\n", style=TEXT_BREAK)
        start = at
    told.append(f"\n[{end} tokens, {sum(learnt)} learnt, {size - end} padding]\n", style=TEXT_BREAK)
    show(f"--- {title} ---")
    show(told)
