"""Write the inputs that fuzzing of the Huffman coder starts from: ``python tests/fuzz/seeds.py FOLDER``.

Each is a script as ``huffman.c`` reads it; one that fits no longer is only a worse start.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

CONTENT, PLAIN_CONTENT, DAMAGED, ASSEMBLED, PLAIN_FRAME, OTHER_CODES = range(6)
END, LITERAL, RUN, SKEWED, UNIFORM, AGAIN = range(6)
SET, FLIP, INSERT, CUT, TRUNCATE, CONTENT_SIZE = range(6)
BLOCK = 1 << 16


def described(operation: int, length: int, first: int, parameter: int | None = None) -> bytes:
    """Return the script of `length` bytes of content, at most 65536."""
    head = bytes([operation, 0]) + (length - 1).to_bytes(2, "little") + bytes([first])
    return head if parameter is None else head + bytes([parameter])


def contents() -> Iterator[bytes]:
    """Yield scripts of content: every kind, of lengths around what the coder treats differently."""
    for length in (1, 2, 63, 64, 65, 77, 255, 256, 1000, 4099, BLOCK - 1, BLOCK):
        yield described(RUN, length, 7)
        for parameter in (0, 1, 2, 3):
            yield described(SKEWED, length, 250, parameter)
        for parameter in (1, 2, 15, 100, 180, 255):
            yield described(UNIFORM, length, 0, parameter)
    block = described(SKEWED, BLOCK, 0, 1)
    yield block + described(SKEWED, BLOCK, 100, 2)
    yield block + described(UNIFORM, BLOCK, 0, 200) + described(SKEWED, 500, 0, 0)
    yield block + described(RUN, BLOCK, 0) + block
    yield block + described(UNIFORM, BLOCK, 0, 255) + described(UNIFORM, 100, 0, 3)
    yield described(UNIFORM, BLOCK, 0, 3) + described(AGAIN, 1000, 0, 10)


def assembled(table: bytes, symbols: int, stream: bytes) -> bytes:
    """Return the script of a frame of one block of `symbols` bytes, four streams alike coded with a described table."""
    head = bytes([0]) + (symbols - 64).to_bytes(2, "little") + bytes([len(table)])
    sizes = bytes([len(stream), 0]) * 4
    return head + sizes + table + (bytes([0, len(stream)]) + stream) * 4


def seeds() -> Iterator[bytes]:
    """Yield the inputs."""
    for content in contents():
        yield bytes([CONTENT]) + content
        yield bytes([DAMAGED]) + content + bytes([END])
    small = [described(UNIFORM, 100, 0, 1), described(UNIFORM, 700, 3, 20), described(SKEWED, BLOCK, 0, 1) * 2]
    edits = [
        bytes([SET, 18, 0x20]),  # a table's first weights
        bytes([SET, 17, 0x81]),
        bytes([FLIP, 12, 4]),  # a block's literals
        bytes([INSERT, 20, 1]),
        bytes([CUT, 20, 0]),
        bytes([TRUNCATE, 50, 3]),
        bytes([CONTENT_SIZE, 0, 127]),
        bytes([SET, 0x80, 0x80, 0x00, 0x55]),
    ]
    for content, edit in itertools.product(small, edits):
        yield bytes([DAMAGED]) + content + bytes([END]) + edit
    yield bytes([PLAIN_CONTENT]) + bytes(range(100))
    yield bytes([PLAIN_CONTENT]) + b"ab" * 100
    yield bytes([PLAIN_FRAME]) + bytes.fromhex("28b52ffda0 04000000 210000") + b"abcd"
    two = bytes([128, 0x10])  # symbols 0 and 1, a bit each
    yield bytes([ASSEMBLED]) + assembled(two, 64, bytes([0x35, 0xA2, 1]))
    four = bytes([130, 0x11, 0x10])  # symbols 0 to 3, two bits each
    yield bytes([ASSEMBLED]) + assembled(four, 64, bytes([0x35, 0xA2, 0x1B, 0xE4, 1]))
    for zeros in (5 * "11" + "10", 5 * "11" + "00", "00"):  # in a table by FSE, how many weights do not occur
        bits = "0000" + "10000" + zeros + 80 * "01"
        table = bytes(int(bits[at : at + 8][::-1], 2) for at in range(0, 80, 8))
        yield bytes([ASSEMBLED]) + assembled(bytes([len(table)]) + table, 64, bytes([0x35, 0xA2, 1]))
    for weights in ([1], [1, 2, 3], [10, 1], [1, *range(1, 11)], [0, 5] * 70, [1, 1, 1] * 60, list(range(11)) * 15):
        for narrow in (0, 200):
            code = bytes([len(weights) - 1, *weights])
            for blocks in range(3):
                full = (code + bytes([5, narrow])) * blocks
                last = (900).to_bytes(2, "little") + code + bytes([5, narrow])
                yield bytes([OTHER_CODES, blocks]) + full + last + bytes([1])
                yield bytes([OTHER_CODES, blocks]) + full + last + bytes([0]) + (800).to_bytes(2, "little")


def main(folder: str) -> None:
    """Write all of them."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        Path(folder, f"seed-{number:03}").write_bytes(seed)


if __name__ == "__main__":
    main(*sys.argv[1:])
