"""The detection benchmark runs, and its own checks hold, on a thousandth of the model."""

from __future__ import annotations

import pytest

from tests import programs


@pytest.mark.slow
def test_the_benchmark_runs() -> None:
    done = programs.run(programs.ROOT / "benchmarks/bench_detect.py", "--scale", 0.001, "--rounds", 1)
    assert done.returncode == 0, done.stderr
    assert "147 tensors" in done.stdout
    assert "relative L2, generic" in done.stdout
