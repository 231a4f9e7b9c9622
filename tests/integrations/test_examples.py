"""The files of examples/ run as they are, on few steps, and what they train learns."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NEEDS = {"lightning_module": "lightning", "transformers_trainer": "accelerate"}
WORDS = {
    "fsdp2": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "{file}", "30"],
    "llama_7b_laptop": ["{file}", "2", "llama-1m"],
    "transformers_trainer": ["{file}", "12"],
}


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_an_example_runs_and_learns(file: Path, tmp_path: Path) -> None:
    package = NEEDS.get(file.stem)
    if package and find_spec(package) is None:
        pytest.skip(f"{package} is not here: tests/clients/*.txt name an environment with it")
    words = [sys.executable, *(word.format(file=file) for word in WORDS.get(file.stem, ["{file}", "30"]))]
    env = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)$", done.stdout, re.MULTILINE)]
    if file.stem == "llama_7b_laptop":
        assert re.search(r"^step 2: perplexity \d+$", done.stdout, re.MULTILINE)
    else:
        assert len(losses) == 2
        assert losses[1] < losses[0]
