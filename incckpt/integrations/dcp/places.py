"""What DCP calls a ``checkpoint_id``, as a step of a run."""

from __future__ import annotations

import os
import re

from incckpt.errors import OptionError
from incckpt.messages import shown
from incckpt.store.location import locate

__all__ = ["step_of"]

_NUMBER = re.compile(r"(?:.*[^0-9])?([0-9]{1,12})[/\\]?", re.DOTALL)


def step_of(checkpoint_id: str | os.PathLike[str], store: str, run: str) -> int:
    """Return the step that a ``checkpoint_id`` ends in.

    Parameters
    ----------
    checkpoint_id
        ``store#run@500``, or any path that ends in a number, as ``step-500``.
    store, run
        What the storage was made for.

    Raises
    ------
    OptionError
        If there is no step, or it names another store or run.
    """
    text = os.fspath(checkpoint_id)
    if "#" in text:
        location = locate(text)
        if (location.store or store, location.run if location.named else run) != (store, run):
            raise OptionError(f"checkpoint_id {shown(text)} is not of {store}#{run}, which this storage was made for")
        if isinstance(location.step, int):
            return location.step
    elif (found := _NUMBER.fullmatch(text)) is not None:
        return int(found[1])
    raise OptionError(
        f"checkpoint_id {shown(text)} names no step; let it end in one, as 'step-500' or '{store}#{run}@500', or leave "
        "it out"
    )
