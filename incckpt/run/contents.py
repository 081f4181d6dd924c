"""The contents of a checkpoint according to its manifest, parsed and checked; for restoring, verifying and saving."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from incckpt.errors import CorruptionError, FormatError, StateError
from incckpt.options import checked_strings
from incckpt.run.reader import Bytes, Reader, reads_for
from incckpt.run.snapshot import Snapshot
from incckpt.staging.hostmem import new_buffer
from incckpt.state.entries import TensorEntry, check_entries, entry_from_json, unpacked_nbytes
from incckpt.state.packing import opened
from incckpt.state.selection import select
from incckpt.state.tree import Tree, packed_refs, parse, references
from incckpt.store.document import Json
from incckpt.store.manifest import Manifest
from incckpt.store.untrusted import reading

__all__ = ["Contents", "ReadBack", "check_read_back", "names_by_chunk", "read_back", "read_packed"]


_PACKED_VALUE = 8  # bytes of memory that most Python objects take at most for each of their bytes when packed

Fetch: TypeAlias = Callable[[Mapping[int, str]], Mapping[int, Bytes]]


@dataclass(frozen=True)
class Contents:
    """A manifest, parsed and checked: the nesting, and the tensors by index.

    Attributes
    ----------
    tree
        The structure, or the part of it that was selected.
    entries
        All tensors of the checkpoint.
    """

    manifest: Manifest
    tree: Tree
    entries: Sequence[TensorEntry]

    @classmethod
    def of(cls, manifest: Manifest, keys: str | Sequence[str] | None = None, *, fetch: Fetch | None = None) -> Contents:
        """Parse and check a manifest's structure and tensors; select what `keys` match.

        Parameters
        ----------
        keys
            Globs of dotted names.
        fetch
            Given the names of packed values by index, returns their bytes by index; without, they stay references. What
            `keys` cannot match is not fetched.

        Raises
        ------
        CorruptionError, FormatError
            If it is inconsistent, or needs another version of incckpt, torch or numpy.
        StateMismatchError
            If `keys` match nothing.
        """
        with reading(f"the manifest of step {manifest.step}"):
            entries = _entries(manifest.tensors, [item.nbytes for item in manifest.ranges])
            tree = parse(manifest.structure, len(entries), len(manifest.packed))
            if fetch is not None and manifest.packed:
                prefixes = None if keys is None else [_literal(key) for key in checked_strings("keys", keys)]
                names = {
                    ref.index: name
                    for name, ref in packed_refs(tree)
                    if prefixes is None
                    or any(name.startswith(start) or f"{start}.".startswith(f"{name}.") for start in prefixes)
                }
                tree = opened(tree, fetch(names))
            if keys is not None:
                tree = select(tree, keys)
        return cls(manifest, tree, entries)

    @cached_property
    def wanted(self) -> frozenset[int]:
        """Indexes of the ranges that `tree` needs."""
        return frozenset(self.entries[index].range for index in references(self.tree)) - {-1}

    def new_bytes(self, ranges: Collection[int] | None = None) -> int:
        """Return the bytes of memory that new tensors take over `ranges`, by default over those that are wanted.

        A range that was packed is unpacked with the gaps that it had.
        """
        chosen = self.wanted if ranges is None else frozenset(ranges)
        gaps = {entry.range: unpacked_nbytes(entry) for entry in self.entries if entry.packed}
        return sum(self.manifest.ranges[index].nbytes + gaps.get(index, 0) for index in chosen)

    def names(self) -> list[list[str]]:
        """Return the names of the tensors in each range."""
        names: list[list[str]] = [[] for _ in self.manifest.ranges]
        for entry in self.entries:
            if entry.range >= 0:
                names[entry.range].append(entry.name)
        return names


def names_by_chunk(manifest: Manifest, names: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return, for messages, the names of tensors in each chunk, given those in each range; of a range the first few."""
    by_chunk: list[list[str]] = [[] for _ in manifest.chunks]
    for item, tensors in zip(manifest.ranges, names, strict=True):
        for index, _, _ in item.pieces:
            by_chunk[index] += tensors[:3]
    return by_chunk


def read_packed(reader: Reader, manifest: Manifest, names: Mapping[int, str]) -> dict[int, Bytes]:
    """Return the bytes of packed values, given their names by index."""
    reader.memory.check(
        _PACKED_VALUE * sum(manifest.packed[index].nbytes for index in names), f"what step {manifest.step} has packed"
    )
    found = {index: new_buffer(manifest.packed[index].nbytes) for index in names}
    buffers = [found.get(index) for index in range(len(manifest.packed))]
    needed_by = [[names[index]] if index in names else [] for index in range(len(manifest.packed))]
    reader.read(reads_for(manifest, manifest.packed, buffers, needed_by).values())
    return found


class ReadBack:
    """Parses what a save is about to write, as a reader will; skips what has not changed since the last save."""

    def __init__(self) -> None:
        self._tensors: tuple[Sequence[Json], Sequence[int]] | None = None
        self._structure: tuple[Json, int, int] | None = None

    def check(self, snapshot: Snapshot) -> None:
        """Check that a reader takes the structure and the tensors of `snapshot`.

        Raises
        ------
        StateError
            If it would not; names the place in the state.
        """
        tensors = snapshot.tensors, [nbytes for nbytes, _ in snapshot.layout.sizes]
        structure = snapshot.structure, len(snapshot.tensors), len(snapshot.packed.ranges)
        with read_back(snapshot.step):
            if tensors != self._tensors:
                _entries(*tensors)
                self._tensors = tensors
            if structure != self._structure:
                parse(*structure)
                self._structure = structure


def check_read_back(step: int, tensors: Sequence[Json], sizes: Sequence[int], structure: Json, packed: int) -> None:
    """Check that a reader takes the structure and the tensors of a manifest that is about to be written.

    Parameters
    ----------
    sizes
        Bytes of each range.
    packed
        The number of packed values.

    Raises
    ------
    StateError
        If it would not.
    """
    with read_back(step):
        _entries(tensors, sizes)
        parse(structure, len(tensors), packed)


@contextmanager
def read_back(step: int) -> Iterator[None]:
    """Refuse to save `step` if reading what would be saved fails in here.

    Raises
    ------
    StateError
    """
    try:
        yield
    except (CorruptionError, FormatError) as error:
        raise StateError(
            f"step {step} was not saved, since it could not be read back: {error}; please report this"
        ) from error


def _literal(pattern: str) -> str:
    """Return the common beginning of all names that a glob matches."""
    return re.split(r"[*?[]", pattern, maxsplit=1)[0]


def _entries(tensors: Sequence[Json], sizes: Sequence[int]) -> list[TensorEntry]:
    entries = [entry_from_json(item) for item in tensors]
    check_entries(entries, sizes)
    return entries
