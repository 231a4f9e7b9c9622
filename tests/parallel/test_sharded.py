"""Shards and one process take the same steps: FSDP2, HSDP, tensor parallelism, and checkpoints of them.

`python tests/parallel/test_sharded.py` prints what was measured. What the processes do is in `sharded.py`; they are
started once for two and once for four, and every test below looks at one kind of what they found.
"""

import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded import COMPILED, ON_FOUR, ON_TWO, RESTS, WHOLE_ZOO, Row, find
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException

from apollo_optim import AdamW, Apollo, ApolloMini, InputError

LIMIT = 1e-5  # ||sharded - single|| / ||single - start||, per tensor; measured: 4e-7 at most where gradients are equal
Found = dict[str, list[Row]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return find(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return find(4, tmp_path_factory.mktemp("four"))


def far(rows: list[Row], limit: float = LIMIT) -> list[Row]:
    assert rows
    return [row for row in rows if not row["distance"] <= limit]  # NaN is far


def test_a_process_that_dies_says_where(tmp_path: Path) -> None:
    with pytest.raises(ProcessExitedException, match="SIGABRT") as died:
        find(1, tmp_path, [abort])
    assert "in abort" in "".join(died.value.__notes__)


def abort() -> Iterator[Any]:
    """A check that ends its process as a broken heap would."""
    os.abort()


@pytest.mark.parametrize("where", ON_TWO)
def test_two_processes_are_one(two: Found, where: str) -> None:
    rows = [row for row in two["parity"] if row["layout"] == where]
    assert "refused" not in two
    assert {row["game"] for row in rows} == set(ON_TWO[where])
    assert not far(rows)


@pytest.mark.slow
def test_three_processes_are_one(tmp_path: Path) -> None:
    """Uneven everywhere, and empty in places."""
    three = find(3, tmp_path)
    assert not far(three["parity"])
    (row,) = three["convolution"]
    assert "split its first dimension" in row["said"]


@pytest.mark.parametrize("where", ON_FOUR)
def test_four_processes_are_one(four: Found, where: str) -> None:
    for row in four.get("refused", []):
        if row["layout"] == where:
            assert "a newer torch can" in row["said"]
            pytest.skip(row["said"])
    assert not far([row for row in four["parity"] if row["layout"] == where])


def test_the_rest_is_stepped_in_one_piece(two: Found, four: Found) -> None:
    """8-bit moments and FOAM need whole rows, and say so; the other rules add up over whatever ranks hold."""
    check_rest([*two["rest"], *four["rest"]])


@pytest.mark.slow
def test_the_rest_of_every_shape_is_stepped_in_one_piece(tmp_path: Path) -> None:
    found = []
    for world in (2, 4):
        (folder := tmp_path / str(world)).mkdir()
        found += find(world, folder, WHOLE_ZOO)["rest"]
    check_rest(found)


def check_rest(rows: list[Row]) -> None:
    assert {row["layout"] for row in rows} == {"fsdp 2", "columns 2", "rows x columns"}
    refused = {(row["layout"], row["game"]) for row in rows if row["refused"]}
    assert refused == set(itertools.product(("columns 2", "rows x columns"), ("adamw8bit", "foam")))
    assert all("whole rows" in row["said"] for row in rows if row["refused"])
    assert {row["game"] for row in rows if not row["refused"]} == set(RESTS)
    assert not far([row for row in rows if not row["refused"]])


def test_a_compiled_step_on_shards_is_that_of_one_process(two: Found) -> None:
    assert not far(two["compiled"])


@pytest.mark.slow
def test_compiled_steps_on_shards_are_those_of_one_process(tmp_path: Path) -> None:
    assert not far(find(2, tmp_path, COMPILED)["compiled"])


def test_bf16_weights_are_rounded_by_the_same_bits(two: Found) -> None:
    """Equal to the bit, but where another order of summation moves a value across its rounding bit: rare, one ulp."""
    for row in two["bf16"]:
        assert row["unequal"] <= 0.01, row
        assert row["ulps"] <= 1, row


def test_a_projection_drawn_from_the_rank_is_noticed(two: Found) -> None:
    """The mutant of what the tests above are for: they would fail, on every matrix that uses the rule."""
    followers = {
        "tall",
        "wide",
        "square",
        "uneven_tall",
        "uneven_wide",
        "experts",
        "wide_experts",
        "one_expert",
        "conv",
    }
    distances = {row["tensor"]: row["distance"] for row in two["rank in the seed"]}
    split = {*followers} - {
        "experts",
        "wide_experts",
        "one_expert",
    }  # (rank 0 has seeds as they should be, and experts)
    assert all(distances[name] > 1000 * LIMIT for name in split), distances
    assert all(distances[name] > 1000 * LIMIT for name in ("experts", "wide_experts")), distances


def test_rounding_by_local_position_is_noticed(two: Found) -> None:
    unequal = {row["tensor"]: row["unequal"] for row in two["bits by local position"]}
    assert all(unequal[name] > 0.05 for name in ("tall", "square", "uneven_tall", "norm")), unequal


def test_an_inf_on_one_rank_stops_all(two: Found) -> None:
    for row in two["non-finite"]:
        stack = row["game"] != "adamw" and "expert" in row["tensor"]
        alone = not stack or row["tensor"] == "mlp.one_expert.weight"
        assert row["skipped"] == row["skipped single"], row
        assert row["skipped"] == (2 if not stack else [2] if alone else [0, 0, 2]), row
        assert row["untouched"] == alone, row
        assert row["distance"] <= LIMIT, row
        assert row["from clean"] > 0.01, row


def test_a_distributed_checkpoint_goes_on_to_the_bit(two: Found) -> None:
    """Flattened state and not; the new optimizer has another seed, and began with torch's zero-gradient step."""
    assert {row["flat"] for row in two["checkpoint"]} == {True, False}
    for row in two["checkpoint"]:
        assert row["equal"], row
        assert row["state"] == [], row


def test_parameters_may_be_exchanged_for_shards_after_construction(two: Found) -> None:
    assert not far(two["swapped"])


def test_training_through_fully_shard(two: Found) -> None:
    """Gradients differ by their own rounding here: half of the batch on each rank."""
    if "trained" not in two:
        pytest.skip("fully_shard's forward does not run on a CPU in this torch")
    assert not far(two["trained"])


def test_the_step_inside_backward(two: Found) -> None:
    if "released" not in two:
        pytest.skip("fully_shard's forward does not run on a CPU in this torch")
    for row in two["released"]:
        assert row["equal"], row
        assert row["state"] == [], row
    for row in two["released norm"]:
        assert row["far"] <= 1e-6, row


def test_released_gradients_that_no_process_averages_are_refused(two: Found) -> None:
    (row,) = two["ddp"]
    assert "after the hooks" in row["said"]
    assert "fully_shard" in row["said"]
    assert len(row["warned"]) == 1
    assert "not sharded" in row["warned"][0]


def test_a_split_that_has_no_step_is_refused(two: Found) -> None:
    (row,) = two["strided"]
    assert "not one block" in row["said"]


def test_a_gradient_split_otherwise(two: Found) -> None:
    assert len(two["other split"]) == 3
    assert not far(two["other split"])


def test_fsdp1_is_refused(two: Found) -> None:
    for row in two["fsdp1"]:
        if not row["wrapped"]:
            pytest.skip(f"this torch does not wrap with FSDP1 on a CPU: {row['said']}")
        assert "fully_shard" in row["said"], row
        assert "\n" not in row["said"]


@pytest.mark.parametrize("shape", [(64,), (8, 8)])
def test_a_flat_parameter_is_refused(shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.zeros(shape))
    p._fsdp_flattened = True  # type: ignore[attr-defined]  # as FSDP1 marks its own
    for build in (lambda: Apollo([p], rank=1), lambda: ApolloMini([p], rank=1), lambda: AdamW([p])):
        with pytest.raises(InputError, match="fully_shard"):
            build()


def table(found: Found) -> str:
    """The worst tensor of every run: what the closing note quotes."""
    lines = [f"{'layout':16}{'optimizer':20}{'decay':>6}{'steps':>6}  {'worst':>8}  of the tensors (fp32)"]
    runs: dict[tuple[str, str, float], list[Row]] = {}
    for row in found["parity"]:
        runs.setdefault((row["layout"], row["game"], row["decay"]), []).append(row)
    for (where, game, decay), rows in runs.items():
        worst = max(rows, key=lambda row: float(row["distance"]))
        lines.append(f"{where:16}{game:20}{decay:6}{worst['steps']:6}  {worst['distance']:8.1e}  {worst['tensor']}")
    for kind in ("swapped", "trained", "rank in the seed", "bits by local position"):
        if kind in found:
            lines.append(f"{kind}: worst {max(row['distance'] for row in found[kind]):.1e}")
    if "bf16" in found:
        unequal = max(row["unequal"] for row in found["bf16"])
        lines.append(f"bf16, stochastic rounding: {unequal:.2%} entries unequal in the worst of {len(found['bf16'])}")
    if "checkpoint" in found:
        equal = sum(row["equal"] and not row["state"] for row in found["checkpoint"])
        lines.append(
            f"DCP, 3 steps after a resume: {equal} of {len(found['checkpoint'])} tensors and their state bitwise"
        )
    lines.append(
        "seconds: "
        + ", ".join(f"{row['check']} {row['seconds']:.1f} (processor {row['cpu']:.1f})" for row in found["seconds"])
    )
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ["SHARDED_LONG"] = "yes"
    for world in (2, 3, 4):
        with tempfile.TemporaryDirectory() as folder:
            sys.stdout.write(f"{world} gloo processes against one\n{table(find(world, Path(folder)))}\n\n")
