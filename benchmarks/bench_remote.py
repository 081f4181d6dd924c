"""How fast objects go to an S3 store and come back, beside s3fs moving the same bytes in the same run.

    python benchmarks/bench_remote.py                                     # against the tests' server, on this machine
    python benchmarks/bench_remote.py --url s3://bucket/scratch           # with the environment's credentials
    python benchmarks/bench_remote.py --url s3://b/x --endpoint http://127.0.0.1:8055 --key test --secret testtest

Contenders, each warm, in another order every round:

- ``save, load``: a `CheckpointManager` saves a state of those bytes, to the end of the commit, and `incckpt.load`
  brings it back into new memory, its hashes checked;
- ``resume``: ``get`` restores into the tensors that are there, and ``put`` is the first save after that, which looks
  for each chunk in the store, as somebody else may have put it;
- ``backend``: the backend that a store uses, called from `--threads` threads, as a save and a restore do;
- ``s3fs``: ``pipe`` and ``cat`` of all objects in one call, as s3fs comes;
- ``s3fs tuned``: the same with our connection settings and as many requests at once;
- ``obstore``: from `--threads` threads; left out, with the reason, where it is not installed.

A server on the same machine takes its share of the processors: then the figures compare, and say little by themselves.
CPU is that of this process, all its threads, per GiB moved. What saving and restoring cost besides moving bytes, and
cannot do without, is measured in the same run: SHA-256 of the bytes, and the first touch of memory for them.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import s3fs
import torch

import incckpt
from incckpt.backends.s3 import S3Backend, client_config
from incckpt.codec import objects as codec

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20


@contextmanager
def own_server() -> Iterator[dict[str, Any]]:
    """Run the tests' S3 server; yield s3fs options for it."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.servers.s3_server"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        options = {"key": "test", "secret": "testtest", "endpoint_url": f"http://127.0.0.1:{port}"}
        s3fs.S3FileSystem(**options).mkdir("bench")
        yield options  # the server ends when its standard input does


class Checkpoints:
    """Whole saves and restores."""

    def __init__(self, bucket: str, path: str, options: Mapping[str, Any], *, in_place: bool) -> None:
        self.url, self.options, self.in_place = f"s3://{bucket}/{path}", dict(options), in_place
        self.bucket, self.path = bucket, path
        self.manager = incckpt.CheckpointManager(self.url, storage_options=self.options)
        self.manager.save(0, {"x": 0}).result()
        self.state: dict[str, torch.Tensor] = {}
        self.step = 0
        self.saved = (0.0, 0.0)  # MiB/s, and CPU seconds per GiB, of the last save

    def put(self, values: Mapping[str, bytes]) -> None:
        self.step += 1
        self.state = {key: torch.from_numpy(np.frombuffer(value, np.float32).copy()) for key, value in values.items()}
        self.saved = measure(lambda: self.manager.save(self.step, self.state).result(), sum(map(len, values.values())))

    def get(self, keys: list[str]) -> Sequence[bytes | npt.NDArray[np.uint8]]:
        if self.in_place:
            self.manager.restore(self.state)
            found = self.state
        else:
            found = incckpt.load(self.url, step=self.step, storage_options=self.options, progress=False)
        return [found[key].numpy().view(np.uint8) for key in keys]

    def close(self) -> None:
        self.manager.close()
        with S3Backend(self.bucket, self.path, self.options) as backend:
            backend.delete([entry.key for entry in backend.list()])


class Incckpt:
    """incckpt's backend."""

    def __init__(self, bucket: str, path: str, options: Mapping[str, Any], threads: int) -> None:
        self.backend = S3Backend(bucket, path, options)
        self.pool = ThreadPoolExecutor(threads)
        self.nbytes = 0

    def put(self, values: Mapping[str, bytes]) -> None:
        self.nbytes = len(next(iter(values.values())))
        list(self.pool.map(self.backend.put, values, values.values()))

    def get(self, keys: list[str]) -> list[npt.NDArray[np.uint8]]:
        return list(self.pool.map(self._get, keys))

    def _get(self, key: str) -> npt.NDArray[np.uint8]:
        value = np.empty(self.nbytes, np.uint8)
        if self.backend.get_into(key, [value.data]) != self.nbytes:
            raise SystemExit(f"{key} has another size")
        return value

    def close(self) -> None:
        self.backend.delete([entry.key for entry in self.backend.list()])
        self.backend.close()
        self.pool.shutdown()


class S3fs:
    """s3fs, all objects in one call."""

    def __init__(self, bucket: str, path: str, options: Mapping[str, Any], batch: int | None = None) -> None:
        self.fs = s3fs.S3FileSystem(**options, skip_instance_cache=True, use_listings_cache=False)
        self.root = f"{bucket}/{path}".rstrip("/")
        self.more = {} if batch is None else {"batch_size": batch}

    def put(self, values: Mapping[str, bytes]) -> None:
        self.fs.pipe({f"{self.root}/{key}": value for key, value in values.items()}, **self.more)

    def get(self, keys: list[str]) -> list[bytes]:
        found = self.fs.cat([f"{self.root}/{key}" for key in keys], **self.more)
        return [found[f"{self.root}/{key}"] for key in keys]

    def close(self) -> None:
        self.fs.rm(self.root, recursive=True)


class Obstore:
    """obstore, whose requests run in threads of its own."""

    def __init__(self, bucket: str, path: str, options: Mapping[str, Any], threads: int) -> None:
        import obstore
        from obstore.store import S3Store

        self.obstore = obstore
        given: dict[str, Any] = {"region": os.environ.get("AWS_REGION", "us-east-1")}
        if endpoint := options.get("endpoint_url"):
            given |= {"endpoint": endpoint, "virtual_hosted_style_request": False}
            given["client_options"] = {"allow_http": endpoint.startswith("http://")}
        if key := options.get("key"):
            given |= {"access_key_id": key, "secret_access_key": options["secret"]}
        self.store = S3Store(bucket, prefix=path, **given)
        self.pool = ThreadPoolExecutor(threads)

    def put(self, values: Mapping[str, bytes]) -> None:
        def put(key: str, value: bytes) -> None:
            self.obstore.put(self.store, key, value, use_multipart=False)

        list(self.pool.map(put, values, values.values()))

    def get(self, keys: list[str]) -> list[memoryview]:
        return list(self.pool.map(lambda key: memoryview(self.obstore.get(self.store, key).bytes()), keys))

    def close(self) -> None:
        for found in self.obstore.list(self.store):
            self.obstore.delete(self.store, [entry["path"] for entry in found])
        self.pool.shutdown()


def touch(nbytes: int) -> None:
    """Write to every page of memory that is new, as numpy's arrays get it: in large pages where there are such."""
    with mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        memory[::4096] = bytes(-(-nbytes // 4096))


def hash_all(values: Mapping[str, bytes]) -> None:
    """Hash the values as chunks are."""
    codec.digest_many(list(values.values()))


def hash_by_hashlib(values: Mapping[str, bytes]) -> None:
    """Hash the same pieces with hashlib."""
    for value in values.values():
        for start in range(0, len(value), MIB):
            hashlib.sha256(memoryview(value)[start : start + MIB]).digest()


def measure(work: Callable[[], object], nbytes: int) -> tuple[float, float]:
    """Return MiB per second and CPU seconds per GiB of `work`."""
    cpu, start = time.process_time(), time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    return nbytes / MIB / seconds, (time.process_time() - cpu) / (nbytes / 1024 / MIB)


def run(bucket: str, path: str, options: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    """Measure and print."""
    tuned = {**options, "config_kwargs": client_config(), "max_concurrency": 1}
    contenders: dict[str, Checkpoints | Incckpt | S3fs | Obstore] = {
        "save, load": Checkpoints(bucket, f"{path}/load", options, in_place=False),
        "resume": Checkpoints(bucket, f"{path}/resume", options, in_place=True),
        "backend": Incckpt(bucket, f"{path}/incckpt", options, arguments.threads),
        "s3fs": S3fs(bucket, f"{path}/s3fs", options),
        "s3fs tuned": S3fs(bucket, f"{path}/tuned", tuned, arguments.threads),
    }
    try:
        contenders["obstore"] = Obstore(bucket, f"{path}/obstore", options, arguments.threads)
    except ImportError as error:
        print(f"obstore is left out: {error}")
    nbytes = arguments.objects * arguments.mib * MIB
    generator = np.random.default_rng(0)
    keys = [f"objects/{number:04d}" for number in range(arguments.objects)]
    figures: dict[tuple[str, str], list[tuple[float, float]]] = {}
    try:
        for number in range(arguments.rounds + 1):
            values = {key: generator.bytes(arguments.mib * MIB) for key in keys}
            names = list(contenders)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                contender = contenders[name]
                put = measure(lambda: contender.put(values), nbytes)  # noqa: B023
                if isinstance(contender, Checkpoints):  # without making the tensors
                    put = contender.saved
                got: list[Any] = []
                get = measure(lambda: got.extend(contender.get(keys)), nbytes)  # noqa: B023
                if any(memoryview(one) != value for one, value in zip(got, values.values(), strict=True)):
                    raise SystemExit(f"{name}: what came back is not what was put")
                if number:  # the first round warms up
                    figures.setdefault((name, "put"), []).append(put)
                    figures.setdefault((name, "get"), []).append(get)
            for name, work in (("SHA-256", hash_all), ("SHA-256 by hashlib", hash_by_hashlib)):
                figures.setdefault((name, ""), []).append(measure(lambda: work(values), nbytes))  # noqa: B023
            figures.setdefault(("first touch", ""), []).append(measure(lambda: touch(nbytes), nbytes))
    finally:
        for contender in contenders.values():
            contender.close()
    print(f"{arguments.objects} objects of {arguments.mib} MiB, {arguments.rounds} rounds, s3fs {s3fs.__version__}")
    print(f"{'':13} {'':4} {'MiB/s':>7} {'min':>7} {'max':>7} {'CPU s/GiB':>10}")
    for (name, what), found in figures.items():
        rates, cpus = zip(*found, strict=True)
        print(
            f"{name:13} {what:4} {statistics.median(rates):7.0f} {min(rates):7.0f} {max(rates):7.0f} "
            f"{statistics.median(cpus):10.2f}"
        )


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="", help="s3://bucket/path to write below; a server is started without it")
    parser.add_argument("--endpoint", default="", help="the server's URL, if it is not Amazon")
    parser.add_argument("--key", default="")
    parser.add_argument("--secret", default="")
    parser.add_argument("--objects", type=int, default=32)
    parser.add_argument("--mib", type=int, default=8, help="of each object")
    parser.add_argument("--threads", type=int, default=16, help="requests at once")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if not arguments.url:
        with own_server() as options:
            run("bench", "x", options, arguments)
        return
    bucket, _, path = arguments.url.removeprefix("s3://").partition("/")
    given = {"key": arguments.key, "secret": arguments.secret, "endpoint_url": arguments.endpoint}
    run(
        bucket, f"{path}/{uuid.uuid4()}".lstrip("/"), {name: value for name, value in given.items() if value}, arguments
    )


if __name__ == "__main__":
    main()
