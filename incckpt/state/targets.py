"""Objects that load themselves: which of them load exactly as torch does, and how to call their loaders."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from incckpt.state.plain import MAX_DEPTH, shown, type_name
from incckpt.state.subclasses import is_of_tensors

__all__ = [
    "OPTIMIZER_HOOKS",
    "Place",
    "compiled_alike",
    "is_stateful",
    "load_and_compare",
    "load_object",
    "loads_by",
    "loads_only_itself",
    "renaming",
    "state_tensors",
    "tensors_in",
    "tensors_of",
    "torch_module_tensors",
]

log = logging.getLogger(__name__)

Place: TypeAlias = tuple[Any, ...]
"""Keys and positions on the way from a container to something in it."""


def is_stateful(value: object) -> bool:
    """Whether `value` is an object that saves and restores itself, with ``state_dict()`` and ``load_state_dict()``."""
    return (
        callable(getattr(value, "state_dict", None))
        and callable(getattr(value, "load_state_dict", None))
        and not isinstance(value, type)
    )


def tensors_in(value: object, place: Place = ()) -> Iterator[tuple[Place, torch.Tensor]]:
    """Yield every torch tensor in nested dicts, lists and tuples, with its place."""
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


def tensors_of(target: object) -> Iterator[torch.Tensor]:
    """Yield the tensors that a module or an optimizer has now."""
    if isinstance(target, torch.nn.Module):
        yield from chain(target.parameters(), target.buffers())
    elif isinstance(target, torch.optim.Optimizer):
        found = [getattr(target, name, None) for name in ("param_groups", "state")]  # an optimizer in name has none
        yield from (tensor for _, tensor in tensors_in(found))


# --- torch's own loading ----------------------------------------------------------------------------------------------
# The methods that take part in it, as of the import of this module: whatever replaces them, in a class or an instance,
# is not torch's.

_MODULE_METHODS = {
    name: getattr(torch.nn.Module, name)
    for name in (
        "load_state_dict",
        "_load_from_state_dict",
        "state_dict",
        "_save_to_state_dict",
        "get_extra_state",
        "set_extra_state",
        "__getattribute__",
    )
}
MODULE_HOOKS = (
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)
OPTIMIZER_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
# These only add or refuse names of older checkpoints; if no name is missing, they do what torch's own does.
_HARMLESS = (_NormBase._load_from_state_dict, _InstanceNorm._load_from_state_dict)


def torch_module_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """Return the tensors of a module's state by name, if loading would only copy into them.

    Returns
    -------
    tensors
        ``None`` if anything in the tree of modules takes part in loading: an override, a hook, extra state, or a tensor
        of another class. Then only ``load_state_dict`` knows how to load a checkpoint.
    """
    if not all(_is_untouched(part) for _, part in _parts(module, "")):
        return None
    found = dict(state_tensors(module))
    plain = (torch.Tensor, torch.nn.Parameter)
    return found if all(type(tensor) in plain or is_of_tensors(tensor) for tensor in found.values()) else None


def state_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters and persistent buffers of a module under the names that torch's ``state_dict()`` gives."""
    for prefix, part in _parts(module, ""):
        for name, tensor in chain(part._parameters.items(), part._buffers.items()):
            if tensor is not None and name not in part._non_persistent_buffers_set:
                yield prefix + name, tensor


def _parts(module: torch.nn.Module, prefix: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield every module with its prefix, in the order of ``load_state_dict``: a shared one several times."""
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _parts(child, f"{prefix}{name}.")


def _is_untouched(module: torch.nn.Module) -> bool:
    own = vars(module)
    return (
        loads_by(type(module), own, _MODULE_METHODS)
        and not any(getattr(module, hooks) for hooks in MODULE_HOOKS)
        and all(isinstance(own.get(name), dict) for name in ("_parameters", "_buffers", "_modules"))  # not scripted
    )


def loads_by(kind: type, own: Mapping[str, Any], methods: Mapping[str, Any]) -> bool:
    """Whether class `kind` has these `methods`, and no attribute of the instance (`own`) hides one."""
    return all(
        (method := getattr(kind, name)) is known or (name == "_load_from_state_dict" and method in _HARMLESS)
        for name, known in methods.items()
    ) and not any(name in own for name in methods)


def loads_only_itself(target: object) -> bool:
    """Whether the loader of `target` is known to write only to `target` itself."""
    parts = target.modules() if isinstance(target, torch.nn.Module) else [target]
    return all(
        _is_of_ours(part) and not any(getattr(part, hooks, None) for hooks in MODULE_HOOKS + OPTIMIZER_HOOKS)
        for part in parts
    )


def _is_of_ours(target: object) -> bool:
    """Whether only code of torch or of this package loads `target`."""
    loading = ("load_state_dict", "_load_from_state_dict", "set_extra_state", "__setstate__")
    owners = [next((kind for kind in type(target).__mro__ if name in vars(kind)), None) for name in loading]
    return all(
        kind is None or kind.__module__.partition(".")[0] in ("torch", "incckpt") for kind in owners
    ) and not any(name in getattr(target, "__dict__", {}) for name in loading)


# --- calling loaders --------------------------------------------------------------------------------------------------


def load_object(target: Any, state: Any, path: str) -> None:
    """Call ``target.load_state_dict(state)``; add `path` to what it raises."""
    try:
        verdict = target.load_state_dict(state)
    except Exception as error:
        error.add_note(
            f"raised by load_state_dict() of {path}, a {type_name(target)}, in the middle of a restore: the target is "
            "undefined until another restore succeeds"
        )
        raise
    for what in ("missing_keys", "unexpected_keys"):
        names = getattr(verdict, what, None)
        if isinstance(names, Sequence) and names:
            log.warning(
                "%s was restored, but its load_state_dict() reports %s: %s", path, what, ", ".join(map(str, names))
            )


def load_and_compare(target: Any, state: Any, path: str) -> None:
    """Let `target` load `state`, and log which tensors its ``state_dict()`` then has in another dtype."""
    dtypes = {place: tensor.dtype for place, tensor in tensors_in(state)}
    load_object(target, state, path)
    if not any(dtype.is_floating_point or dtype.is_complex for dtype in dtypes.values()):
        return
    try:
        loaded = list(tensors_in(target.state_dict()))
    except Exception as error:  # noqa: BLE001 -- the object has loaded; this check only helps
        log.warning("%s was restored, but its state_dict() raises %r: it cannot be saved now", path, error)
        return
    changed = [
        f"{''.join(f'[{shown(key)}]' for key in place)} ({dtypes[place]} to {tensor.dtype})"
        for place, tensor in loaded
        if dtypes.get(place, tensor.dtype) != tensor.dtype
    ]
    if changed:
        log.warning("%s converted what it loaded, so it is not as it was saved: %s", path, ", ".join(changed))


# --- names ------------------------------------------------------------------------------------------------------------

_COMPILED = "_orig_mod"
_WRAPPERS = {
    _COMPILED: "torch.compile",
    "module": "DistributedDataParallel, DataParallel or AveragedModel",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "activation checkpointing",
}


_FOUR_BIT = ".quant_state.bitsandbytes__"


def renaming(stored: Sequence[str], here: Sequence[str]) -> str:
    """Return a hint why names differ, or an empty string: a wrapper around the model, a prefix, 4-bit layers.

    Parameters
    ----------
    stored, here
        Names of a module's tensors in the checkpoint, and in the target.
    """
    if any(_FOUR_BIT in name for name in stored) and not any(_FOUR_BIT in name for name in here):
        return (
            "the checkpoint has 4-bit layers of bitsandbytes, which save more than they can load: restore into "
            "make_loadable(model), from incckpt.integrations.bitsandbytes, with the model quantised as it was"
        )
    for segment, wrapper in _WRAPPERS.items():
        if {_without(name, segment) for name in stored} == {_without(name, segment) for name in here}:
            with_it, without, advice = ("the checkpoint", "the target", "wrap the target in the same way")
            if sum(map(len, stored)) < sum(map(len, here)):
                with_it, without, advice = (
                    "the target",
                    "the checkpoint",
                    f"restore into the model inside (.{segment})",
                )
            return f"names of {with_it} have {segment + '.'!r}, from {wrapper}, those of {without} have not: {advice}"
    for longer, shorter, owner in ((stored, here, "the checkpoint"), (here, stored, "the target")):
        some = next(iter(longer), "")
        for name in shorter:
            prefix = some.removesuffix(name)
            if prefix not in ("", some) and {prefix + other for other in shorter} == set(longer):
                return (
                    f"the names of {owner} begin with {prefix!r}, and are the same after it: restore into the module "
                    "that was saved, or load() the state and rename it"
                )
    return ""


def compiled_alike(stored: Collection[str], here: Collection[str]) -> dict[str, str]:
    """Return the names that tensors of a checkpoint have in a target, where ``torch.compile`` alone makes them differ.

    Of a module that was compiled, whole or in part, or is now. The modules are the same, and so are their tensors.
    """
    theirs, ours = ({_without(name, _COMPILED): name for name in names} for names in (stored, here))
    if theirs.keys() != ours.keys() or len(theirs) != len(stored) or len(ours) != len(here):
        return {}
    return {name: ours[bare] for bare, name in theirs.items()}


def _without(name: str, segment: str) -> str:
    return ".".join(part for part in name.split(".") if part != segment)
