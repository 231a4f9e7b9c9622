"""What README and docs show of other people's tools runs, with those tools."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="Trainer needs accelerate, which the dev extra brings")
from trainer_runs import ROWS, make_model

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = [
    (page.name, code)
    for page in PAGES
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    if "apollo_optim.integrations" in code or page.parent.name == "integrations"
]


@pytest.mark.parametrize(("page", "code"), CODE, ids=[f"{page}-{i}" for i, (page, _) in enumerate(CODE)])
def test_python_of_other_tools_in_the_docs_runs(page, code, tmp_path, monkeypatch):
    for package in re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not here: make test-clients has environments with it")
    names = {"model": make_model(), "rows": ROWS}
    if "trl" in code:
        from trl_runs import make_rows, make_tokenizer

        names |= {"texts": make_rows("sft"), "tokenizer": make_tokenizer()}
    monkeypatch.chdir(tmp_path)
    exec(code, names)
    if ".train()" in code:
        trainer = names["trainer"]
        assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {trainer.state.max_steps}
