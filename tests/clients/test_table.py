"""The table of clients: a case is a row, in its newest form."""

from table import merged


def test_figures_of_one_case_are_one_row():
    """The micro-batches of a case are told before its releases and resumes."""
    key = {"client": "Trainer", "case": "llama"}
    old = [{**key, "resumed": "0.5", "adamw": "0.5"}, {"client": "timm", "case": "ViT"}]
    new = [{**key, "accumulated": 1e-6}, {"client": "TRL", "case": "llama"}, {**key, "resumed": 0.0}]
    assert merged(old, new) == [{**key, "accumulated": 1e-6, "resumed": 0.0}, old[1], new[1]]
