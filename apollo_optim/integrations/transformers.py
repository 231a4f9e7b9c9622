"""transformers' `Trainer`, 4.57 and 5, and what is built on it: TRL, unsloth, axolotl.

>>> from apollo_optim.integrations.transformers import ReleaseCallback, apollo
>>> args = TrainingArguments(learning_rate=1e-4, max_grad_norm=0.0)
>>> Trainer(model, args, optimizer_cls_and_kwargs=apollo("apollo-mini", args, model), callbacks=[ReleaseCallback()])
"""

import inspect
from typing import Any

from accelerate.state import GradientState
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from apollo_optim.core.errors import InputError
from apollo_optim.core.place import is_sharded
from apollo_optim.optim.recipes import Recipe, build_optimizer, check_knobs, find_optimizer
from apollo_optim.optim.release import Released, release

__all__ = ["ReleaseCallback", "apollo"]

_THEIRS = {"lr": "learning_rate", "weight_decay": "weight_decay"}  # knob -> argument
_ADAM_EPS = 1e-8  # the arguments' own default


def apollo(
    name: str | Recipe, args: TrainingArguments, model: nn.Module | None = None, **knobs: Any
) -> tuple[Any, dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes: `build_optimizer(name, model, ...)` by Trainer's arguments.

    Learning rate, weight decay and betas are those of `args`; so is `adam_epsilon` where it is not its default, 1e-8,
    which is Adam's (without it every rule has its own). Groups, and what has no weight decay, are `param_groups`'
    choice, by what a tensor is. The optimizer is made when Trainer asks for it, of the model that it trains.

    Args:
        name: As of `build_optimizer`: any rule or recipe, "muon+adamw", or a `Recipe` of your own.
        args: Trainer's; TRL's configurations are such arguments, too.
        model: Trainer's. transformers 5 gives the optimizer the model that it trains; transformers 4 gives it nameless
            parameters, whose names are looked up here, and needs it.
        **knobs: All else that `build_optimizer` takes: `rank`, `targets`, `rest_lr`, `state_dtype`, ...

    Raises InputError for an unknown name or knob (naming the nearest) and for `lr` and `weight_decay`; when training
    begins, as `build_optimizer` does.
    """
    for knob, argument in _THEIRS.items():
        if knob in knobs:
            raise InputError(f"{knob}={knobs[knob]!r}: this is Trainer's: say {argument}=... in its arguments instead")
    recipe = find_optimizer(name) if isinstance(name, str) else name
    own = inspect.signature(build_optimizer).parameters
    check_knobs(recipe.choosing(knobs), {knob: value for knob, value in knobs.items() if knob not in own})
    settings = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        **({} if args.adam_epsilon == _ADAM_EPS else {"eps": args.adam_epsilon}),
    }
    return _Factory(recipe, model), {**settings, **knobs}


class _Factory:
    """Stands where an optimizer's class is expected.

    transformers 5 sees that it is none and calls `factory()(model, **settings)` (axolotl: `factory()(model, args,
    **settings)`); transformers 4 calls `factory(groups, **settings)` with groups of its own making.
    """

    def __init__(self, recipe: Recipe, model: nn.Module | None) -> None:
        self.recipe, self.model = recipe, model

    def __call__(self, given: nn.Module | list[dict[str, Any]] | None = None, *_: Any, **settings: Any) -> Any:
        if given is None:
            return self
        model = given if isinstance(given, nn.Module) else self._model_of(given)
        return build_optimizer(self.recipe, model, **settings)

    def _model_of(self, groups: list[dict[str, Any]]) -> nn.Module:
        if self.model is None:
            raise InputError("transformers 4 gives parameters without names: call apollo(name, args, model)")
        known = set(self.model.parameters())
        strange = [p for group in groups for p in group["params"] if p not in known]
        if strange:
            raise InputError(
                f"Trainer trains {len(strange)} parameters that the model given to apollo() does not have: give it "
                "the model that Trainer has in the end, adapters included"
            )
        return self.model


class ReleaseCallback(TrainerCallback):
    """The step inside backward (`apollo_optim.release`) in Trainer: one gradient in memory at a time.

    It begins when training does, for only then the model is as it will be trained (sharded, compiled), and ends with
    it. Gradients are accumulated until the micro-batch that accelerate calls the last. Weights and logs are those of a
    run without it, the logged gradient norm being that before clipping.

    Trackers that Trainer makes itself (`report_to`) come before all callbacks of yours, and see Trainer's own gradient
    norm, which is that of no gradients: `Trainer(..., report_to="none", callbacks=[ReleaseCallback(),
    TensorBoardCallback()])` lets them see the true one.

    Args:
        clip_tensor: Clip the gradient of each parameter to this norm of its own.

    Raises InputError when training begins, for what a step inside backward cannot honour: `max_grad_norm`, fp16's
    GradScaler, DistributedDataParallel, `auto_find_batch_size`, and optimizers of other libraries.
    """

    def __init__(self, clip_tensor: float | None = None) -> None:
        self.clip_tensor = clip_tensor
        self.handle: Released | None = None
        self._norm: Tensor | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        self._end()  # of a run that was cut short
        _refuse(args, model, optimizer)
        gradients = GradientState()
        self.handle = release(
            model,
            getattr(optimizer, "optimizer", optimizer),  # accelerate's wrapper has it inside
            clip=self.clip_tensor,
            ready=lambda: bool(gradients.sync_gradients),
        )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.handle is not None:
            self.handle.track_norm = _is_logged(args, state, state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.handle is not None:
            self._norm = self.handle.grad_norm() if self.handle.track_norm else None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self.handle is None or logs is None or "loss" not in logs:
            return
        for entry in (logs, state.log_history[-1]):
            if self._norm is None:
                entry.pop("grad_norm", None)
            else:
                entry["grad_norm"] = self._norm.item()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._end()

    def _end(self) -> None:
        if self.handle is not None:
            self.handle.remove()
        self.handle = self._norm = None


def _refuse(args: TrainingArguments, model: nn.Module, optimizer: Any) -> None:
    """Raise InputError for what a step inside backward cannot honour."""
    if args.max_grad_norm:
        raise InputError(
            f"max_grad_norm={args.max_grad_norm}: the norm of all gradients is not known when the first weight is "
            "stepped. Say max_grad_norm=0.0 and, to clip every gradient to a norm of its own, "
            f"ReleaseCallback(clip_tensor={args.max_grad_norm})"
        )
    if args.fp16 or getattr(optimizer, "scaler", None) is not None:
        raise InputError(
            "fp16: the weights would be stepped before its GradScaler has unscaled the gradients. Train in bf16, or "
            "leave ReleaseCallback out"
        )
    if args.auto_find_batch_size:
        raise InputError(
            "auto_find_batch_size: what runs out of memory inside backward has stepped some weights by then. Name a "
            "batch size, or leave ReleaseCallback out"
        )
    if args.world_size > 1 and not all(is_sharded(p) for p in model.parameters() if p.requires_grad):
        raise InputError(
            "DistributedDataParallel averages the gradients of the processes after the weights would have been "
            "stepped. Use FSDP2 (fsdp_version: 2), or leave ReleaseCallback out"
        )


def _is_logged(args: TrainingArguments, state: TrainerState, step: int) -> bool:
    """Will Trainer log this step? Those before the end of an epoch may all be its last."""
    if args.logging_strategy == "steps":
        return step % state.logging_steps == 0 or (args.logging_first_step and step == 1)
    return args.logging_strategy == "epoch" or (args.logging_first_step and step == 1)
