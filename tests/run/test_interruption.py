"""Calls interrupted at many instants: nothing hangs, nothing is lost, and the next save works."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import s3fs

import incckpt

pytestmark = pytest.mark.slow

STRIDE = int(os.environ.get("INCCKPT_INTERRUPTION", "1009"))  # 1: every instant (make interrupt)
SAMPLED = "INCCKPT_INTERRUPTION" not in os.environ
HANGS = 1200 if STRIDE > 30 else 12 * 3600  # seconds; a single instant that hangs ends the child sooner


def interrupt(stride: int, *where: str) -> None:
    """Interrupt every `stride`-th instant of every call, from a random one."""
    first = random.randrange(stride)
    command = [sys.executable, "-m", "tests.children.interrupted", "", "exception,handler"]
    command += [str(first), str(stride), *where]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANGS)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"{command} is slow or hangs: {(error.stdout or b'').decode()[-1000:]}") from None
    assert done.returncode == 0, f"{command}: {done.stdout[-1000:]}{done.stderr}"
    outcomes = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("done ")]
    print(f"every {stride}th instant from {first}:", *outcomes, sep="\n")
    assert sum(outcome["instants"] for outcome in outcomes) > 2000 // stride


@pytest.mark.timeout(HANGS + 60)
def test_interrupted_local(tmp_path: Path) -> None:
    interrupt(STRIDE, str(tmp_path / "store"))
    assert incckpt.load(tmp_path / "store", run="handler")["log"] == ["x"] * 9


@pytest.mark.skipif(SAMPLED, reason="takes minutes: make interrupt")
@pytest.mark.timeout(HANGS + 60)
def test_interrupted_s3(s3_server: dict[str, Any]) -> None:
    s3fs.S3FileSystem(**s3_server).makedirs("interrupted", exist_ok=True)
    url = "s3://interrupted/store"
    interrupt(STRIDE if STRIDE < 10 else 5 * STRIDE, url, s3_server["endpoint_url"])
    assert incckpt.load(url, run="handler", storage_options=s3_server)["log"] == ["x"] * 9
