"""Tensor subclasses that consist of other tensors: taking them apart, matching them, and making them again.

The protocol is torch's own: ``__tensor_flatten__`` and ``__tensor_unflatten__``. A ``DTensor`` on one process is its
local tensor; its mesh and placements are those of the target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from incckpt.errors import FormatError, StateError
from incckpt.state.contexts import DTENSOR, Classes, class_name, context_difference, decode_context, encode_context
from incckpt.state.entries import Json
from incckpt.state.plain import type_name
from incckpt.state.tree import SubclassRef, TensorRef, Tree, describe

__all__ = ["encoded_context", "flattened", "inner_tensors", "is_of_tensors", "make", "paired"]


def is_of_tensors(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is of a subclass that consists of other tensors, and says of which."""
    return (
        type(tensor) is not torch.Tensor
        and type(tensor) is not torch.nn.Parameter
        and is_traceable_wrapper_subclass(tensor)
    )


def flattened(tensor: Any) -> tuple[list[str], Any]:
    """Return the names of the attributes that `tensor` consists of, and its context.

    Raises
    ------
    StateError
        If it is sharded over processes.
    """
    if class_name(type(tensor)) in DTENSOR:
        if tensor.device_mesh.size() != 1:
            raise StateError(
                f"a {type_name(tensor)} is sharded over processes; save sharded state through "
                "torch.distributed.checkpoint"
            )
        return ["_local_tensor"], None
    names, context = tensor.__tensor_flatten__()
    return list(names), context


def inner_tensors(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that `tensor` consists of, by attribute.

    Raises
    ------
    StateError
        If one is no tensor.
    """
    for name in flattened(tensor)[0]:
        inner = getattr(tensor, name)
        if not isinstance(inner, torch.Tensor):
            raise StateError(f"{name} of a {type_name(tensor)} is a {type_name(inner)}, and no tensor")
        yield name, inner


def encoded_context(tensor: torch.Tensor) -> Json:
    """Return the node of what `tensor` keeps beside its inner tensors.

    Raises
    ------
    StateError
        If that cannot be stored.
    """
    return encode_context(flattened(tensor)[1])


def paired(tree: Tree, live: torch.Tensor) -> tuple[list[tuple[TensorRef, torch.Tensor]], str]:
    """Return which stored tensors go into which plain tensors of `live`, or why they do not fit.

    Parameters
    ----------
    tree
        What the checkpoint has.
    live
        A tensor of any class.
    """
    if isinstance(tree, TensorRef) and class_name(type(live)) in DTENSOR:
        return _all_paired([(tree, inner) for _, inner in inner_tensors(live)])
    if not isinstance(tree, SubclassRef):
        if is_of_tensors(live) or not isinstance(tree, TensorRef):
            what = type_name(live) if is_of_tensors(live) else "tensor"
            return [], f"is a {what} here and {describe(tree)} in the checkpoint"
        return [(tree, live)], ""
    if tree.cls in DTENSOR and not is_of_tensors(live):
        return paired(tree.inner[0][1], live)
    found = f"{class_name(type(live))} {live.dtype} {tuple(live.shape)}"
    if found != f"{tree.cls} {tree.dtype} {tree.shape}" or not is_of_tensors(live):
        return [], f"is a {found} here and {describe(tree)} in the checkpoint"
    try:
        inner, context = dict(inner_tensors(live)), encoded_context(live)
    except StateError as error:
        return [], f"cannot be restored in place: {error}"
    if list(inner) != [name for name, _ in tree.inner]:
        stored = ", ".join(name for name, _ in tree.inner)
        return [], f"consists of {', '.join(inner)} here and of {stored} in the checkpoint"
    if problem := context_difference(tree.context, context):
        return [], f"is a {tree.cls}, but {problem}"
    return _all_paired([(node, inner[name]) for name, node in tree.inner])


def _all_paired(
    found: list[tuple[TensorRef | SubclassRef, torch.Tensor]] | list[tuple[TensorRef, torch.Tensor]],
) -> tuple[list[tuple[TensorRef, torch.Tensor]], str]:
    pairs: list[tuple[TensorRef, torch.Tensor]] = []
    for node, inner in found:
        some, problem = paired(node, inner)
        if problem:
            return [], problem
        pairs += some
    return pairs, ""


def make(ref: SubclassRef, inner: Mapping[str, torch.Tensor], classes: Classes) -> torch.Tensor:
    """Return a new tensor of the class that `ref` names.

    Parameters
    ----------
    inner
        Its inner tensors, which it keeps.

    Raises
    ------
    FormatError
        If the class is not known here, or makes something else. What it raises is raised.
    """
    if ref.cls in DTENSOR:  # on its only process it was `inner`; without a mesh here it stays that
        (tensor,) = inner.values()
        return _flagged(classes.distributed(tensor), ref)
    cls: Any = classes.find(ref.cls)
    if not issubclass(cls, torch.Tensor) or not hasattr(cls, "__tensor_unflatten__"):
        raise FormatError(f"{ref.cls} is no class of tensors here that consist of others")
    context = decode_context(ref.context, classes.find)
    made = cls.__tensor_unflatten__(dict(inner), context, torch.Size(ref.shape), ref.stride)
    if type(made) is not cls or (tuple(made.shape), str(made.dtype)) != (ref.shape, ref.dtype):
        raise FormatError(f"{ref.cls}.__tensor_unflatten__ made a {type_name(made)} that is not {describe(ref)}")
    return _flagged(made, ref)


def _flagged(tensor: torch.Tensor, ref: SubclassRef) -> torch.Tensor:
    if ref.parameter:
        return torch.nn.Parameter(tensor, requires_grad=ref.requires_grad)
    return tensor if tensor.requires_grad == ref.requires_grad else tensor.detach().requires_grad_(ref.requires_grad)
