"""URLs of stores, runs and checkpoints: ``store#run@step``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from incckpt.errors import OptionError
from incckpt.store.refs import validate_run

__all__ = ["DEFAULT_RUN", "Location", "parse_location"]

DEFAULT_RUN = "default"


@dataclass(frozen=True, slots=True)
class Location:
    """A URL taken apart: ``store#run@step``.

    Attributes
    ----------
    store
        URL or path of the store.
    run
        The run named in the fragment, or ``None``.
    step
        A step, ``"latest"``, ``"best"`` or ``None``.
    """

    store: str
    run: str | None = None
    step: int | str | None = None


def parse_location(url: str) -> Location:
    """Take a URL with an optional fragment ``#run``, ``#run@step`` or ``#@step`` apart.

    Raises
    ------
    OptionError
        Naming the URL and what is wrong with it.
    """
    store, mark, fragment = url.partition("#")
    if not store:
        raise OptionError(f"not a store: {url!r}; give a path or a URL such as s3://bucket/prefix")
    run, at, step = fragment.partition("@")
    if mark and not fragment:
        raise OptionError(f"{url!r} ends in an empty fragment; a run is named as in {store}#my-run@500")
    if not at:
        return Location(store, validate_run(run) if run else None)
    if re.fullmatch(r"[0-9]{1,12}", step):
        chosen: int | str = int(step)
    elif step in ("latest", "best"):
        chosen = step
    else:
        raise OptionError(f"{url!r}: after '@' comes a step, 'latest' or 'best', not {step!r}")
    return Location(store, validate_run(run) if run else None, chosen)
