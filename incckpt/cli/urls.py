"""URLs as arguments: what one means beside another, and what the shell completes."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import click
from click.shell_completion import CompletionItem

__all__ = ["beside", "complete_url"]

_PATIENCE = 5.0  # seconds that a key press may wait for a store
_MOST = 200


def beside(before: str, after: str) -> str:
    """Return the URL that `after` means where it may be a fragment alone: of the store, or the run, of `before`."""
    if after[:1] not in ("#", "@"):
        return after
    store, _, fragment = before.partition("#")
    return f"{store}{after}" if after[0] == "#" else f"{store}#{fragment.partition('@')[0]}{after}"


def complete_url(context: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem[Any]]:
    """Return what a URL that is typed may become: folders; after ``#`` the store's runs, after ``@`` a run's steps."""
    options = context.params.get("option")
    url = beside(context.params.get("before") or "", typed)
    if "#" in url:
        found = _in_time(lambda: _fragments(url, typed, options))
    elif "://" in url:
        found = _in_time(lambda: _folders(url, options))
    else:
        return [CompletionItem(typed, type="dir")]
    return [CompletionItem(value) for value in found if value.startswith(typed)]


def _in_time(find: Callable[[], Iterable[str]]) -> list[str]:
    """Return what `find` yields; nothing if it fails, or takes too long, as against a server that is away."""
    found: list[str] = []

    def work() -> None:
        try:
            found.extend(find())
        except Exception as error:  # noqa: BLE001 -- whatever it is, there is nothing to complete
            logging.getLogger(__name__).debug("nothing is completed: %s", error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    if thread.is_alive():
        os._exit(0)  # its requests would be repeated for minutes, and an orderly end waits for them
    return found


def _fragments(url: str, typed: str, options: dict[str, Any] | None) -> Iterator[str]:
    from incckpt.store.location import DEFAULT_RUN
    from incckpt.store.refs import run_names
    from incckpt.store.store import Store

    place, _, fragment = url.partition("#")
    run, at, _ = fragment.partition("@")
    head = typed[: typed.rindex("@" if at else "#") + 1]
    with Store.lent(place, place, options) as store:
        if at:
            steps = {name.step for name in store.run(run or DEFAULT_RUN).lineage().live}
            yield from (f"{head}{word}" for word in ("latest", "best", *sorted(steps, reverse=True)[:_MOST]) if steps)
        else:
            for name in run_names(store.backend)[:_MOST]:
                yield from (f"{head}{name}", f"{head}{name}@")


def _folders(url: str, options: dict[str, Any] | None) -> Iterator[str]:
    import fsspec

    parent = url[: url.rindex("/") + 1]
    fs, path = fsspec.core.url_to_fs(parent, **(options or {}))
    for entry in sorted(fs.ls(path, detail=True), key=lambda entry: str(entry["name"])):
        if entry["type"] == "directory":
            folder = f"{parent}{entry['name'].rstrip('/').rpartition('/')[2]}"
            yield from (folder, f"{folder}/")  # of two no shell takes one as the end of the word
