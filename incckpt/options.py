"""What a caller gives, checked before anything is done with it: each function names the option and what it may be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import timedelta
from numbers import Integral
from typing import Any

from incckpt.errors import OptionError
from incckpt.messages import shown

__all__ = [
    "MAX_THREADS",
    "check_choice",
    "check_function",
    "checked_count",
    "checked_flag",
    "checked_mapping",
    "checked_name",
    "checked_seconds",
    "checked_strings",
]

MAX_THREADS = 1024
"""More are of no use, and a system that cannot start them kills the process."""


def checked_count(option: str, value: Any, least: int, most: int | None = None) -> int:
    """Return an integer of any integer type as an ``int``.

    Raises
    ------
    OptionError
        If it is none, or out of range.
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
        if least <= number and (most is None or number <= most):
            return number
    bound = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise OptionError(f"{option} must be an integer {bound}, not {shown(value)}")


def checked_seconds(option: str, value: Any, *, positive: bool = False, endless: bool = False) -> float:
    """Return a time in seconds, given as a number of any type or as a `timedelta`.

    Parameters
    ----------
    positive
        Whether 0 is refused, too.
    endless
        Whether it may be infinite.

    Raises
    ------
    OptionError
        If it is none, or out of range. Text and booleans are no numbers.
    """
    try:
        if isinstance(value, timedelta):
            value = value.total_seconds()
        number = math.nan if _is_bool(value) or isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last from a tensor of several elements
        number = math.nan
    if (number > 0 if positive else number >= 0) and (endless or number < math.inf):
        return number
    bound = "above 0" if positive else "of at least 0"
    raise OptionError(f"{option} must be a number of seconds {bound}, not {shown(value)}")


def checked_flag(option: str, value: Any) -> bool:
    """Return a boolean; the text ``"False"`` is none, and would count as true.

    Raises
    ------
    OptionError
    """
    if _is_bool(value):
        return bool(value)
    raise OptionError(f"{option} must be True or False, not {shown(value)}")


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or (type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"))


def check_choice(option: str, value: Any, choices: Iterable[str]) -> None:
    """Check that `value` is one of `choices`.

    Raises
    ------
    OptionError
    """
    known = tuple(choices)
    if not isinstance(value, str) or value not in known:
        *others, last = map(repr, known)
        raise OptionError(f"{option} must be {', '.join(others)} or {last}, not {shown(value)}")


def check_function(option: str, value: Any) -> None:
    """Check that `value` can be called.

    Raises
    ------
    OptionError
    """
    if not callable(value):
        raise OptionError(f"{option} must be a function, not {shown(value)}")


def checked_name(option: str, value: Any) -> str | None:
    """Return a name, or ``None``.

    Raises
    ------
    OptionError
    """
    if value is None or isinstance(value, str):
        return value
    raise OptionError(f"{option} must be a string, not {shown(value)}")


def checked_strings(option: str, value: Any) -> tuple[str, ...]:
    """Return one string, or several, as a tuple.

    Raises
    ------
    OptionError
    """
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        try:
            found = tuple(value)
        except TypeError:  # a 0-dim array has `__iter__`, too
            found = (None,)
        if all(isinstance(item, str) for item in found):
            return found
    raise OptionError(f"{option} must be a string or several, not {shown(value)}")


def checked_mapping(option: str, value: Any) -> dict[str, Any]:
    """Return a mapping from names; of ``None`` an empty one. Messages do not show the values, which may be secret.

    Raises
    ------
    OptionError
    """
    if value is None:
        return {}
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return dict(value)
    raise OptionError(f"{option} must be a mapping from names, not a {type(value).__name__}")
