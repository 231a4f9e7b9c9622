"""Protocols over the package: how fast, how much memory, how equal. Not in the wheel; run them from the checkout.

    kit.py      a log of JSON lines, what a figure depends on, statistics, units
    table.py    tables
    cases.py    a case in a process of its own

The others are benchmarks: `apollo-optim bench NAME`, or `python -m benchmarks.NAME`. They may use all of the package,
and nothing of it uses them.
"""

import os

# As the command does, before torch is imported: large tensors of a CPU come in pages of 2 MB.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
