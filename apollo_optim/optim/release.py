"""The step inside backward: a weight is stepped as soon as its gradient is there, and the gradient is set free.

No second optimizer: the hooks run `step_one` of the one there is ("LOMO", Lv et al., arXiv 2306.09782, fused SGD's
update into the backward pass; torch runs any code there with `register_post_accumulate_grad_hook`).
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakMethod, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm

from apollo_optim.core.errors import InputError
from apollo_optim.core.place import is_sharded, local, whole
from apollo_optim.optim.knobs import Group
from apollo_optim.optim.optimizer import RuleOptimizer

_released: WeakSet[torch.optim.Optimizer] = WeakSet()


def release(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    clip: float | None = None,
    track_norm: bool = False,
    ready: Callable[[], bool] | None = None,
) -> "Released":
    """Step every parameter of `optimizer` inside `backward()` and set its gradient free at once.

    One gradient is in memory at a time instead of all of them, and the weights that come out are `step()`'s to the
    bit, whatever changes on the way: schedules, `load_state_dict`, added groups, unfrozen parameters, tied weights.

    >>> handle = release(model, optimizer)
    >>> for x, y in batches:
    ...     loss(model(x), y).backward()  # every weight is stepped in here
    ...     optimizer.step()  # steps what no hook could (see `Released`); nothing is left, mostly
    ...     scheduler.step()

    Call it when the model is as it will be trained: on its device, sharded (`fully_shard`), compiled.

    Args:
        clip: Clip the gradient of each parameter to this norm of its own. The total norm of all gradients, what
            `clip_grad_norm_` needs, is not known when the first weight is stepped. (APOLLO's limiter bounds the
            growth of every matrix's step without clipping.)
        track_norm: Collect the gradients' norms for `grad_norm`; may be switched on and off later.
        ready: Asked at every gradient whether it is complete. Where it says no, the gradient is kept and the next one
            added to it, as in `Released.accumulate`: for loops of other tools, which know themselves which micro-batch
            is the last (accelerate: `lambda: accelerator.sync_gradients`). None: every backward pass is a step.

    Raises InputError for an optimizer that is not of this library or is released already, a clip that is not above 0,
    and a model in DistributedDataParallel, which averages gradients later than the hooks run.
    """
    if not isinstance(optimizer, RuleOptimizer):
        raise InputError(
            f"{type(optimizer).__name__} has no step for one parameter: release works with the optimizers of "
            "build_optimizer (Apollo, ApolloMini, AdamW, ...); of a wrapper such as accelerate's, pass .optimizer"
        )
    if optimizer in _released:
        raise InputError("this optimizer is released already: keep the handle, or call its remove() first")
    if clip is not None and not clip > 0:
        raise InputError(f"clip={clip}: the norm that each gradient is clipped to must be greater than 0")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise InputError(
            "the model is in DistributedDataParallel, which averages the gradients of the processes after the hooks "
            "of this step have run: shard it with fully_shard (FSDP2) instead, or call step() without release"
        )
    return Released(model, optimizer, clip, track_norm, ready)


class Released:
    """What `release` returns: takes the hooks off again, and knows about accumulation and the gradients' norm.

    A context manager: the hooks are gone after it. `optimizer.step()` stays harmless and right. It steps, and frees,
    the gradients that no hook could: of a parameter that took part in an earlier micro-batch but not in the last, or
    that was put into the optimizer's groups by hand.

    Attributes:
        clip, track_norm, ready: As given to `release`; obeyed from the next gradient on.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: RuleOptimizer,
        clip: float | None,
        track_norm: bool,
        ready: Callable[[], bool] | None = None,
    ) -> None:
        self.clip, self.track_norm, self.ready = clip, track_norm, ready
        self._model, self._optimizer = model, optimizer
        self._keep = False
        self._norms: dict[Tensor, Tensor] = {}
        self._hooks: dict[Tensor, Any] = {}
        self._rest = optimizer.register_step_pre_hook(self._before_step)
        _released.add(optimizer)
        vars(optimizer)["add_param_group"] = self._add_param_group  # torch has no hook for this
        self._attach()
        if self._alone():
            warnings.warn(
                "several processes, and parameters that are not sharded: each process steps with its own gradients of "
                "them. DistributedDataParallel would average them too late; fully_shard (FSDP2) is in time",
                stacklevel=3,
            )

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Within it gradients are kept and added up as usual: for all micro-batches but the last.

        From the first one's backward pass to the last one's all gradients are in memory, as without `release`.
        """
        before, self._keep = self._keep, True
        try:
            yield
        finally:
            self._keep = before

    def grad_norm(self) -> Tensor:
        """The total norm (0-D) of the gradients stepped since the last call, before clipping; on their device.

        Read it once after each backward pass that has `track_norm`. Raises InputError if nothing was collected.
        """
        if not self._norms:
            raise InputError("no gradient norm was collected: set handle.track_norm = True before backward()")
        order: dict[Tensor, int] = {p: i for i, p in enumerate(self._model.parameters())}
        norms = sorted(self._norms.items(), key=lambda item: order.get(item[0], len(order)))  # sums have an order, too
        self._norms = {}
        total = get_total_norm([whole(norm) for _, norm in norms])
        for _, norm in norms:
            read_here(norm)
        return total

    def remove(self) -> None:
        """Take the hooks off: from here on `step()` steps, as ever."""
        for hook in (*self._hooks.values(), self._rest):
            hook.remove()
        self._hooks = {}
        vars(self._optimizer).pop("add_param_group", None)
        _released.discard(self._optimizer)

    def __enter__(self) -> "Released":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _attach(self) -> None:
        """A hook on every parameter that has none; on frozen ones too, for they may be unfrozen."""
        hook = _weak(self._on_gradient)
        for p in self._parameters():
            if p not in self._hooks:
                frozen = not p.requires_grad
                p.requires_grad_(True)  # torch takes a hook only now, but keeps it
                self._hooks[p] = p.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                p.requires_grad_(not frozen)

    def _add_param_group(self, param_group: Group) -> None:
        type(self._optimizer).add_param_group(self._optimizer, param_group)
        self._attach()

    def _on_gradient(self, p: Tensor) -> None:
        if not self._keep and (self.ready is None or self.ready()):
            self._step(p)

    def _before_step(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """The rest is stepped before a step without a closure, and after the closure of one that has one.

        Until that has run backward, gradients of earlier micro-batches are not the rest: they are added to.
        """
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._step_rest()
            return None

        def with_rest() -> Any:
            loss = closure()
            self._step_rest()
            return loss

        return args[:1], {**kwargs, "closure": with_rest}

    def _step_rest(self) -> None:
        for p in self._parameters():
            if p.grad is not None:
                if p not in self._hooks:
                    self._check_complete()
                self._step(p)

    def _check_complete(self) -> None:
        """Refuse groups in which others took the place of the released parameters: nothing was stepped, nor freed."""
        left = self._hooks.keys() - set(self._parameters())
        if left:
            raise InputError(
                f"{len(left)} released parameters have left the optimizer's groups, and others with gradients came: "
                "call release when the model is as it will be trained, after fully_shard or accelerator.prepare"
            )

    def _step(self, p: Tensor) -> None:
        if self.clip is not None:
            norm = clip_grad_norm_([p], self.clip)
        elif self.track_norm and p.grad is not None:
            norm = get_total_norm([p.grad])
        if self.track_norm:
            self._norms[p] = norm.detach()
        self._optimizer.step_one(p, self._group(p))
        if p.grad is not None:
            read_here(p.grad)
        p.grad = None

    def _group(self, p: Tensor) -> Group:
        """Looked up at every step: `load_state_dict` replaces the groups."""
        try:
            return self._optimizer.locate(p)[0]
        except KeyError:
            raise InputError(
                f"a released parameter, {tuple(p.shape)}, has left the optimizer's groups: call release after they are "
                "final, or handle.remove() first"
            ) from None

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _alone(self) -> bool:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        several = distributed and torch.distributed.get_world_size() > 1
        return several and not all(is_sharded(p) for p in self._parameters())


def read_here(t: Tensor) -> None:
    """Said of what is freed next: this stream may still be reading it.

    A hook runs on the stream of its parameter's accumulation, while a gradient's memory is of the stream that made it:
    given back to that one at once, it could be written anew before the step has read it. (Where both are one stream,
    torch notes nothing.)
    """
    if t.device.type == "cuda":
        local(t).record_stream(torch.cuda.current_stream(t.device))


def _weak(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A hook that does not keep its handle alive, nor model and optimizer with it.

    The garbage collector cannot see through a parameter's hooks: they would stay in memory for ever.
    """
    reference = WeakMethod(method)

    def hook(p: Tensor) -> None:
        found = reference()
        if found is None:
            raise InputError(
                "the optimizer that this parameter was released to is gone: keep it while you train, or, to go on "
                "without it, leave release by its remove() or `with`"
            )
        found(p)

    return hook
