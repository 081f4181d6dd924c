"""Values in messages: a line at most, whatever their size, their nesting, and what their ``repr`` does."""

from __future__ import annotations

import reprlib

__all__ = ["shown"]


class _Short(reprlib.Repr):
    def __init__(self, most: int) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxstring = self.maxother = most

    def repr_int(self, x: int, level: int) -> str:
        """Show a long integer in hexadecimal: Python refuses to write over 4,300 decimal digits."""
        return repr(x) if x.bit_length() <= 256 else hex(x)


def shown(value: object, most: int = 80) -> str:
    """Return the beginning of ``repr(value)``, `most` characters; the type, where that fails."""
    text = _Short(most).repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
