"""What every backend must do, as pytest classes.

A package with a backend of its own checks it in a few lines::

    class TestMyBackend(BackendConformance):
        @pytest.fixture
        def backend(self, tmp_path):
            with MyBackend(tmp_path) as backend:
                yield backend

Each test asks the fixture for a backend over an *empty* root.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from incckpt.backends.base import Backend, ReadableBuffer
from incckpt.errors import BackendError, KeyExistsError, KeyNotFoundError, OptionError

__all__ = ["BackendConformance", "ReadConformance"]

_BAD_KEYS = [
    "",
    "/",
    "/absolute",
    "folder/",
    "a//b",
    ".",
    "..",
    "../up",
    "a/../b",
    "a/.hidden",
    ".incckpt-tmp-0",
    "back\\slash",
    "space d",
    "new\nline",
    "nul\0",
    "ümlaut",
    "a?b",
    "a#b",
    "a%2fb",
    "x" * 256,
    "/".join(["x" * 100] * 10),
]
_VALUES = {
    "empty": b"",
    "one": b"\0",
    "every-byte": bytes(range(256)),
    "line-ends": b"\r\n\n\r\x00\x1a\xff\xfe",
    "looks-like-xml": b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>",
    "looks-compressed": b"\x1f\x8b\x08\x00" + bytes(12),
    "text": "später".encode(),
    "odd-length": random.Random(1).randbytes(65_537),
}


_RANGES: list[tuple[int, int | None]] = [
    *((0, None), (0, 0), (0, 1), (3, 3), (3, 7), (5, None)),
    *((9, 10), (9, 11), (10, None), (10, 10), (10, 20), (50, 50), (50, 60), (50, None)),
]


class ReadConformance:
    """Reading. Read-only backends override `writer` with a backend over the same root."""

    many_keys = 1_005
    """Keys in the listing test; a page has 1,000 keys at S3, and up to 5,000 elsewhere."""

    large_value = 64 << 20
    """Bytes of the largest value."""

    @pytest.fixture
    def writer(self, backend: Backend) -> Backend:
        """Return the backend that writes the values to be read; by default the tested one."""
        return backend

    def test_get_returns_what_was_put(self, backend: Backend, writer: Backend) -> None:
        for name, value in _VALUES.items():
            writer.put(f"values/{name}", value)
            assert backend.get(f"values/{name}") == value, name

    def test_large_value(self, backend: Backend, writer: Backend) -> None:
        value = random.Random(2).randbytes(self.large_value)
        writer.put("large", value)
        assert backend.head("large").size == len(value)
        assert backend.get("large") == value
        room = bytearray(len(value))
        assert backend.get_into("large", [memoryview(room)[:99], memoryview(room)[99:]]) == len(value)
        assert room == value
        middle = len(value) // 2
        assert backend.get("large", middle - 3, middle + 70_000) == value[middle - 3 : middle + 70_000]

    def test_get_into(self, backend: Backend, writer: Backend) -> None:
        for name, value in _VALUES.items():
            writer.put(f"values/{name}", value)
            for cut in {0, len(value) // 3, len(value)}:
                room = bytearray(len(value) + 2)
                parts = [memoryview(room)[1 : 1 + cut], memoryview(room)[1 + cut : -1]]
                assert backend.get_into(f"values/{name}", parts) == len(value), name
                assert room == b"\0" + value + b"\0", name

    def test_get_into_parts_of_another_length(self, backend: Backend, writer: Backend) -> None:
        """The caller learns that the length is wrong, and nothing is written beyond the parts."""
        writer.put("ten", b"0123456789")
        room = bytearray(30)
        for nbytes in (0, 1, 9):
            parts = [memoryview(room)[:0], memoryview(room)[:nbytes]]
            assert backend.get_into("ten", parts) > nbytes
            assert not any(room[nbytes:])
        for nbytes in (11, 20):
            assert backend.get_into("ten", [memoryview(room)[:5], memoryview(room)[5:nbytes]]) == 10
            assert not any(room[nbytes:])

    def test_get_into_of_a_missing_key(self, backend: Backend, writer: Backend) -> None:
        writer.put("there/too", b"x")
        for key in ("missing", "there/missing", "there", "the"):
            with pytest.raises(KeyNotFoundError, match=key):
                backend.get_into(key, [memoryview(bytearray(3))])

    def test_range_is_clipped_at_the_end(self, backend: Backend, writer: Backend) -> None:
        value = b"0123456789"
        writer.put("ten", value)
        for start, end in _RANGES:
            assert backend.get("ten", start, end) == value[start:end], (start, end)

    def test_range_of_an_empty_value(self, backend: Backend, writer: Backend) -> None:
        writer.put("empty", b"")
        assert backend.get("empty", 0, 5) == b""
        assert backend.get("empty", 2) == b""

    def test_head_tells_size_and_time(self, backend: Backend, writer: Backend) -> None:
        writer.put("a/b", b"12345")
        entry = backend.head("a/b")
        assert (entry.key, entry.size) == ("a/b", 5)
        assert entry.modified is None or entry.modified > 1_600_000_000
        listed = {found.key: found for found in backend.list()}["a/b"]
        assert listed.size == 5
        if entry.modified is not None and listed.modified is not None:
            assert abs(listed.modified - entry.modified) < 2

    def test_get_of_a_missing_key(self, backend: Backend, writer: Backend) -> None:
        writer.put("there/too", b"x")
        for key in ("missing", "there/missing", "there", "the"):
            for start, end in ((0, None), (0, 0), (5, 9)):
                with pytest.raises(KeyNotFoundError, match=key):
                    backend.get(key, start, end)

    def test_head_of_a_missing_key(self, backend: Backend, writer: Backend) -> None:
        writer.put("there/too", b"x")
        for key in ("missing", "there/missing", "there", "the"):
            with pytest.raises(KeyNotFoundError, match=key):
                backend.head(key)

    def test_list_of_an_empty_root(self, backend: Backend) -> None:
        assert list(backend.list()) == []
        assert list(backend.list("any/thing")) == []

    def test_list_is_by_plain_prefix(self, backend: Backend, writer: Backend) -> None:
        keys = ["a/b", "a/bc", "a/bc.d", "a/c/b", "ab", "ab.c", "abc/d/e/f", "b", "b+=@_-/x"]
        for key in keys:
            writer.put(key, key.encode())
        prefixes = {"", "missing", "z/", "a/b/"} | {key[:n] for key in keys for n in range(1, len(key) + 1)}
        for prefix in prefixes:
            found = list(backend.list(prefix))
            assert sorted(entry.key for entry in found) == sorted(key for key in keys if key.startswith(prefix)), prefix
            assert all(entry.size == len(entry.key) for entry in found)

    def test_list_is_complete(self, backend: Backend, writer: Backend) -> None:
        keys = [f"many/{number % 7}/{number:06d}" for number in range(self.many_keys)]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda key: writer.put(key, b"."), keys))
        found = [entry.key for entry in backend.list("many/")]
        assert len(found) == len(set(found))
        assert set(found) == set(keys)

    def test_bad_keys_are_refused(self, backend: Backend) -> None:
        for key in _BAD_KEYS:
            calls: list[Callable[[str], object]] = [
                backend.get,
                lambda key: backend.get_into(key, [memoryview(bytearray(1))]),
                backend.head,
                lambda key: backend.put(key, b""),
                lambda key: backend.create(key, b""),
                lambda key: backend.delete(["good", key]),
            ]
            if key not in ("", "folder/"):  # as prefixes these are good
                calls.append(lambda prefix: list(backend.list(prefix)))
            for call in calls:
                with pytest.raises(OptionError):
                    call(key)
        assert list(backend.list()) == []

    def test_names_itself(self, backend: Backend) -> None:
        assert backend.url in repr(backend)
        assert "://" in backend.url

    def test_close_twice(self, backend: Backend) -> None:
        backend.close()
        backend.close()


class BackendConformance(ReadConformance):
    """Reading and writing."""

    creators = 20
    """Threads that race to create one key."""

    @pytest.fixture
    def plain_get(self, backend: Backend) -> Callable[[str], bytes] | None:
        """Return a function that reads a value without the backend, or ``None`` (the default) if there is none.

        Only such a reader detects a fault that `put` and `get` share.
        """
        return None

    def test_another_reader_sees_the_same_bytes(
        self, backend: Backend, plain_get: Callable[[str], bytes] | None
    ) -> None:
        if plain_get is None:
            pytest.skip("no other reader of what this backend writes")
        for name, value in _VALUES.items():
            backend.put(f"put/{name}", value)
            backend.create(f"create/{name}", value)
        backend.put_many([(f"many/{name}", value) for name, value in _VALUES.items()])
        for way in ("put", "create", "many"):
            for name, value in _VALUES.items():
                assert plain_get(f"{way}/{name}") == value, (way, name)

    def test_put_many(self, backend: Backend) -> None:
        """It replaces values, and takes any buffers, or none at all."""
        backend.put("many/old", b"old")
        values: list[tuple[str, ReadableBuffer]] = [
            ("many/old", bytearray(b"new")),
            ("many/deep/er", memoryview(b"xyz")[1:]),
            ("many/empty", b""),
            *((f"many/{number}", bytes([number]) * number) for number in range(20)),
        ]
        backend.put_many([])
        backend.put_many(values)
        assert {entry.key: entry.size for entry in backend.list("many/")} == {key: len(data) for key, data in values}
        for key, data in values:
            assert backend.get(key) == bytes(data), key
        for key in ("../up", "many//x"):
            with pytest.raises(OptionError):
                backend.put_many([("many/fine", b"1"), (key, b"2")])

    def test_create_has_one_winner(self, backend: Backend) -> None:
        """Of several creates at once exactly one succeeds, and its bytes stay."""
        if not backend.exclusive:
            pytest.skip(f"{backend.url} does not promise exclusive creation")
        barrier = threading.Barrier(self.creators)

        def create(number: int) -> int | None:
            barrier.wait()
            try:
                backend.create("race/key", number.to_bytes(2, "big") * 1_000)
            except KeyExistsError:
                return None
            return number

        with ThreadPoolExecutor(self.creators) as pool:
            winners = [number for number in pool.map(create, range(self.creators)) if number is not None]
        assert len(winners) == 1
        assert backend.get("race/key") == winners[0].to_bytes(2, "big") * 1_000

    def test_probe_agrees(self, backend: Backend) -> None:
        before = backend.exclusive
        assert backend.probe_exclusive() == before
        assert list(backend.list()) == []

    def test_create_does_not_touch_what_is_there(self, backend: Backend) -> None:
        for first, second in ((b"first", b"second"), (b"", b"second"), (b"first", b"")):
            backend.delete(["k"])
            backend.create("k", first)
            with pytest.raises(KeyExistsError, match="k"):
                backend.create("k", second)
            assert backend.get("k") == first

    def test_create_over_a_put(self, backend: Backend) -> None:
        backend.put("k", b"put")
        with pytest.raises(KeyExistsError):
            backend.create("k", b"created")
        backend.put("k", b"put again")
        assert backend.get("k") == b"put again"

    def test_create_after_delete(self, backend: Backend) -> None:
        backend.create("k", b"1")
        backend.delete(["k"])
        backend.create("k", b"2")
        assert backend.get("k") == b"2"

    def test_put_replaces(self, backend: Backend) -> None:
        for value in (b"long value", b"short", b"", b"long again"):
            backend.put("k", value)
            assert backend.get("k") == value
            assert backend.head("k").size == len(value)
        assert [entry.key for entry in backend.list()] == ["k"]

    def test_put_is_atomic_under_readers(self, backend: Backend) -> None:
        """A reader sees one value or the other, whole, never a mixture or a part."""
        values = [bytes([letter]) * (200_000 + letter) for letter in range(8)]
        backend.put("k", values[0])
        done = threading.Event()
        torn: list[int] = []

        def read() -> int:
            reads = 0
            while not done.is_set() or reads == 0:
                value = backend.get("k")
                reads += 1
                if value not in values:
                    torn.append(len(value))
            return reads

        with ThreadPoolExecutor(3) as pool:
            readers = [pool.submit(read) for _ in range(3)]
            try:
                for _ in range(3):
                    for value in values:
                        backend.put("k", value)
            finally:
                done.set()
            assert all(reader.result() for reader in readers)
        assert torn == []

    def test_takes_any_buffer(self, backend: Backend) -> None:
        value = random.Random(3).randbytes(100_001)
        buffers: dict[str, ReadableBuffer] = {
            "bytes": value,
            "bytearray": bytearray(value),
            "view": memoryview(value),
            "part": memoryview(bytearray(b"_" + value))[1:],
            "words": memoryview(bytearray(value[:100_000])).cast("I"),
        }
        for name, buffer in buffers.items():
            expected = bytes(buffer)
            backend.put(f"put/{name}", buffer)
            backend.create(f"created/{name}", buffer)
            assert backend.get(f"put/{name}") == backend.get(f"created/{name}") == expected, name
            assert backend.head(f"put/{name}").size == len(expected)
            assert isinstance(backend.get(f"put/{name}"), bytes)

    def test_delete(self, backend: Backend) -> None:
        for key in ("a/1", "a/2", "a/2.x", "b"):
            backend.put(key, b"x")
        backend.delete(["a/1", "a/2", "a/missing", "missing/too", "a"])
        assert sorted(entry.key for entry in backend.list()) == ["a/2.x", "b"]
        backend.delete(["a/1"])
        backend.delete([])
        with pytest.raises(KeyNotFoundError):
            backend.get("a/1")

    def test_delete_takes_an_iterator_of_many(self, backend: Backend) -> None:
        keys = [f"many/{number}" for number in range(self.many_keys)]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda key: backend.put(key, b"."), keys))
        backend.put("manyfold", b".")
        backend.delete(iter(keys))
        assert [entry.key for entry in backend.list()] == ["manyfold"]

    def test_many_threads_at_once(self, backend: Backend) -> None:
        def use(number: int) -> bool:
            key, value = f"t/{number}", random.Random(number).randbytes(5_000 + number)
            backend.put(key, value)
            same = backend.get(key) == value and backend.get(key, 7, 77) == value[7:77]
            room = bytearray(len(value))
            same &= backend.get_into(key, [memoryview(room)]) == len(value) and room == value
            backend.delete([key])
            return same

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(use, range(64)))
        assert list(backend.list()) == []

    def test_errors_name_the_key(self, backend: Backend) -> None:
        with pytest.raises(BackendError, match="no/such/key") as caught:
            backend.get("no/such/key")
        assert not caught.value.transient
        assert isinstance(caught.value, FileNotFoundError)

    def test_leaves_nothing_over(self, backend: Backend) -> None:
        backend.put("k", b"1")
        backend.create("c", b"1")
        assert list(backend.leftovers()) == []
