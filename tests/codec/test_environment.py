"""What the environment asks of the codec: coding by libzstd alone, and decoding again what is about to be stored."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

import incckpt
from incckpt.codec import environment
from incckpt.codec import objects as codec
from incckpt.codec.frames import CodedFrame, encode_chunks
from incckpt.errors import CodecError, OptionError

pytestmark = pytest.mark.slow

Bytes = npt.NDArray[np.uint8]

STATE = """
import sys
import torch
import incckpt
from incckpt.codec import frames

def state_at(step):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(700_000, generator=generator)
    moved = weights + step * 1e-5 * torch.randn(700_000, generator=generator)
    few = torch.zeros(400_000, dtype=torch.int64)
    few[:: 1000] = step
    return {"weights": moved, "halves": moved.bfloat16(), "few": few, "text": "to be or not to be " * 5000}
"""
WRITE = (
    STATE
    + """
with incckpt.CheckpointManager(sys.argv[1]) as manager:
    for step in (1, 2):
        manager.save(step, state_at(step)).result()
"""
)
READ = (
    STATE
    + """
answers = []
own = frames._planes.unhuffman
def counted(coded, out, variant):
    answers.append(own(coded, out, variant))
    return answers[-1]
frames._planes.unhuffman = counted
for store in sys.argv[1:]:
    for step in (1, 2):
        found, expected = incckpt.load(f"{store}#@{step}"), state_at(step)
        assert found["text"] == expected["text"]
        for name in ("weights", "halves", "few"):
            assert torch.equal(found[name], expected[name]), (step, name)
    print(sum(answers), len(answers))
    answers.clear()
"""
)


def python(program: str, *arguments: str, coder: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "INCCKPT_CODEC": coder},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_stores_written_either_way_are_read_either_way(tmp_path: Path) -> None:
    coders = "huffman", "zstd"
    stores = [str(tmp_path / coder) for coder in coders]
    for writer, store in zip(coders, stores, strict=True):
        python(WRITE, store, coder=writer)
    for reader in coders:
        printed = python(READ, *stores, coder=reader).splitlines()
        for writer, line in zip(coders, printed, strict=True):
            by_own_decoder, asked = map(int, line.split())
            assert (asked > 0) == (reader == "huffman"), "zstd does without our decoder"
            assert (by_own_decoder > 0) == (writer == reader == "huffman"), "and without our coder"


def test_a_coder_that_is_none() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import incckpt; incckpt.load"],
        env={**os.environ, "INCCKPT_CODEC": "lz4"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "INCCKPT_CODEC must be one of huffman, zstd; it is 'lz4'" in done.stderr
    assert done.returncode == 1


def test_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INCCKPT_TRIAL", raising=False)
    assert environment.choice("INCCKPT_TRIAL", ("a", "b")) == "a"
    monkeypatch.setenv("INCCKPT_TRIAL", "")
    assert environment.choice("INCCKPT_TRIAL", ("a", "b")) == "a"
    monkeypatch.setenv("INCCKPT_TRIAL", "b")
    assert environment.choice("INCCKPT_TRIAL", ("a", "b")) == "b"
    monkeypatch.setenv("INCCKPT_TRIAL", "c")
    with pytest.raises(OptionError, match="INCCKPT_TRIAL must be one of a, b; it is 'c'"):
        environment.choice("INCCKPT_TRIAL", ("a", "b"))


# ---- a coder at fault ------------------------------------------------------------------------------------------------


def flip_a_bit(frame: CodedFrame, coded: memoryview) -> CodedFrame:
    coded[frame.nbytes // 2] ^= 16
    return frame


def forget_the_end(frame: CodedFrame, coded: memoryview) -> CodedFrame:
    return frame._replace(nbytes=frame.nbytes - 1)


def go_too_far(frame: CodedFrame, coded: memoryview) -> CodedFrame:
    return frame._replace(nbytes=len(coded) + 1)


def mistake_the_way(frame: CodedFrame, coded: memoryview) -> CodedFrame:
    return frame._replace(way=3 - frame.way)


FAULTS = [flip_a_bit, forget_the_end, go_too_far, mistake_the_way]


@pytest.fixture(params=FAULTS)
def faulty_coder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the last frame of every chunk be coded wrongly."""

    def encode_wrongly(
        chunks: Sequence[tuple[memoryview, memoryview | None, int, memoryview]],
    ) -> list[list[CodedFrame]]:
        answers = encode_chunks(chunks)
        for (raw, _, _, out), frames in zip(chunks, answers, strict=True):
            if len(raw):
                start = sum(frame.nbytes for frame in frames[:-1])
                frames[-1] = request.param(frames[-1], out[start:])
        return answers

    monkeypatch.setattr(codec, "encode_chunks", encode_wrongly)
    monkeypatch.setattr(codec, "_faults", itertools.count())


def numbers(seed: int, n: int = 400_000) -> Bytes:
    return np.random.default_rng(seed).standard_normal(n).astype("<f4").view(np.uint8)


def test_writes_are_verified_in_the_tests() -> None:
    assert environment.VERIFY_WRITES


@pytest.mark.usefixtures("faulty_coder")
@pytest.mark.parametrize("delta", [False, True])
def test_what_is_coded_wrongly_is_stored_uncoded(*, delta: bool, caplog: pytest.LogCaptureFixture) -> None:
    raw = numbers(0)
    before = raw.copy()
    before.view("<u4")[:] -= 3
    found = codec.digest(raw)
    base = codec.Base(codec.digest(before).identity, before) if delta else None
    for _ in range(2):
        encoded = codec.encode(raw, 4, digest=found, base=base)
        assert encoded.base is None
        assert encoded.ways == {"raw": codec.WayBytes(raw.nbytes, raw.nbytes)}
        assert len(encoded.data) == encoded.full_nbytes == codec.max_nbytes(raw.nbytes)
        out = np.empty_like(raw)
        codec.decode(encoded.data, out, identity=found.identity)
        assert np.array_equal(out, raw)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert found.identity.hex() in record.getMessage()


@pytest.mark.usefixtures("faulty_coder")
def test_unverified_it_shows_at_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "VERIFY_WRITES", False)
    raw = numbers(1)
    found = codec.digest(raw)
    encoded = codec.encode(raw, 4, digest=found)
    with pytest.raises(CodecError):
        codec.decode(encoded.data, np.empty_like(raw), identity=found.identity)


@pytest.mark.usefixtures("faulty_coder")
def test_a_save_by_a_coder_at_fault_succeeds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    for step in range(2):
        incckpt.save({"weights": weights + step}, str(tmp_path / "store"))
        assert torch.equal(incckpt.load(str(tmp_path / "store"))["weights"], weights + step)
    assert len([record for record in caplog.records if "coded wrongly" in record.getMessage()]) == 1
