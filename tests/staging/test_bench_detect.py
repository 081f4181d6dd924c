"""The detection benchmark runs, and its own checks hold, on a thousandth of the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_runs() -> None:
    result = subprocess.run(
        [sys.executable, "benchmarks/bench_detect.py", "--scale", "0.001", "--rounds", "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "147 tensors" in result.stdout
    assert "relative L2, generic" in result.stdout
