"""What a checkpoint consists of: sizes by the first parts of the tensors' names."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from incckpt.state.entries import entry_from_json
from incckpt.store.manifest import Manifest, Range

__all__ = ["Component", "components_of"]

_MOST_PARTS = 24


@dataclass
class Component:
    """Tensors whose names begin alike.

    Attributes
    ----------
    name
        What their names begin with; ``None`` for the plain values.
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

    name: str | None
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
    named: dict[str, list[tuple[list[str], Range, str]]] = {}
    counted: set[int] = set()
    for item in manifest.tensors:
        entry = entry_from_json(item)
        if entry.range >= 0 and entry.range not in counted:
            counted.add(entry.range)
            top, *rest = entry.name.split(".")
            named.setdefault(top, []).append((rest, manifest.ranges[entry.range], entry.dtype))
    components: list[Component] = []
    for top, tensors in named.items():
        whole = Component(top)
        parts: dict[str, Component] = {}
        shared = _shared(min(rest for rest, _, _ in tensors), max(rest for rest, _, _ in tensors))
        for rest, found, dtype in tensors:
            name = ".".join(rest[: shared + 1])
            for component in (whole, parts.setdefault(name, Component(name))):
                component.add(found.nbytes, _stored(manifest, found), dtype)
        whole.parts, whole.others = _largest(list(parts.values()))
        components.append(whole)
    if manifest.packed:
        values = Component(None)
        for found in manifest.packed:
            values.nbytes += found.nbytes
            values.stored += _stored(manifest, found)
        components.append(values)
    return sorted(components, key=lambda component: -component.nbytes)


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """Return how many parts two names share at their beginning; of the first and the last in order, all between do."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


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
    rest = Component(None)
    for component in parts[_MOST_PARTS - 1 :]:
        rest.tensors += component.tensors
        rest.nbytes += component.nbytes
        rest.stored += component.stored
        rest.dtypes += component.dtypes
    return [*parts[: _MOST_PARTS - 1], rest], len(parts) - _MOST_PARTS + 1
