"""DeepSpeed's engine with optimizers of ours: without ZeRO it trains and resumes, ZeRO is refused."""

import pytest

pytest.importorskip("deepspeed", reason="make test-clients has an environment with it")
import deepspeed_runs
from command_runs import on_two
from deepspeed_runs import DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_zero_it_trains_by_the_rule_and_resumes_bitwise(dtype):
    assert on_two(deepspeed_runs.__file__, "0", dtype) == {"follows": "2 of 2", "resumed": 0.0, "adamw": 0.0}


@pytest.mark.parametrize("stage", [1, 3])
def test_zero_is_refused_at_the_first_step(stage):
    said = on_two(deepspeed_runs.__file__, str(stage), "float32")["refused"]
    assert "flat parameters (partitions of DeepSpeed ZeRO" in said
    assert "fully_shard" in said
