"""The example, which asks a server of the tests for notices; arguments: the cloud, its URL, and the example's."""

from __future__ import annotations

import logging
import os
import runpy
import sys
from pathlib import Path

import incckpt
from incckpt.preemption.notices import AwsNotices, AzureNotices, GcpNotices, Source

EXAMPLE = Path(__file__).parents[2] / "examples" / "preemptible.py"


def source_of(cloud: str, url: str, grace: float) -> Source:
    """Return where the notices of a cloud come from; GCP's do not say when, so that is told here."""
    if cloud == "gcp":
        return GcpNotices(url, seconds=grace)
    return AwsNotices(url) if cloud == "aws" else AzureNotices(url)


def main() -> None:
    """Train, and end the process."""
    cloud, url, *rest = sys.argv[1:]
    example = runpy.run_path(str(EXAMPLE))
    given = example["options"]().parse_args(rest)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    os._exit(example["train"](given, incckpt.Preemption(clouds=source_of(cloud, url, given.grace))))


if __name__ == "__main__":
    main()
