"""The time of a step: ours, the installed peers and torch's fused AdamW, interleaved in one process.

`apollo-optim bench step --help` tells the protocol.

    contenders.py   who steps
    stage.py        what is stepped, and who fits into memory together
    rounds.py       first steps, rounds, and what else is measured
    table.py        the log as a table and a chart
"""
