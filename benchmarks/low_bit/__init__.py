"""What a step of low-bit weights costs, and what other formats for them would be worth.

`apollo-optim bench low-bit cost --help` and `... formats --help` tell the protocols.

    cost.py      the pieces of a step
    formats.py   four formats
    compare.py   what is measured of them
    tables.py    as tables
"""
