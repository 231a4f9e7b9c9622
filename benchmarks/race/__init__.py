"""The race: every optimizer trains the same small LLaMA, each with the same budget for its rates.

`python -m benchmarks.race --help` says how to run it, docs/race.md what is compared and what would falsify a claim.

    methods.py    what is raced, as data
    protocol.py   how: settings, budgets, stages, and the run file of one trial
    search.py     coordinate search over the rates: a pure function of the losses so far
    agenda.py     which trials are wanted next, in which order: a pure function of the lines so far
    store.py      the lines on disk, and which trial is whose
    trial.py      one run, through `pretrain`, and what is measured of it
    report.py     the table, the pictures, the page
"""
