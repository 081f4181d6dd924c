"""Exports and imports take memory for a part of the state, however large that is.

``benchmarks/bench_interchange.py`` measures all formats, and larger states.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.bench_interchange import run, same_bytes, tensors_of, write_model

pytest.importorskip("safetensors")

STATE = 500 << 20
MOST = 400 << 20  # what the reader has in flight, and a window of chunks


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_stays_below_the_size_of_the_state(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    write_model(model, STATE, noise=True)  # of which nothing compresses: objects are as large as chunks
    steps = {
        "import": (model, tmp_path / "store"),
        "safetensors": (tmp_path / "store", tmp_path / "back.safetensors"),
    }
    took = {name: run(name, *places) for name, places in steps.items()}
    too_much = {name: one["peak"] - one["before"] for name, one in took.items() if one["peak"] - one["before"] > MOST}
    assert too_much == {}
    assert same_bytes(tensors_of(tmp_path / "back.safetensors"), tensors_of(model))
