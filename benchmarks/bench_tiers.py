"""What a local tier costs and saves, and what a restart uploads again, against an S3 server on this machine.

python benchmarks/bench_tiers.py resume --size 1000    # cut an upload off at 60 %, and go on in a new process
python benchmarks/bench_tiers.py local --size 64       # saves while the bucket takes 5 MB/s, and while it hangs
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import s3fs
import torch

import incckpt
from incckpt.backends import open_backend
from incckpt.testing.faults import Call, Fault, FaultyBackend, kill_process
from tests.servers.processes import python_server
from tests.servers.slow_relay import slowed

KEYS = {"key": "test", "secret": "testtest"}
RATE = 5 << 20  # bytes per second
CHANGES = 0.05  # of the state, by save


def state_of(megabytes: int) -> dict[str, torch.Tensor]:
    """Return random tensors of 10 MB, which no coder makes smaller."""
    chance = np.random.default_rng(1)
    return {
        f"w{index}": torch.from_numpy(chance.integers(0, 256, 10 << 20, np.uint8)) for index in range(megabytes // 10)
    }


def save_all(url: str, endpoint: str, megabytes: int, kill_at: int) -> None:
    """Save once, and print what was put; die when object `kill_at` is put, if that is not 0."""
    backend = open_backend(url, {**KEYS, "endpoint_url": endpoint})
    kill = Fault("put", "objects/*", nth=kill_at, do=Call(kill_process, after_work=True))
    with incckpt.CheckpointManager(FaultyBackend(backend, [kill]) if kill_at else backend) as manager:
        manager.save(1, state_of(megabytes)).result()
        (report,) = manager.history
    print(json.dumps({"put_bytes": report.put_bytes, "nbytes": report.nbytes}))


@contextmanager
def s3(endpoint: str | None = None) -> Iterator[tuple[str, str, Any]]:
    """Yield the URL of an S3 server (moto unless one is given), a new bucket, and a file system that looks into it."""
    with ExitStack() as stack:
        if endpoint is None:
            endpoint = f"http://127.0.0.1:{stack.enter_context(python_server('s3_server'))}"
        files = s3fs.S3FileSystem(**KEYS, endpoint_url=endpoint, use_listings_cache=False)
        bucket = f"bench-{time.time_ns()}"
        files.mkdir(bucket)
        yield endpoint, bucket, files


def resume(megabytes: int, given: str | None) -> None:
    """Kill a process when 60 % of its state are in the bucket; let another one save the same."""
    with s3(given) as (endpoint, bucket, files):
        command = [sys.executable, __file__, "child", "--endpoint", endpoint, "--size", str(megabytes)]
        command += ["--bucket", bucket]
        total = megabytes // 10 * (10 << 20)
        kill_at = str(int(0.6 * megabytes / 10))
        started = time.perf_counter()
        first = subprocess.run([*command, "--kill-at", kill_at], stdout=subprocess.DEVNULL, cwd=tempfile.mkdtemp())
        assert first.returncode == -signal.SIGKILL
        put = sum(entry["size"] for entry in files.find(bucket, detail=True).values())
        seconds = time.perf_counter() - started
        print(f"killed with {put / total:.0%} of {total >> 20} MiB in the bucket, after {seconds:.0f} s", flush=True)
        started = time.perf_counter()
        second = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=tempfile.mkdtemp())
        again = json.loads(second.stdout)["put_bytes"]
        print(f"the next start put {again / total:.0%}, in {time.perf_counter() - started:.0f} s")


def saves(manager: incckpt.CheckpointManager, megabytes: int, count: int) -> tuple[float, float]:
    """Save a state that changes; return medians of the seconds that a save blocked, and until it was durable."""
    state = state_of(megabytes)
    durable = []
    for step in range(1, count + 1):
        for tensor in list(state.values())[: max(1, int(len(state) * CHANGES))]:
            tensor += 1
        started = time.perf_counter()
        manager.save(step, state).result()
        durable.append(time.perf_counter() - started)
    return statistics.median(report.blocked_seconds for report in list(manager.history)[1:]), statistics.median(
        durable[1:]
    )


def local(megabytes: int, count: int) -> None:
    """Compare a local store with a local tier whose bucket is slow, and hangs."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder, s3() as (endpoint, bucket, _):
        port = urlsplit(endpoint).port
        assert port is not None
        plain = incckpt.CheckpointManager(Path(folder) / "plain")
        print("a local store: blocked {:.3f} s, durable after {:.3f} s".format(*saves(plain, megabytes, count)))
        plain.close()
        for name, rate in (("takes 5 MB/s", RATE), ("hangs", 0)):
            with slowed(port, RATE) as (relay, limit):
                options = {**KEYS, "endpoint_url": f"http://127.0.0.1:{relay}"}
                manager = incckpt.CheckpointManager(
                    f"s3://{bucket}/{rate}", local=Path(folder) / str(rate), storage_options=options
                )
                limit.rate = rate
                figures = saves(manager, megabytes, count)
                states = [report.tiers["bucket"].state for report in manager.history]
                print("a bucket that {}: blocked {:.3f} s, durable after {:.3f} s".format(name, *figures), states)
                limit.rate = 1 << 40
                manager.close()
            with incckpt.CheckpointManager(
                f"s3://{bucket}/{rate}", storage_options={**KEYS, "endpoint_url": endpoint}
            ) as reader:
                assert reader.latest is not None
                print(f"    once it goes on, the bucket's latest is step {reader.latest.step} of {count}")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["resume", "local", "child"])
    parser.add_argument("--size", type=int, default=100, help="of the state, MB")
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--endpoint", help="of an S3 server whose keys are test and testtest; moto by default")
    parser.add_argument("--bucket", default="", help="of the child")
    parser.add_argument("--kill-at", type=int, default=0)
    options = parser.parse_args()
    if options.what == "child":
        save_all(f"s3://{options.bucket}/run", options.endpoint, options.size, options.kill_at)
    elif options.what == "resume":
        resume(options.size, options.endpoint)
    else:
        local(options.size, options.saves)


if __name__ == "__main__":
    main()
