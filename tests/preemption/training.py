"""The example as a process forked where PyTorch was imported already, since that takes long and is not tested."""

from __future__ import annotations

import logging
import multiprocessing
import os
import runpy
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import s3fs  # noqa: F401 - imported before the fork

import incckpt
from incckpt.preemption.notices import AwsNotices, AzureNotices, GcpNotices, Source

__all__ = ["PROCESSES", "train"]

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])

_example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "preemptible.py"))


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
    given = _example["options"]().parse_args(arguments)
    clouds = () if notices is None else [_source_of(*notices, given.grace)]
    os._exit(_example["train"](given, incckpt.Preemption(grace=given.grace, clouds=clouds)))


def _source_of(cloud: str, url: str, grace: float) -> Source:
    if cloud == "gcp":
        return GcpNotices(url, seconds=grace)  # which its notices do not say
    return AwsNotices(url) if cloud == "aws" else AzureNotices(url)
