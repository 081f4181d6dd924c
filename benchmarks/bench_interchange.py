"""Peak memory and time of imports and exports of a state that is larger than the memory they may take.

A safetensors file of random bfloat16 tensors is written, imported, exported in every format and imported again, each in
a process of its own; the peak of its resident memory is printed, and what came out is compared with what went in.

    python benchmarks/bench_interchange.py --gigabytes 6 --folder /var/tmp

Takes about four times the size of the state on disk. Or, what a folder of checkpoints takes once it is imported:

    python benchmarks/bench_interchange.py --series 20   # the fine-tune in bfloat16 of bench_bytes, as .pt files
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TENSOR_BYTES = 150 << 20
SMALL = 3


def write_model(path: Path, nbytes: int, *, noise: bool = False) -> None:
    """Write a safetensors file: large tensors, and small ones beside them, of normal numbers or of noise."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0

    def add(name: str, columns: int, rows: int) -> None:
        nonlocal position
        size = 2 * columns * rows
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [position, position + size]}
        position += size

    index = 0
    while position < nbytes:
        add(f"layers.{index:04}.weight", 4096, TENSOR_BYTES // 8192)
        for part in range(SMALL):
            add(f"layers.{index:04}.norm.{part}", 4096, 1)
        index += 1
    document = json.dumps(header).encode()
    document += b" " * (-len(document) % 8)
    numbers = np.random.default_rng(1)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(document)) + document)
        for start in range(0, position, 16 << 20):
            size = min(16 << 20, position - start)
            if noise:
                file.write(numbers.bytes(size))
            else:
                values = numbers.standard_normal(size // 2, np.float32)
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).data)


def tensors_of(path: Path) -> dict[str, tuple[Path, int, int]]:
    """Return where the bytes of each tensor of a safetensors file are: file, start, length."""
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    begin = 8 + length
    return {
        name: (path, begin + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
    }


def tensors_in(folder: Path) -> dict[str, tuple[Path, int, int]]:
    """Return where the bytes of each tensor of a folder of safetensors files are."""
    return {name: place for path in folder.glob("*.safetensors") for name, place in tensors_of(path).items()}


def same_bytes(one: dict[str, tuple[Path, int, int]], other: dict[str, tuple[Path, int, int]]) -> bool:
    """Whether two sets of tensors are the same, byte for byte; a part of a file at a time is mapped."""
    if one.keys() != other.keys():
        return False
    return all(_same(one[name], other[name]) for name in one)


def _same(one: tuple[Path, int, int], other: tuple[Path, int, int]) -> bool:
    if one[2] != other[2]:
        return False
    with open(one[0], "rb") as left, open(other[0], "rb") as right:
        left.seek(one[1])
        right.seek(other[1])
        for start in range(0, one[2], 16 << 20):
            size = min(16 << 20, one[2] - start)
            if left.read(size) != right.read(size):
                return False
    return True


def measured(name: str, work: Callable[[], object]) -> None:
    """Do `work` in this process, and print what it took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"name": name, "seconds": seconds, "before": before << 10, "peak": peak << 10}))


def child(what: str, source: str, target: str) -> None:
    """Import or export, in the process that is measured."""
    from incckpt.interchange import export, import_files

    if what == "import":
        measured(what, lambda: import_files(source, target))
    else:
        measured(what, lambda: export(source, target, format=what))  # type: ignore[arg-type]


def run(what: str, source: Path | str, target: Path) -> dict[str, float]:
    """Run `child` in a new process; return what it measured."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", what, str(source), str(target)],
        env={name: value for name, value in os.environ.items() if name != "INCCKPT_VERIFY_WRITES"}
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=True,
        capture_output=True,
        text=True,
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def series(folder: Path, count: int) -> None:
    """Fine-tune a small model, save every ten steps with torch.save, and import the folder."""
    import torch

    import incckpt
    from benchmarks.bench_bytes import GAP, pretrained, train_step
    from benchmarks.bench_codec import batches
    from incckpt.interchange import import_files

    model = pretrained().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    source = batches(3)
    old = folder / "old"
    old.mkdir()
    for save in range(count):
        for _ in range(GAP):
            train_step(model, optimizer, next(source))
        torch.save(model.state_dict(), old / f"checkpoint-{save * GAP}.pt")
    made = import_files(old, folder / "store")
    files = sum(path.stat().st_size for path in old.iterdir())
    stored = sum(path.stat().st_size for path in (folder / "store").rglob("*") if path.is_file())
    later = made[1:]
    ratio = sum(one.checkpoint.written for one in later) / sum(one.checkpoint.nbytes for one in later)
    print(f"{count} files of {files / 1e6:.1f} MB together take {stored / 1e6:.1f} MB, {stored / files:.3f} of it")
    first = made[0].checkpoint.written / made[0].checkpoint.nbytes
    print(f"{ratio:.4f} of the raw bytes for each after the first, {first:.3f} for that")
    for one in made:
        loaded = incckpt.load(f"{folder}/store#@{one.checkpoint.step}")
        original = torch.load(one.source, weights_only=True)
        same = all(torch.equal(loaded[name].view(torch.uint8), original[name].view(torch.uint8)) for name in original)
        if not same or list(loaded) != list(original):
            raise SystemExit(f"step {one.checkpoint.step} came back different")
    print("every one of them came back, bit for bit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", default=None, help="where to work; a temporary folder is made in it")
    parser.add_argument("--formats", nargs="*", default=["safetensors", "pt", "huggingface", "dcp"])
    parser.add_argument("--series", type=int, default=0, help="how many checkpoints of a fine-tune to import instead")
    parser.add_argument("--child", nargs=3, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(*options.child)
        return
    folder = Path(tempfile.mkdtemp(prefix="bench-interchange-", dir=options.folder))
    try:
        if options.series:
            series(folder, options.series)
        else:
            bench(folder, int(options.gigabytes * (1 << 30)), options.formats)
    finally:
        shutil.rmtree(folder)


def bench(folder: Path, nbytes: int, formats: list[str]) -> None:
    """Import a file, and export and import it in every format."""
    model = folder / "model.safetensors"
    write_model(model, nbytes)
    expected = tensors_of(model)
    print(f"{model.stat().st_size / 1e9:.2f} GB in {len(expected)} tensors", flush=True)

    def line(what: str, one: dict[str, float], same: bool | None) -> None:
        verdict = "" if same is None else "same bytes" if same else "DIFFERENT BYTES"
        print(
            f"{what:28} {one['seconds']:7.1f} s   peak {one['peak'] / 1e6:7.0f} MB, "
            f"{(one['peak'] - one['before']) / 1e6:6.0f} MB of it for the work   {verdict}",
            flush=True,
        )

    line("import safetensors", run("import", model, folder / "store"), None)
    for name in formats:
        out = folder / f"out-{name}"
        target = out / {"safetensors": "model.safetensors", "pt": "state.pt"}.get(name, "folder")
        one = run(name, folder / "store", target)
        if name in ("safetensors", "huggingface"):
            line(f"export {name}", one, same_bytes(tensors_in(target.parent if target.suffix else target), expected))
        else:
            line(f"export {name}", one, None)
            line(f"import {name}", run("import", target, out / "store"), None)
            run("huggingface", out / "store", out / "back")
            verdict = "same bytes" if same_bytes(tensors_in(out / "back"), expected) else "DIFFERENT BYTES"
            print(f"{name}, out and in: {verdict}", flush=True)
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
