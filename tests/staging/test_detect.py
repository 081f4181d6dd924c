"""The kernels against plain numpy, over element types, instruction sets, block bounds, alignments and thread counts."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from incckpt.errors import KernelError, OptionError
from incckpt.staging import _detect, detect
from tests.effort import tries

Bytes = npt.NDArray[np.uint8]
Float64s = npt.NDArray[np.float64]
Table = tuple[npt.NDArray[np.uintp], npt.NDArray[np.int64]]

PATIENT = settings(deadline=None)  # examples take longer while other tests share the processor
THREADS = (1, 2, 7)
REAL_DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
ITEM_BYTES = {name: getattr(torch, name).itemsize for name in detect.DTYPE_CODES}
#: Of the sums, by element type: what the docstring of `relative_l2` promises, and rounding.
TOLERANCE = {name: 1e-6 if "16" in name or "8" in name else 1e-13 for name in REAL_DTYPES}


class Memory:
    """Segments laid out in one buffer with gaps, so that most start unaligned."""

    def __init__(self, segments: Sequence[Bytes], gaps: Sequence[int] = (1, 0, 13, 64, 7)) -> None:
        sizes = [len(segment) for segment in segments]
        starts, position = [], 0
        for index, size in enumerate(sizes):
            position += gaps[index % len(gaps)]
            starts.append(position)
            position += size
        self.buffer = np.full(position + 64, 0xA5, np.uint8)
        for start, segment in zip(starts, segments, strict=True):
            self.buffer[start : start + len(segment)] = segment
        self.starts = np.array(starts, np.int64)
        self.nbytes = np.array(sizes, np.int64)

    @property
    def addresses(self) -> npt.NDArray[np.uintp]:
        return (self.buffer.ctypes.data + self.starts).astype(np.uintp)

    def segment(self, index: int) -> Bytes:
        return self.buffer[self.starts[index] : self.starts[index] + self.nbytes[index]]


def as_float64(raw: Bytes, dtype: str) -> Float64s:
    """Return the elements in `raw`, complex ones as pairs, without any arithmetic of ours."""
    real = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}.get(dtype, dtype)
    if not len(raw):  # torch cannot view nothing as something
        return np.empty(0)
    flat: Float64s = torch.from_numpy(raw.copy()).view(getattr(torch, real)).to(torch.float64).numpy()
    return flat


def reference_sums(current: Bytes, base: Bytes, dtype: str) -> tuple[float, float]:
    with np.errstate(all="ignore"):
        b = as_float64(base, dtype)
        d = as_float64(current, dtype) - b
        return float((d * d).sum()), float((b * b).sum())


def sums(
    current: Memory, base: Memory, dtype: str, *, threads: int = 1, kernel: str | None = None, group: object = None
) -> tuple[Float64s, Float64s]:
    count = len(current.nbytes)
    groups = np.arange(count) if group is None else np.asarray(group, np.int64)
    code = np.full(count, detect.DTYPE_CODES[dtype])
    n_groups = int(groups.max(initial=-1)) + 1
    return detect.relative_l2(
        current.addresses, base.addresses, current.nbytes, groups, code, n_groups, threads=threads, kernel=kernel
    )


def random_elements(rng: np.random.Generator, count: int, dtype: str) -> Bytes:
    """Return finite elements of many magnitudes, signs and zeros, squares within the range of float64."""
    spread = {"float64": 120, "float32": 30, "bfloat16": 30, "float16": 5, "float8_e4m3fn": 2, "float8_e5m2": 4}
    values = rng.standard_normal(count) * 10.0 ** rng.uniform(-spread[dtype], min(spread[dtype], 3), count)
    values[rng.random(count) < 0.1] = 0.0
    values[rng.random(count) < 0.05] = -0.0
    tensor = torch.from_numpy(values).to(getattr(torch, dtype))
    return tensor.view(torch.uint8).numpy() if count else np.empty(0, np.uint8)


# ---- blocks ----


@settings(PATIENT)
@given(
    st.lists(
        st.one_of(st.integers(0, 5), st.integers(0, 300), st.sampled_from([63, 64, 65, 127, 128, 129])), max_size=12
    )
)
def test_blocks_cover_every_byte_once_and_in_order(sizes: list[int]) -> None:
    with mock.patch.object(detect, "BLOCK_BYTES", 64):
        blocks = detect.blocks_of(np.array(sizes, np.int64))
    covered = [
        (int(segment), byte)
        for segment, offset, nbytes in zip(blocks.segment, blocks.offset, blocks.nbytes, strict=True)
        for byte in range(offset, offset + nbytes)
    ]
    assert covered == [(segment, byte) for segment, size in enumerate(sizes) for byte in range(size)]
    assert all(0 < nbytes <= 64 for nbytes in blocks.nbytes)


# ---- exact ----


@st.composite
def edited_segments(draw: st.DrawFn) -> tuple[list[Bytes], list[Bytes], list[int], int]:
    """Return segments, a copy with some bytes changed, the group of each, and the number of groups."""
    n_groups = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.one_of(st.integers(0, 40), st.integers(60, 700)), max_size=10))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    base = [rng.integers(0, 256, size, np.uint8) for size in sizes]
    current = [segment.copy() for segment in base]
    for segment in current:
        if len(segment) and draw(st.booleans()):
            segment[draw(st.integers(0, len(segment) - 1))] ^= 1 << draw(st.integers(0, 7))
    return current, base, [draw(st.integers(0, n_groups - 1)) for _ in sizes], n_groups


@settings(PATIENT)
@given(edited_segments(), st.sampled_from(THREADS))
def test_changed_exact_agrees_with_numpy(case: tuple[list[Bytes], list[Bytes], list[int], int], threads: int) -> None:
    current, base, group, n_groups = case
    expected = np.zeros(n_groups, np.bool_)
    for c, b, g in zip(current, base, group, strict=True):
        expected[g] |= not np.array_equal(c, b)
    left, right = Memory(current), Memory(base, gaps=(3, 8, 0))
    with mock.patch.object(detect, "BLOCK_BYTES", 64):
        changed = detect.changed_exact(
            left.addresses, right.addresses, left.nbytes, np.array(group, np.int64), n_groups, threads=threads
        )
    assert changed.dtype == np.bool_
    assert changed.tolist() == expected.tolist()


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("nbytes", [1, detect.BLOCK_BYTES - 1, detect.BLOCK_BYTES, detect.BLOCK_BYTES + 1, 3 << 20])
def test_a_change_of_one_bit_is_found_wherever_it_is(nbytes: int, threads: int) -> None:
    base = np.zeros(nbytes, np.uint8)
    for position in {0, nbytes // 2, max(0, nbytes - 1), min(nbytes - 1, detect.BLOCK_BYTES)}:
        current = base.copy()
        current[position] = 0x80  # -0.0: equal as a number, another bit pattern
        left, right = Memory([current, base]), Memory([base, base])
        changed = detect.changed_exact(
            left.addresses, right.addresses, left.nbytes, np.array([1, 0]), 2, threads=threads
        )
        assert changed.tolist() == [False, True]


# ---- sums ----


@pytest.mark.slow
@pytest.mark.parametrize("kernel", detect.KERNELS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_every_bit_pattern_of_a_small_float_is_squared_exactly(dtype: str, kernel: str) -> None:
    size = ITEM_BYTES[dtype]
    patterns = np.arange(256**size).astype(np.uint8 if size == 1 else np.uint16).view(np.uint8)
    pieces = list(patterns.reshape(-1, size))
    zeros = [np.zeros(size, np.uint8)] * len(pieces)
    values = as_float64(patterns, dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = values * values
    diff, base = sums(Memory(pieces), Memory(zeros), dtype, kernel=kernel)
    np.testing.assert_array_equal(diff, expected)
    assert not base.any()
    diff, base = sums(Memory(zeros), Memory(pieces), dtype, kernel=kernel)
    np.testing.assert_array_equal(diff, expected)
    np.testing.assert_array_equal(base, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", detect.KERNELS)
@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_sums_agree_with_float64_arithmetic(dtype: str, kernel: str) -> None:
    rng = np.random.default_rng(7)
    item = ITEM_BYTES[dtype]
    counts = [0, 1, 2, 3, 5, 31, 32, 33, 63, 127, 128, 129, 255, 256, 257, 1000, 4099]
    counts += [detect.BLOCK_BYTES // item + more for more in (-1, 0, 1)]
    current = [random_elements(rng, count, dtype) for count in counts]
    base = [random_elements(rng, count, dtype) for count in counts]
    expected = np.array([reference_sums(c, b, dtype) for c, b in zip(current, base, strict=True)])
    diff, squares = sums(Memory(current), Memory(base, gaps=(5, 2, 0, 1)), dtype, kernel=kernel)
    np.testing.assert_allclose(diff, expected[:, 0], rtol=TOLERANCE[dtype])
    np.testing.assert_allclose(squares, expected[:, 1], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("kernel", detect.KERNELS)
@pytest.mark.parametrize("dtype", REAL_DTYPES)
@settings(PATIENT, max_examples=tries(30))
@given(
    counts=st.lists(st.integers(0, 400), max_size=8),
    seed=st.integers(0, 2**32),
    threads=st.sampled_from(THREADS),
    data=st.data(),
)
def test_sums_of_any_table_agree_with_float64_arithmetic(
    dtype: str, kernel: str, counts: list[int], seed: int, threads: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    current = [random_elements(rng, count, dtype) for count in counts]
    base = [
        c.copy() if data.draw(st.booleans()) else random_elements(rng, len(c) // ITEM_BYTES[dtype], dtype)
        for c in current
    ]
    group = [data.draw(st.integers(0, 3)) for _ in counts]
    expected = np.zeros((max(group, default=-1) + 1, 2))
    for c, b, g in zip(current, base, group, strict=True):
        expected[g] += reference_sums(c, b, dtype)
    with mock.patch.object(detect, "BLOCK_BYTES", 256):
        diff, squares = sums(Memory(current), Memory(base), dtype, kernel=kernel, threads=threads, group=group)
    np.testing.assert_allclose(diff, expected[:, 0], rtol=TOLERANCE[dtype])
    np.testing.assert_allclose(squares, expected[:, 1], rtol=TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", detect.KERNELS)
@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_sums_do_not_depend_on_threads_or_alignment(dtype: str, kernel: str) -> None:
    rng = np.random.default_rng(3)
    counts = [700_001 // ITEM_BYTES[dtype], 17, 300_000 // ITEM_BYTES[dtype], 0, 5]
    current = [random_elements(rng, count, dtype) for count in counts]
    base = [random_elements(rng, count, dtype) for count in counts]
    group = [0, 1, 0, 2, 1]
    first = sums(Memory(current), Memory(base), dtype, kernel=kernel, group=group)
    for threads in THREADS:
        for gaps in ((0,), (1, 3), (64, 63)):
            again = sums(Memory(current, gaps), Memory(base), dtype, kernel=kernel, threads=threads, group=group)
            assert [part.tobytes() for part in again] == [part.tobytes() for part in first]


@pytest.mark.parametrize(
    ("dtype", "real"), [("complex128", "float64"), ("complex64", "float32"), ("complex32", "float16")]
)
def test_complex_numbers_are_pairs(dtype: str, real: str) -> None:
    rng = np.random.default_rng(5)
    current, base = (Memory([random_elements(rng, 2 * 321, real)]) for _ in range(2))
    assert sums(current, base, dtype) == sums(current, base, real)
    diff, squares = sums(current, base, dtype)
    assert (diff[0], squares[0]) == pytest.approx(reference_sums(current.segment(0), base.segment(0), dtype), rel=1e-6)


@pytest.mark.parametrize("kernel", detect.KERNELS)
@pytest.mark.parametrize("dtype", REAL_DTYPES)
@settings(PATIENT, max_examples=tries(20))
@given(count=st.integers(1, 600), where=st.integers(0), what=st.sampled_from([np.nan, np.inf, -np.inf]), data=st.data())
def test_nan_and_infinity_anywhere_count_as_changed(
    dtype: str, kernel: str, count: int, where: int, what: float, data: st.DataObject
) -> None:
    if dtype == "float8_e4m3fn":  # has no infinities, and torch saturates or not by version
        what = np.nan
    sides = data.draw(st.sampled_from([(True, False), (False, True), (True, True)]))
    tensors = [torch.full((count,), 0.5, dtype=getattr(torch, dtype)) for _ in sides]
    for tensor, side in zip(tensors, sides, strict=True):
        if side:
            tensor[where % count] = what
    current, base = (Memory([tensor.view(torch.uint8).numpy()]) for tensor in tensors)
    diff, squares = sums(current, base, dtype, kernel=kernel)
    assert not detect.within(diff, squares, 1e300)[0]


def test_subnormal_numbers_count_whatever_the_thread_was_told() -> None:
    """torch.set_flush_denormal sets a mode of the calling thread only; the others would answer differently."""
    tiny = torch.full((1 << 20,), 1e-42)
    current, base = Memory([tiny.view(torch.uint8).numpy()]), Memory([(tiny * 2).view(torch.uint8).numpy()])
    expected = [sums(current, base, "float32", kernel=kernel) for kernel in detect.KERNELS]
    assert all(diff[0] > 0 for diff, _ in expected)
    flushing = torch.set_flush_denormal(True)
    try:
        for threads in THREADS:
            assert [
                sums(current, base, "float32", kernel=kernel, threads=threads) for kernel in detect.KERNELS
            ] == expected
        if flushing:
            assert (tiny[:8] * 0.5).count_nonzero() == 0, "the kernels must leave the thread as it was"
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("kernel", detect.KERNELS)
def test_float64_differences_too_small_to_square_are_not_lost(kernel: str) -> None:
    def clean(current: Float64s, base: Float64s) -> bool:
        diff, squares = sums(Memory([current.view(np.uint8)]), Memory([base.view(np.uint8)]), "float64", kernel=kernel)
        return bool(detect.within(diff, squares, 0.5)[0])

    tiny = np.full(1000, 1e-170)
    assert clean(tiny, tiny)
    assert not clean(-tiny, tiny)
    assert not clean(tiny, np.zeros(1000))
    assert clean(np.append(tiny, 1.0), np.append(-tiny, 1.0))
    assert clean(np.full(1000, -0.0), np.zeros(1000))


def test_small_bfloat16_and_float32_are_not_lost() -> None:
    for dtype in ("bfloat16", "float32"):
        tiny = torch.full((100,), 1e-30, dtype=getattr(torch, dtype))
        current, base = Memory([tiny.view(torch.uint8).numpy()]), Memory([(tiny * 2).view(torch.uint8).numpy()])
        diff, squares = sums(current, base, dtype)
        assert np.sqrt(diff / squares)[0] == pytest.approx(0.5, rel=1e-6)


# ---- the decision ----

FINITE = st.floats(0, 1e300)


@settings(PATIENT)
@given(FINITE, FINITE, st.floats(0, 1e10))
@example(0.0, 0.0, 0.0)
@example(1e-300, 0.0, 1.0)
@example(1e-8, 1.0, 1e-4)
def test_within_is_the_comparison_of_norms(diff: float, base: float, threshold: float) -> None:
    clean = detect.within(np.array([diff]), np.array([base]), threshold)
    assert clean.tolist() == [bool(np.sqrt(diff) <= threshold * np.sqrt(base))]


@settings(PATIENT)
@given(st.sampled_from([np.nan, np.inf]), st.one_of(FINITE, st.just(np.inf)), st.floats(0, 1e10), st.booleans())
def test_nothing_that_is_not_finite_is_clean(bad: float, other: float, threshold: float, swap: bool) -> None:
    pair = (other, bad) if swap else (bad, other)
    assert detect.within(np.array([pair[0]]), np.array([pair[1]]), threshold).tolist() == [False]


# ---- copy ----


@settings(PATIENT)
@given(
    st.lists(st.one_of(st.integers(0, 200), st.integers(65_400, 65_700)), max_size=6),
    st.lists(st.integers(0, 70), min_size=1, max_size=4),
    st.lists(st.integers(0, 70), min_size=1, max_size=4),
    st.sampled_from(THREADS),
)
def test_copy_writes_what_it_should_and_nothing_else(
    sizes: list[int], gaps: list[int], other_gaps: list[int], threads: int
) -> None:
    rng = np.random.default_rng(1)
    source = Memory([rng.integers(0, 256, size, np.uint8) for size in sizes], gaps)
    target = Memory([np.zeros(size, np.uint8) for size in sizes], other_gaps)
    expected = Memory([source.segment(index) for index in range(len(sizes))], other_gaps).buffer
    before = source.buffer.copy()
    detect.copy(source.addresses, target.addresses, source.nbytes, threads=threads)
    np.testing.assert_array_equal(target.buffer, expected)
    np.testing.assert_array_equal(source.buffer, before)


@pytest.mark.parametrize("threads", THREADS)
def test_copy_of_several_blocks(threads: int) -> None:
    rng = np.random.default_rng(2)
    source = Memory([rng.integers(0, 256, detect.BLOCK_BYTES * 3 + more, np.uint8) for more in (-1, 0, 1)])
    target = Memory([np.zeros(size, np.uint8) for size in source.nbytes.tolist()])
    detect.copy(source.addresses, target.addresses, source.nbytes, threads=threads)
    np.testing.assert_array_equal(target.buffer, source.buffer)


# ---- arguments ----


def arguments() -> dict[str, object]:
    memory = Memory([np.zeros(8, np.uint8)] * 3)
    return {
        "memory": memory,
        "src": memory.addresses,
        "base": memory.addresses,
        "nbytes": memory.nbytes,
        "group": np.arange(3),
        "dtype_code": np.zeros(3, np.int64),
        "n_groups": 3,
        "threads": 1,
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("src", np.ones(3, np.int64), "src must be .*uint64"),
        ("base", np.ones(2, np.uintp), "base has 2 elements"),
        ("src", np.array([1, 0, 1], np.uintp), r"src\[1\] is a null address"),
        ("base", np.ones(6, np.uintp)[::2], "base must be a contiguous"),
        ("nbytes", np.ones((3, 1), np.int64), "nbytes must be"),
        ("nbytes", np.ones(3, np.int32), "nbytes must be"),
        ("nbytes", np.array([8, 8, -8]), r"nbytes\[2\] is negative"),
        ("nbytes", np.array([8, 7, 8]), r"nbytes\[1\] is 7.*elements of 8 bytes"),
        ("group", np.array([0, 3, 1]), r"group\[1\] is 3.*range\(3\)"),
        ("group", np.array([0, 1, -1]), r"group\[2\] is -1"),
        ("group", np.arange(4), "group has 4 elements"),
        ("n_groups", -1, "n_groups"),
        ("dtype_code", np.array([0, 0, 6]), "DTYPE_CODES"),
        ("dtype_code", np.array([0, 0, -1]), "DTYPE_CODES"),
        ("dtype_code", np.zeros(3, np.int8), "dtype_code must be"),
        ("threads", 0, "threads must be 1 or more, not 0"),
    ],
)
def test_unusable_arguments_are_named(name: str, value: object, message: str) -> None:
    given_ = arguments()
    del given_["memory"]
    given_[name] = value
    with pytest.raises(OptionError, match=message):
        detect.relative_l2(**given_)  # type: ignore[arg-type]
    del given_["dtype_code"]
    if name != "dtype_code" and "elements of" not in message:
        with pytest.raises(OptionError, match=message):
            detect.changed_exact(**given_)  # type: ignore[arg-type]


def test_unusable_arguments_of_copy_are_named() -> None:
    memory = Memory([np.zeros(8, np.uint8)])
    with pytest.raises(OptionError, match="dst has 0 elements"):
        detect.copy(memory.addresses, memory.addresses[:0], memory.nbytes, threads=1)
    with pytest.raises(OptionError, match="threads"):
        detect.copy(memory.addresses, memory.addresses, memory.nbytes, threads=-1)


@pytest.mark.parametrize("threshold", [-1e-9, np.inf, np.nan])
def test_an_unusable_threshold_is_named(threshold: float) -> None:
    with pytest.raises(OptionError, match="threshold must be"):
        detect.within(np.zeros(1), np.zeros(1), threshold)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("n_groups", [0, 3])
def test_empty_tables(n_groups: int, threads: int) -> None:
    addresses, nothing = np.zeros(0, np.uintp), np.zeros(0, np.int64)
    changed = detect.changed_exact(addresses, addresses, nothing, nothing, n_groups, threads=threads)
    assert changed.tolist() == [False] * n_groups
    for part in detect.relative_l2(addresses, addresses, nothing, nothing, nothing, n_groups, threads=threads):
        assert part.tolist() == [0.0] * n_groups
        assert part.dtype == np.float64
    detect.copy(addresses, addresses, nothing, threads=threads)


def test_an_empty_segment_needs_no_address() -> None:
    null, zero = np.zeros(1, np.uintp), np.zeros(1, np.int64)
    assert detect.changed_exact(null, null, zero, zero, 1, threads=1).tolist() == [False]


# ---- kernels and threads ----


def test_the_kernel_is_chosen_by_name_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INCCKPT_KERNEL", raising=False)
    assert detect.default_kernel() == detect.KERNELS[0]
    assert detect.KERNELS[-1] == "generic"
    monkeypatch.setenv("INCCKPT_KERNEL", "generic")
    assert detect.default_kernel() == "generic"
    monkeypatch.setenv("INCCKPT_KERNEL", "avx1024")
    with pytest.raises(KernelError, match=r"'avx1024'.*there are: .*generic"):
        detect.default_kernel()
    memory = Memory([np.zeros(8, np.uint8)])
    with pytest.raises(KernelError, match="avx1024"):
        sums(memory, memory, "float32")
    with pytest.raises(KernelError, match="sse9"):
        sums(memory, memory, "float32", kernel="sse9")
    sums(memory, memory, "float32", kernel="generic")


@pytest.mark.parametrize(
    ("asked", "least"), [("1", 1), ("1,4", 1), ("100000", None), ("", None), ("0", None), ("x", None)]
)
def test_default_threads(asked: str, least: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    processors = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    assert detect.default_threads() == (processors if least is None else least)


@pytest.mark.skipif(sys.platform != "linux", reason="needs processor affinity")
def test_default_threads_respects_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 8})
    assert detect.default_threads() == 3


@pytest.fixture
def without_openmp(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    detect._warn_of_single_thread.cache_clear()
    monkeypatch.setattr(_detect, "OPENMP", False)
    yield
    detect._warn_of_single_thread.cache_clear()


@pytest.mark.usefixtures("without_openmp")
def test_a_build_without_openmp_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    memory = Memory([np.zeros(8, np.uint8)])
    with caplog.at_level(logging.WARNING, "incckpt"):
        detect.copy(memory.addresses, memory.addresses, memory.nbytes, threads=1)
        assert not caplog.records
        for _ in range(3):
            assert not detect.changed_exact(
                memory.addresses, memory.addresses, memory.nbytes, np.zeros(1, np.int64), 1, threads=2
            ).any()
    assert [record.getMessage() for record in caplog.records] == [
        "incckpt was built without OpenMP: changes are detected and copied on one thread only"
    ]


def repeated(buffer: Bytes, times: int) -> tuple[npt.NDArray[np.uintp], detect.Blocks]:
    """Return a table that names the same memory many times."""
    nbytes = np.full(times, len(buffer), np.int64)
    return np.full(times, buffer.ctypes.data, np.uintp), detect.blocks_of(nbytes)


class Changer(threading.Thread):
    """Changes one byte as soon as it is allowed to and gets to run."""

    def __init__(self, buffer: Bytes) -> None:
        super().__init__()
        self.buffer = buffer
        self.allowed = threading.Event()

    def run(self) -> None:
        self.allowed.wait()
        self.buffer[-1] = 0x7F


@pytest.fixture
def no_thread_switches() -> Iterator[None]:
    """Let a thread keep the GIL until it gives it up."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(3600)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="is about CPython's lock")
@pytest.mark.usefixtures("no_thread_switches")
def test_other_threads_run_during_a_comparison() -> None:
    """The kernel compares equal memory until another Python thread changes it, which takes the GIL."""
    base, current = np.zeros(64 << 10, np.uint8), np.zeros(64 << 10, np.uint8)
    times = 1_000_000
    left, blocks = repeated(current, times)
    right, _ = repeated(base, times)
    group, flags = np.zeros(times, np.int64), np.zeros(1, np.uint8)
    changer = Changer(current)
    changer.start()
    changer.allowed.set()
    _detect.flag_differences(left, right, blocks.segment, blocks.offset, blocks.nbytes, group, flags, 1)
    changer.join()
    assert flags[0], "no other thread ran while the kernel did"


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="is about CPython's lock")
@pytest.mark.usefixtures("no_thread_switches")
def test_other_threads_run_during_sums_and_copies() -> None:
    """A change made by another Python thread shows in what the kernel reads later in the same call."""
    base, current = np.zeros(64 << 10, np.uint8), np.zeros(64 << 10, np.uint8)
    times = 20_000
    left, blocks = repeated(current, times)
    right, _ = repeated(base, times)
    code, result = np.full(times, detect.DTYPE_CODES["bfloat16"]), np.zeros((times, 2))
    changer = Changer(current)
    changer.start()
    changer.allowed.set()
    _detect.sum_squares(left, right, blocks.segment, blocks.offset, blocks.nbytes, code, result, detect.KERNELS[0], 1)
    changer.join()
    assert result[-1, 0] > 0, "no other thread ran while the sums were added up"

    current[:] = 0
    target = np.zeros_like(current)
    destination, _ = repeated(target, times)
    changer = Changer(current)
    changer.start()
    changer.allowed.set()  # from here to the kernel nothing may give up the GIL, as numpy's functions do
    _detect.copy(left, destination, blocks.segment, blocks.offset, blocks.nbytes, 1)
    changer.join()
    assert target[-1] == 0x7F, "no other thread ran during the copy"
