"""One optimizer step: a batch becomes gradients, and the gradients an update."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apollo_optim import Released
from apollo_optim.core.place import local
from apollo_optim.data.layout import IGNORED
from apollo_optim.parallel.spread import waiting
from apollo_optim.parallel.world import ALONE, World
from apollo_optim.train.config import TrainConfig
from apollo_optim.train.failures import TrainingFailed
from apollo_optim.train.loss import summed_loss, targets
from apollo_optim.train.schedule import set_lr
from apollo_optim.train.skips import clip_each, total_norm
from apollo_optim.train.state import TrainState

if TYPE_CHECKING:
    from apollo_optim.data import Batch


class AsyncScalar:
    """A number on its way from the device: it sets out at once and is waited for when it is read."""

    def __init__(self, value: torch.Tensor) -> None:
        self._value = value.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if value.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record()

    def get(self) -> float:
        """The number."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._value)


@dataclass(frozen=True)
class StepReport:
    """What a step says of itself."""

    loss: float
    """Of the whole batch, before the update."""
    grad_norm: AsyncScalar | None
    """Of the gradients that are finite, before clipping; None where nobody asked."""
    data_wait: float = 0.0
    """Seconds that all steps so far waited for their batches."""


@dataclass
class TrainStep:
    """Makes the steps of a run."""

    state: TrainState
    cfg: TrainConfig
    schedule: Callable[[int], float]
    """The factor of every group's peak learning rate at a step, which counts from 1."""
    released: Released | None = None
    """The step inside the backward pass, if `train.release`."""
    tokenizer: Any = None
    """For the message where a token has no place in the model's vocabulary."""
    world: World = ALONE
    learner: nn.Module | None = None
    """The model and its loss, spread over the processes (`parallel.spread`); None: one process has it all."""
    data_wait: float = field(default=0.0, init=False)
    """Seconds that its steps waited for their batches."""

    def __call__(self, step: int, *, norm: bool) -> StepReport:
        """Make step number `step`; `norm`: report the gradients' norm.

        Raises TrainingFailed, before the weights are touched, if the loss is not finite, and TextEnded if there is no
        batch.
        """
        state = self.state
        set_lr(state.optimizer, self.schedule(step))
        asked = time.perf_counter()
        batch = state.batches.next(self.cfg.batch_size)
        self.data_wait += time.perf_counter() - asked
        self.world.draw(self.cfg.seed, step)
        report = dataclasses.replace(self.learn(batch, step, norm), data_wait=self.data_wait)
        state.tokens += int((batch.labels != IGNORED).sum())
        return report

    def learn(self, batch: Batch, step: int, norm: bool) -> StepReport:
        """One update from one batch, which every process has: each learns from its own rows of it.

        Every prediction of the batch weighs the same, however it is cut into micro-batches and spread over processes.
        """
        from apollo_optim.data import check_vocabulary

        state, cfg, device = self.state, self.cfg, self.state.device
        check_vocabulary(batch, state.model.config.get_text_config().vocab_size, self.tokenizer)
        predictions = max(targets(batch.labels), 1)
        if self.world.size > 1:
            batch = batch.map(self.world.mine)
        if device.type == "cuda":  # a copy from other memory waits for the device
            batch = batch.pinned()
        size = cfg.micro_batch or cfg.batch_size
        summed = torch.zeros((), device=device)
        pieces = [batch.part(at, at + size) for at in range(0, len(batch.labels), size)]
        for number, piece in enumerate(pieces, 1):
            with self.accumulating() if number < len(pieces) else contextlib.nullcontext():
                loss = self.loss_of(piece.map(lambda part: part.to(device, non_blocking=True))) / predictions
                summed += loss.detach()
                if self.world.shares > 1:
                    loss = loss * self.world.shares  # the processes' gradients are averaged
                if number < len(pieces):
                    loss.backward()  # type: ignore[no-untyped-call]
        # Set out before the last backward: it has arrived when the step needs it.
        total = AsyncScalar(self.world.total(summed))
        if self.released is not None:
            grad_norm = self.step_inside_backward(self.released, loss, total, step, norm)
        else:
            loss.backward()  # type: ignore[no-untyped-call]
            grad_norm = self.clip_gradients(norm)
            check_loss(total, step)
            state.optimizer.step()
        return StepReport(total.get(), grad_norm)

    def loss_of(self, rows: Batch) -> Tensor:
        """Summed over the predictions of these rows."""
        if self.learner is None:
            return summed_loss(self.state.model, rows.input_ids, rows.labels, self.cfg.loss, rows.position_ids)
        loss: Tensor = self.learner(*rows)
        return loss

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """Around a micro-batch that is not a step's last: nothing is stepped, and nothing averaged over processes."""
        with contextlib.ExitStack() as around:
            if self.released is not None:
                around.enter_context(self.released.accumulate())
            if self.learner is not None:
                around.enter_context(waiting(self.learner))
            yield

    def step_inside_backward(
        self, released: Released, loss: torch.Tensor, total: AsyncScalar, step: int, norm: bool
    ) -> AsyncScalar | None:
        """The last backward pass of a step, which changes the weights: so the loss is waited for before it."""
        check_loss(total, step)
        released.track_norm = norm
        loss.backward()  # type: ignore[no-untyped-call]
        self.state.optimizer.step()  # what took part in an earlier micro-batch, but not in the last
        return AsyncScalar(released.grad_norm()) if norm else None

    def clip_gradients(self, norm: bool) -> AsyncScalar | None:
        """Clip them as configured. The total norm is the one before, of all gradients that are finite."""
        cfg, parameters = self.cfg, [p for p in self.state.model.parameters() if p.grad is not None]
        found = None
        if norm or cfg.clip is not None:
            total = total_norm([p.grad for p in parameters if p.grad is not None])
            found = AsyncScalar(total)
            if cfg.clip is not None:
                own = [local(p.grad) for p in parameters if p.grad is not None]  # they may lie on several meshes
                torch._foreach_mul_(own, (cfg.clip / (total + 1e-6)).clamp(max=1.0))
        if cfg.clip_tensor is not None:
            clip_each([p.grad for p in parameters if p.grad is not None], cfg.clip_tensor)
        return found


def check_loss(loss: AsyncScalar, step: int) -> None:
    """Stop the run if the loss is not finite; the weights are not touched yet."""
    value = loss.get()
    if not math.isfinite(value):
        raise TrainingFailed(f"the loss is {value} at step {step}: stopped before its update", step)
