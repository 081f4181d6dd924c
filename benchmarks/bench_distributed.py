"""Checkpoints of several ranks: what the coordinator does for a thousand of them, and saves beside DCP's own storage.

    python benchmarks/bench_distributed.py coordinator                 # 1,000 ranks of 1,000 tensors, and smaller
    torchrun --nproc-per-node 4 benchmarks/bench_distributed.py saves  # beside FileSystemWriter, in one run

`coordinator` makes what ranks would report, 10 MB a shard, and measures the processor time of everything between the
reports and the commit: putting them together, checking that they cover every tensor, making the manifest. Nothing is
put anywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import pickle
import resource
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from incckpt.codec import objects as codec
from incckpt.integrations.dcp import IncrementalReader, IncrementalWriter
from incckpt.integrations.dcp.gathering import gathered
from incckpt.run import shards
from incckpt.run.merging import merge
from incckpt.run.parts import Parts, Place
from incckpt.state.entries import TensorEntry
from incckpt.store.encoded import EncodedChunks
from incckpt.store.manifest import Chunk, Range
from incckpt.store.objects import chunk_sizes, manifest_keys, manifest_sizes
from incckpt.store.refs import RefName

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


def saves(megabytes: int, rounds: int, changed: float) -> None:
    """Print what saves and loads take beside DCP's own, alternating, on a local disk."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(dist.get_rank())
    count = 20
    elements = (megabytes << 20) // 4 // count // dist.get_world_size() // 1024
    locals_ = [torch.randn(elements, 1024, generator=generator) for _ in range(count)]
    state = {f"w{i}": DTensor.from_local(one, mesh, [Shard(0)], run_check=False) for i, one in enumerate(locals_)}
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder, 0)
    root = Path(folder[0])
    writer = IncrementalWriter(str(root / "incckpt"), threads=1)
    took: dict[str, list[float]] = {"incckpt": [], "FileSystemWriter": []}

    def timed(act: Callable[[], object]) -> float:
        dist.barrier()
        started = time.perf_counter()
        act()
        dist.barrier()
        return time.perf_counter() - started

    for number in range(rounds):
        took["incckpt"].append(timed(lambda: save(state, storage_writer=writer)))
        other = FileSystemWriter(root / f"dcp-{number}")
        took["FileSystemWriter"].append(timed(lambda other=other: save(state, storage_writer=other)))  # type: ignore[misc]
        for one in locals_[: round(count * changed)]:
            one += 1e-3 * torch.randn(one.shape, generator=generator)
    reading = {
        "incckpt": timed(lambda: load(state, storage_reader=IncrementalReader(str(root / "incckpt"), threads=1))),
        "FileSystemWriter": timed(lambda: load(state, storage_reader=FileSystemReader(root / f"dcp-{rounds - 1}"))),
    }
    if dist.get_rank() == 0:
        stored = {
            "incckpt": [root / "incckpt"],
            "FileSystemWriter": [root / f"dcp-{number}" for number in range(rounds)],
        }
        print(f"{megabytes} MiB over {dist.get_world_size()} ranks, {changed:.0%} of the tensors changed between saves")
        print("| | first save | later saves (median) | load | stored by all saves |")
        print("| --- | --- | --- | --- | --- |")
        for name, seconds in took.items():
            nbytes = sum(path.stat().st_size for one in stored[name] for path in one.rglob("*") if path.is_file())
            later = statistics.median(seconds[1:])
            print(f"| {name} | {seconds[0]:.2f} s | {later:.2f} s | {reading[name]:.2f} s | {nbytes / 1e6:.0f} MB |")
        shutil.rmtree(root)
    writer.close()
    dist.destroy_process_group()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("coordinator", "saves"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[250, 500, 1000])
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--changed", type=float, default=0.3)
    arguments = parser.parse_args()
    if arguments.which == "coordinator":
        coordinator([(ranks, arguments.tensors) for ranks in arguments.ranks])
    else:
        saves(arguments.megabytes, arguments.rounds, arguments.changed)


if __name__ == "__main__":
    main()
