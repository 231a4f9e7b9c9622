"""Low-bit weights under FSDP2: the codes of one process, and no more bytes gathered than these have.

What the processes do is in `low_bit_shards.py`; they are started once, and every test looks at one kind of findings.
"""

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from low_bit_shards import CHECKS, GROUP, HIDDEN, OUT, N, one, stored, unequal
from sharded import Row, find

Found = dict[str, list[Row]]
pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard's forward does not run on a CPU in this torch"
)
RARE = 0.01  # of the codes: sums of another order carry a number over its rounding bit
BY_ROWS = "adamw"  # needs no sum over processes: nothing is left to differ


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return find(2, tmp_path_factory.mktemp("two"), CHECKS[2])


def check_given(rows: list[Row]) -> None:
    assert {row["bits"] for row in rows} == {8, 4}
    for row in rows:
        assert row["cut"] == 0.0, row
        assert row["stepped"] > 0, row
        assert row["unequal"] <= (0.0 if row["game"] == BY_ROWS else RARE), row


def test_codes_are_those_of_one_process(two: Found) -> None:
    check_given(two["given"])


@pytest.mark.slow
def test_codes_of_groups_of_processes_are_those_of_one(tmp_path: Path) -> None:
    rows = find(4, tmp_path, CHECKS[4])["given"]
    assert {row["layout"] for row in rows} == {"fsdp", "hsdp"}
    check_given(rows)


def test_training_through_fully_shard(tmp_path: Path) -> None:
    """Three processes, none of them with as many rows as another; gradients differ by their own rounding."""
    rows = find(3, tmp_path, CHECKS[3])["trained"]
    assert {(row["bits"], row["synced"]) for row in rows} == {(8, True), (8, False), (4, True), (4, False)}
    for row in rows:
        assert row["stepped"] > 0.5, row
        assert row["unequal"] <= RARE, row


def test_fully_shard_of_one_process(tmp_path: Path) -> None:
    """A process that is alone is given no scales back: torch gathers nothing then, and takes the first tensor only."""
    rows = find(1, tmp_path, CHECKS[1])["trained"]
    assert {row["bits"] for row in rows} == {8, 4}
    for row in rows:
        assert row["stepped"] > 0.5, row
        assert row["unequal"] == 0.0, row


def test_the_step_inside_backward(two: Found) -> None:
    assert {row["synced"] for row in two["released"]} == {True, False}
    for row in two["released"]:
        assert row["equal"], row
        assert row["state"] == [], row


def test_what_is_gathered_are_codes_and_scales(two: Found) -> None:
    """Of each matrix as many rows of every process as the largest part has; vectors as they are, in bf16."""

    def whole_groups(n: int) -> int:
        return -(-n // GROUP) * GROUP

    first, second = -(-HIDDEN // 2) * 2, -(-OUT // 2) * 2
    vectors = 2 * first, 2 * second  # the bias, and the norm
    stored = {
        bits: (
            first * (whole_groups(N) * bits // 8 + 2 * whole_groups(N) // GROUP),
            second * (whole_groups(HIDDEN) * bits // 8 + 2 * whole_groups(HIDDEN) // GROUP),
        )
        for bits in (8, 4)
    }
    stored[None] = first * N * 2, second * HIDDEN * 2
    for row in two["gathered"]:
        expected = [sum(pair) for pair in zip(stored[row["bits"]], vectors, strict=True)]
        assert sorted(row["sent"]) == sorted(expected), row
    (kept,) = two["kept"]
    assert kept == {"rows": 16, "bytes": 16 * (N + 2 * N // GROUP)}


def test_gathered_weights_stand_for_the_dtype_of_the_policy(two: Found) -> None:
    (row,) = two["mixed"]
    assert row["seen"] == ["torch.bfloat16", "torch.bfloat16"]
    assert row["grad"] == "torch.float32"


def test_an_inf_on_one_rank_stops_all(two: Found) -> None:
    for row in two["non-finite"]:
        assert row["skipped"] == 1, row
        assert row["ndim"] == 3 or row["unequal"] == 0.0, row


def test_a_model_without_memory_is_cut_as_low_bit(two: Found) -> None:
    (row,) = two["drawn"]
    assert row["low"]
    assert row["equal"] == {"codes": True, "scales": True}


def test_a_distributed_checkpoint_holds_codes(two: Found) -> None:
    """In as many processes, and in one."""
    for row in two["checkpoint"]:
        assert row["unequal"] == 0.0, row
        assert row["same"], row
    folder = Path(two["checkpoint"][0]["folder"])
    alone = one()
    saved = alone.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(saved, checkpoint_id=folder / "dcp", no_dist=True)
    codes = torch.load(folder / "codes-0.pt")
    assert codes.keys() == stored(alone).keys()
    assert not any(unequal(its, codes[name]) for name, its in stored(alone).items())


def test_what_cannot_be_done_is_refused(two: Found) -> None:
    said = {row["way"]: row["said"] for row in two["refused"]}
    assert "Shard(0)" in said["columns"]
    assert "fully_shard" in said["fsdp1"]
    assert "cannot be distributed" in said["tensor parallelism"]
    assert "cannot write" in said["AdamW of torch"]
    assert "cannot write" in said["AdamW of torch, in lists"]
    assert not any("\n" in line for line in said.values())
