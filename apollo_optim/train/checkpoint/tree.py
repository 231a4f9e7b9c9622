"""A tree of Python values as JSON beside named tensors, and the optimizer's state, which is one."""

from __future__ import annotations

from typing import Any

import torch

from apollo_optim.core.errors import InputError

DTYPES = {str(kind).removeprefix("torch."): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}


def pack(tree: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Split a tree of dicts, lists, tuples, numbers, strings, dtypes and tensors into JSON and tensors."""
    tensors: dict[str, torch.Tensor] = {}

    def plain(value: Any, path: str) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, torch.Tensor):
            tensors[path] = value
            return {"$tensor": path}
        if isinstance(value, torch.dtype):
            return {"$dtype": str(value).removeprefix("torch.")}
        if isinstance(value, dict):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: plain(item, f"{path}.{key}") for key, item in value.items()}
            return {"$items": [[plain(key, path), plain(item, f"{path}.{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            items = [plain(item, f"{path}.{number}") for number, item in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        raise InputError(
            f"{path.lstrip('.')} is a {type(value).__name__}: only tensors, numbers, strings and containers of them "
            "can be saved"
        )

    return plain(tree, ""), {name.lstrip("."): tensor for name, tensor in tensors.items()}


def unpack(plain: Any, tensors: dict[str, torch.Tensor]) -> Any:  # noqa: PLR0911 (one for each kind)
    """The inverse of `pack`. Raises InputError if something is referred to that is not there."""
    if isinstance(plain, list):
        return [unpack(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if "$tensor" in plain:
        return _named(plain["$tensor"], tensors, "tensor")
    if "$dtype" in plain:
        return _named(plain["$dtype"], DTYPES, "dtype")
    if "$tuple" in plain:
        return tuple(unpack(item, tensors) for item in plain["$tuple"])
    if "$items" in plain:
        return {unpack(key, tensors): unpack(item, tensors) for key, item in plain["$items"]}
    return {key: unpack(item, tensors) for key, item in plain.items()}


def _named(name: Any, table: dict[str, Any], what: str) -> Any:
    try:
        return table[name.lstrip(".")]
    except (KeyError, AttributeError):
        raise InputError(f"there is no {what} {name!r}") from None


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """`load_state_dict`, but every tensor keeps the dtype it was saved in (torch would cast it to the parameter's)."""
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        raise InputError(f"the saved optimizer state does not fit this optimizer: {error}") from None
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in saved["state"].items():
        state = optimizer.state[parameters[index]]
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and state[key].dtype != value.dtype:
                state[key] = value.to(state[key].device)
