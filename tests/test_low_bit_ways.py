"""Every way in which torch touches a weight: on a low-bit one it works, or it says no in one line."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from apollo_optim import InputError, LowBitWeight


def low_bit(*shape: int, bits: int = 8, group_size: int = 8) -> nn.Parameter:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return nn.Parameter(LowBitWeight.from_float(value, bits, group_size))


def step_of(optimizer: type[torch.optim.Optimizer], **flags: bool) -> Callable[[nn.Parameter], None]:
    def step(w: nn.Parameter) -> None:
        w.grad = torch.ones_like(w)
        with torch.enable_grad():
            optimizer([w, nn.Parameter(torch.ones(2))], lr=1.0, **flags).step()  # type: ignore[call-arg]

    return step


LOST_WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "AdamW(fused=True)": step_of(torch.optim.AdamW, fused=True),
    "AdamW(foreach=True)": step_of(torch.optim.AdamW, foreach=True),
    "SGD(foreach=True)": step_of(torch.optim.SGD, foreach=True),
    "foreach": lambda w: torch._foreach_mul_([torch.ones(2), w], 0.5),
    "out=": lambda w: torch.add(torch.ones(4, 20), 1.0, out=w),
    "w[:, 0] = 0": lambda w: w.__setitem__((slice(None), 0), 0.0),
    "w[w > 0] = 0": lambda w: w.__setitem__(w > 0, 0.0),
    "w.t()": lambda w: w.t().zero_(),
    "w.data.view(-1)": lambda w: w.data.view(-1)[3:].mul_(2),
    "a view of a view": lambda w: w.view(2, 40)[0].detach().add_(1),
    "chunk": lambda w: w.chunk(2, dim=1)[1].fill_(1.0),
    "out= of a view": lambda w: torch.neg(torch.ones(20, 4), out=w.mT),
    "foreach of views": lambda w: torch._foreach_zero_(list(w.split(10, dim=1))),
}


@pytest.mark.parametrize("write", LOST_WRITES.values(), ids=LOST_WRITES)
def test_a_write_that_would_be_lost_is_refused(write):
    w = low_bit(4, 20)
    before = w.detach().clone()
    with torch.no_grad(), pytest.raises(InputError, match=r"cannot write to a (view of a )?low-bit weight") as refused:
        write(w)
    assert "\n" not in str(refused.value)
    assert torch.equal(w.codes, before.codes)
    assert torch.equal(w.scales, before.scales)


@pytest.mark.parametrize("group_size", [10, 8], ids=["whole groups", "a short one"])
def test_a_view_reads_what_the_weight_is(group_size):
    w = low_bit(4, 20, group_size=group_size)
    twin = w.dequantize().contiguous().requires_grad_()
    x = torch.randn(2, 4)
    views: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.view(-1)[5:45],
        lambda t: t.t()[1:, 0],
        lambda t: t.expand(3, 4, 20).chunk(2, dim=-1)[1],
        lambda t: t.unflatten(1, (2, 10)).unbind(1)[0],
    ]
    for view in views:
        assert torch.equal(view(w), view(twin))
    for t in (w, twin):
        (x @ t).square().sum().backward()
        (t.view(-1)[5:45] * 2).sum().backward()
    torch.testing.assert_close(w.grad, twin.grad)
    result = w.t() * 1
    assert type(result) is Tensor  # ... and may be written
