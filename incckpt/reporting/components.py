"""What a checkpoint consists of: sizes by the first parts of the tensors' names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from incckpt.state.entries import entry_from_json
from incckpt.store.manifest import Manifest, Range

__all__ = ["VALUES", "Component", "components_of"]

VALUES = ""
"""Name of the component that plain values make up."""

_MOST_PARTS = 24


@dataclass
class Component:
    """Tensors whose names begin alike.

    Attributes
    ----------
    name
        What their names begin with.
    tensors
        How many there are; those that share memory count once.
    nbytes, stored
        Their bytes, and those of the objects that hold them (their part of an object that holds others, too).
    dtypes
        Bytes by element type.
    parts
        The same by the part of the name that follows, the largest first, the smallest put together.
    others
        How many are put together in the last of `parts`.
    """

    name: str
    tensors: int = 0
    nbytes: int = 0
    stored: float = 0.0
    dtypes: Counter[str] = field(default_factory=Counter)
    parts: Sequence[Component] = ()
    others: int = 0

    def add(self, nbytes: int, stored: float, dtype: str) -> None:
        """Count a tensor."""
        self.tensors += 1
        self.nbytes += nbytes
        self.stored += stored
        self.dtypes[dtype] += nbytes


def components_of(manifest: Manifest) -> list[Component]:
    """Return the components of a checkpoint, the largest first."""
    tops: dict[str, Component] = {}
    parts: dict[str, dict[str, Component]] = {}
    counted: set[int] = set()
    for item in manifest.tensors:
        entry = entry_from_json(item)
        if entry.range < 0 or entry.range in counted:
            continue
        counted.add(entry.range)
        found = manifest.ranges[entry.range]
        top, _, rest = entry.name.partition(".")
        part = rest.partition(".")[0]
        of_top = tops.setdefault(top, Component(top))
        of_part = parts.setdefault(top, {}).setdefault(part, Component(part))
        for component in (of_top, of_part):
            component.add(found.nbytes, _stored(manifest, found), entry.dtype)
    for name, component in tops.items():
        component.parts, component.others = _largest(list(parts[name].values()))
    if manifest.packed:
        values = Component(VALUES)
        for found in manifest.packed:
            values.add(found.nbytes, _stored(manifest, found), "values")
        tops[VALUES] = values
    return sorted(tops.values(), key=lambda component: -component.nbytes)


def _stored(manifest: Manifest, found: Range) -> float:
    stored = 0.0
    for index, _, nbytes in found.pieces:
        chunk = manifest.chunks[index]
        size = chunk.size + (0 if chunk.base is None else chunk.base.size)
        stored += size * nbytes / chunk.nbytes if chunk.nbytes else 0
    return stored


def _largest(parts: list[Component]) -> tuple[list[Component], int]:
    parts.sort(key=lambda component: -component.nbytes)
    if len(parts) <= _MOST_PARTS:
        return parts, 0
    rest = Component("")
    for component in parts[_MOST_PARTS - 1 :]:
        rest.tensors += component.tensors
        rest.nbytes += component.nbytes
        rest.stored += component.stored
        rest.dtypes += component.dtypes
    return [*parts[: _MOST_PARTS - 1], rest], len(parts) - _MOST_PARTS + 1
