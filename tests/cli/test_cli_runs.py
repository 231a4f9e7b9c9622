"""The run files say what the papers say, and each of them is a run that can be built."""

import json
import re
from pathlib import Path

import pytest

from apollo_optim import build_optimizer
from apollo_optim.cli import pretrain
from apollo_optim.train.config import differences, to_dict
from apollo_optim.train.models import SIZES, skeleton
from apollo_optim.train.optimizer import make_optimizer

RUNS = Path(__file__).resolve().parents[2] / "runs"
FILES = sorted({*RUNS.glob("*.yaml")} - {*RUNS.glob("finetune-*.yaml")})  # those: test_cli_finetune.py

# Published: steps, APOLLO's rank, Mini's scale; AdamW's lr, which below sequence 1024 is ours.
PUBLISHED = {
    "60m": (10_000, 128, 128, 1e-3),
    "130m": (20_000, 192, 192, 1e-3),
    "350m": (60_000, 256, 128, 1e-3),
    "1b": (100_000, 256, 128, 7e-4),
    "7b": (150_000, 256, 128, 7e-4),
    "13b": (150_000, 256, 128, 7e-4),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_run_file_is_a_run(path: Path) -> None:
    cfg = pretrain.parse(["--config", str(path)]).cfg
    assert path.read_text().startswith("# ")
    assert cfg.model.name in SIZES
    assert cfg.train.batch_size % (cfg.train.micro_batch or cfg.train.batch_size) == 0
    if path.stem == "llama-7b-q-apollo-mini":  # what one CPU can show, not the papers' protocol
        assert (cfg.train.batch_size, cfg.data.seq_len, cfg.train.release, cfg.model.dtype) == (
            1,
            256,
            True,
            "bfloat16",
        )
        return
    assert (cfg.schedule.kind, cfg.schedule.min_lr) == ("cosine", 0.1)
    if path.stem != "demo":
        assert cfg.schedule.warmup == 0.1
        assert (cfg.data.source, cfg.data.subset, cfg.data.mode) == ("allenai/c4", "en", "pad")
        assert cfg.data.tokenizer.endswith("t5-base")
        assert cfg.model.dtype == "bfloat16"
        assert cfg.train.batch_size * cfg.data.seq_len == 512 * 256
        assert path.stem.startswith(cfg.model.name)
        assert f"-{cfg.optim.name}" in path.stem


def test_the_demo_compares_two_runs_that_differ_in_their_optimizer_alone() -> None:
    makefile = (RUNS.parent / "Makefile").read_text()
    (adamw,) = re.findall(r"^DEMO_ADAMW := (.*)$", makefile, re.MULTILINE)
    demo = ["--config", str(RUNS / "demo.yaml")]
    ours, theirs = pretrain.parse(demo).cfg, pretrain.parse([*demo, *adamw.split()]).cfg
    assert differences(to_dict(ours), to_dict(theirs)) == ["optim.lr", "optim.name", "optim.rest"]
    searched = (RUNS.parent / "results" / "race" / "llama-4m" / "trials.jsonl").read_text().splitlines()
    for method, optim in (("apollo", ours.optim), ("adamw", theirs.optim)):
        whole = [line for line in map(json.loads, searched) if (line["method"], line["steps"]) == (method, 700)]
        assert {(line["lr"], line["rest_lr"]) for line in whole} == {(optim.lr, optim.rest_lr)}, "tuned as hard"


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_papers_hyper_parameters(size: str) -> None:
    steps, rank, scale, lr = PUBLISHED[size]
    apollo, mini, adamw = (
        pretrain.parse(["--config", str(RUNS / f"llama-{size}-{name}.yaml")]).cfg
        for name in ("apollo", "apollo-mini", "adamw")
    )
    assert {cfg.train.steps for cfg in (apollo, mini, adamw)} == {steps}
    assert (apollo.optim.lr, apollo.optim.knobs) == (0.01, {"rank": rank, "scale": 1})
    assert (mini.optim.lr, mini.optim.knobs["rank"], mini.optim.knobs["scale"]) == (0.01, 1, scale)
    assert mini.optim.knobs.get("scale_front", False) == (size in ("60m", "130m"))
    assert adamw.optim.lr == lr


@pytest.mark.parametrize("path", sorted(RUNS.glob("*-full.yaml")), ids=lambda path: path.stem)
def test_full_is_run_as_adamw_is(path: Path) -> None:
    ours, theirs = (
        to_dict(pretrain.parse(["--config", str(p)]).cfg) for p in (path, Path(str(path).replace("-full", "-adamw")))
    )
    assert differences(ours, theirs) == ["optim.name"]


LONG = [("apollo", 0.01, 2), ("apollo-mini", 0.01, 384), ("adamw", 0.005, None)]


@pytest.mark.parametrize(("name", "lr", "scale"), LONG)
def test_the_runs_of_sequence_1024(name: str, lr: float, scale: float | None) -> None:
    cfg = pretrain.parse(["--config", str(RUNS / f"llama-350m-seq1024-{name}.yaml")]).cfg
    assert (cfg.data.seq_len, cfg.optim.lr, cfg.optim.knobs.get("scale")) == (1024, lr, scale)


@pytest.mark.parametrize(
    "name", ["demo", "llama-60m-adamw", "llama-60m-apollo", "llama-60m-apollo-mini", "llama-60m-full"]
)
def test_model_and_optimizer_can_be_built(name: str) -> None:
    cfg = pretrain.parse(["--config", str(RUNS / f"{name}.yaml")]).cfg
    model = skeleton(cfg.model)
    optimizer = make_optimizer(cfg.optim, model)
    matrices = [group for group in optimizer.param_groups if group["name"] == "matrices"]
    assert sum(len(group["params"]) for group in matrices) == 7 * SIZES[cfg.model.name].layers
    rest = cfg.optim.lr if cfg.optim.rest_lr is None else cfg.optim.rest_lr
    for group in optimizer.param_groups:
        assert group["lr"] == (cfg.optim.lr if group["name"] == "matrices" else rest), group["name"]


def test_sizes_are_what_their_names_say() -> None:
    for name, millions in {"llama-60m": 58, "llama-130m": 134, "llama-4m": 3.4}.items():
        model = skeleton(pretrain.parse(["--model.name", name]).cfg.model)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.03)
        build_optimizer("apollo", model)
