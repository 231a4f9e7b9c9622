"""`apollo-optim eval --tasks` with the real lm-eval, offline: a task of our own over a file."""

import json
import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("lm_eval", reason="lm-eval is the extra eval; make test-clients has an environment with it")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from chat_tiny import make_tuned

from apollo_optim.cli.main import main

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{asked}}}}"
doc_to_target: right
doc_to_choice: ["uno", "due"]
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tuned(tmp_path_factory.mktemp("tuned"), [("one:", " uno"), ("two:", " due")])


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [{"asked": "one:", "right": 0}, {"asked": "two:", "right": 1}, {"asked": "two:", "right": 0}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    return tmp_path / "tasks"


def test_a_task_is_scored(tuned, tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = ["eval", str(tuned), "--tasks", "colours", "--include", str(tasks)]
    assert main([*words, "--out", str(tmp_path / "scores.json")]) == 0
    assert "colours: acc 0.6667 +- 0.3333" in capsys.readouterr().out
    assert json.loads((tmp_path / "scores.json").read_text())["tasks"]["colours"]["acc,none"] == pytest.approx(2 / 3)
    assert main([*words, "--limit", "2"]) == 0
    assert "colours: acc 1.0000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "colourss", "--include", "TASKS"], "lm-eval has no such task (did you mean colours?)"),
        (["--tasks", "colours", "--include", "nowhere"], "--include nowhere: there is no such directory"),
        (["--tasks", ","], "--tasks: name at least one"),
        (["--tasks", "missing", "--include", "TASKS"], "lm-eval could not run them"),
    ],
)
def test_what_cannot_be_run_is_one_line(tuned, tasks, capsys, words, said):
    missing = TASK.format(file="/nowhere/rows.jsonl").replace("task: colours", "task: missing")
    (tasks / "missing.yaml").write_text(missing)
    assert main(["eval", str(tuned), *[str(tasks) if word == "TASKS" else word for word in words]]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert said in error[0]
