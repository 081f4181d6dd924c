"""How much a test tries."""

from __future__ import annotations

import os

_EFFORT = float(os.environ.get("INCCKPT_EFFORT", "1"))  # make quick: 0.1, make test: 0.3, make thorough: 8


def tries(count: int) -> int:
    """Return `count`, times the environment's ``INCCKPT_EFFORT``; at least 3."""
    return max(3, round(_EFFORT * count))


def every(count: int = 1) -> int:
    """Return which of many to try: one in `count`, fewer where the environment's ``INCCKPT_EFFORT`` is less than 1."""
    return max(count, round(count / _EFFORT))
