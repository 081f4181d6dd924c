"""Checkpoints of several ranks: what the coordinator does for a thousand of them, and saves beside DCP's own storage.

    python -m benchmarks.bench_distributed coordinator                              # 1,000 ranks of 1,000 tensors
    torchrun --nproc-per-node 4 -m benchmarks.bench_distributed saves               # beside DCP's own, on a local disk
    torchrun --nproc-per-node 4 -m benchmarks.bench_distributed saves --gigabits 1  # the same over a slow link

`coordinator` makes what ranks would report, 10 MB a shard, and measures the processor time of everything between the
reports and the commit: putting them together, checking that they cover every tensor, making the manifest. Nothing is
put anywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import logging
import os
import pickle
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec
import torch
import torch.distributed as dist
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from incckpt.codec import objects as codec
from incckpt.integrations.dcp import IncrementalReader, IncrementalWriter
from incckpt.integrations.dcp.gathering import gathered
from incckpt.run import shards
from incckpt.run.merging import merge
from incckpt.run.parts import Parts, Place
from incckpt.run.view import RunView
from incckpt.state.entries import TensorEntry
from incckpt.store.encoded import EncodedChunks
from incckpt.store.manifest import Chunk, Range
from incckpt.store.objects import chunk_sizes, manifest_keys, manifest_sizes
from incckpt.store.refs import RefName
from incckpt.store.store import Store
from tests.servers.installed import rclone
from tests.servers.processes import free_port, program_server, python_server

_SHARD = 10 << 20  # bytes of a shard: 1,000 tensors over 1,000 ranks are 10 TB


def reports(ranks: int, tensors: int) -> tuple[Metadata, list[list[WriteResult]], int]:
    """Return what DCP gives the coordinator: a plan in which each tensor is split by rows over all ranks, and what each
    rank reports; and the bytes in which the reports came.
    """
    rows, columns = _SHARD // 4096, 1024
    names = [f"layers.{number}.weight" for number in range(tensors)]
    entries = [
        TensorEntry(name, "torch", "float32", (rows, columns), (columns, 1), i, 0) for i, name in enumerate(names)
    ]
    ranges = [Range(_SHARD, 4, ((number, 0, _SHARD),)) for number in range(tensors)]
    nodes = {name: {"tensor": number} for number, name in enumerate(names)}
    results, nbytes = [], 0
    for rank in range(ranks):
        identities = [hashlib.sha256(f"{rank} {number}".encode()).hexdigest() for number in range(tensors)]
        chunks = [Chunk(identity, _SHARD, 4, f"{rank:016x}", _SHARD // 2) for identity in identities]
        places = {name: Place(name, (rank * rows, 0)) for name in names}
        parts = Parts.of(places, nodes, entries, ranges)
        listed = EncodedChunks.of(chunks, chunk_sizes(chunks))
        told = pickle.dumps(shards.Shard({}, {}, {}, (), parts, listed, 16 << 20, [*listed.sizes]))
        nbytes += len(told)
        at = torch.Size((rank * rows, 0))
        results.append([WriteResult(MetadataIndex(name, at, rank), _SHARD, None) for name in names])
        results[-1][0] = WriteResult(results[-1][0].index, _SHARD, pickle.loads(told))
    size = torch.Size((rows, columns))
    boxes = [ChunkStorageMetadata(torch.Size((rank * rows, 0)), size) for rank in range(ranks)]
    described = TensorStorageMetadata(TensorProperties(), torch.Size((ranks * rows, columns)), boxes)
    return Metadata(dict.fromkeys(names, described), {name: tuple(name.split(".")) for name in names}), results, nbytes


def coordinator(sizes: Sequence[tuple[int, int]]) -> None:
    """Print the processor time that the coordinator's part takes, by ranks and tensors."""
    print("| ranks | tensors | merge | manifest | coded | keys | together | reports | JSON | stored | peak memory |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for ranks, tensors in sizes:
        metadata, results, told = reports(ranks, tensors)
        times = [time.process_time()]
        leaves, found = gathered(metadata, results, [])
        merged = merge(leaves, found)
        times.append(time.process_time())
        manifest = merged.manifest("run", RefName.new(1, 1), 0.0, {})
        document = manifest.to_json()
        times.append(time.process_time())
        data = codec.encode_document(document, digest=codec.digest(document))
        times.append(time.process_time())
        keys = manifest_keys(manifest), frozenset(manifest_sizes(manifest))
        times.append(time.process_time())
        assert len(keys[0]) == ranks * tensors
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        spent = [*(after - before for before, after in itertools.pairwise(times)), times[-1] - times[0]]
        columns = " | ".join(f"{seconds:.2f} s" for seconds in spent)
        print(
            f"| {ranks:,} | {tensors:,} | {columns} | {told / 1e6:.1f} MB | {len(document) / 1e6:.1f} MB "
            f"| {len(data) / 1e6:.1f} MB | {peak} MiB |",
            flush=True,
        )


class Target:
    """Where the savers save: a local folder, or a bucket behind a link; the same for all ranks.

    Parameters
    ----------
    rate
        Bytes per second, each way, of the link to an S3 server of this machine; ``None`` for a folder. The server is
        rclone, which answers many requests at once; it cannot create exclusively, which costs us a request more each.
    """

    def __init__(self, rate: float | None) -> None:
        self._stack = ExitStack()
        told: list[Any] = [None, None]
        if dist.get_rank() == 0 and rate is None:
            told[0] = self._stack.enter_context(tempfile.TemporaryDirectory())
        elif dist.get_rank() == 0 and rate is not None:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            (folder / "served" / "bench").mkdir(parents=True)
            port = free_port()
            command = [rclone(), "serve", "s3", "--config", os.devnull, "--auth-key", "test,testtest", "--no-cleanup"]
            command += ["--addr", f"127.0.0.1:{port}", str(folder / "served")]
            self._stack.enter_context(program_server(command, port, folder / "log"))
            relay = self._stack.enter_context(python_server("slow_relay", str(port), str(rate)))
            options = {"key": "test", "secret": "testtest", "endpoint_url": f"http://127.0.0.1:{relay}"}
            told = ["s3://bench", options]
        dist.broadcast_object_list(told, 0)
        self.root, self.options = told
        self.remote = rate is not None

    def incckpt(self, name: str) -> IncrementalWriter:
        """Return our writer, to a new store."""
        return IncrementalWriter(f"{self.root}/{name}", threads=1, storage_options=self.options)

    def file_system(self, name: str) -> StorageWriter:
        """Return DCP's own writer of a new checkpoint."""
        if self.remote:
            return FsspecWriter(f"{self.root}/{name}", **self.options)
        return FileSystemWriter(f"{self.root}/{name}")

    def fsspec(self, name: str) -> StorageWriter:
        """Return DCP's writer over fsspec; for a first save with a new session, as ours has."""
        prefix = "" if self.remote else "file://"
        options = dict(self.options or {})
        if self.remote and name.startswith("first-"):
            options["skip_instance_cache"] = True
        return FsspecWriter(f"{prefix}{self.root}/{name}", **options)

    def reader(self, name: str) -> StorageReader:
        """Return DCP's reader of a checkpoint; with a new session, as after a restart, and as ours has."""
        return (
            FsspecReader(f"{self.root}/{name}", skip_instance_cache=True, **self.options)
            if self.remote
            else FileSystemReader(f"{self.root}/{name}")
        )

    def nbytes(self, name: str) -> int:
        """Return what is stored below a name."""
        files = fsspec.filesystem("s3" if self.remote else "file", **(self.options or {}), use_listings_cache=False)
        return sum(entry["size"] for entry in files.find(f"{self.root}/{name}", detail=True).values())

    def forget(self) -> None:
        """Have the next reads come from the disk: drop all files from the kernel's page cache."""
        os.sync()
        for path in Path(self.root).rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)

    def close(self) -> None:
        """Remove it."""
        self._stack.close()


def slowest(seconds: float) -> float:
    """Return the longest that any rank took."""
    told = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return float(told.item())


def saves(megabytes: int, rounds: int, changed: float, rate: float | None, equal: bool = False) -> None:
    """Print what saves in the background and loads take beside DCP's own, alternating; medians.

    First saves are of a new writer to a new place, later ones of the same.

    Parameters
    ----------
    rate
        As `Target` takes it.
    equal
        Whether every rank has the same shards.
    """
    dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("incckpt").setLevel(logging.ERROR)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0 if equal else dist.get_rank())
    count = 20
    elements = (megabytes << 20) // 4 // count // dist.get_world_size() // 1024
    locals_ = [torch.randn(elements, 1024, generator=generator) for _ in range(count)]
    state = {f"w{i}": DTensor.from_local(one, mesh, [Shard(0)], run_check=False) for i, one in enumerate(locals_)}
    place = Target(rate)
    writers: dict[str, Callable[[str], StorageWriter]] = {"incckpt": place.incckpt, "FsspecWriter": place.fsspec}
    if not place.remote:
        writers["FileSystemWriter"] = place.file_system

    def save(storage: StorageWriter) -> tuple[float, float]:
        """Return how long the slowest rank was blocked by a save, and the whole save took."""
        if dist.get_rank() == 0:
            os.sync()  # or a save that syncs would pay for what one that does not has left
        dist.barrier()
        started = time.perf_counter()
        future = async_save(state, storage_writer=storage, process_group=group)
        blocked = slowest(time.perf_counter() - started)
        future.result()  # type: ignore[union-attr]
        return blocked, slowest(time.perf_counter() - started)

    firsts: dict[str, list[tuple[float, float]]] = {name: [] for name in writers}
    laters: dict[str, list[tuple[float, float]]] = {name: [] for name in writers}
    for number in range(rounds):
        for name, writer in sorted(writers.items(), reverse=bool(number % 2)):
            storage = writer(f"first-{name}-{number}")
            firsts[name].append(save(storage))
            if isinstance(storage, IncrementalWriter):
                storage.close()
    ours = place.incckpt("incckpt")
    for number in range(rounds):
        for name, writer in sorted(writers.items(), reverse=bool(number % 2)):
            took = save(ours if name == "incckpt" else writer(f"{name}-{number}"))
            if number:
                laters[name].append(took)
        for one in locals_[: round(count * changed)]:
            one += 1e-3 * torch.randn(one.shape, generator=generator)
    unverified = "incckpt, verify=False"
    loads: dict[str, list[float]] = {name: [] for name in (*writers, unverified)}
    cold: dict[str, list[float]] = {name: [] for name in loads}
    for taken, number in itertools.product((loads,) if place.remote else (loads, cold), range(rounds)):
        for name in sorted(loads, reverse=bool(number % 2)):
            reader: StorageReader = (
                place.reader(f"{name}-{rounds - 1}")
                if name in writers and name != "incckpt"
                else IncrementalReader(
                    f"{place.root}/incckpt", threads=1, verify=name != unverified, storage_options=place.options
                )
            )
            if taken is cold and dist.get_rank() == 0:
                place.forget()
            dist.barrier()
            started = time.perf_counter()
            load(state, storage_reader=reader)
            taken[name].append(slowest(time.perf_counter() - started))
    if dist.get_rank() == 0:
        where = "a local disk" if rate is None else f"a link of {rate * 8 / 1e9:g} Gbit/s to an S3 server"
        what = f"{megabytes} MiB over {dist.get_world_size()} {'equal ' if equal else ''}ranks"
        print(f"{what}, {changed:.0%} of the tensors changed, {where}")
        print("| | blocked by the first, later saves | first save, later ones | load | stored by the first, by all |")
        print("| --- | --- | --- | --- | --- |")
        first = Store.open(f"{place.root}/incckpt", place.options)
        with first, RunView(first, "default", threads=1) as view:
            written = view.checkpoints()[0].written
        for name in writers:
            blocked, whole = (
                f"{statistics.median(one[i] for one in firsts[name]):.2f} s, "
                f"{statistics.median(one[i] for one in laters[name]):.2f} s"
                for i in (0, 1)
            )
            names = [name] if name == "incckpt" else [f"{name}-{number}" for number in range(rounds)]
            sizes = [place.nbytes(one) for one in names]
            early = written if name == "incckpt" else sizes[0]
            stored = f"{early / 1e6:.0f} MB, {sum(sizes) / 1e6:.0f} MB"
            print(f"| {name} | {blocked} | {whole} | {statistics.median(loads[name]):.2f} s | {stored} |")
        print(f"Loads with verify=False take incckpt {statistics.median(loads[unverified]):.2f} s.")
        if not place.remote:
            print("Loads from the disk, nothing in the page cache:", end=" ")
            print(", ".join(f"{name} {statistics.median(seconds):.2f} s" for name, seconds in cold.items()))
    dist.barrier()
    ours.close()
    place.close()
    dist.destroy_process_group()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("coordinator", "saves"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[250, 500, 1000])
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--megabytes", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--changed", type=float, default=0.3)
    parser.add_argument("--gigabits", type=float, help="save to an S3 server over a link of so many Gbit/s")
    parser.add_argument("--equal", action="store_true", help="let every rank have the same shards")
    arguments = parser.parse_args()
    if arguments.which == "coordinator":
        coordinator([(ranks, arguments.tensors) for ranks in arguments.ranks])
    else:
        saves(
            arguments.megabytes,
            arguments.rounds,
            arguments.changed,
            arguments.gigabits and arguments.gigabits / 8 * 1e9,
            arguments.equal,
        )


if __name__ == "__main__":
    main()
