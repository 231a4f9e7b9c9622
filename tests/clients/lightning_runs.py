"""Tiny runs of Lightning's Trainer with an optimizer of ours or torch's, and the table's rows of it."""

import warnings
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from command_runs import far
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from apollo_optim import RuleOptimizer, build_optimizer, rule_of
from apollo_optim.integrations.lightning import ReleaseCallback

STEPS, SAVED = 6, 4  # two epochs of 11 batches, 4 to a step: the last step of each has 3
BATCHES = [torch.randint(0, 48, (2, 12), generator=torch.Generator().manual_seed(i)) for i in range(11)]
RELEASED = (ReleaseCallback,)
TORCH_ADAMW = "torch.optim.AdamW"


class Batches:
    """A loader that knows where it is: Lightning's Trainer goes on within an epoch with no other kind."""

    def __init__(self) -> None:
        self.next = 0

    def __len__(self) -> int:
        return len(BATCHES)

    def __iter__(self) -> Iterator[Tensor]:
        self.next %= len(BATCHES)
        while self.next < len(BATCHES):
            self.next += 1
            yield BATCHES[self.next - 1]

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class Module(LightningModule):
    """Embedding, attention and MLP, norm, head; and `rare`, which no last micro-batch of a step uses."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, **knobs: Any) -> None:
        super().__init__()
        self.name, self.knobs = name, knobs
        torch.manual_seed(0)
        self.wte = nn.Embedding(48, 32)
        self.attn, self.mlp, self.rare_mlp = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(32, 64)
        self.down_mlp, self.norm, self.lm_head = nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 48, bias=False)
        self.to(dtype)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        x = self.wte(batch)
        hidden = self.mlp(x + self.attn(x)) + (self.rare_mlp(x) if index % 4 == 0 else 0.0)
        x = self.norm(x + self.down_mlp(hidden.tanh()))
        return nn.functional.cross_entropy(self.lm_head(x)[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        torch_adamw = self.name == TORCH_ADAMW
        optimizer = (
            torch.optim.AdamW(self.parameters(), lr=1e-2)
            if torch_adamw
            else build_optimizer(self.name, self, lr=1e-2, weight_decay=0.1, **self.knobs)
        )
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(
    out: Path,
    name: str = "apollo-mini",
    *,
    dtype: torch.dtype = torch.float32,
    callbacks: tuple[Any, ...] = (),
    resume: Path | None = None,
    knobs: dict[str, Any] | None = None,
    **own: Any,
) -> tuple[Module, Trainer]:
    """Two epochs, a checkpoint of every step under `out`; or on from a checkpoint."""
    module = Module(name, dtype, **(knobs or {}))
    kept = ModelCheckpoint(out, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    settings: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 4, **own}
    trainer = Trainer(
        default_root_dir=out, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[kept, *(callback() for callback in callbacks)], **settings,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, Batches(), ckpt_path=resume)
    return module, trainer


def difference(one: tuple[Module, Trainer], other: tuple[Module, Trainer]) -> float:
    """In any weight or state."""
    return far(_tensors(one), _tensors(other))


def _tensors(run: tuple[Module, Trainer]) -> dict[str, Any]:
    state = run[1].optimizers[0].state_dict()["state"]
    return dict(run[0].state_dict()) | {f"{i}.{key}": v for i, one in state.items() for key, v in one.items()}


def followed(run: tuple[Module, Trainer], rule: str) -> str:
    """How many of the four hidden matrices use the rule, by the optimizer's type and their state."""
    module, trainer = run
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, RuleOptimizer)
    matrices = {name: p for name, p in module.named_parameters() if p.ndim == 2 and ("mlp" in name or "attn" in name)}
    ruled = [name for name, p in matrices.items() if rule_of(p, optimizer.locate(p)[0]) == rule]
    assert {int(state["step"]) for state in optimizer.state.values()} == {STEPS}
    return f"{len(ruled)} of {len(matrices)}"


def rows(out: Path) -> Iterator[dict[str, Any]]:
    """Of the table: every figure is a largest difference."""
    for dtype in (torch.float32, torch.bfloat16):
        word = str(dtype).removeprefix("torch.")
        run = partial(train, dtype=dtype)
        own = {"name": "apollo", "knobs": {"rank": 8}}
        full, saved = run(out / word, **own), out / word / f"step={SAVED}.ckpt"
        adamw = run(out / f"{word}-adamw", TORCH_ADAMW)
        again = run(out / "x", TORCH_ADAMW, resume=out / f"{word}-adamw" / f"step={SAVED}.ckpt")
        yield {
            "client": f"Lightning {version('lightning')}",
            "case": f"{word}, apollo",
            "follows": followed(full, "apollo"),
            "release": difference(full, run(out / "x", **own, callbacks=RELEASED)),
            "resumed": difference(full, run(out / "x", **own, resume=saved)),
            "resumed_released": difference(full, run(out / "x", **own, resume=saved, callbacks=RELEASED)),
            "adamw": difference(adamw, again),
        }
