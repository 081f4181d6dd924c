"""The example as a process forked where PyTorch was imported already, since that takes long and is not tested."""

from __future__ import annotations

import logging
import multiprocessing
import os
import runpy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

__all__ = ["PROCESSES", "train"]

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["torch._dynamo", "s3fs", "incckpt.manager", "incckpt.backends.s3", "incckpt.preemption.preemption"]
)
EXAMPLE = Path(__file__).parents[2] / "examples" / "preemptible.py"


def train(
    arguments: Sequence[str],
    notices: tuple[str, str] | None,
    output: Connection,
    log: str,
    environment: Mapping[str, str],
) -> None:
    """Train, and end the process.

    Parameters
    ----------
    arguments
        Of the example.
    notices
        A cloud, and the URL where its notices are asked for; ``None`` for SIGTERM alone.
    output
        What standard output is to be.
    log
        Path of the file that standard error is to be.
    """
    os.environ.update(environment)
    os.dup2(output.fileno(), 1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    from incckpt.preemption.notices import AwsNotices, AzureNotices, GcpNotices, Source
    from incckpt.preemption.preemption import Preemption

    example = runpy.run_path(str(EXAMPLE))
    given = example["options"]().parse_args(arguments)
    sources: list[Source] = []
    if notices is not None:
        cloud, url = notices
        makers: dict[str, Callable[[str], Source]]
        makers = {"aws": AwsNotices, "azure": AzureNotices, "gcp": partial(GcpNotices, seconds=given.grace)}
        sources.append(makers[cloud](url))
    os._exit(example["train"](given, Preemption(grace=given.grace, clouds=sources)))
