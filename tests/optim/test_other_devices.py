"""GPUs of other vendors: eager steps, no dtype that Apple's lack, and one line where there is none."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apollo_optim import RuleOptimizer
from apollo_optim.core.errors import InputError
from apollo_optim.optim.compiled import is_compiled
from apollo_optim.quant import write as low_bit
from apollo_optim.rules import RULES
from apollo_optim.train.build import choose_device
from apollo_optim.train.config import ModelConfig, RunConfig, TrainConfig


class Watch(TorchDispatchMode):
    """Notes the dtypes of what an operation makes on the device that stands for theirs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made |= {t.dtype for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_meta}
        return out


@pytest.mark.parametrize("rule", RULES)
def test_a_step_makes_no_float64_on_a_device(rule: str) -> None:
    """Apple's GPUs have none. (The meta device stands for theirs: what is not a CPU is stepped as it is.)"""
    knobs = {"rank": 4} if "rank" in RULES[rule].knobs() else {}
    shapes = [(96, 64), (96, 64), (64, 96), (3, 32, 16), (64,), (64,)]
    for dtype in (torch.float32, torch.bfloat16):
        params = [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in shapes]
        optimizer = RuleOptimizer(params, rule, **knobs)
        with Watch() as watch:
            for _ in range(2):
                for p in params:
                    p.grad = torch.empty_like(p)
                optimizer.step()
        assert dtype in watch.made
        assert torch.float64 not in watch.made


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_nothing_is_compiled_there_by_default(kind: str) -> None:
    large = nn.Parameter(torch.empty(4096, 4096, device="meta"))
    assert not is_compiled(None, large, kind)
    assert is_compiled(None, large, "cuda")
    assert not low_bit.is_compiled((4096, 4096), torch.device(kind))


@pytest.mark.parametrize("kind", ["mps", "xpu", "xla", "nonsense"])
def test_a_device_that_is_not_there_is_one_line(kind: str) -> None:
    if kind in ("mps", "xpu") and getattr(torch, kind).is_available():
        pytest.skip(f"there is an {kind} device")
    with pytest.raises(InputError, match=f"train.device={kind}: ") as error:
        choose_device(RunConfig(model=ModelConfig("llama-1m"), train=TrainConfig(device=kind)))
    assert "\n" not in str(error.value)
