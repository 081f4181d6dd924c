"""What the environment asks of the codec, read once; the codec's page, ``docs/codec-huffman.md``, says when to."""

from __future__ import annotations

import os
from typing import Final

from incckpt.errors import OptionError

__all__ = ["CODER", "VERIFY_WRITES", "choice"]


def choice(variable: str, values: tuple[str, ...]) -> str:
    """Return the one of `values` that an environment variable holds; the first if it is unset or empty.

    Raises
    ------
    OptionError
        It holds something else.
    """
    value = os.environ.get(variable) or values[0]
    if value not in values:
        raise OptionError(f"the environment variable {variable} must be one of {', '.join(values)}; it is {value!r}")
    return value


CODER: Final = choice("INCCKPT_CODEC", ("huffman", "zstd"))
"""What codes byte planes, and decodes them: the coder of our own, or libzstd."""

VERIFY_WRITES: Final = choice("INCCKPT_VERIFY_WRITES", ("0", "1")) == "1"
"""Whether every object is decoded again, by libzstd, before it is stored."""
