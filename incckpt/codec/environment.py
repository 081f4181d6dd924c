"""The codec's environment variables, read once; ``docs/codec-huffman.md`` says when to set them."""

from __future__ import annotations

import os
from typing import Final

from incckpt.errors import OptionError

__all__ = ["CODER", "VERIFY_WRITES", "choice"]


def choice(variable: str, values: tuple[str, ...]) -> str:
    """Return the value of an environment variable, which must be one of `values`; the first if it is unset or empty.

    Raises
    ------
    OptionError
        If it has another value.
    """
    value = os.environ.get(variable) or values[0]
    if value not in values:
        raise OptionError(f"the environment variable {variable} must be one of {', '.join(values)}; it is {value!r}")
    return value


CODER: Final = choice("INCCKPT_CODEC", ("huffman", "zstd"))
"""What codes and decodes byte planes: our own Huffman coder, or libzstd."""

VERIFY_WRITES: Final = choice("INCCKPT_VERIFY_WRITES", ("0", "1")) == "1"
"""Whether libzstd decodes every object again before it is stored."""
