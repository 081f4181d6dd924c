"""Dotted names of what a state holds: the same in every process, whatever the keys."""

from __future__ import annotations

from collections.abc import Callable

from incckpt.state.plain import shown

__all__ = ["join_name"]


def join_name(prefix: str, key: object) -> str:
    """Return the dotted name of the child `key` of `prefix`; always valid UTF-8."""
    segment = key if isinstance(key, str) else _text_of(key, str)
    if not segment.isascii():
        segment = segment.encode("utf-8", "backslashreplace").decode()
    return f"{prefix}.{segment}" if prefix else segment


def _text_of(key: object, text_of_scalar: Callable[[object], str] = repr) -> str:
    """Return the text of a key, with the members of frozensets in order: Python's own differs between processes."""
    if isinstance(key, frozenset):
        return f"frozenset({{{', '.join(sorted(map(_text_of, key)))}}})" if key else "frozenset()"
    if isinstance(key, tuple):
        members = list(map(_text_of, key))
        if fields := getattr(key, "_fields", ()):
            return f"{type(key).__name__}({', '.join(map('='.join, zip(fields, members, strict=True)))})"
        return f"({members[0]},)" if len(members) == 1 else f"({', '.join(members)})"
    try:
        return text_of_scalar(key)
    except ValueError:  # an integer of over 4,300 digits
        return hex(key) if type(key) is int else shown(key)
