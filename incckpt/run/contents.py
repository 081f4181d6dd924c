"""What a manifest says a checkpoint holds: parsed and checked once, for restoring, verifying and saving alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from incckpt.errors import CorruptionError, FormatError, StateError
from incckpt.run.snapshot import Snapshot
from incckpt.state.entries import TensorEntry, check_entries, entry_from_json
from incckpt.state.selection import select
from incckpt.state.tree import Tree, parse, references
from incckpt.store.document import Json
from incckpt.store.manifest import Manifest

__all__ = ["Contents", "ReadBack"]


@dataclass(frozen=True)
class Contents:
    """A manifest, parsed and checked: the nesting, and the tensors by index.

    Attributes
    ----------
    tree
        The structure, or the part of it that was selected.
    entries
        All tensors of the checkpoint.
    wanted
        Indexes of the ranges that `tree` needs.
    """

    manifest: Manifest
    tree: Tree
    entries: Sequence[TensorEntry]
    wanted: frozenset[int]

    @classmethod
    def of(cls, manifest: Manifest, keys: str | Sequence[str] | None = None) -> Contents:
        """Parse and check a manifest's structure and tensors; select what `keys` match.

        Raises
        ------
        CorruptionError, FormatError
            If it is inconsistent, or needs another version of incckpt, torch or numpy.
        StateMismatchError
            If `keys` match nothing.
        """
        entries = _entries(manifest.tensors, [item.nbytes for item in manifest.ranges])
        tree = parse(manifest.structure, len(entries))
        if keys is not None:
            tree = select(tree, keys)
        wanted = frozenset(entries[index].range for index in references(tree)) - {-1}
        return cls(manifest, tree, entries, wanted)

    def names(self) -> list[list[str]]:
        """Return the names of the tensors in each range."""
        names: list[list[str]] = [[] for _ in self.manifest.ranges]
        for entry in self.entries:
            if entry.range >= 0:
                names[entry.range].append(entry.name)
        return names


class ReadBack:
    """Parses what a save is about to write as a reader will; what has not changed since the last save is skipped."""

    def __init__(self) -> None:
        self._tensors: tuple[Sequence[Json], Sequence[int]] | None = None
        self._structure: tuple[Json, int] | None = None

    def check(self, snapshot: Snapshot) -> None:
        """Check that a reader takes the structure and the tensors of `snapshot`.

        Raises
        ------
        StateError
            If not; the message names the place in the state.
        """
        tensors = snapshot.tensors, [nbytes for nbytes, _ in snapshot.layout.sizes]
        structure = snapshot.structure, len(snapshot.tensors)
        try:
            if tensors != self._tensors:
                _entries(*tensors)
                self._tensors = tensors
            if structure != self._structure:
                parse(*structure)
                self._structure = structure
        except (CorruptionError, FormatError) as error:
            raise StateError(
                f"step {snapshot.step} was not saved, since it could not be read back: {error}; please report this"
            ) from error


def _entries(tensors: Sequence[Json], sizes: Sequence[int]) -> list[TensorEntry]:
    entries = [entry_from_json(item) for item in tensors]
    check_entries(entries, sizes)
    return entries
