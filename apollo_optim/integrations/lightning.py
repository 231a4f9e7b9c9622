"""Lightning's `Trainer`: any optimizer of ours is made in `configure_optimizers`; here is the step inside backward.

>>> from apollo_optim.integrations.lightning import ReleaseCallback
>>> Trainer(max_epochs=1, callbacks=[ReleaseCallback()]).fit(module, batches)
"""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from apollo_optim.core.errors import InputError
from apollo_optim.optim.release import Released, release

__all__ = ["ReleaseCallback"]


class ReleaseCallback(Callback):
    """The step inside backward (`apollo_optim.release`) in Lightning's Trainer: one gradient in memory at a time.

    It begins when training does, for only then the model is as it will be trained (on its device, sharded), and ends
    with it. With `accumulate_grad_batches`, gradients are kept until the last micro-batch of a step, or of an epoch.
    Weights are those of a run without it.

    Args:
        clip_tensor: Clip the gradient of each parameter to this norm of its own.

    Raises InputError when training begins, for what a step inside backward cannot honour: `gradient_clip_val`, a
    GradScaler (`precision="16-mixed"`), DistributedDataParallel, manual optimization, and optimizers of other
    libraries.
    """

    def __init__(self, clip_tensor: float | None = None) -> None:
        self.clip_tensor = clip_tensor
        self.handle: Released | None = None
        self._batch = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()
        _refuse(trainer, pl_module)

        def ready() -> bool:
            number = self._batch + 1
            last = trainer.is_last_batch or number == trainer.num_training_batches
            return bool(last or number % trainer.accumulate_grad_batches == 0)

        model: Any = trainer.model  # as the strategy has wrapped it
        self.handle = release(model, trainer.optimizers[0], clip=self.clip_tensor, ready=ready)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = batch_idx

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        if self.handle is not None:
            self.handle.remove()
        self.handle = None


def _refuse(trainer: Trainer, module: LightningModule) -> None:
    """Raise InputError for what a step inside backward cannot honour."""
    if not module.automatic_optimization:
        raise InputError(
            "automatic_optimization=False: only your training_step knows when a gradient is complete. Call "
            "apollo_optim.release(module, optimizer) in it yourself, and leave ReleaseCallback out"
        )
    if trainer.gradient_clip_val:
        raise InputError(
            f"gradient_clip_val={trainer.gradient_clip_val}: the norm of all gradients is not known when the first "
            "weight is stepped. Leave it out and, to clip every gradient to a norm of its own, say "
            f"ReleaseCallback(clip_tensor={trainer.gradient_clip_val})"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise InputError(
            f'precision="{trainer.precision}": the weights would be stepped before its GradScaler has unscaled the '
            'gradients. Say precision="bf16-true", or leave ReleaseCallback out'
        )
