"""The loss without logits: the numbers of the loss with them, without a tensor of their size; or none at all."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_tiny import figures, tiny

from apollo_optim import InputError, build_optimizer, quantize_weights, release
from apollo_optim.train import build, chunked, loss
from apollo_optim.train.chunked import Unmade, summed_cross_entropy
from apollo_optim.train.loss import summed_loss
from apollo_optim.train.pretrain import pretrain

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 64 entries, the smallest there are: 300 are five of them, the last one short."""
    monkeypatch.setattr(chunked, "LOGITS", 1000)


@pytest.fixture
def parts_used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every loss without logits."""
    used: list[int] = []
    monkeypatch.setattr(loss, "summed_cross_entropy", lambda *args: used.append(1) or summed_cross_entropy(*args))
    return used


def model_of(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**SIZES | changes)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")


def rows(count: int = 3, seq_len: int = 16) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 300, (count, seq_len), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[-1, 5:] = -100
    return ids, labels


def differentiated(model: nn.Module, how: str) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = summed_loss(model, *rows(), how)
    (loss / 7).backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


# --- the numbers ---


@pytest.mark.parametrize("kind", ["llama", "tied", "low-bit", "mixtral", "gpt2", "frozen head"])
def test_loss_and_gradients_are_those_of_the_logits(kind: str, parts_used: list[int]) -> None:
    if kind == "mixtral":  # whose router has a loss of its own
        model = model_of(kind, output_router_logits=True, num_local_experts=2).train()
    elif kind == "gpt2":
        model = model_of(kind).eval()
    else:
        model = model_of("llama", tie_word_embeddings=kind == "tied")
    if kind == "low-bit":
        quantize_weights(model, 8, 16, targets="*", exclude="norm")
    model.get_output_embeddings().weight.requires_grad_(kind != "frozen head")
    loss, gradients = differentiated(model, "full")
    assert not parts_used
    for how in ("auto", "chunked"):
        again, others = differentiated(model, how)
        torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
        for ours, theirs in zip(others, gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))
    assert len(parts_used) == 2
    with torch.no_grad():
        torch.testing.assert_close(summed_loss(model.eval(), *rows()), loss, rtol=1e-6, atol=1.0 * (kind == "mixtral"))


@pytest.mark.parametrize("tokens", [40, 1000])
def test_bfloat16_is_as_good_as_with_logits(tokens: int) -> None:
    """Both beside float64, from the same bfloat16 numbers: loss and head. The gradient of the hidden states is a sum
    of parts, which are rounded themselves: two roundings instead of one, however many parts there are."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 64).bfloat16(), (torch.randn(700, 64) / 8).bfloat16()
    targets = torch.randint(700, (tokens,))
    head = nn.Linear(64, 700, bias=False, dtype=torch.bfloat16)

    def full(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy((x @ w.mT).to(torch.promote_types(x.dtype, torch.float32)), targets, reduction="sum")

    def in_parts(x: Tensor, w: Tensor) -> Tensor:
        del head.weight
        head.weight = w
        return summed_cross_entropy(Unmade(x, head), targets)

    def run(loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        x, w = (nn.Parameter(t.to(dtype)) for t in (hidden, weight))
        value = loss(x, w)
        (value / tokens).backward()
        return [t.detach().double() for t in (value, x.grad, w.grad)]

    exact = run(full, torch.float64)
    errors = [
        [float((ours - true).norm() / true.norm()) for ours, true in zip(run(loss, torch.bfloat16), exact, strict=True)]
        for loss in (in_parts, full)
    ]
    for ours, theirs, allowed in zip(*errors, (1.05, 2**0.5, 1.05), strict=True):
        assert ours <= theirs * allowed + 1e-7


class Sizes(TorchDispatchMode):
    """The most entries of a tensor that an operation made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **kwargs or {})
        self.most = max([self.most, *(t.numel() for t in tree_leaves(output) if isinstance(t, Tensor))])
        return output


def test_nothing_of_the_size_of_the_logits_is_made() -> None:
    model = model_of("llama", vocab_size=3000, hidden_size=16)
    ids = torch.randint(3000, (4, 64))
    most = {}
    for how in ("full", "auto", "chunked"):
        with Sizes() as sizes:
            summed_loss(model, ids, ids, how).backward()
        most[how] = sizes.most
    assert most["full"] == 4 * 64 * 3000
    assert most["auto"] == most["chunked"] < 4 * 64 * 3000 / 10


# --- when ---


def test_auto_is_for_large_logits(parts_used: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    monkeypatch.setattr(chunked, "LOGITS", 3 * 16 * 300)
    summed_loss(model, *rows())
    assert not parts_used
    monkeypatch.setattr(chunked, "LOGITS", 3 * 16 * 300 - 1)
    summed_loss(model, *rows())
    assert parts_used


def masked() -> nn.Module:
    """A model that writes into its logits, as Chameleon does."""
    model = model_of("llama")
    original = type(model).forward

    class Masked(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = original(self, *args, **kwargs)
            output.logits[:, :, 250:] = -100.0
            return output

    model.__class__ = Masked
    return model


def hooked() -> nn.Module:
    model = model_of("llama")
    model.lm_head.register_forward_hook(lambda module, args, logits: logits * 2)
    return model


def biased() -> nn.Module:
    model = model_of("llama")
    model.lm_head.bias = nn.Parameter(torch.randn(300))
    return model


def wrapped() -> nn.Module:
    """As accelerate does it."""
    model = model_of("llama")
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: plain(x) * 2
    return model


def as_a_whole() -> nn.Module:
    model = model_of("llama")
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda: model_of("gemma2", final_logit_softcapping=2.0, head_dim=16),
        lambda: model_of("cohere", logit_scale=3.0),
        lambda: model_of("granite", logits_scaling=3.0),
        lambda: model_of("phi"),
        lambda: model_of("opt", ffn_dim=64),
        *(masked, hooked, biased, wrapped, as_a_whole),
    ],
    ids=["gemma2", "cohere", "granite", "phi", "opt", "masked", "hooked", "biased", "wrapped", "compiled"],
)
def test_what_is_more_than_a_product_keeps_its_logits(build: Callable[[], nn.Module], parts_used: list[int]) -> None:
    model = build().eval()
    loss, gradients = differentiated(model, "full")
    again, others = differentiated(model, "auto")
    assert torch.equal(loss, again)
    assert all(map(torch.equal, gradients, others))
    assert not parts_used
    with pytest.raises(InputError, match=r"train.loss=chunked: the logits of \w+ are not the plain matmul.*use auto"):
        summed_loss(model, *rows(), "chunked")


def test_the_model_is_left_as_it_was() -> None:
    model = model_of("llama")
    summed_loss(model, *rows(), "chunked")
    assert type(model(rows()[0]).logits) is Tensor
    assert "forward" not in vars(model.lm_head)


def test_a_compiled_model_is_compiled_without_its_head(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))  # noqa: PLW0108 (to be a method)
    monkeypatch.setattr(build, "can_compile", lambda device: True)
    pretrain(tiny(tmp_path, train={"steps": 1, "loss": "chunked"}, model={"compile": True}))
    assert [type(module).__name__ for module in compiled] == ["LlamaModel"]
    model = model_of("llama")
    loss, _ = differentiated(model, "full")
    monkeypatch.undo()
    model.base_model.compile(backend="eager")
    torch.testing.assert_close(differentiated(model, "chunked")[0], loss, rtol=1e-6, atol=0)


# --- in a run ---


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_has_one_gradient_a_backward(tied: bool) -> None:
    model = model_of("llama", tie_word_embeddings=tied)
    twin = model_of("llama", tie_word_embeddings=tied)
    optimizer, other = (build_optimizer("apollo", m, lr=1e-2, rank=4) for m in (model, twin))
    seen: list[int] = []
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda p: seen.append(1))
    with release(model, optimizer):
        summed_loss(model, *rows(), "chunked").backward()
    summed_loss(twin, *rows(), "chunked").backward()
    other.step()
    assert len(seen) == 1
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_goes_on_to_the_bit(tmp_path, dtype: str) -> None:
    how = {"loss": "chunked", "micro_batch": 3}
    whole = tiny(tmp_path, "whole", train=how, model={"dtype": dtype})
    pretrain(whole)
    stopped = tiny(tmp_path, "stopped", train=how | {"steps": 4}, model={"dtype": dtype}, schedule={"kind": "constant"})
    again = dataclasses.replace(whole, out=stopped.out, schedule=stopped.schedule)
    pretrain(stopped)
    pretrain(again, resume=True)
    reference = dataclasses.replace(again, out=str(tmp_path / "reference"))
    pretrain(reference)
    assert figures(again.out)[-5:] == figures(reference.out)[-5:]
    plain = dataclasses.replace(whole, out=str(tmp_path / "plain"), train=dataclasses.replace(whole.train, loss="full"))
    assert pretrain(plain).loss == pytest.approx(
        figures(whole.out)[-1]["loss"], rel=1e-5 if dtype == "float32" else 1e-2
    )
