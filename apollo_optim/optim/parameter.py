"""One parameter between its steps: the rule that it follows, its state, and what a step of it is specialised on."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from apollo_optim.core.blocks import blocks
from apollo_optim.core.codecs import BF16, CODECS, FP32, SCALE, Codec
from apollo_optim.core.errors import InputError
from apollo_optim.core.matrix import Number, is_wide, matrix_shape
from apollo_optim.core.place import Place, aligned, is_sharded, local
from apollo_optim.core.random import Key, key_at
from apollo_optim.core.storage import writes_itself
from apollo_optim.optim.apply import Inputs, Static, Stored
from apollo_optim.optim.knobs import Group, make_rule
from apollo_optim.optim.together import Given
from apollo_optim.rules import Rule
from apollo_optim.rules.base import Slot

OURS = ("step", "seed", "skipped")  # what the optimizer keeps for every parameter, beside the rule's slots


def listed(params: Any, owner: str) -> list[Any]:
    """Parameters or groups, as a list. Raises InputError for a model in their place."""
    if isinstance(params, torch.nn.Module) and not isinstance(params, torch.nn.ParameterList):
        raise InputError(
            f"{owner} takes parameters or groups, not a {type(params).__name__}: {owner}(param_groups(model, ...)), or "
            "build_optimizer(name, model)"
        )
    return list(params)


def chosen_rule(p: Tensor, group: Group) -> Rule:
    """The rule that steps `p`: its group's, or what the group names for those that this one does not apply to.

    Decided by the group and the *global* shape alone. Raises InputError where neither applies.
    """
    rule = make_rule(group["rule"], group)
    if applies(rule, p, group["view"]):
        return rule
    other = make_rule(group["otherwise"], group)
    if not applies(other, p, group["view"]):
        raise InputError(
            f"neither {rule.title} nor {other.title}, which the group names otherwise, is a rule for a parameter of "
            f"shape {tuple(p.shape)}: give it a group of its own"
        )
    return other


def applies(rule: Rule, p: Tensor, view: str | None) -> bool:
    """Is it a rule for `p`, seen as its group's `view` says?"""
    if rule.view == "any":
        return rule.applies(tuple(p.shape))
    return p.ndim > 1 and p.numel() > 0 and rule.applies(_seen_shape(rule, matrix_shape(tuple(p.shape), view)))


def _seen_shape(rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2]) if rule.view == "channels" and is_wide(shape) else shape


def codec_of(name: str, slot: Slot, group: Group) -> Codec:
    """How a slot is stored: as the group asks for, where that fits."""
    asked = group["state_dtype"]
    if slot.kind not in ("mean", "square"):
        return FP32
    codec = CODECS[slot.codec or (asked.get(name, FP32.name) if isinstance(asked, dict) else asked)]
    return codec if codec.fits(slot.shape) else FP32


def static_of(p: Tensor, group: Group, rule: Rule) -> Static:
    """What a step of `p` is specialised on, but for the phase; on the meta device, too."""
    shape = tuple(p.shape)
    form = shape if rule.view == "any" else matrix_shape(shape, group["view"])
    if rule.view == "any" and p.ndim > 2 and _in_codes(rule, form, group):
        form = matrix_shape(shape, group["view"])  # rows of codes
    conv = len(form) != len(shape)
    place = Place.plain(form) if not is_sharded(p) else Place.flattened(p) if conv else Place.of(p)
    wide = rule.view == "channels" and is_wide(form)
    seen = place.transposed() if wide else place
    slots = []
    for name, slot in rule.slots(seen.shape).items():
        codec = codec_of(name, slot, group)
        coding = codec.coding.get(slot.kind)
        if coding is not None and slot.split == "same" and seen.splits(-1):
            raise InputError(
                f"state_dtype={codec.name!r} has no step for a parameter split as {p.placements}: neighbours in a row "  # type: ignore[attr-defined]
                "share a scale, so ranks must hold whole rows. Choose another state_dtype for it"
            )
        rounds = coding is not None or (codec is BF16 and group["stochastic_rounding"])
        slots.append((name, Stored(slot, codec, seen.of_state(slot.shape, slot.split), coding, rounds)))
    own = writes_itself(p)
    stochastic = group["stochastic_rounding"] and (p.dtype is torch.bfloat16 or own)
    if own and group["cautious_decay"]:
        raise InputError("cautious_decay has no step for low-bit weights, which decay as codes: leave it out")
    small = len(blocks(form, p.device)) == 1
    options = group["maximize"], float(group["grad_power"]), group["cautious_decay"]
    return Static(rule.static, conv, wide, place, seen, tuple(slots), stochastic, *options, own, small)


def _in_codes(rule: Rule, shape: tuple[int, ...], group: Group) -> bool:
    asked = group["state_dtype"]
    names = asked.values() if isinstance(asked, dict) else [asked]
    return bool(rule.slots(shape)) and any(CODECS[name].dtype is None for name in names)


def init_state(p: Tensor, group: Group, seed: int = 0) -> dict[str, Any]:
    """All that `p` will ever keep: later steps add no key and change no shape.

    Runs on the meta device too, so that plans and tables count the bytes of the code that will run.
    """
    static = static_of(p, group, chosen_rule(p, group))
    seen = static.seen
    stack = () if static.rule.view == "any" else seen.shape[:-2]
    state: dict[str, Any] = {
        "step": torch.zeros((), dtype=torch.float32, device="cpu"),
        "seed": seed,
        "skipped": seen.zeros(stack, "same", torch.int32, p.device),
    }
    for name, stored in static.slots:
        slot, codec = stored.slot, stored.codec
        if codec.dtype is not None:
            state[name] = _zeros(static, slot, codec.dtype, p.device)
            if slot.start == "eye":
                state[name].copy_(torch.eye(*slot.shape[-2:], dtype=codec.dtype, device=p.device))
            continue
        coding, n = codec.coding[slot.kind], slot.shape[-1]
        codes, scales = (*slot.shape[:-1], n // codec.packed), (*slot.shape[:-1], codec.groups(n))
        state[name] = seen.zeros(codes, slot.split, coding.codes, p.device)
        state[name + SCALE] = seen.zeros(scales, slot.split, coding.scale, p.device)
    return state


def _zeros(static: Static, slot: Slot, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A low-rank state lies in memory as its gradient does, across where that is a transpose: one pass over both."""
    if slot.split == "channels" and static.wide and static.seen.mesh is None:
        return static.seen.zeros((*slot.shape[:-2], slot.shape[-1], slot.shape[-2]), slot.split, dtype, device).mT
    return static.seen.zeros(slot.shape, slot.split, dtype, device)


class Shared:
    """What the parameters of a group share whose steps differ in nothing but tensors and seeds.

    Attributes:
        graphs: Compiled steps, by phase and by shapes, strides and dtypes of the tensors.
    """

    def __init__(self, group: Group, rule: Rule, static: Static) -> None:
        self.group, self.rule, self.static = group, rule, static
        self.graphs: dict[Any, Any] = {}
        self.has_phases = type(rule).phase is not Rule.phase
        self.rounded = ["weight"] if static.stochastic else []
        self.rounded += [name for name, stored in static.slots if stored.stochastic]
        self._phases: dict[Hashable, Static] = {None: static}
        self._numbers: dict[str, Number] = {}
        self._step = 0

    def at(self, step: int) -> Static:
        """What this step is specialised on."""
        phase = self.rule.phase(step) if self.has_phases else None
        if phase not in self._phases:
            self._phases[phase] = replace(self.static, phase=phase)
        return self._phases[phase]

    def numbers(self, step: int) -> dict[str, Number]:
        """The rates and the rule's scalars: the same object for all parameters at one step, unless a rate changes."""
        lr, weight_decay, last = self.group["lr"], self.group["weight_decay"], self._numbers
        if step != self._step or lr is not last["lr"] or weight_decay is not last["weight_decay"]:
            scalars = self.rule.scalars(step, self.static.seen.shape)
            self._numbers, self._step = {"lr": lr, "weight_decay": weight_decay, **scalars}, step
        return self._numbers


class Known:
    """One parameter and its state, until its group says otherwise."""

    def __init__(self, p: Tensor, group: Group, knobs: list[Any], state: dict[str, Any], shared: Shared) -> None:
        self.group, self.knobs, self.state, self.shared = group, knobs, state, shared
        if missing := [name for name, _ in shared.static.slots if name not in state]:
            raise InputError(
                f"the state of a parameter of group {group.get('name', '')!r} has no {missing[0]}: a key of the group "
                "that decides what is kept was changed after its first step. Make the optimizer anew with it"
            )
        self.given = {name: t for name, t in state.items() if isinstance(t, Tensor) and name != "step"}
        self.tensors = {name: local(t) for name, t in self.given.items()}
        self.sharded = is_sharded(p)

    def fits(self, group: Group, knobs: list[Any], state: dict[str, Any]) -> bool:
        """Is it still so?"""
        same = self.group is group and self.state is state and self.knobs == knobs
        return same and all(map(operator.is_, map(state.get, self.given), self.given.values()))

    def next_step(self, p: Tensor) -> Given:
        """What `apply_update` takes; it counts as taken."""
        step = int(self.state["step"].add_(1).item())  # on the CPU: no device waits for it
        assert p.grad is not None  # it was there when the step began
        weight, grad = _local_parts(p, p.grad) if self.sharded else (p, p.grad)
        keys: dict[str, Key] = {}
        seed = self.state["seed"]
        for name, counter in self.shared.rule.draws(step).items():
            keys[name] = key_at(seed, name.partition(".")[0], counter)
        for name in self.shared.rounded:
            keys[name] = key_at(seed, name, step)
        return Given(self.shared.at(step), weight, grad, self.tensors, Inputs(self.shared.numbers(step), keys))


def _local_parts(p: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's part of a sharded weight and of its gradient."""
    return local(p.detach()), local(aligned(grad, p))
