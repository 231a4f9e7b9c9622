"""The plan of a GPU: the allocator's segments on cases worked by hand, and what the command says of them."""

import dataclasses

import pytest
import torch
from torch import nn

from apollo_optim import build_optimizer
from apollo_optim.cli.main import main
from apollo_optim.core.blocks import few_blocks
from apollo_optim.plan import plan, trace_step
from apollo_optim.plan.cuda import CONTEXT, MIB, advice, overhead, reserved, reserved_expandable
from apollo_optim.quant.products import PRODUCT_BLOCK
from apollo_optim.quant.weight import LowBitWeight
from apollo_optim.train.config import ModelConfig
from apollo_optim.train.loss import summed_loss
from apollo_optim.train.models import skeleton


@pytest.mark.parametrize(
    ("sizes", "plain", "expandable"),
    [
        ([], 0, 0),
        ([0], 0, 0),  # no memory at all
        ([4], 2 * MIB, 2 * MIB),  # 512 bytes of a small segment
        ([1] * 4096, 2 * MIB, 2 * MIB),  # 4096 x 512 fill one
        ([1] * 4097, 4 * MIB, 4 * MIB),
        ([MIB, MIB], 2 * MIB, 2 * MIB),  # still small
        ([MIB + 1], 20 * MIB, 20 * MIB),  # middle: a byte more
        ([5 * MIB] * 4, 20 * MIB, 20 * MIB),
        ([5 * MIB] * 5, 40 * MIB, 40 * MIB),
        ([10 * MIB], 10 * MIB, 20 * MIB),  # large: its own segment, or a page
        ([11 * MIB], 12 * MIB, 20 * MIB),  # to 2 MiB
        ([11 * MIB] * 100, 1200 * MIB, 1100 * MIB),
        ([3, 2 * MIB, 11 * MIB], (2 + 20 + 12) * MIB, (2 + 20) * MIB),
    ],
)
def test_segments_by_hand(sizes: list[int], plain: int, expandable: int) -> None:
    assert reserved(sizes) == plain
    assert reserved_expandable(sizes) == expandable
    assert overhead(sizes) == {"allocator": plain - sum(sizes), "context": CONTEXT}


def test_expandable_segments_are_advised_where_they_help() -> None:
    assert "takes 0.10 GB less" in advice([11 * MIB] * 100)
    assert "next to nothing" in advice([64 * MIB] * 100)


def test_a_plan_for_cuda_is_the_tensors_and_what_is_rounded_up() -> None:
    """Of one model: the rows of tensors are the CPU's where no block is cut, and the sizes add up to them."""
    model = skeleton(dataclasses.replace(ModelConfig("llama-1m"), dtype="bfloat16"))
    trace = trace_step(model, summed_loss, 2, 64)
    for release in (False, True):
        cpu = plan(model, "adamw", trace, release=release)
        gpu = plan(model, build_optimizer("adamw", model), trace, release=release, device="cuda")
        assert cpu.rows["allocator"] == cpu.rows["context"] == 0
        for mine, theirs in zip(gpu.moments, cpu.moments, strict=True):
            tensors = {part: size for part, size in mine.rows.items() if part not in ("allocator", "context")}
            assert sum(mine.sizes) == sum(tensors.values())
            assert mine.rows["allocator"] == reserved(mine.sizes) - sum(mine.sizes) > 0
            assert mine.rows["context"] == CONTEXT
            same = [part for part in tensors if part != "update"]  # its blocks are larger
            if mine.when == theirs.when:
                assert {part: theirs.rows[part] for part in same} == {part: tensors[part] for part in same}


def test_a_product_with_a_low_bit_weight_is_whole_on_a_gpu() -> None:
    weight = LowBitWeight.from_float(torch.empty(PRODUCT_BLOCK // 256, 512, device="meta"), 8, 128)
    layer = nn.Linear(512, weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)

    def copies(device: str) -> int:
        made: list[int] = []
        whole = LowBitWeight.dequantize

        def dequantize(self: LowBitWeight, *args: object, **kwargs: object) -> torch.Tensor:
            made.append(self.numel())
            return whole(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch, few_blocks(device):
            patch.setattr(LowBitWeight, "dequantize", dequantize)
            layer(torch.empty(2, 512, device="meta"))
        return max(made, default=0)

    assert copies("cuda") == weight.numel()
    assert copies("cpu") < weight.numel()


def test_the_command_plans_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-1m", "--device", "cuda", "--optimizer", "apollo-mini", "--seq", "32"]) == 0
    out = capsys.readouterr().out
    assert "allocator" in out
    assert "context" in out
    assert "not measured here" in " ".join(out.split())
    assert "expandable_segments:True" in out
    assert main(["plan", "llama-1m", "--device", "mps"]) == 2
    assert "--device" in capsys.readouterr().err
