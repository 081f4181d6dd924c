"""Restore in place: a checkpoint into the modules, optimizers, tensors and values of a live state.

First everything is matched, and nothing touched: what does not fit is an error that names all of it. Then the bytes
come, straight into the memory of the live tensors where that is laid out as it was; then the objects are told.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch

from incckpt.errors import PickleRefusedError, StateMismatchError
from incckpt.state.build import Buffer, Builder, Bytes, MapLocation, device_available, set_generator_state
from incckpt.state.entries import TensorEntry
from incckpt.state.plain import type_name
from incckpt.state.rng import RngState
from incckpt.state.targets import (
    Live,
    Place,
    addresses,
    copy_into,
    find_destinations,
    is_stateful,
    load_and_compare,
    load_module,
    load_optimizer,
    overlaps_itself,
    tensors_in,
)
from incckpt.state.tree import (
    GeneratorRef,
    MappingNode,
    Pickled,
    Plain,
    SequenceNode,
    TensorRef,
    Tree,
    children,
    leaves,
)

__all__ = ["Assignment"]

log = logging.getLogger(__name__)

_Restore: TypeAlias = Callable[[], Any]  # restores one place of the target; returns the value that belongs there

_SHOWN = 20


class Assignment:
    """The restore of one checkpoint into one target.

    Once made, it has checked that the checkpoint fits, and changed nothing. Fill each of `ranges`, in the memory that
    `destination` gives or in new memory, `deliver` it, then `finish`::

        assignment = Assignment(tree, entries, sizes, target)
        for index in assignment.ranges:
            buffer = assignment.destination(index)
            if buffer is None:
                buffer = new_memory(sizes[index])
            fill(index, buffer)
            assignment.deliver(index, buffer)
        assignment.finish()

    If that breaks off in the middle, the target is undefined until another restore succeeds.

    Parameters
    ----------
    tree, entries
        The checkpoint, parsed and checked.
    sizes
        Bytes of each range.
    target
        Dicts, lists and tuples of live objects and plain values. What the target has, the checkpoint must have; what
        the checkpoint has besides is left out, which is logged. In detail:

        - A tensor or array is written in place; shape and dtype must be the same. Its device and stride may differ.
        - ``nn.Module``: names, shapes and dtypes must be the same; written in place, then ``load_state_dict`` is
          called. If a module has hooks that rewrite what is loaded, it is all left to ``load_state_dict``.
        - ``Optimizer``: the numbers of parameters must be the same. What its ``load_state_dict`` casts (to the dtype of
          the parameter) is put right afterwards, bit for bit.
        - Other objects with ``load_state_dict``: it is called. Tensors that come back in another dtype are logged.
        - `RngState` is restored last.
        - A dict, list or other container that holds none of these is replaced in its contents, whatever those were; a
          plain value is replaced.
    allow_pickle
        Whether pickled objects are loaded.

    Attributes
    ----------
    ranges
        The ranges that are needed, ascending.

    Raises
    ------
    StateMismatchError
        If the checkpoint does not fit; names every place.
    PickleRefusedError
        If the target needs a pickled object and `allow_pickle` is not set.
    """

    def __init__(
        self,
        tree: Tree,
        entries: Sequence[TensorEntry],
        sizes: Sequence[int],
        target: Any,
        *,
        allow_pickle: bool = False,
    ) -> None:
        self._entries = entries
        self._allow_pickle = allow_pickle
        self._problems: list[str] = []
        self._ignored: list[str] = []
        self._needed: set[int] = set()
        self._live: dict[int, Live] = {}
        self._last: list[_Restore] = []
        self._buffers: dict[int, Buffer] = {}
        self._delivered: set[int] = set()
        self._builder = self._new_builder(_saved_device_or_cpu)
        self._host_builder = self._new_builder("cpu")  # modules and optimizers move what they load
        self._restore = self._match(tree, target, "state")
        if self._problems:
            more = f"\n  and {len(self._problems) - _SHOWN} more" if len(self._problems) > _SHOWN else ""
            raise StateMismatchError(
                "the checkpoint does not fit, nothing was restored:\n  " + "\n  ".join(self._problems[:_SHOWN]) + more
            )
        if self._ignored:
            log.warning("in the checkpoint, but not in the target, so not restored: %s", _listing(self._ignored))
        self._members: dict[int, list[int]] = {}
        for index in sorted(self._needed):
            if entries[index].range >= 0:
                self._members.setdefault(entries[index].range, []).append(index)
        self.ranges = sorted(self._members)
        self._destinations = find_destinations(entries, sizes, self._live)

    def destination(self, index: int) -> Bytes | None:
        """Return the target's own memory for a range, ``uint8[sizes[index]]``, of any alignment.

        ``None`` if the target has none, has it on a device, in another layout, or for more than one range.
        """
        return self._destinations.get(index)

    def deliver(self, index: int, buffer: Buffer) -> None:
        """Hand over a range that has been filled; may be called from several threads for different ranges.

        Copies it to where it belongs, if it is not there already. `buffer` is kept only if an object is to get it.
        """
        builder = Builder(self._entries, {index: buffer}, map_location="cpu")
        for member in self._members[index]:
            live = self._live.get(member)
            if live is None:
                self._buffers[index] = buffer
            else:
                copy_into(live, builder.tensor(member))
        self._delivered.add(index)

    def finish(self) -> Any:
        """Restore everything; return the target, or what is to stand in its place if it is immutable."""
        if missing := set(self.ranges) - self._delivered:
            raise RuntimeError(f"finish() was called before ranges {sorted(missing)} were delivered")
        for live in self._live.values():
            if isinstance(live, torch.Tensor) and not live.is_inference():
                torch.autograd.graph.increment_version(live)
        value = self._restore()
        for restore in self._last:
            restore()
        return value

    def _new_builder(self, map_location: MapLocation) -> Builder:
        return Builder(
            self._entries, self._buffers, map_location=map_location, allow_pickle=self._allow_pickle, live=self._live
        )

    # -- matching: each method checks one place of the target and returns what restores it

    def _match(self, tree: Tree, target: Any, path: str) -> _Restore:
        if isinstance(target, (torch.Tensor, np.ndarray)):
            return self._match_tensor(tree, target, path)
        if isinstance(target, torch.Generator):
            return self._match_generator(tree, target, path)
        if is_stateful(target):
            return self._match_object(tree, target, path)
        if not _holds_live(target, set()):
            self._need(tree, path)
            return lambda: _replace_contents(target, self._builder.value(tree))
        if isinstance(target, dict):
            return self._match_dict(tree, target, path)
        return self._match_sequence(tree, target, path)

    def _match_tensor(self, tree: Tree, target: Live, path: str) -> _Restore:
        problem = self._misfit(tree, target)
        if problem:
            self._problems.append(f"{path} {problem}")
        elif isinstance(tree, TensorRef):
            self._needed.add(tree.index)
            self._live[tree.index] = target
        return lambda: target

    def _match_generator(self, tree: Tree, target: torch.Generator, path: str) -> _Restore:
        if not isinstance(tree, GeneratorRef):
            self._problems.append(f"{path} is a torch.Generator here and {_describe(tree)} in the checkpoint")
            return lambda: target
        self._needed.add(tree.index)

        def restore() -> torch.Generator:
            name = self._entries[tree.index].name
            set_generator_state(target, self._builder.tensor(tree.index), tree.device, name)
            return target

        return restore

    def _match_dict(self, tree: Tree, target: dict[Any, Any], path: str) -> _Restore:
        if not isinstance(tree, MappingNode):
            self._problems.append(f"{path} is a dict here and {_describe(tree)} in the checkpoint")
            return lambda: target
        stored = dict(tree.items)
        restores: list[tuple[Any, _Restore]] = []
        for key, value in target.items():
            if key in stored:
                restores.append((key, self._match(stored.pop(key), value, f"{path}[{key!r}]")))
            else:
                self._problems.append(f"{path}[{key!r}] is not in the checkpoint")
        self._ignored += [f"{path}[{key!r}]" for key in stored]

        def restore() -> dict[Any, Any]:
            for key, step in restores:
                target[key] = step()
            return target

        return restore

    def _match_sequence(self, tree: Tree, target: Any, path: str) -> _Restore:
        if not isinstance(tree, SequenceNode) or len(tree.items) != len(target):
            kind = type(target).__name__
            self._problems.append(f"{path} is a {kind} of {len(target)} here and {_describe(tree)} in the checkpoint")
            return lambda: target
        restores = [
            self._match(child, value, f"{path}[{index}]")
            for index, (child, value) in enumerate(zip(tree.items, target, strict=True))
        ]

        def restore() -> Any:
            values = [step() for step in restores]
            if isinstance(target, tuple):
                return type(target)(*values) if hasattr(target, "_fields") else tuple(values)
            for index, value in enumerate(values):
                target[index] = value
            return target

        return restore

    def _match_object(self, tree: Tree, target: Any, path: str) -> _Restore:
        self._need(tree, path)
        load: Callable[[Any, Any, str], None] = load_and_compare
        builder = self._builder
        if isinstance(target, torch.nn.Module):
            self._match_module(tree, target, path)
            load, builder = load_module, self._host_builder
        elif isinstance(target, torch.optim.Optimizer):
            self._match_optimizer(tree, target, path)
            load, builder = load_optimizer, self._host_builder

        def restore() -> Any:
            load(target, builder.value(tree), path)
            return target

        if isinstance(target, RngState):
            self._last.append(restore)
            return lambda: target
        return restore

    def _match_module(self, tree: Tree, module: torch.nn.Module, path: str) -> None:
        if not isinstance(tree, MappingNode):
            self._problems.append(f"{path} is a {type_name(module)} here and {_describe(tree)} in the checkpoint")
            return
        if any(part._load_state_dict_pre_hooks for part in module.modules()):
            return  # the hooks may rename, add or convert what is loaded: only load_state_dict can tell
        own = addresses(chain(module.parameters(), module.buffers()))
        live = module.state_dict()
        stored = dict(tree.items)
        if missing := [str(name) for name in live if name not in stored]:
            self._problems.append(f"{path}: not in the checkpoint: {_listing(missing)}")
        if unexpected := [str(name) for name in stored if name not in live]:
            self._problems.append(f"{path}: in the checkpoint, but not in the module: {_listing(unexpected)}")
        for name, value in live.items():
            node = stored.get(name)
            if node is None or not isinstance(value, torch.Tensor):
                continue
            if problem := self._misfit(node, value):
                self._problems.append(f"{path}: {name} {problem}")
            elif isinstance(node, TensorRef) and addresses([value]) <= own:
                self._live[node.index] = value

    def _match_optimizer(self, tree: Tree, optimizer: torch.optim.Optimizer, path: str) -> None:
        numbers = _parameter_numbers(tree)
        state = dict(children(tree)).get("state")
        if numbers is None or not isinstance(state, MappingNode):
            self._problems.append(f"{path} is an optimizer here; in the checkpoint, {_describe(tree)} that is none")
            return
        sizes, here = [len(group) for group in numbers], [len(group["params"]) for group in optimizer.param_groups]
        if sizes != here:
            self._problems.append(f"{path} has groups of {here} parameters here, and of {sizes} in the checkpoint")
        if list(chain(*numbers)) != list(range(sum(here))):
            return  # load_state_dict sorts it out
        # Of a state that exists already, the tensors that fit are written in place.
        own = addresses(tensor for parameter in optimizer.state.values() for _, tensor in tensors_in(parameter))
        live = dict(tensors_in(optimizer.state_dict()["state"]))
        for place, node in _tensor_refs(state):
            tensor = live.get(place)
            if tensor is not None and not self._misfit(node, tensor) and addresses([tensor]) <= own:
                self._live[node.index] = tensor

    def _need(self, tree: Tree, path: str) -> None:
        for leaf in leaves(tree):
            if isinstance(leaf, (TensorRef, GeneratorRef)):
                self._needed.add(leaf.index)
            elif isinstance(leaf, Pickled) and not self._allow_pickle:
                raise PickleRefusedError(
                    f"{path} holds a pickled {leaf.type} in the checkpoint; loading it can run any code. If you trust "
                    "whoever wrote it, pass allow_pickle=True"
                )

    def _misfit(self, tree: Tree, live: Live) -> str:
        """Return why the tensor `tree` cannot be written into `live`, or an empty string."""
        if not isinstance(tree, TensorRef):
            return f"is a tensor here and {_describe(tree)} in the checkpoint"
        entry = self._entries[tree.index]
        if isinstance(live, np.ndarray):
            kind, dtype, stride = "numpy", str(live.dtype), live.strides
            if type(live) not in (np.ndarray, np.memmap) or not live.flags.writeable:
                return f"is a read-only array, or a {type_name(live)}: cannot be restored in place"
            same = entry.kind == kind and entry.numpy_dtype == live.dtype
        else:
            kind, dtype, stride = "torch", str(live.dtype).removeprefix("torch."), live.stride()
            if not addresses([live]):
                return f"is a {type_name(live)} of layout {live.layout} on {live.device}: cannot be restored in place"
            same = entry.kind == kind and entry.dtype == dtype
        shape = tuple(live.shape)
        if not same or shape != entry.shape:
            return f"is {kind} {dtype} {shape} here and {entry.kind} {entry.dtype} {entry.shape} in the checkpoint"
        if overlaps_itself(live) and tuple(stride) != entry.stride:
            return (
                f"has stride {tuple(stride)} here, so that elements share memory, and {entry.stride} in the checkpoint"
            )
        return ""


def _saved_device_or_cpu(saved: str) -> str:
    if device_available(torch.device(saved)):
        return saved
    log.warning("tensors saved on %s go to the CPU where nothing in the target tells their device", saved)
    return "cpu"


def _replace_contents(target: Any, value: Any) -> Any:
    """Give the container `target` the contents of `value` if they are of one kind; return what belongs in its place."""
    if isinstance(target, dict) and isinstance(value, dict):
        target.clear()
        for key, item in value.items():
            target[key] = item
    elif isinstance(target, list) and isinstance(value, list):
        target[:] = value
    elif isinstance(target, set) and isinstance(value, set):
        target.clear()
        target.update(value)
    elif isinstance(target, deque) and isinstance(value, deque):
        target.clear()
        target.extend(value)
    else:
        return value
    return target


def _holds_live(value: object, seen: set[int]) -> bool:
    """Whether `value` is, or contains, something that is restored in place."""
    if isinstance(value, (torch.Tensor, np.ndarray, torch.Generator)) or is_stateful(value):
        return True
    if not isinstance(value, (dict, list, tuple, deque)) or id(value) in seen:
        return False
    seen.add(id(value))
    return any(_holds_live(item, seen) for item in (value.values() if isinstance(value, dict) else value))


def _tensor_refs(tree: Tree, place: Place = ()) -> Iterator[tuple[Place, TensorRef]]:
    if isinstance(tree, TensorRef):
        yield place, tree
    for key, child in children(tree):
        yield from _tensor_refs(child, (*place, key))


def _parameter_numbers(tree: Tree) -> list[list[Any]] | None:
    """Return the numbers of the parameters in each group of an optimizer's state, or ``None`` if it is none."""
    groups = dict(children(tree)).get("param_groups")
    numbers = []
    for _, group in children(groups) if groups is not None else ():
        params = dict(children(group)).get("params")
        if not isinstance(params, SequenceNode) or not all(isinstance(item, Plain) for item in params.items):
            return None
        numbers.append([item.value for item in params.items if isinstance(item, Plain)])
    return numbers if groups is not None else None


def _describe(tree: Tree) -> str:
    match tree:
        case TensorRef():
            return "a tensor"
        case GeneratorRef():
            return "a torch.Generator"
        case Pickled(_, name):
            return f"a pickled {name}"
        case Plain(value):
            return f"a value of type {type_name(value)}"
        case MappingNode(kind, items) | SequenceNode(kind, items):
            return f"a {kind} of {len(items)}"


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
