"""Updates that were not made: a gradient that is not finite leaves its weight as it was, and is counted."""

from __future__ import annotations

from collections import defaultdict

import torch

from apollo_optim.core.lockstep import summed
from apollo_optim.core.place import local, whole
from apollo_optim.core.placements import sharing

PATIENCE = 10  # steps in a row of which nothing is left, until a run stops


def norms_of(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The norm of each, (n,): one sum over processes for all that are sharded alike."""
    norms = torch.stack(torch._foreach_norm([local(grad) for grad in gradients]))
    parts: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, grad in enumerate(gradients):
        parts[sharing(grad)].append(i)
    for groups, own in parts.items():
        if groups:
            squares = norms[own].square()
            for group in groups:
                squares = summed(squares, group)
            norms[own] = squares.sqrt()
    return norms


def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The norm (0-D) of all gradients that are finite: those that are not are skipped, and must not clip the others."""
    norms = norms_of(gradients)
    total: torch.Tensor = torch.linalg.vector_norm(torch.where(norms.isfinite(), norms, 0.0))
    return total


def clip_each(gradients: list[torch.Tensor], clip: float) -> None:
    """Scale each gradient to a norm of at most `clip`, as torch's clip_grad_norm_ does with one."""
    factors = (clip / (norms_of(gradients) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local(grad) for grad in gradients], list(factors.unbind()))


class Skips:
    """Reads the optimizer's own counts where the log is written: no step waits for them.

    Attributes:
        total: Updates skipped since the beginning of the run, one for each matrix and step.
        streak: The last so many steps changed nothing at all, as far as it was looked at.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        self._optimizer, self._step = optimizer, step
        self._names: dict[torch.Tensor, str] = {p: name for name, p in model.named_parameters()}
        self._counts, _ = self._read()
        self._told: set[str] = set()
        self.total, self.streak = sum(self._counts.values()), 0

    def look(self, step: int) -> list[str]:
        """Count up to this step. Returns the parameters that had a gradient that was not finite for the first time."""
        counts, a_step = self._read()
        since, steps = sum(counts.values()) - self.total, step - self._step
        if steps:
            self.streak = self.streak + steps if a_step and since == steps * a_step else 0
        new = {name for name, count in counts.items() if count > self._counts.get(name, 0)} - self._told
        self._told |= new
        self._counts, self.total, self._step = counts, self.total + since, step
        return sorted(new)

    def _read(self) -> tuple[dict[str, int], int]:
        """Skipped updates by parameter, and how many updates a step has."""
        counted = {
            self._names.get(p, "?"): state["skipped"]
            for p, state in self._optimizer.state.items()
            if isinstance(state.get("skipped"), torch.Tensor)
        }
        if not counted:
            return {}, 0
        sums = torch.stack([whole(t).sum() for t in counted.values()]).tolist()  # one transfer
        return dict(zip(counted, sums, strict=True)), sum(t.numel() for t in counted.values())
