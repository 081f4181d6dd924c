"""Restores in place: from a checkpoint into the modules, optimizers, tensors and values of a live state.

First everything is matched and nothing changed; one error names everything that does not fit. Then the bytes arrive, in
the memory of the live tensors if its layout is the same. Last, in the order of the target, objects load and values are
set.

Bytes are written into an object's tensors only if it loads by torch's own methods, which would only copy. Every other
object gets a state dict in new memory, and its ``load_state_dict`` decides (docs/decisions/013).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from incckpt.errors import PickleRefusedError, StateMismatchError
from incckpt.state.build import Buffer, Builder, Bytes, set_generator_state
from incckpt.state.contexts import Classes
from incckpt.state.entries import TensorEntry
from incckpt.state.inplace import Live, copy_into, find_destinations, mark_changed, overlaps_itself, why_not_writable
from incckpt.state.names import join_name
from incckpt.state.optimizers import (
    existing_tensors,
    is_torch_optimizer,
    load_optimizer,
    loads_as_torch_optimizer,
    optimizer_problems,
    reordered,
)
from incckpt.state.plain import shown, type_name
from incckpt.state.rng import RngState
from incckpt.state.selection import UNSELECTED, Patterns, Selection
from incckpt.state.subclasses import paired
from incckpt.state.targets import (
    compiled_alike,
    is_stateful,
    load_and_compare,
    loads_only_itself,
    renaming,
    state_tensors,
    tensors_of,
    torch_module_tensors,
)
from incckpt.state.tree import (
    GeneratorRef,
    MappingNode,
    Pickled,
    SequenceNode,
    TensorRef,
    Tree,
    children,
    describe,
    leaves,
)
from incckpt.state.values import is_value, needs_matching, replace_contents, takes_contents

__all__ = ["Assignment"]

log = logging.getLogger(__name__)

_Restore: TypeAlias = Callable[[], Any]  # restores one place of the target and returns its new value

_TOP = "state"
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class _At:
    """A place in the target.

    Attributes
    ----------
    path
        As written in Python, for messages.
    name
        Its dotted name, which patterns match.
    chosen
        Whether all of this place is restored, not only something in it.
    settable
        Whether its container can replace the value.
    """

    path: str
    name: str
    chosen: bool
    settable: bool


class Assignment:
    """The restore of one checkpoint into one target.

    The constructor checks that the checkpoint fits, and changes nothing. Fill each of `ranges`, in the memory that
    `destination` returns or in new memory, and `deliver` it; at the end, `finish`::

        assignment = Assignment(tree, entries, sizes, target)
        for index in assignment.ranges:
            buffer = assignment.destination(index)
            if buffer is None:
                buffer = new_memory(sizes[index])
            fill(index, buffer)
            assignment.deliver(index, buffer)
        assignment.finish()

    If this stops in the middle, the target is undefined until another restore succeeds.

    Parameters
    ----------
    tree, entries
        The checkpoint, parsed and checked.
    sizes
        Bytes of each range.
    target
        Dicts, lists and tuples of live objects and plain values. The checkpoint must have everything that the target
        has; what else it has is not restored, which is logged. In detail:

        - A tensor or array is written in place. Shape and dtype must be the same; device and stride may differ.
        - ``nn.Module``: names, shapes and dtypes must be the same. It is written in place; ``load_state_dict``, which
          would do the same, is not called.
        - ``Optimizer`` of ``torch.optim``: the numbers of parameters must be the same, and moments must have the shapes
          of their parameters. Existing state is written in place. Tensors that ``load_state_dict`` would cast to the
          dtype of the parameter are restored bit for bit.
        - Any other object with ``load_state_dict`` is given a new state dict, whose tensors it may keep. So are modules
          and optimizers if their class, a hook or a tensor of theirs takes part in loading. Nothing is checked first,
          and what the object raises is raised. Casts are undone, as above, if an optimizer loads by torch's own method;
          for other objects a warning lists the tensors that come back in another dtype.
        - Objects load in the order of the target, except `RngState`, which loads last.
        - A dict, list or other container that holds none of these gets the stored contents, whatever it held before. A
          plain value is replaced if its container is writable. At the top, containers are matched item by item, and an
          empty dict is refused.
    allow_pickle
        Whether to load pickled objects.
    keys, ignore
        Globs of dotted names, such as ``"model.*"``: restores only what `keys` match, and nothing that `ignore`
        matches; the rest of the target stays as it is. An object that loads itself is restored whole or not at all.

    Attributes
    ----------
    ranges
        The ranges needed, ascending.

    Raises
    ------
    StateMismatchError
        If the checkpoint does not fit, or the target is not writable; names every place.
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
        keys: Patterns = None,
        ignore: Patterns = None,
    ) -> None:
        self._entries = entries
        self._allow_pickle = allow_pickle
        self._selection = Selection(keys, ignore)
        self._classes = Classes()
        self._problems: list[str] = []
        self._left_out: list[str] = []
        self._needed: set[int] = set()
        self._live: dict[int, Live] = {}  # entry -> tensor that may be written before anything else is restored
        self._foreign = False  # whether some object may write to others while it loads
        self._last: list[_Restore] = []
        self._buffers: dict[int, Buffer] = {}
        self._delivered: set[int] = set()
        self._builder = self._new_builder(None)
        self._host_builder = self._new_builder("cpu")  # modules and optimizers move what they load
        top = _At(_TOP, "", self._selection.chooses(""), settable=False)
        self._restore = self._match(self._selection.part_of(tree), target, top)
        if self._problems:
            more = f"\n  and {len(self._problems) - _SHOWN} more" if len(self._problems) > _SHOWN else ""
            raise StateMismatchError(
                "the checkpoint does not fit, nothing was restored:\n  " + "\n  ".join(self._problems[:_SHOWN]) + more
            )
        if self._left_out:
            log.warning("in the checkpoint, but not in the target, so not restored: %s", _listing(self._left_out))
        self._members: dict[int, list[int]] = {}
        for index in sorted(self._needed):
            if entries[index].range >= 0:
                self._members.setdefault(entries[index].range, []).append(index)
        self.ranges = sorted(self._members)
        destinations, contested = find_destinations(entries, sizes, self._live)
        for index in contested:
            del self._live[index]  # restored in the order of the target, as by hand, so that the same write comes last
        self._destinations = {
            number: memory
            for number, memory in destinations.items()
            if all(index in self._live for index in self._members[number])  # others need memory of their own
        }

    def destination(self, index: int) -> Bytes | None:
        """Return the target's own memory for a range, ``uint8[sizes[index]]``, of any alignment.

        ``None`` if the target has no memory on the host with the layout of the range, if that memory belongs to other
        ranges too, or if an object will load a tensor of this range, which needs new memory.
        """
        return self._destinations.get(index)

    def deliver(self, index: int, buffer: Buffer) -> None:
        """Take a range that has been filled; several threads may call this for different ranges.

        Copies it to its place, if it is not there already. Keeps `buffer` only if an object will get it.
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
        """Restore everything; return the target, or its replacement if it is immutable."""
        if missing := set(self.ranges) - self._delivered:
            raise RuntimeError(f"finish() was called before ranges {sorted(missing)} were delivered")
        for live in self._live.values():
            mark_changed(live)
        value = self._restore()
        for restore in self._last:
            restore()
        return value

    def _new_builder(self, map_location: str | None) -> Builder:
        return Builder(
            self._entries,
            self._buffers,
            map_location=map_location,
            allow_pickle=self._allow_pickle,
            live=self._live,
            lenient=True,
            classes=self._classes,
        )

    # -- matching: each method checks one place of the target and returns a function that restores it

    def _match(self, tree: Tree, target: Any, at: _At) -> _Restore:
        if isinstance(target, (torch.Tensor, np.ndarray)):
            return self._match_tensor(tree, target, at)
        if isinstance(target, torch.Generator):
            return self._match_generator(tree, target, at)
        if is_stateful(target):
            return self._match_object(tree, target, at)
        container = isinstance(target, (dict, list, tuple, deque))
        if container and (at.path == _TOP or self._selection.is_partial(tree) or needs_matching(target, set())):
            if isinstance(target, dict):
                return self._match_dict(tree, target, at)
            return self._match_sequence(tree, target, at)
        return self._match_value(tree, target, at)

    def _match_value(self, tree: Tree, target: Any, at: _At) -> _Restore:
        if not isinstance(tree, Pickled) and not is_value(target):
            self._problems.append(
                f"{at.path} is a {type_name(target)}, which cannot be restored in place: give it state_dict() and "
                f"load_state_dict(), or put None there to be given {describe(tree)}"
            )
        elif not at.settable and not takes_contents(target, tree):
            self._problems.append(
                f"{at.path} is a {type_name(target)}, which cannot be written to here: "
                + ("restore into a dict" if at.path == _TOP else "put it into a dict or list")
            )
        else:
            self._need(tree, at)
        return lambda: replace_contents(target, self._builder.value(tree))

    def _match_tensor(self, tree: Tree, target: Live, at: _At) -> _Restore:
        writes, problem = self._writes(tree, target)
        if problem:
            self._problems.append(f"{at.path} {problem}")

        def restore() -> Live:
            for write in writes:
                write()
            return target

        return restore

    def _writes(self, tree: Tree, target: Live) -> tuple[list[Callable[[], None]], str]:
        """Return what writes the tensor `tree` into `target`, or why it does not fit."""
        pairs: Sequence[tuple[Tree, Live]] = [(tree, target)]
        problem = ""
        if isinstance(target, torch.Tensor):
            pairs, problem = paired(tree, target)
        problem = problem or next(filter(None, (self._misfit(node, inner) for node, inner in pairs)), "")
        if problem:
            return [], problem
        return [self._write(node.index, inner) for node, inner in pairs if isinstance(node, TensorRef)], ""

    def _write(self, index: int, target: Live) -> Callable[[], None]:
        """Note that entry `index` goes into `target`; return a function that writes it, unless that is done by then."""
        self._needed.add(index)
        if not self._foreign:
            self._live[index] = target

        def write() -> None:
            if index not in self._live:
                copy_into(target, self._host_builder.tensor(index))
                mark_changed(target)

        return write

    def _match_generator(self, tree: Tree, target: torch.Generator, at: _At) -> _Restore:
        if not isinstance(tree, GeneratorRef):
            self._problems.append(f"{at.path} is a torch.Generator here and {describe(tree)} in the checkpoint")
            return lambda: target
        self._needed.add(tree.index)

        def restore() -> torch.Generator:
            name = self._entries[tree.index].name
            set_generator_state(target, self._builder.tensor(tree.index), tree.device, name)
            return target

        return restore

    def _child(self, at: _At, key: Any, part: object, *, settable: bool) -> _At | None:
        """Return the place `key` of a container at `at`, or ``None`` if nothing in it is selected."""
        name = join_name(at.name, key if part is None else part)
        if self._selection.ignores(name):
            return None
        return _At(f"{at.path}[{shown(key)}]", name, self._selection.chooses(name) or at.chosen, settable)

    def _match_dict(self, tree: Tree, target: dict[Any, Any], at: _At) -> _Restore:
        if not isinstance(tree, MappingNode):
            self._problems.append(f"{at.path} is a dict here and {describe(tree)} in the checkpoint")
            return lambda: target
        if not target and tree.items:
            self._problems.append(f"{at.path} is an empty dict, so nothing says what to restore into: use load()")
        stored = dict(tree.items)
        restores: list[tuple[Any, _Restore]] = []
        for key, value in target.items():
            place = self._child(at, key, None, settable=True)
            child = stored.pop(key, None)
            if place is None:
                continue
            if child is not None:
                restores.append((key, self._match(child, value, place)))
            elif place.chosen:
                self._problems.append(f"{place.path} is not in the checkpoint")
        self._left_out += [f"{at.path}[{shown(key)}]" for key in stored]

        def restore() -> dict[Any, Any]:
            for key, step in restores:
                target[key] = step()
            return target

        return restore

    def _match_sequence(self, tree: Tree, target: Any, at: _At) -> _Restore:
        kind = type(target).__name__
        if not isinstance(tree, SequenceNode) or len(tree.items) != len(target):
            self._problems.append(f"{at.path} is a {kind} of {len(target)} here and {describe(tree)} in the checkpoint")
            return lambda: target
        immutable = isinstance(target, tuple)
        restores: list[tuple[int, _Restore]] = []
        for index, ((part, child), value) in enumerate(zip(children(tree), target, strict=True)):
            place = self._child(at, index, part, settable=at.settable or not immutable)
            if place is not None and child is not UNSELECTED:
                restores.append((index, self._match(child, value, place)))

        def restore() -> Any:
            values = list(target)
            for index, step in restores:
                values[index] = step()
                if not immutable:
                    target[index] = values[index]
            if not immutable:
                return target
            return type(target)(*values) if hasattr(target, "_fields") else tuple(values)

        return restore

    def _match_object(self, tree: Tree, target: Any, at: _At) -> _Restore:
        if isinstance(target, torch.nn.Module) and (tensors := torch_module_tensors(target)) is not None:
            return self._match_module(tree, target, tensors, at)
        if self._selection.is_partial(tree):
            self._problems.append(
                f"{at.path} loads itself, so it is restored whole or not at all; load() with keys=, and load it by hand"
            )
        self._need(tree, at)
        self._classes.learn(tensors_of(target))
        builder = self._builder
        load: Callable[[Any, Any, str], None] = load_and_compare
        if isinstance(target, torch.nn.Module):
            builder = self._host_builder
        elif isinstance(target, torch.optim.Optimizer) and loads_as_torch_optimizer(target):
            load = load_optimizer
            if moved := reordered(tree, target):
                log.warning(
                    "%s has its parameters in another order than the checkpoint, and optimizers go by the order: the "
                    "state of one parameter goes to another: %s",
                    at.path,
                    _listing(moved),
                )
            if is_torch_optimizer(target):
                self._match_optimizer(tree, target, at)

        def restore() -> Any:
            try:
                load(target, builder.value(tree), at.path)
            except RuntimeError as error:
                if isinstance(target, torch.nn.Module) and (hint := _renaming(tree, target)):
                    error.add_note(hint)
                raise
            return target

        if isinstance(target, RngState):
            self._last.append(restore)
            return lambda: target
        if not loads_only_itself(target):
            self._foreign = True
        return restore

    def _match_module(self, tree: Tree, module: torch.nn.Module, tensors: dict[str, torch.Tensor], at: _At) -> _Restore:
        if not isinstance(tree, MappingNode):
            self._problems.append(f"{at.path} is a {type_name(module)} here and {describe(tree)} in the checkpoint")
            return lambda: module
        stored = dict(tree.items)
        if stored.keys() != tensors.keys() and (alike := compiled_alike([*map(str, stored)], tensors)):
            stored = {alike[str(name)]: node for name, node in stored.items()}
        missing: list[str] = []
        writes: list[Callable[[], None]] = []
        for name, tensor in tensors.items():
            place = self._child(at, name, None, settable=True)
            node = stored.pop(name, None)
            if place is None:
                continue
            if node is None:
                if place.chosen:
                    missing.append(name)
            else:
                some, problem = self._writes(node, tensor)
                writes += some
                if problem:
                    self._problems.append(f"{at.path}: {name} {problem}")
        unexpected = [str(name) for name in stored]
        if unexpected and (hint := _renaming(tree, module)):
            self._problems.append(f"{at.path}: {hint}")
        if missing:
            self._problems.append(f"{at.path}: not in the checkpoint: {_listing(missing)}")
        if unexpected:
            self._problems.append(f"{at.path}: in the checkpoint, but not in the module: {_listing(unexpected)}")

        def restore() -> torch.nn.Module:
            for write in writes:
                write()
            return module

        return restore

    def _match_optimizer(self, tree: Tree, optimizer: torch.optim.Optimizer, at: _At) -> None:
        if problems := optimizer_problems(tree, self._entries, optimizer):
            self._problems += [f"{at.path}{problem}" for problem in problems]
        elif not self._foreign:  # tensors of existing state that fit are written in place
            for index, tensor in existing_tensors(tree, optimizer):
                if not self._misfit(TensorRef(index), tensor):
                    self._live[index] = tensor

    def _need(self, tree: Tree, at: _At) -> None:
        for leaf in leaves(tree):
            if isinstance(leaf, (TensorRef, GeneratorRef)):
                self._needed.add(leaf.index)
            elif isinstance(leaf, Pickled) and not self._allow_pickle:
                raise PickleRefusedError(
                    f"{at.path} holds a pickled {leaf.type} in the checkpoint; loading it can run any code. If you "
                    "trust whoever wrote it, pass allow_pickle=True"
                )

    def _misfit(self, tree: Tree, live: Live) -> str:
        """Return why the tensor `tree` cannot be written into `live`, or an empty string."""
        if not isinstance(tree, TensorRef):
            return f"is a tensor here and {describe(tree)} in the checkpoint"
        if problem := why_not_writable(live):
            return f"{problem}: cannot be restored in place"
        entry = self._entries[tree.index]
        if isinstance(live, np.ndarray):
            kind, dtype, stride = "numpy", str(live.dtype), live.strides
            same = entry.kind == kind and entry.numpy_dtype == live.dtype
        else:
            kind, dtype, stride = "torch", str(live.dtype).removeprefix("torch."), live.stride()
            same = entry.kind == kind and entry.dtype == dtype
        shape = tuple(live.shape)
        if not same or shape != entry.shape:
            return f"is {kind} {dtype} {shape} here and {entry.kind} {entry.dtype} {entry.shape} in the checkpoint"
        if overlaps_itself(live) and tuple(stride) != entry.stride:
            return (
                f"has stride {tuple(stride)} here, so that elements share memory, and {entry.stride} in the checkpoint"
            )
        return ""


def _renaming(tree: Tree, module: torch.nn.Module) -> str:
    return renaming([str(name) for name, _ in children(tree)], [name for name, _ in state_tensors(module)])


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
