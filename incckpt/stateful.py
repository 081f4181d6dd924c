"""Objects that save and restore themselves by ``state_dict()`` and ``load_state_dict()``."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch

from incckpt.errors import StateMismatchError
from incckpt.plain import MAX_DEPTH

__all__ = [
    "Place",
    "addresses",
    "is_stateful",
    "load_and_compare",
    "load_module",
    "load_object",
    "load_optimizer",
    "tensors_in",
]

log = logging.getLogger(__name__)

Place: TypeAlias = tuple[Any, ...]
"""Keys and positions that lead from a container to something in it."""


def is_stateful(value: object) -> bool:
    """Whether `value` is an object that saves and restores itself by ``state_dict()`` and ``load_state_dict()``."""
    return (
        callable(getattr(value, "state_dict", None))
        and callable(getattr(value, "load_state_dict", None))
        and not isinstance(value, type)
    )


def tensors_in(value: object, place: Place = ()) -> Iterator[tuple[Place, torch.Tensor]]:
    """Yield every torch tensor in nested dicts, lists and tuples, with the place where it is."""
    if isinstance(value, torch.Tensor):
        yield place, value
    elif len(place) < MAX_DEPTH:
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, (list, tuple)):
            items = enumerate(value)
        for key, child in items:
            yield from tensors_in(child, (*place, key))


def addresses(tensors: Iterable[torch.Tensor]) -> set[tuple[torch.device, int]]:
    """Return where the first elements of `tensors` are; those that have no address are left out."""
    return {
        (tensor.device, tensor.data_ptr())
        for tensor in tensors
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
    }


def load_module(module: torch.nn.Module, state: Mapping[str, Any], path: str) -> None:
    """Load a module's state.

    Raises
    ------
    StateMismatchError
        If the module refuses it; it may have taken a part by then.
    """
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise StateMismatchError(f"{path} cannot be restored: {error}") from error


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], path: str) -> None:
    """Load an optimizer's state exactly.

    ``Optimizer.load_state_dict`` casts floating-point state to the dtype of the parameter: the float32 moments of a
    bfloat16 parameter would lose half their bits. What comes back in another dtype is replaced by what was stored.
    """
    stored = list(tensors_in(state["state"]))
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    load_object(optimizer, state, path)
    parameters = dict(zip(numbers, (p for group in optimizer.param_groups for p in group["params"]), strict=True))
    for (number, *keys), tensor in stored:
        container: Any = optimizer.state
        *way, last = (parameters.get(number, number), *keys)
        for key in way:
            container = container[key] if _has(container, key) else None
        now = container[last] if _has(container, last) else None
        if isinstance(now, torch.Tensor) and now.dtype != tensor.dtype and now.shape == tensor.shape:
            container[last] = tensor.to(now.device)


def load_object(target: Any, state: Any, path: str) -> None:
    """Call ``target.load_state_dict(state)``; what it raises says where that was."""
    try:
        target.load_state_dict(state)
    except Exception as error:
        error.add_note(f"raised while incckpt restored {path}")
        raise


def load_and_compare(target: Any, state: Any, path: str) -> None:
    """Load `state` into an object of unknown kind, and log which tensors it then gives back in another dtype."""
    dtypes = {place: tensor.dtype for place, tensor in tensors_in(state)}
    load_object(target, state, path)
    if not any(dtype.is_floating_point or dtype.is_complex for dtype in dtypes.values()):
        return
    changed = [
        f"{''.join(f'[{key!r}]' for key in place)} ({dtypes[place]} to {tensor.dtype})"
        for place, tensor in tensors_in(target.state_dict())
        if dtypes.get(place, tensor.dtype) != tensor.dtype
    ]
    if changed:
        log.warning("%s converted what it loaded, so it is not as it was saved: %s", path, ", ".join(changed))


def _has(container: Any, key: Any) -> bool:
    if isinstance(container, dict):
        return key in container
    return isinstance(container, list) and isinstance(key, int) and key < len(container)
