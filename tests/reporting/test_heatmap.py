"""Cells, and how large runs are folded into a map of bounded size."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from incckpt.reporting import heatmap
from incckpt.reporting.heatmap import HeatMapBuilder, decode, encode
from incckpt.reporting.tensors import TensorTable


def table(names: list[str], content: list[int], moved: dict[str, tuple[float, float]] | None = None) -> TensorTable:
    alone = np.ones(len(names), np.bool_)
    return TensorTable(names, np.array(content, np.int64), alone, alone, moved or {})


@given(st.floats(1e-7, 1e2))
def test_a_cell_is_within_a_twentieth_of_what_it_stands_for(relative: float) -> None:
    cell = encode(relative, 1.0)
    assert heatmap.SCALE <= cell < heatmap.FROM_ZERO
    assert decode(np.array([cell], np.uint8))[0] == pytest.approx(relative, rel=0.05)


@given(st.floats(allow_nan=True), st.floats(0, 1e9))
def test_every_change_has_a_cell(relative: float, norm: float) -> None:
    cell = encode(relative, norm)
    assert 0 < cell < 256
    assert (cell == heatmap.NOT_FINITE) == (math.isnan(relative) or (math.isinf(relative) and norm != 0))


@given(st.lists(st.floats(1e-9, 1e3), min_size=2, max_size=2))
def test_larger_changes_have_higher_cells(pair: list[float]) -> None:
    low, high = sorted(pair)
    assert encode(low, 1.0) <= encode(high, 1.0)


def test_many_checkpoints_are_merged_and_the_largest_change_shows() -> None:
    count = 3 * heatmap.MOST_COLUMNS + 1
    builder = HeatMapBuilder(count)
    jump = count // 2
    for index in range(count):
        moved = {"w": (0.5, 1.0)} if index == jump else {}
        builder.add(table(["w"], [int(index >= jump)], moved))
    found = builder.finish()
    assert found.merged == 4
    assert found.cells.shape == (1, -(-count // 4))
    assert np.flatnonzero(found.cells[0] >= heatmap.SCALE).tolist() == [jump // 4]


def test_many_tensors_are_folded_into_their_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heatmap, "_MOST_ROWS", 30)
    names = [f"model.{layer}.{part}.{kind}" for layer in range(10) for part in "abc" for kind in ("weight", "bias")]
    builder = HeatMapBuilder(2)
    builder.add(table(names, [0] * 60))
    builder.add(table(names, [0] * 59 + [1], {names[-1]: (0.1, 1.0)}))
    found = builder.finish()
    assert (len(found.rows), found.depth, found.tensors) == (30, 3, 60)
    changed = np.flatnonzero(found.cells[:, 1] >= heatmap.SCALE).tolist()
    assert [found.rows[index] for index in changed] == ["model.9.c"]
    builder.add(table([f"late.{index}.w" for index in range(100)], [0] * 100))
    assert len(builder.finish().rows) == 30, "tensors that come later find no more room"


def test_jumps_and_what_moves_most_are_named() -> None:
    builder = HeatMapBuilder(12)
    for index in range(12):
        relative = {"a.steady": 0.01, "a.jumps": 0.001 if index < 11 else 0.1, "b.slow": 1e-5}
        builder.add(table([*relative, "b.frozen"], [index] * 3 + [0], {name: (x, 1.0) for name, x in relative.items()}))
    found = builder.finish()
    (jumped,) = found.jumped
    assert jumped.name == "a.jumps"
    assert jumped.relative / (jumped.usual or 0) == pytest.approx(100, rel=0.2)
    assert [one.name for one in found.learning] == ["a.jumps", "a.steady", "b.slow"]
    assert found.frozen == ["b.frozen"]
