"""Peak memory of training: a fresh process for every optimizer, each beside its plan.

`apollo-optim bench memory --help` tells the protocol.

    cases.py     what is measured: optimizers of ours, and of peers
    measure.py   the life of the process of a case
    rows.py      a line of the log: what a process measured, beside the plan of the same run
    run.py       a run of `pretrain` beside its plan
    table.py     the log as a table and a picture
"""
