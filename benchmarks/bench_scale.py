"""A store of many checkpoints and objects: what saving, collecting, opening and sweeping cost then.

Runs of ten checkpoints each are put straight into the backend, as saves would have left them. One more run is saved to
and pruned by the real code, with its requests counted. With ``--prunes`` a store on the disk grows old instead: one
run saves and prunes that many times, there or at ``--url``, and a save should cost in the end what it did at first.

    python benchmarks/bench_scale.py                              # 10,000 checkpoints, 1,000,000 objects, in memory
    python benchmarks/bench_scale.py --local --checkpoints 1000   # on the disk
    python benchmarks/bench_scale.py --prunes 5000                # how saves fare in an old store
    python benchmarks/bench_scale.py --prunes 5000 --url s3://bucket/scratch  # the same on S3
    python benchmarks/bench_scale.py --tensors 100000             # one state of many small tensors
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import statistics
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

import incckpt
from incckpt.backends.base import Backend, Entry, ReadableBuffer
from incckpt.backends.local import LocalBackend
from incckpt.backends.registry import open_backend
from incckpt.codec import objects as codec
from incckpt.errors import KeyExistsError, KeyNotFoundError
from incckpt.store.document import dump_document
from incckpt.store.gc import Collector
from incckpt.store.manifest import Chunk, Manifest
from incckpt.store.objects import ObjectKey, chunk_keys
from incckpt.store.refs import Ref, RefName
from incckpt.store.store import Store
from incckpt.testing.faults import CountingBackend

PAGE = 1000
PER_RUN = 10
SAVES = 50  # that a rate is taken from


class PagedBackend(Backend):
    """A dict, by first folder, that counts listings as S3 does: a request for each thousand keys."""

    def __init__(self) -> None:
        self.url = "simulated://"
        self.remote = False
        self.pages = 0
        self._folders: dict[str, dict[str, bytes]] = {}
        self._lock = threading.Lock()

    def _folder(self, key: str) -> dict[str, bytes]:
        return self._folders.setdefault(key.split("/")[0], {})

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        try:
            return self._folder(key)[key][start:end]
        except KeyError:
            raise KeyNotFoundError(f"no key {key}") from None

    def put(self, key: str, data: ReadableBuffer) -> None:
        self._folder(key)[key] = bytes(data)

    def create(self, key: str, data: ReadableBuffer) -> None:
        with self._lock:
            if key in self._folder(key):
                raise KeyExistsError(f"key {key} exists")
            self._folder(key)[key] = bytes(data)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._folder(key).pop(key, None)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        found = [Entry(k, len(v), 0.0) for k, v in list(self._folder(prefix).items()) if k.startswith(prefix)]
        self.pages += max(1, -(-len(found) // PAGE))
        return iter(found)

    def head(self, key: str) -> Entry:
        return Entry(key, len(self.get(key)), 0.0)


def put_fast(backend: Backend, key: str, data: bytes) -> None:
    """Put without the durability that a benchmark's preparation does not need."""
    if isinstance(backend, LocalBackend):
        path = Path(backend.url.removeprefix("file://")) / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    else:
        backend.put(key, data)


def fill(backend: Backend, checkpoints: int, objects: int) -> None:
    """Put runs of ten checkpoints, each with objects of its own, as their saves would have."""
    each = objects // checkpoints
    for number in range(checkpoints):
        run, step = f"run{number // PER_RUN}", number % PER_RUN
        nonce = f"{number:016x}"
        names = (hashlib.sha256(f"{number} {index}".encode()).hexdigest() for index in range(each))
        chunks = tuple(Chunk(name, 1 << 20, 4, nonce, 1) for name in names)
        for chunk in chunks:
            put_fast(backend, str(chunk_keys(chunk)[0]), b"x")
        manifest = Manifest(run, 1, step, nonce, 0.0, {}, 16 << 20, {}, (), (), chunks).to_json()
        digest = codec.digest(manifest)
        data = codec.encode_document(manifest, digest=digest)
        key = str(ObjectKey(digest.identity.hex(), nonce))
        put_fast(backend, key, data)
        ref = Ref(RefName(1, step, nonce), 0.0, {}, key, len(data), each << 20, each)
        put_fast(backend, f"refs/{run}/{ref.name}", ref.to_json())
        if step == 0:
            put_fast(backend, f"runs/{run}/attempts/000001", dump_document("attempt", {}))
            seal = dump_document("lineage", {"attempt": 1, "refs": [], "abandoned": []})
            put_fast(backend, f"runs/{run}/attempts/000001.from", seal)


def described(calls: Counter[str]) -> str:
    """Return the counts by operation."""
    return ", ".join(f"{count} {name}" for name, count in sorted(calls.items())) or "nothing"


def measure(backend: Backend, name: str) -> None:
    """Save to one more run and prune it; open, list and sweep; print what each asked and took."""
    counting = CountingBackend(backend)
    state = {"w": torch.zeros(1000)}

    def step(label: str, started: float) -> None:
        seconds = time.perf_counter() - started
        small = Counter({op: n for op, n in counting.calls.items() if n})
        pages = f", {backend.pages} pages listed" if isinstance(backend, PagedBackend) else ""
        print(f"{name:22} {label:34} {seconds:8.3f} s   {described(small)}{pages}", flush=True)
        counting.reset()
        if isinstance(backend, PagedBackend):
            backend.pages = 0

    with incckpt.CheckpointManager(counting, run="mine", keep_last_n=2, threads=1) as manager:
        started = time.perf_counter()
        manager.save(1, state).result()
        step("first save (opens the run)", started)
        for number in (2, 3, 4, 5):
            state["w"].fill_(number)
            started = time.perf_counter()
            manager.save(number, state).result()
            labels = {2: "save", 3: "save, first prune (reads manifests)"}
            step(labels.get(number, "save and prune"), started)
    with incckpt.CheckpointManager(counting, run="run0", read_only=True) as reader:
        started = time.perf_counter()
        assert len(reader.checkpoints()) == PER_RUN
        step("list a run", started)
    collector = Collector(Store(counting))
    started = time.perf_counter()
    collector.sweep()
    step("full sweep", started)


class Saver:
    """Saves one changing tensor to a store, and keeps only the last checkpoint."""

    def __init__(self, url: str, options: dict[str, str]) -> None:
        self._manager = incckpt.CheckpointManager(url, keep_last_n=1, threads=1, storage_options=options)
        self._state = {"w": torch.zeros(1000)}
        self.done = 0

    def save(self) -> tuple[float, float]:
        """Save, and prune what was before; return the seconds and the processor's seconds that this took."""
        self.done += 1
        self._state["w"].fill_(self.done)
        started, cpu = time.perf_counter(), time.process_time()
        self._manager.save(self.done, self._state).result()
        return time.perf_counter() - started, time.process_time() - cpu

    def close(self) -> None:
        """Close the manager."""
        self._manager.close()


def grow_old(prunes: int, url: str, options: dict[str, str]) -> None:
    """Save and prune `prunes` times; on the way print how long saves and loads take, and what there is.

    Saves in a new store alternate with those that are measured, so that what else the machine does slows both.
    """
    old = Saver(url, options)
    for milestone in sorted({0, 1000, prunes} | set(range(5000, prunes, 5000))):
        while old.done <= milestone:
            old.save()
        new = Saver(f"{url}-new-{milestone}", options)
        new.save()
        pairs = [(old.save(), new.save()) for _ in range(SAVES)]
        new.close()
        wall, cpu, wall_new, cpu_new = (
            1000 * statistics.median(pair[store][clock] for pair in pairs) for store in (0, 1) for clock in (0, 1)
        )
        load = 1000 * statistics.median(
            seconds_of(lambda: incckpt.load(url, storage_options=options, threads=1)) for _ in range(5)
        )
        with open_backend(url, options) as backend:
            keys = Counter(entry.key.split("/")[0] for entry in backend.list())
        print(
            f"after {milestone:6} prunes: {1000 / wall:5.1f} saves a second, {1000 / wall_new:.1f} in a new store "
            f"(medians {wall:.1f} and {wall_new:.1f} ms, processor {cpu:.1f} and {cpu_new:.1f} ms), "
            f"a load {load:.1f} ms, resident {resident_mib():.0f} MiB, {described(keys)}{folders_of(url)}",
            flush=True,
        )
    old.close()


def many_tensors(count: int) -> None:
    """Save and load a state of `count` tensors of ten numbers; print how long that takes, and torch.save and load."""
    state = {f"layer{index // 10}.w{index % 10}": torch.full((10,), float(index)) for index in range(count)}
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/state.pt"
        for label, call in (
            ("torch.save", lambda: torch.save(state, file)),
            ("torch.load", lambda: torch.load(file)),
            ("incckpt.save", lambda: incckpt.save(state, f"{folder}/store")),
            ("incckpt.load", lambda: incckpt.load(f"{folder}/store")),
        ):
            cpu = time.process_time()
            seconds = seconds_of(call)
            cpu = time.process_time() - cpu
            print(f"{count} tensors, {label:12}: {seconds:6.2f} s, {cpu:6.2f} s of processor time", flush=True)


def seconds_of(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def resident_mib() -> float:
    """Return the memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def folders_of(url: str) -> str:
    """Return how many folders a store on the disk has, and on which file system it is."""
    if "://" in url:
        return ""
    command = ["df", "--output=fstype", url]
    kind = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    return f", {sum(1 for path in Path(url).rglob('*') if path.is_dir())} folders ({kind})"


def main() -> None:
    """Print the figures of an empty store and of a full one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=10_000)
    parser.add_argument("--objects", type=int, default=1_000_000)
    parser.add_argument("--local", action="store_true")
    parser.add_argument("--prunes", type=int, default=0)
    parser.add_argument("--tensors", type=int, default=0, help="measure one state of so many small tensors")
    parser.add_argument("--url", help="with --prunes: a store that does not exist yet; by default a temporary folder")
    parser.add_argument("--endpoint", help="of an S3 server, with --key and --secret")
    parser.add_argument("--key")
    parser.add_argument("--secret")
    arguments = parser.parse_args()
    if arguments.tensors and not arguments.prunes:
        many_tensors(arguments.tensors)
        return
    if arguments.prunes:
        given = {"endpoint_url": arguments.endpoint, "key": arguments.key, "secret": arguments.secret}
        with tempfile.TemporaryDirectory() as folder:
            options = {name: value for name, value in given.items() if value}
            grow_old(arguments.prunes, arguments.url or f"{folder}/store", options)
        return
    counts = (PER_RUN, arguments.checkpoints)
    per_checkpoint = max(1, arguments.objects // arguments.checkpoints)
    for checkpoints in counts:
        with tempfile.TemporaryDirectory() as folder:
            backend: Backend = LocalBackend(folder) if arguments.local else PagedBackend()
            started = time.perf_counter()
            fill(backend, checkpoints, checkpoints * per_checkpoint)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            objects = checkpoints * per_checkpoint
            print(f"{checkpoints} checkpoints, {objects} objects, put in {time.perf_counter() - started:.0f} s")
            measure(backend, f"{checkpoints} checkpoints")
            used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            print(f"memory beyond the store itself, at most: {used:.0f} MiB")


if __name__ == "__main__":
    main()
