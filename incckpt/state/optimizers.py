"""Optimizers that load as torch's do: the form of their state, whether it fits, and loading it exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch

from incckpt.state.entries import TensorEntry
from incckpt.state.targets import OPTIMIZER_HOOKS, Place, load_object, loads_by, tensors_in
from incckpt.state.tree import MappingNode, Plain, SequenceNode, TensorRef, Tree, children, describe

__all__ = [
    "existing_tensors",
    "is_torch_optimizer",
    "load_optimizer",
    "loads_as_torch_optimizer",
    "optimizer_problems",
    "reordered",
]

_METHODS = {
    name: getattr(torch.optim.Optimizer, name)
    for name in ("load_state_dict", "state_dict", "_process_value_according_to_param_policy", "__getattribute__")
}


def loads_as_torch_optimizer(optimizer: torch.optim.Optimizer) -> bool:
    """Whether unchanged methods of ``torch.optim.Optimizer`` make and load the state of `optimizer`."""
    own = vars(optimizer)
    return loads_by(type(optimizer), own, _METHODS) and not any(own.get(hooks, True) for hooks in OPTIMIZER_HOOKS)


def is_torch_optimizer(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the class of `optimizer` is in ``torch.optim`` itself, and it loads as those do."""
    return f"{type(optimizer).__module__}.".startswith("torch.optim.") and loads_as_torch_optimizer(optimizer)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Any, path: str) -> None:
    """Load the state of an optimizer that loads as torch's do, exactly.

    ``Optimizer.load_state_dict`` casts floating-point state to the dtype of the parameter: the float32 moments of a
    bfloat16 parameter would lose half their bits. Tensors that come back in another dtype are replaced by the stored
    ones. It also leaves options that are tensors, such as ``lr``, on the device where they were saved; they are moved
    to the device of those that they replace.
    """
    before = [dict(group) for group in optimizer.param_groups]
    load_object(optimizer, state, path)
    for was, group in zip(before, optimizer.param_groups, strict=False):
        for key, value in group.items():
            if isinstance(value, torch.Tensor) and isinstance(was.get(key), torch.Tensor):
                group[key] = value.to(was[key].device)
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = dict(zip(numbers, (p for group in optimizer.param_groups for p in group["params"]), strict=False))
    for number, stored in state["state"].items():
        key = parameters.get(number, number)
        if key in optimizer.state:
            optimizer.state[key] = _uncast(optimizer.state[key], stored)


def _uncast(now: Any, stored: Any) -> Any:
    """Return `now` with each tensor whose dtype differs from the stored one's replaced by the stored one."""
    if isinstance(now, torch.Tensor):
        if isinstance(stored, torch.Tensor) and now.dtype != stored.dtype and now.shape == stored.shape:
            return stored.to(now.device)
    elif isinstance(now, dict) and isinstance(stored, dict):
        for key in now.keys() & stored.keys():
            now[key] = _uncast(now[key], stored[key])
    elif type(now) in (list, tuple) and type(stored) is type(now) and len(now) == len(stored):
        return type(now)(_uncast(a, b) for a, b in zip(now, stored, strict=True))
    return now


def optimizer_problems(tree: Tree, entries: Sequence[TensorEntry], optimizer: torch.optim.Optimizer) -> list[str]:
    """Return why the state `tree` does not fit an optimizer of ``torch.optim``, in texts that follow its path.

    One is a moment without its parameter's shape, with which ``step()`` would fail later.
    """
    numbers = _parameter_lists(tree, "params")
    state = dict(children(tree)).get("state")
    if numbers is None or not isinstance(state, MappingNode):
        return [f" is an optimizer here; in the checkpoint, {describe(tree)} that is none"]
    sizes, here = [len(group) for group in numbers], [len(group["params"]) for group in optimizer.param_groups]
    if sizes != here:
        return [f" has groups of {here} parameters here, and of {sizes} in the checkpoint"]
    if isinstance(optimizer, torch.optim.LBFGS):
        return []  # its vectors span all parameters
    parameters = dict(zip(chain(*numbers), chain(*map(_named, optimizer.param_groups)), strict=True))
    found = []
    for number, moments in state.items:
        if number not in parameters:
            continue
        parameter, name = parameters[number]
        shape = tuple(parameter.shape)
        factored = {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, *shape[-1:])}  # Adafactor's
        for key, node in children(moments):
            if isinstance(node, TensorRef) and key != "step":
                stored = entries[node.index].shape
                if stored not in ((), factored.get(str(key), shape)):
                    found.append(
                        f"['state'][{number!r}][{key!r}] is of shape {stored} in the checkpoint, and its parameter "
                        f"{name} of shape {shape} here: leave the optimizer out (ignore=), or load() its state, resize "
                        "it and load it by hand"
                    )
    return found


def existing_tensors(tree: Tree, optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the existing tensors of the optimizer's state that `tree` has too, each with the index of its entry."""
    state = dict(children(tree))["state"]
    if list(chain(*_parameter_lists(tree, "params") or ())) != list(range(sum(map(_size, optimizer.param_groups)))):
        return  # other numbers: load_state_dict sorts this out
    live = dict(tensors_in(optimizer.state_dict()["state"]))
    for place, index in _tensor_refs(state):
        if place in live:
            yield index, live[place]


def reordered(tree: Tree, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return which parameters have moved since the checkpoint, if both name theirs: state goes by position."""
    before = list(chain(*(_parameter_lists(tree, "param_names") or ())))
    here = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    if len(before) != len(here):
        return []
    known, now_known = set(before), set(here)
    return [
        f"{old} to {new}"
        for old, new in zip(before, here, strict=True)
        if old != new and (old in now_known or new in known)
    ]


def _size(group: dict[str, Any]) -> int:
    return len(group["params"])


def _named(group: dict[str, Any]) -> list[tuple[torch.Tensor, str]]:
    names = group.get("param_names") or [f"number {index} of its group" for index in range(_size(group))]
    return list(zip(group["params"], names, strict=True))


def _parameter_lists(tree: Tree, key: str) -> list[list[Any]] | None:
    """Return the list `key` of each group of an optimizer's state: its parameters' numbers or names.

    ``None`` if `tree` is no such state, or has no such lists.
    """
    groups = dict(children(tree)).get("param_groups")
    found = []
    for _, group in children(groups) if groups is not None else ():
        listed = dict(children(group)).get(key)
        if not isinstance(listed, SequenceNode) or not all(isinstance(item, Plain) for item in listed.items):
            return None
        found.append([item.value for item in listed.items if isinstance(item, Plain)])
    return found if groups is not None else None


def _tensor_refs(tree: Tree, place: Place = ()) -> Iterator[tuple[Place, int]]:
    if isinstance(tree, TensorRef):
        yield place, tree.index
    for key, child in children(tree):
        yield from _tensor_refs(child, (*place, key))
