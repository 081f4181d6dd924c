"""Large plain values: seconds to save, save again unchanged, and load, and the bytes stored, beside ``torch.save``.

``python benchmarks/bench_plain.py [--blob-mb 850]``
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import incckpt


def seconds(call: Callable[[], Any]) -> float:
    """Return how long `call` takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def states(blob_mb: int) -> dict[str, Any]:
    """Return the states to be saved."""
    log = [
        {"step": i, "loss": random.random(), "lr": 1e-3, "phase": "train", "tokens": i * 4096} for i in range(200_000)
    ]
    return {
        "200,000 dicts": {"log": log},
        "1,000,000 floats": {"values": [random.random() for _ in range(1_000_000)]},
        f"{blob_mb} MB of bytes": {"x": os.urandom(blob_mb * 1_000_000)},
    }


def main() -> None:
    """Print one line per state."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blob-mb", type=int, default=850)
    options = parser.parse_args()
    print(f"{'':22}{'blocked':>9}{'save':>9}{'again':>9}{'load':>9}{'MB':>9}   torch: {'save':>9}{'load':>9}{'MB':>9}")
    for name, state in states(options.blob_mb).items():
        with tempfile.TemporaryDirectory() as folder:
            with incckpt.CheckpointManager(folder) as manager:
                first = seconds(lambda: manager.save(1, state).result())  # noqa: B023 -- called at once
                again = seconds(lambda: manager.save(2, state).result())  # noqa: B023
                report = manager.history[0]
            load = seconds(lambda: incckpt.load(folder, progress=False))
            path = Path(folder, "torch.pt")
            torch_save = seconds(lambda: torch.save(state, path))  # noqa: B023
            torch_load = seconds(lambda: torch.load(path))  # noqa: B023
            print(
                f"{name:22}{report.blocked_seconds:9.2f}{first:9.2f}{again:9.2f}{load:9.2f}"
                f"{report.put_bytes / 1e6:9.1f}"
                f"          {torch_save:9.2f}{torch_load:9.2f}{path.stat().st_size / 1e6:9.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
