"""Parts of a structure, selected by globs of dotted names."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

from incckpt.errors import StateMismatchError
from incckpt.options import checked_strings
from incckpt.state.names import join_name
from incckpt.state.tree import MappingNode, Plain, SequenceNode, Tree, children

__all__ = ["UNSELECTED", "Patterns", "Selection", "select"]

Patterns: TypeAlias = str | Sequence[str] | None

UNSELECTED = Plain(None)
"""Placeholder for the unselected elements of a selected sequence; compare by identity."""


def select(tree: Tree, patterns: str | Sequence[str]) -> Tree:
    """Return the part of `tree` whose dotted names match a glob.

    A pattern is a glob (:func:`fnmatch.fnmatchcase`; ``*`` also matches dots) or the literal name, brackets and all. If
    it matches a container, it selects all of it. In a dict the rest is dropped; in a list or tuple it becomes ``None``,
    to keep positions.

    Raises
    ------
    StateMismatchError
        If a pattern matches nothing; the message shows names that exist.
    """
    return Selection(patterns).part_of(tree)


class Selection:
    """Everything, or what `keys` match, without what `ignore` matches.

    Parameters
    ----------
    keys, ignore
        Globs, as for :func:`select`. `ignore` has priority, and may match nothing.
    """

    def __init__(self, keys: Patterns = None, ignore: Patterns = None) -> None:
        self._keys = None if keys is None else _compiled(checked_strings("keys", keys))
        self._ignore = () if ignore is None else _compiled(checked_strings("ignore", ignore))
        self._hits: set[str] = set()
        self._partial: dict[int, Tree] = {}

    def chooses(self, name: str) -> bool:
        """Whether `keys` match `name`, and so select everything below it."""
        if self._keys is None:
            return True
        hits = [pattern for pattern, match in self._keys if match(name)]
        self._hits.update(hits)
        return bool(hits)

    def ignores(self, name: str) -> bool:
        """Whether `ignore` matches `name`, and so excludes everything below it."""
        return any(match(name) for _, match in self._ignore)

    def is_partial(self, tree: Tree) -> bool:
        """Whether `tree`, a part of what `part_of` returned, lacks something that the whole tree has."""
        return id(tree) in self._partial

    def part_of(self, tree: Tree) -> Tree:
        """Return the selected part of `tree`; sequences keep their length, see `UNSELECTED`.

        Raises
        ------
        StateMismatchError
            If one of `keys` matches nothing, or `ignore` everything.
        """
        if self._keys is None and not self._ignore:
            return tree
        part = self._prune(tree, "", chosen=False)
        missing = [pattern for pattern, _ in self._keys or () if pattern not in self._hits]
        if missing or part is None:
            names = list(dict.fromkeys(name for name in _names(tree, "") if name))
            close = [
                name
                for pattern in missing
                for name in difflib.get_close_matches(pattern, names[:5000], n=3, cutoff=0.5)
            ]
            shown = ", ".join(dict.fromkeys([*close, *names[:5]])) or "none"
            patterns = ", ".join(map(repr, missing))
            what = f"matches {patterns or 'no pattern'}" if missing or not self._ignore else "is left to restore"
            raise StateMismatchError(f"nothing in the checkpoint {what}; some names: {shown}")
        return part

    def _prune(self, tree: Tree, name: str, *, chosen: bool) -> Tree | None:
        """Return the selected part, or ``None``. Also walks selected parts: other patterns may match there."""
        if self.ignores(name):
            return None
        chosen = self.chooses(name) or chosen
        if not isinstance(tree, (MappingNode, SequenceNode)):
            return tree if chosen else None
        if chosen and not self._ignore and all(pattern in self._hits for pattern, _ in self._keys or ()):
            return tree
        kept = [(key, child, self._prune(child, join_name(name, key), chosen=chosen)) for key, child in children(tree)]
        if not chosen and all(part is None for _, _, part in kept):
            return None
        if all(part is child for _, child, part in kept):
            return tree
        pruned: Tree
        if isinstance(tree, MappingNode):
            pruned = replace(tree, items=[(key, part) for key, _, part in kept if part is not None])
        else:
            pruned = replace(tree, items=[UNSELECTED if part is None else part for _, _, part in kept])
        self._partial[id(pruned)] = pruned
        return pruned


def _compiled(patterns: Sequence[str]) -> tuple[tuple[str, Callable[[str], object]], ...]:
    # Also literally: the name in `{"a[0]": ...}` is a glob that does not match itself.
    return tuple((one, re.compile(rf"{re.escape(one)}\Z|{fnmatch.translate(one)}").match) for one in patterns)


def _names(tree: Tree, name: str) -> Iterator[str]:
    yield name
    for key, child in children(tree):
        yield from _names(child, join_name(name, key))
