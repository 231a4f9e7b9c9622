"""Which weights of a model are stored in few bits."""

from collections.abc import Sequence

from torch import Tensor, nn

from apollo_optim.core.errors import InputError
from apollo_optim.core.names import (
    ALL_LINEAR,
    as_tuple,
    head_of,
    is_linear,
    is_pattern,
    is_router,
    is_vector,
    matches,
    unmatched,
    with_matrices,
)
from apollo_optim.core.place import is_sharded, local
from apollo_optim.core.placements import split_alike
from apollo_optim.core.storage import is_finite, writes_itself
from apollo_optim.quant.format import TOP
from apollo_optim.quant.weight import LowBitWeight

Chosen = dict[nn.Module, dict[str, str]]  # module -> the names of its weights, there and in the whole model


def quantize_weights(
    model: nn.Module,
    bits: int = 8,
    group_size: int = 128,
    targets: str | Sequence[str] = ("attn", "mlp"),
    exclude: str | Sequence[str] = (),
) -> list[str]:
    """Store the matrices of these modules as `LowBitWeight`s, in place, one at a time; returns their names.

    Call it before the optimizer is built: parameters are replaced. On the meta device it replaces shapes.

    Args:
        bits: 8 or 4 for each weight.
        group_size: Entries of a row that share a bf16 scale; even. A row need not be a whole number of groups.
        targets: As in `param_groups`: part of a module's name, a glob, `re:...`, or "all-linear", which leaves the
            head and recurrent layers out. Linear weights and stacks of expert matrices are taken, and embeddings and
            heads if they are named; a mixture's routers by globs and regular expressions alone; convolutions and
            vectors never.
        exclude: Patterns of the same kind, over parameter names.

    Raises InputError for other bits, a target that matches nothing, weights that two modules share, values that are not
    finite.
    """
    chosen = choose_weights(model, targets, exclude)
    for module in chosen:
        quantize_module(module, chosen, bits, group_size)
    return [name for names in chosen.values() for name in names.values()]


def choose_weights(model: nn.Module, targets: str | Sequence[str], exclude: str | Sequence[str] = ()) -> Chosen:
    """The weights that `quantize_weights` would take, found before any of them has a value."""
    chosen: Chosen = {}
    owners: dict[Tensor, str] = {}
    targets = as_tuple(targets)
    head = head_of(model) if ALL_LINEAR in targets else None
    for module_name, module in model.named_modules():
        for own, p in module.named_parameters(recurse=False):
            name = f"{module_name}.{own}" if module_name else own
            other = owners.setdefault(p, name)
            if p.ndim not in (2, 3) or isinstance(module, nn.modules.conv._ConvNd) or is_vector(own, p):
                continue
            linear = module is not head and not isinstance(module, nn.RNNBase) and is_linear(module, module_name, p)
            names = module_name, other.rpartition(".")[0]
            if not any(linear if t == ALL_LINEAR else any(matches(t, n) for n in names) for t in targets):
                continue
            if is_router(module, module_name, model) and not any(map(is_pattern, targets)):
                continue
            if any(matches(pattern, name) for pattern in as_tuple(exclude)):
                continue
            if other != name:
                raise InputError(
                    f"{name} and {other} are one weight, which cannot be low-bit: leave both out of targets"
                )
            chosen.setdefault(module, {})[own] = name
    modules = with_matrices(model.named_parameters(remove_duplicate=False))
    for target in targets:
        if not (chosen if target == ALL_LINEAR else any(matches(target, name) for name in modules)):
            raise InputError(unmatched(target, modules))
    return chosen


def quantize_module(module: nn.Module, chosen: Chosen, bits: int, group_size: int) -> None:
    """The weights that a module holds itself, if any of them are chosen; those that are low-bit already stay."""
    for own, name in chosen.get(module, {}).items():
        p = module._parameters[own]
        assert p is not None  # it was there when it was chosen
        if not writes_itself(p):
            module._parameters[own] = quantized(p, name, bits, group_size)


def quantized(p: nn.Parameter, name: str, bits: int, group_size: int) -> nn.Parameter:
    """What takes the place of a float parameter, split as that is. `name`: for the message if it cannot."""
    check_format(bits, group_size)
    value = local(p.detach())
    if not p.is_meta and not is_finite(value):
        raise InputError(f"{name} is not finite: it cannot be quantised")
    weight = LowBitWeight.from_float(value, bits, group_size)
    return nn.Parameter(split_alike(weight, p) if is_sharded(p) else weight, p.requires_grad)


def check_format(bits: int, group_size: int) -> None:
    """Raise InputError unless weights can have so many bits in groups of this size."""
    if bits not in TOP:
        raise InputError(f"bits={bits}: a weight can have {' or '.join(map(str, TOP))}")
    if group_size < 2 or group_size % 2:
        raise InputError(f"group_size={group_size}: an even number")
