"""`write_report`: a run as one page of HTML."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from incckpt.backends.base import Backend, redact
from incckpt.errors import OptionError
from incckpt.outputs import Outputs
from incckpt.reporting.history import read_history
from incckpt.reporting.page import render
from incckpt.store.location import locate
from incckpt.store.store import Store

__all__ = ["write_report"]


def write_report(
    url: str | os.PathLike[str] | Backend,
    path: str | os.PathLike[str],
    *,
    run: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> int:
    """Write a report of a run: one file of HTML that loads nothing, for a browser.

    It shows the metrics, the bytes stored, how long training waited for saves, which tensors changed and how far, what
    was abandoned, and what the state consists of. Each manifest is read once, and no tensor is read. The run's
    writer is not disturbed.

    Parameters
    ----------
    url
        Of the store, with the run as a fragment where wanted: ``s3://bucket/sweep#lr3e-4``. Or a `Backend`, which stays
        open.
    path
        The file to write; replaced if it is there. Folders above it are made.
    run
        In place of the fragment.
    progress
        Called with how many of how many checkpoints are read.
    storage_options
        For fsspec.

    Returns
    -------
    int
        Bytes of the file, at most some 8 MB whatever the run.

    Raises
    ------
    OptionError
        If the URL names a step, or `path` cannot be a file.
    StoreNotFoundError, CheckpointNotFoundError
        If there is no store or no such run. A run that has no checkpoint yet, or none any more, has a report.
    BackendError
        If the store failed.
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import incckpt, tempfile, torch
    >>> folder = tempfile.mkdtemp()
    >>> checkpoint = incckpt.save({"w": torch.zeros(3)}, f"{folder}/store")
    >>> nbytes = incckpt.write_report(f"{folder}/store", f"{folder}/report.html")
    """
    location = locate(url, run=run)
    if location.step is not None:
        raise OptionError(f"{redact(location.store)}: a report is of a whole run; leave out '@{location.step}'")
    with ExitStack() as stack:
        store = stack.enter_context(Store.lent(url, location.store, storage_options))
        page = render(read_history(store, location.run, progress)).encode()
    _write(Path(path), page)
    return len(page)


def _write(path: Path, page: bytes) -> None:
    if path.exists() and not (path.is_file() or path.is_dir()):  # /dev/stdout
        path.write_bytes(page)
        return
    outputs = Outputs(overwrite=True)
    try:
        with outputs.open(path) as file:
            file.write(page)
        outputs.publish()
    finally:
        outputs.discard()
