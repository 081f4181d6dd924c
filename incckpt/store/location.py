"""URLs of stores, runs and checkpoints: ``store#run@step``, or ``store#run@ref``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from incckpt.backends.base import Backend, redact
from incckpt.backends.registry import check_url
from incckpt.errors import OptionError
from incckpt.messages import shown
from incckpt.store.refs import RefName, validate_run

__all__ = ["DEFAULT_RUN", "Location", "locate"]

DEFAULT_RUN = "default"


@dataclass(frozen=True, slots=True)
class Location:
    """A store, run and step, as named by a URL and further arguments.

    Attributes
    ----------
    store
        URL or path for `open_backend`.
    run
        Name of the run.
    step
        A step, ``"latest"``, ``"best"``, the exact name of a ref, or ``None``.
    named
        Whether the URL or an argument names the run.
    """

    store: str
    run: str = DEFAULT_RUN
    step: int | str | RefName | None = None
    named: bool = False

    def new_step(self) -> int | None:
        """Return the step to save as, if one is named.

        Raises
        ------
        OptionError
            If it is named otherwise than by a number.
        """
        if self.step is None or isinstance(self.step, int):
            return self.step
        raise OptionError(f"a save needs a number after '@' in the URL, not '{self.step}'")

    def check_whole_run(self) -> None:
        """Check that no step is named, for a manager.

        Raises
        ------
        OptionError
        """
        if self.step is not None:
            raise OptionError(f"a manager writes a whole run; give step {self.step!r} to restore(), not in the URL")


def locate(
    url: str | os.PathLike[str] | Backend, *, run: str | None = None, step: int | str | RefName | None = None
) -> Location:
    """Take a URL with an optional fragment ``#run``, ``#run@step`` or ``#@step`` apart.

    Only a string has a fragment: a path object or a backend always means a whole store. Messages show no passwords or
    signatures.

    Parameters
    ----------
    url
        As passed by the user.
    run, step
        As passed besides.

    Raises
    ------
    OptionError
        If `url` is not the URL of a store, or its fragment contradicts the arguments.
    """
    in_url: tuple[str | None, int | str | RefName | None] = (None, None)
    if isinstance(url, Backend):
        store = place = url.url
    elif isinstance(url, str):
        store, mark, fragment = url.partition("#")
        place = redact(url).partition("#")[0]
        if mark:
            in_url = _parse_fragment(place, fragment, secret=_SECRET.match(store) is not None)
        check_url(store)
    elif isinstance(url, os.PathLike):
        store = _path_text(url)
        place = store
    else:
        raise OptionError(f"not a path or URL: {shown(url)}")
    given = None if run is None else validate_run(run), step
    for option, one, other in zip(("run", "step"), in_url, given, strict=True):
        if one is not None and other is not None and one != other:
            raise OptionError(
                f"{place}: the {option} is {_quoted(one)} in the URL and {_quoted(other)} in {option}=; "
                "give one of them"
            )
    name = in_url[0] or given[0]
    return Location(store, name or DEFAULT_RUN, in_url[1] if step is None else step, name is not None)


def _quoted(value: int | str | RefName) -> str:
    return repr(str(value) if isinstance(value, RefName) else value)


def _path_text(path: os.PathLike[str]) -> str:
    text = os.fsdecode(path)
    collapsed = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+", text)
    if collapsed is not None:
        raise OptionError(
            f"the path {collapsed[1]}:/… was a URL before it became a path object, which makes one slash of two: give "
            f"the URL as a string, as '{collapsed[1]}://…'. (To name a folder {collapsed[1]}:, give its absolute path.)"
        )
    return os.path.join(".", text) if ":" in text else text  # keeps `open_backend` from taking it for a URL


def _parse_fragment(store: str, fragment: str, *, secret: bool) -> tuple[str | None, int | str | RefName | None]:
    run, at, step = fragment.partition("@")
    if not fragment:
        raise OptionError(f"{store}#: the fragment is empty; a run is named as in {store}#my-run@500. {_PATH_ADVICE}")
    if secret and not _RUN_AND_STEP.fullmatch(fragment):
        raise OptionError(
            f"{store}: what follows the '#' is no name of a run, '@' and step; a '#' in a password is written %23"
        )
    try:
        name = validate_run(run) if run else None
    except OptionError as error:
        raise OptionError(f"{store}#…: {error}. {_PATH_ADVICE}") from error
    if not at:
        return name, None
    if re.fullmatch(r"[0-9]{1,12}", step):
        return name, int(step)
    if step in ("latest", "best"):
        return name, step
    name_of_ref = RefName.parse(step)
    if name_of_ref is not None:
        return name, name_of_ref
    raise OptionError(
        f"{store}#…: after '@' comes a step, 'latest', 'best' or the name of a ref, not {shown(step)}. {_PATH_ADVICE}"
    )


_SECRET = re.compile(r"[A-Za-z0-9+.:-]*://[^/?#]*[:@]")  # a user or a port: what follows may be a part of a password

_RUN_AND_STEP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*|[A-Za-z0-9._=+-]*@(latest|best|[0-9]{1,12}|[0-9a-f-]{36})")

_PATH_ADVICE = "If the folder's name has a '#', give a pathlib.Path, or a file:// URL with '%23' for it"
