"""What a checkpoint holds: everything that changes while a run runs, and nothing else."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apollo_optim.core.errors import Damaged
from apollo_optim.train.checkpoint import restore_optimizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from apollo_optim.data import Batches


@dataclass
class TrainState:
    """A run between two steps."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    batches: Batches
    """Where the text goes on: anything with `next`, `state_dict` and `load_state_dict`."""
    identity: dict[str, Any]
    """Which text that is. It does not change, but a position means nothing without it."""
    step: int = 0
    """Steps made."""
    tokens: int = 0
    """Tokens trained on, padding not counted."""
    seconds: float = 0.0
    """Training time, up to the last time that the clock was stopped."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """The last one."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def state_dict(self) -> dict[str, Any]:
        """All of it but the weights, which a checkpoint holds in a form of their own."""
        on_gpu = self.device.type == "cuda"
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "evaluation": self.evaluation,
            "identity": self.identity,
            "data": self.batches.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": {
                "python": random.getstate(),
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if on_gpu else None,
            },
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go back to `saved`; the weights are somebody else's business, and so is whether the text is the same."""
        restore_optimizer(self.optimizer, saved["optimizer"])
        self.batches.load_state_dict(saved["data"])
        self.step, self.tokens, self.seconds, self.evaluation = (
            saved[key] for key in ("step", "tokens", "seconds", "evaluation")
        )
        random.setstate(saved["random"]["python"])
        torch.set_rng_state(saved["random"]["torch"])
        if saved["random"]["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(saved["random"]["cuda"], self.device)


SCHEMA: dict[str, Any] = {
    "step": int,
    "tokens": int,
    "seconds": float,
    "evaluation": dict,
    "identity": dict,
    "data": dict,
    "optimizer": {"state": dict, "param_groups": list},
    "random": {"python": tuple, "torch": torch.Tensor},
}


def check_saved(saved: dict[str, Any], checkpoint: Path) -> None:
    """Refuse a state of other types than `TrainState.state_dict` gives, or of numbers that cannot be.

    Raises Damaged, naming the key.
    """

    def check(value: Any, wanted: Any, name: str) -> None:
        kind = dict if isinstance(wanted, dict) else wanted
        right = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        if not right or (isinstance(value, (int, float)) and not 0 <= value < 1 << 62):
            raise Damaged(checkpoint / "state.json", f"its {name} is {value!r}, of type {type(value).__name__}")
        for key, inner in wanted.items() if isinstance(wanted, dict) else ():
            check(value.get(key), inner, f"{name}.{key}".lstrip("."))

    check(saved, SCHEMA, "")
    if saved["step"] != (named := int(checkpoint.name.removeprefix("step-"))):
        raise Damaged(checkpoint / "state.json", f"its step is {saved['step']}, not {named}")
