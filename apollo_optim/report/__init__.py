"""Tables and pictures of runs, from their logs and from nothing else.

A run directory holds `metrics.jsonl`; `read_run` makes a `Run` of it, `write_report` a picture, a table and one
self-contained HTML page of several of them. Runs are only put side by side where their numbers can be compared:
the same corpus (by its hash) and the same tokenizer.
"""

from apollo_optim.report.follow import follow
from apollo_optim.report.page import Report, write_report
from apollo_optim.report.picture import draw
from apollo_optim.report.read import Run, check_comparable, read_events, read_run
from apollo_optim.report.table import NOTE, markdown_table, rich_table, table_rows
from apollo_optim.report.words import in_words

__all__ = [
    "NOTE",
    "Report",
    "Run",
    "check_comparable",
    "draw",
    "follow",
    "in_words",
    "markdown_table",
    "read_events",
    "read_run",
    "rich_table",
    "table_rows",
    "write_report",
]
